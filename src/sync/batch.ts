import type { Definition } from '../core/definition.js';
import { quoteIdentifier, quoteLiteral } from '../db/connect.js';
import { definitionLock } from '../db/locks.js';
import { applyDelta } from './apply.js';
import { appliedOf, closeDefinition } from './close.js';
import { countChanges, givesProfileTwice, momentsAt, refuseConflicts, type DefinitionRow } from './comparison.js';
import { enterState } from './compute.js';
import type { RunCounts } from './delta.js';
import { evaluate, planOf, type BatchSession } from './evaluation.js';
import { addToHour, hourQuery, judgeHour, type Hour } from './hour.js';
import type { Evaluated } from './some.js';

/**
 * Evaluates what has changed of one definition, in one transaction from its lock to its commit:
 *
 *   lock ─▶ read what is due ─▶ compare these profiles ─▶ guard ─▶ apply ─▶ delete exactly what was read
 *
 * What is due is read before it is compared, in a statement of its own, so a change that comes meanwhile is due under
 * another id and is evaluated again. Whatever goes wrong, nothing is written and all stays due. The moment of a batch is
 * read under the lock, so batches of a definition have moments in the order in which they write.
 */
export type BatchResult =
  | { kind: 'nothing' }
  /** Nothing may be written at present: what is due stays. */
  | { kind: 'waits'; because: string }
  /** The guard: what is due stays, and a run in full shows it to a person. */
  | { kind: 'holds'; because: string }
  /** `changed` recipients have something to be told of; `more` waits. */
  | { kind: 'written'; profiles: number; changed: number; counts: RunCounts | null; more: boolean };

export interface BatchOptions {
  /** How many due rows are taken at once. */
  limit: number;
  /** Only these due rows. */
  only?: readonly number[];
  /** The scheduled run that evaluates them; left out: they are evaluated as they come. */
  runId?: number;
}

const STRANGERS_ROUNDS = 3;

/** What a batch finds out under the lock. */
interface Locked {
  now: string;
  row: DefinitionRow;
  state: string;
  held: boolean;
  full_run: number | null;
  conflicts: number;
  hour: Hour;
}

/** Begins the transaction and waits for the definition's lock; returns what is known of it then. */
async function lock(session: BatchSession, definitionId: number): Promise<Locked> {
  const schema = quoteIdentifier(session.context.databases.state.schema);
  await session.client.query(`begin; set local synchronous_commit = on; ${definitionLock(definitionId)}`);
  const { rows } = await session.client.query<{ locked: string }>(
    `select jsonb_build_object('now', clock_timestamp()::text, 'state', state, 'full_run', full_run,
       'held', exists (select from ${schema}.run as r where r.definition_id = d.id and r.outcome = 'held' and r.decision is null),
       'hour', ${hourQuery(session.context.databases.state.schema, definitionId, 'clock_timestamp()')},
       'conflicts', (select count(*) from ${schema}.conflict as c where c.definition_id = d.id),
       'row', jsonb_build_object('id', id, 'computationId', computation_id, 'members', members, 'first', first_run_at is null, 'live', tracking = 'live', 'stuck', stuck_because is not null, 'settled', false,
         'textHash', text_hash, 'fields', fields))::text as locked
     from ${schema}.definition as d where id = ${definitionId}`,
  );
  return JSON.parse(rows[0]?.locked ?? 'null') as Locked;
}

/** Why a batch may not write at present; null: it may. */
function reasonToWait({ state, held, row }: Locked, textHash: string): string | null {
  if (state !== 'active') return 'it is paused';
  if (!row.live) return 'its changes are not followed';
  if (row.first) return 'its first run has not ended';
  if (row.textHash !== textHash) return 'its new text has not run yet';
  if (held) return 'a held run waits for a person';
  return null;
}

interface Due {
  ids: readonly number[];
  profiles: readonly string[];
  more: boolean;
}

async function readDue(
  { client, context }: BatchSession,
  { row: { id: definitionId }, now }: Locked,
  { limit, only }: BatchOptions,
  windowed: boolean,
): Promise<Due> {
  const schema = quoteIdentifier(context.databases.state.schema);
  const { rows } = await client.query<{
    ids: string;
    profiles: readonly string[] | null;
    reached: readonly string[] | null;
  }>(
    `with due as (select id, profile_id from ${schema}.due where definition_id = ${definitionId} and parked_at is null and claimed_by is null
         ${only === undefined ? '' : `and id in (${only.join(', ') || 'null'})`} order by id limit ${limit})
     select coalesce(jsonb_agg(id), '[]')::text as ids, array_agg(distinct profile_id) as profiles,
       ${
         windowed && only === undefined
           ? `array(select profile_id from ${schema}.validity where definition_id = ${definitionId} and until <= ${quoteLiteral(now)} order by until limit ${limit})`
           : 'null::text[]'
       } as reached
     from due`,
  );
  const ids = JSON.parse(rows[0]?.ids ?? '[]') as number[];
  const reached = rows[0]?.reached ?? [];
  return {
    ids,
    profiles: [...new Set([...(rows[0]?.profiles ?? []), ...reached])],
    more: ids.length === limit || reached.length === limit,
  };
}

/**
 * The owners, so far, of recipients that are about to change, who weren't looked at themselves: whoever has given a
 * recipient up is compared together with whoever has it now, or an exit and an entry of one person would be told as two.
 */
