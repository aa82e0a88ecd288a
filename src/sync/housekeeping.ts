import { inTransaction, type Client } from '../db/connect.js';
import { isUnreachable } from '../db/failure.js';
import type { State } from '../db/state.js';
import { tendDead } from '../outbox/dead.js';
import { dropUnread } from './findings.js';

/** What the leader tidies up: partitions of the history, dead calls whose day has come, old runs and requests. */
const HISTORY_DAYS = 90;

async function addMonth(client: Client, monthsAhead: number): Promise<void> {
  const { rows } = await client.query<{ name: string; first: string; next: string; there: boolean }>(
    `select 'transition_' || to_char(m, 'YYYY_MM') as name, m::text as first, (m + interval '1 month')::text as next,
       to_regclass('transition_' || to_char(m, 'YYYY_MM')) is not null as there
     from date_trunc('month', now() + $1 * interval '1 month') as m`,
    [monthsAhead],
  );
  const month = rows[0];
  if (month === undefined || month.there) return;
  await client.query(`create table ${month.name} (like transition including defaults including constraints)`);
  await client.query(
    `alter table transition attach partition ${month.name} for values from ('${month.first}') to ('${month.next}')`,
  );
}

/** Makes this and the next month's partition of the history; a run can't write its history without. */
export async function prepareHistory(state: State): Promise<void> {
  await inTransaction(state.pool, async (client) => {
    await client.query(`select pg_advisory_xact_lock(hashtext('personas-sync history'))`);
    await addMonth(client, 0);
    await addMonth(client, 1);
  });
}

/** Drops the months that are past. It needs the whole table for a moment, and would rather come again than wait for it. */
async function dropOldHistory(client: Client): Promise<void> {
  await client.query(`set local lock_timeout = '1s'`);
  const { rows } = await client.query<{ name: string }>(
    `select c.relname as name from pg_inherits as i join pg_class as c on c.oid = i.inhrelid
     where i.inhparent = 'transition'::regclass
       and c.relname < 'transition_' || to_char(now() - ${HISTORY_DAYS + 31} * interval '1 day', 'YYYY_MM')`,
  );
  for (const { name } of rows) await client.query(`drop table ${name}`);
}

async function dropOldRuns(state: State): Promise<void> {
  await state.pool.query(
    `delete from run where finished_at < now() - interval '90 days' and outcome <> 'held'
     and not exists (select from run as later where later.approves = run.id)`,
  );
}

async function dropOldRequests(state: State): Promise<void> {
  await state.pool.query(`delete from request where finished_at < now() - interval '7 days'`);
}

/** People's data first. */
const STEPS: readonly ((state: State) => Promise<void>)[] = [
  ({ pool }) => dropUnread(pool),
  prepareHistory,
  ({ pool }) => inTransaction(pool, dropOldHistory),
  ({ pool }) => tendDead(pool),
  dropOldRuns,
  dropOldRequests,
];

/** Does each step, also where another fails, unless the database is out of reach; then throws what the first has failed of. */
export async function tidyUp(state: State): Promise<void> {
  const failures: unknown[] = [];
  for (const step of STEPS) {
    try {
      await step(state);
    } catch (error) {
      failures.push(error);
      if (isUnreachable(error)) break;
    }
  }
  if (failures.length > 0) throw failures[0];
}
