import { inTransaction, type Client, type Pool, type Queryable } from '../db/connect.js';
import { lockDefinition } from '../db/locks.js';
import { COLUMNS_TOGETHER, DUE_NOW, hashOf } from './queue.js';

/**
 * Dead calls: what a destination has refused, with its answer. They wait for a person (`failed retry`, `failed discard`),
 * for a newer change, which takes their place, or, where the refusal may pass, for the next day.
 */
/** The reason of those that weren't sent, since their field was refused for everybody. */
export const FIELD_STOPPED = 'FieldStopped';

export interface DeadFilter {
  /** Definition keys; none: all. */
  keys: readonly string[];
  /** A refusal's code, such as InvalidEmailAddressError; null: any. */
  reason: string | null;
  destination: string | null;
  /** An interval as PostgreSQL reads it: only what died longer ago; null: any age. */
  olderThan: string | null;
}

const MATCHES = `(cardinality($1::text[]) = 0 or d.key = any($1)) and ($2::text is null or x.reason = $2)
  and ($3::text is null or t.name = $3) and ($4::interval is null or x.died_at < now() - $4::interval)`;
const FROM = `dead_call as x join definition as d on d.id = x.definition_id join destination as t on t.id = x.destination_id`;

const parameters = ({ keys, reason, destination, olderThan }: DeadFilter): unknown[] => [
  keys,
  reason,
  destination,
  olderThan,
];

export interface DeadGroup {
  definition: string;
  destination: string;
  /** Where the destination is: one of the same name may have been elsewhere. */
  host: string;
  reason: string;
  count: number;
  oldest: Date;
  samples: readonly { recipient: string; field: string | null; event: string | null; answer: string }[];
}

/** Dead calls by definition and reason, each with up to three samples. */
export async function listDead(pool: Queryable, filter: DeadFilter): Promise<readonly DeadGroup[]> {
  const sample = `jsonb_build_object('recipient', x.recipient, 'field', x.field, 'event', x.event, 'answer', x.answer)`;
  const { rows } = await pool.query<DeadGroup>(
    `select g.definition, g.destination, g.host, g.reason, g.count, g.oldest, s.samples
     from (select d.key as definition, t.name as destination, t.host, x.reason, count(*) as count, min(x.died_at) as oldest,
             d.id as definition_id, t.id as destination_id
           from ${FROM} where ${MATCHES} group by d.id, t.id, x.reason) as g
     cross join lateral (select jsonb_agg(sample order by id) as samples from (
       select x.id, ${sample} as sample from dead_call as x
       where x.definition_id = g.definition_id and x.destination_id = g.destination_id and x.reason = g.reason
         and ($4::interval is null or x.died_at < now() - $4::interval)
       order by x.id limit 3) as first) as s
     order by g.count desc, 1, 3`,
    parameters(filter),
  );
  return rows;
}

/** There may be very many: none of them is held in memory for long, and nobody waits long for their locks. */
const MOST_TOGETHER = 5_000;

/**
 * Puts dead calls back into the outbox, at the end of the queue. What an exit was to be sent before has been let go, and may
 * be under way: it waits for it no more, and is marked again after it.
 */
async function putBack(client: Client, ids: readonly number[], byItself: 0 | 1): Promise<void> {
  await client.query(
    `insert into outbox (kind, destination_id, definition_id, priority, recipient, columns, with_beside, revived, exit_of)
     select 'm', x.destination_id, x.definition_id, 1, x.recipient, array_agg(x.field), bool_or(x.with_beside), max(x.retries) + $2,
       max(x.exit_of)
     from dead_call as x where x.id = any($1) and x.kind = 'm' group by x.destination_id, x.definition_id, x.recipient
     order by x.recipient
     on conflict (recipient, destination_id, definition_id) where kind = 'm' do update set
       columns = ${COLUMNS_TOGETHER},
       version = nextval('version'), due_at = ${DUE_NOW}, attempts = 0, revived = excluded.revived,
       with_beside = outbox.with_beside or excluded.with_beside,
       exit_of = case when outbox.follows is null then coalesce(outbox.exit_of, excluded.exit_of) end`,
    [ids, byItself],
  );
  await client.query(
    `insert into outbox (kind, destination_id, definition_id, priority, recipient, event, message_id, occurred_at, properties, beside, revived)
     select 'e', destination_id, definition_id, 1, recipient, event, message_id, occurred_at, properties, beside, retries + $2
     from dead_call where id = any($1) and kind = 'e' order by id`,
    [ids, byItself],
  );
  await client.query(
    `update outbox as o set follows = null from dead_call as x
     where x.id = any($1) and o.follows = x.exit_of and o.destination_id = x.destination_id`,
    [ids],
  );
  await client.query('delete from dead_call where id = any($1)', [ids]);
}