async function findStrangers(
  session: BatchSession,
  row: DefinitionRow,
  affected: readonly string[],
): Promise<readonly string[]> {
  const schema = quoteIdentifier(session.context.databases.state.schema);
  const { rows } = await session.client.query<{ strangers: readonly string[] | null }>(
    `select array_agg(distinct s.profile_id) as strangers
     from pg_temp.delta as d join ${schema}.snapshot_${row.id} as s on s.recipient = d.recipient
     where d.op in ('x', 'c', 't', 'k') and s.profile_id is not null and not s.profile_id = any($1)`,
    [affected],
  );
  return rows[0]?.strangers ?? [];
}

async function readOps({ client }: BatchSession): Promise<ReadonlySet<string>> {
  const { rows } = await client.query<{ ops: string | null; twice: boolean | null }>(
    `select string_agg(distinct op::text, '') as ops, bool_or(op = 'd' and cardinality(rivals) = 1) as twice from pg_temp.delta`,
  );
  const ops = new Set(rows[0]?.ops ?? '');
  return rows[0]?.twice === true ? ops.add('2') : ops;
}

/** Writes what was evaluated down as done: the due rows, the windows, and what a run that is under way has to leave out. */
async function settle(
  { client }: BatchSession,
  { row, full_run, now }: Locked,
  due: Due,
  { affected, wanted, windows }: Evaluated,
  windowed: boolean,
): Promise<void> {
  const moment = quoteLiteral(now);
  if (due.ids.length > 0) {
    await client.query(
      `delete from due where definition_id = ${row.id} and (id in (${due.ids.join(', ')}) or parked_at < ${moment} and profile_id = any($1))`,
      [due.profiles],
    );
  }
  if (windowed) {
    await client.query(`delete from validity where definition_id = ${row.id} and profile_id = any($1)`, [affected]);
    // A window that has closed by now is looked at again all the same, but not at once for ever.
    await client.query(
      `insert into validity (definition_id, profile_id, until)
       select ${row.id}, p, case when u > ${moment} then u else ${moment}::timestamptz + interval '1 second' end
       from unnest($1::text[], $2::timestamptz[]) as w(p, u)`,
      [windows.map(([profile]) => profile), windows.map(([, until]) => until)],
    );
  }
  if (full_run !== null) {
    await client.query(
      `insert into noted (definition_id, kind, name)
       select ${row.id}, 'p', p from unnest($1::text[]) as p union all select ${row.id}, 'r', r from unnest($2::text[]) as r
       on conflict do nothing`,
      [[...new Set(affected)], wanted],
    );
  }
}

/** Evaluates what is due of a definition. Throws what the database throws, with everything rolled back. */
export async function evaluateBatch(
  session: BatchSession,
  definition: Definition,
  definitionId: number,
  options: BatchOptions,
): Promise<BatchResult> {
  const { client, context } = session;
  try {
    const locked = await lock(session, definitionId);
    const plan = await planOf(session, definition, locked.row);
    const { row, now } = locked;
    const wait = reasonToWait(locked, plan.textHash);
    if (wait !== null) {
      await client.query('rollback');
      return { kind: 'waits', because: wait };
    }
    const windowed = plan.inputs.shape.validUntil !== null;
    const due = await readDue(session, locked, options, windowed);
    if (due.profiles.length === 0) {
      await client.query('rollback');
      return { kind: 'nothing' };
    }
    let called = due.profiles;
    let evaluated = await evaluate(session, plan, called, now);
    for (let round = 0; round < STRANGERS_ROUNDS; round += 1) {
      const strangers = await findStrangers(session, row, evaluated.affected);
      if (strangers.length === 0) break;
      called = [...called, ...strangers];
      await client.query('delete from pg_temp.delta');
      evaluated = await evaluate(session, plan, called, now);
    }
    const ops = await readOps(session);
    if (ops.has('2')) throw givesProfileTwice(definition);
    await enterState(client, context.databases.state.schema);
    let counts: RunCounts | null = null;
    if (ops.size > 0) {
      const inputs = { ...plan.inputs, moments: momentsAt(now, definition) };
      counts = await countChanges(client, inputs, row);
      const verdict = await judgeHour(client, row.id, definition.guard, counts, locked.hour);
      if (verdict.kind === 'holds') {
        await client.query('rollback');
        return { kind: 'holds', because: verdict.because };
      }
      const applied = appliedOf(inputs, row, {
        runId: options.runId ?? null,
        priority: options.runId === undefined ? 0 : 1,
      });
      const isApplied = await applyDelta(client, { ...applied, some: evaluated.wanted }, { send: true });
      if (!isApplied) throw new Error('A recipient came twice to a grouped comparison.');
      if (ops.has('d')) await refuseManyConflicts(session, definition, row);
      await closeDefinition(client, inputs, row, {
        members: counts.members,
        textHash: plan.textHash,
        recount: false,
      });
      await addToHour(client, row.id, counts);
    } else if (locked.conflicts > 0) {
      await client.query(`delete from conflict where definition_id = ${row.id} and recipient = any($1)`, [
        evaluated.wanted,
      ]);
    }
    await settle(session, locked, due, evaluated, windowed);
    await client.query('commit');
    const changed = counts === null ? 0 : counts.entered + counts.exited + counts.changed;
    return { kind: 'written', profiles: due.profiles.length, changed, counts, more: due.more };
  } catch (error) {
    await client.query('rollback').catch(() => undefined);
    throw error;
  }
}

async function refuseManyConflicts(
  { client }: BatchSession,
  definition: Definition,
  row: DefinitionRow,
): Promise<void> {
  const { rows } = await client.query<{ conflicts: string }>(
    `select count(*) as conflicts from conflict where definition_id = ${row.id}`,
  );
  refuseConflicts(definition, { before: row.members, members: row.members, conflicting: Number(rows[0]?.conflicts) });
}