/**
 * Takes the first of a definition's dead calls that `condition` picks; returns how many, null where it picks none. Locks are taken in the order of
 * whoever else writes here: the definition's, marks by recipient, dead calls.
 */
async function reviveSome(
  client: Client,
  definitionId: number,
  { condition, values, byItself }: { condition: string; values: readonly unknown[]; byItself: 0 | 1 },
): Promise<number | null> {
  await lockDefinition(client, definitionId);
  const picked = await client.query<{ id: number }>(
    `select x.id from ${FROM} where x.definition_id = ${definitionId} and ${condition} order by x.id limit ${MOST_TOGETHER}`,
    [...values],
  );
  const ids = picked.rows.map(({ id }) => id);
  if (ids.length === 0) return null;
  await client.query(
    `select from outbox where definition_id = $2 and kind = 'm' and (recipient, destination_id) in (
       select recipient, destination_id from dead_call where id = any($1)) order by recipient, id for update`,
    [ids, definitionId],
  );
  const locked = await client.query<{ id: number }>(
    'select id from dead_call where id = any($1) order by id for update',
    [ids],
  );
  await putBack(
    client,
    locked.rows.map(({ id }) => id),
    byItself,
  );
  return locked.rows.length;
}

interface Revived {
  count: number;
  /** The keys of their definitions. */
  definitions: readonly string[];
}

async function revive(pool: Pool, condition: string, values: readonly unknown[], byItself: 0 | 1): Promise<Revived> {
  const found = await pool.query<{ id: number; key: string; last: number }>(
    `select d.id, d.key, max(x.id) as last from ${FROM} where ${condition} group by d.id, d.key order by d.id`,
    [...values],
  );
  let count = 0;
  for (const { id, last } of found.rows) {
    // What dies anew meanwhile is left dead.
    const picks = { condition: `x.id <= ${last} and ${condition}`, values, byItself };
    const some = (): Promise<number | null> => inTransaction(pool, (client) => reviveSome(client, id, picks));
    for (let revived = await some(); revived !== null; revived = await some()) count += revived;
  }
  return { count, definitions: found.rows.map(({ key }) => key) };
}

/** Sends them again, fields that had stopped and to people whom the destination had forgotten, too: a person says so. */
export async function retryDead(pool: Pool, filter: DeadFilter): Promise<Revived> {
  await pool.query(
    `update definition_destination as dd set stopped_fields = dd.stopped_fields - r.fields
     from (select x.definition_id, x.destination_id, array_agg(distinct x.field) as fields from ${FROM}
           where ${MATCHES} and x.field is not null group by 1, 2) as r
     where dd.definition_id = r.definition_id and dd.destination_id = r.destination_id and dd.stopped_fields ?| r.fields`,
    parameters(filter),
  );
  await pool.query(
    `delete from forgotten_there as f using (select x.destination_id, x.recipient from ${FROM} where ${MATCHES}) as r
     where f.destination_id = r.destination_id and f.hash = ${hashOf('r.recipient')}`,
    parameters(filter),
  );
  return revive(pool, MATCHES, parameters(filter), 0);
}

const IS_LEFT_OUT_NO_MORE = `x.reason = '${FIELD_STOPPED}' and not exists (select from definition_destination as dd
  where dd.definition_id = x.definition_id and dd.destination_id = x.destination_id and dd.stopped_fields ? x.field)`;

/** Sends values that were left out while their field had stopped: what has been resumed, or has all of its calls wait. Gives their number. */
export async function reviveLeftOut(pool: Pool): Promise<number> {
  return (await revive(pool, IS_LEFT_OUT_NO_MORE, [], 0)).count;
}

export async function discardDead(pool: Queryable, filter: DeadFilter): Promise<number> {
  const result = await pool.query(
    `delete from dead_call where id in (select x.id from ${FROM} where ${MATCHES})`,
    parameters(filter),
  );
  return result.rowCount ?? 0;
}

const RETRIES = 5;

/** Revives what was to be tried again by itself or is left out no more, and drops what has been dead for 90 days. */
export async function tendDead(pool: Pool): Promise<void> {
  await revive(pool, `x.retry_at <= now() and x.retries < ${RETRIES}`, [], 1);
  // Some were under way as their field was resumed.
  await reviveLeftOut(pool);
  await pool.query(`delete from dead_call where died_at < now() - interval '90 days'`);
}
