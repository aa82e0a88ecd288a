import type { Definition } from '../core/definition.js';
import { quoteIdentifier } from '../db/connect.js';
import { definitionLock } from '../db/locks.js';
import type { Repeated } from '../db/repeated.js';
import { applySome } from './apply.js';
import { appliedOf, claimFields, writeLeft } from './close.js';
import { fieldsOf, givesProfileTwice, momentsAt, refuseConflicts, type DefinitionRow } from './comparison.js';
import { enterState } from './compute.js';
import { countDelta, leaveOutForgotten, type RunCounts } from './delta.js';
import { evaluate, planOf, type BatchSession, type Plan } from './evaluation.js';
import { addToHour, hourQuery, judgeHour, type Hour } from './hour.js';
import type { Evaluated } from './some.js';
import type { Inputs } from './statement.js';

/**
 * Evaluates what has changed of one definition, in one transaction from its lock to its commit:
 *
 *   lock ─▶ read what is due ─▶ compare these profiles ─▶ guard ─▶ apply ─▶ delete exactly what was read
 *
 * What is due is read before it is compared, in a statement of its own, so a change that comes meanwhile is due under
 * another id and is evaluated again. It all goes in three messages, each of which is answered before the next: what is due,
 * what differs, and what is written (`db/repeated.ts`). The moment of a batch is read under the lock, so batches of a
 * definition have moments in the order in which they write.
 *
 * Whatever goes wrong, nothing is written and all stays due. That holds for a crash of the server as well, so the commit
 * doesn't wait for the disk: who sends does (`db/flush.ts`).
 */
export type BatchResult =
  | { kind: 'nothing' }
  /** Nothing may be written at present: what is due stays. */
  | { kind: 'waits'; because: string }
  /** The guard: what is due stays, and a run in full shows it to a person. */
  | { kind: 'holds'; because: string }
  /** What is to be told of stands in the outbox from the id `raisedFrom` on; `more` waits. */
  | { kind: 'written'; profiles: number; raisedFrom: number | null; counts: RunCounts | null; more: boolean };

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
  /** Whether some destination is sent events. */
  tracked: boolean;
  hour: Hour;
}

/** The moment of the batch, as PostgreSQL wrote it under the lock: a setting of the transaction, so that texts are constant. */
const NOW_KEPT = `current_setting('personas.now')::timestamptz`;

/** Begins the transaction and waits for the definition's lock; returns what is known of it then, and what is due. */
async function lock(
  { run, context }: BatchSession,
  definitionId: number,
  options: BatchOptions,
): Promise<[Locked, DueRow]> {
  const schema = quoteIdentifier(context.databases.state.schema);
  const [, { rows }, due] = await Promise.all([
    run.all(`begin; set local synchronous_commit = off; ${definitionLock(definitionId)}`),
    run.query<{ locked: string }>(
      `select jsonb_build_object('now', set_config('personas.now', clock_timestamp()::text, true), 'state', state, 'full_run', full_run,
       'held', exists (select from ${schema}.run as r where r.definition_id = d.id and r.outcome = 'held' and r.decision is null),
       'hour', ${hourQuery(context.databases.state.schema, definitionId, 'clock_timestamp()')},
       'conflicts', (select count(*) from ${schema}.conflict as c where c.definition_id = d.id),
       'tracked', exists (select from ${schema}.definition_destination as dd where dd.definition_id = d.id and dd.active and dd.track),
       'row', jsonb_build_object('id', id, 'computationId', computation_id, 'members', members, 'first', first_run_at is null, 'live', tracking = 'live', 'stuck', stuck_because is not null, 'settled', false,
         'textHash', text_hash, 'fields', fields))::text as locked
       from ${schema}.definition as d where id = ${definitionId}`,
    ),
    readDue(run, schema, definitionId, options),
  ]);
  return [JSON.parse(rows[0]?.locked ?? 'null') as Locked, due];
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

interface DueRow {
  ids: string;
  profiles: readonly string[] | null;
  reached: readonly string[];
}

async function readDue(
  run: Repeated,
  schema: string,
  definitionId: number,
  { limit, only }: BatchOptions,
): Promise<DueRow> {
  const { rows } = await run.query<DueRow>(
    `with due as (select id, profile_id from ${schema}.due where definition_id = ${definitionId} and parked_at is null and claimed_by is null
         ${only === undefined ? '' : 'and id = any($2::bigint[])'} order by id limit $1)
     select coalesce(jsonb_agg(id), '[]')::text as ids, array_agg(distinct profile_id) as profiles,
       ${
         only === undefined
           ? `array(select profile_id from ${schema}.validity where definition_id = ${definitionId} and until <= ${NOW_KEPT} order by until limit $1)`
           : `'{}'::text[]`
       } as reached
     from due`,
    only === undefined ? [limit] : [limit, only],
  );
  return rows[0] ?? { ids: '[]', profiles: null, reached: [] };
}

interface Due {
  ids: readonly number[];
  profiles: readonly string[];
  more: boolean;
}

function dueOf(row: DueRow, limit: number, windowed: boolean): Due {
  const ids = JSON.parse(row.ids) as number[];
  const reached = windowed ? row.reached : [];
  return {
    ids,
    profiles: [...new Set([...(row.profiles ?? []), ...reached])],
    more: ids.length === limit || reached.length === limit,
  };
}

/** What a comparison has left in `delta`. */
interface Found {
  ops: ReadonlySet<string>;
  /** A profile came twice. */
  twice: boolean;
  /** The owners, so far, of recipients that are about to change. */
  owners: readonly string[];
  counts: RunCounts;
}

/** Leaves the session's bare names those of the state. */
async function look({ run, context }: BatchSession, inputs: Inputs, row: DefinitionRow): Promise<Found> {
  const { schema } = context.databases.state;
  const [{ rows }, , , counts] = await Promise.all([
    run.query<{ ops: string | null; twice: boolean | null; owners: readonly string[] | null }>(
      `select string_agg(distinct op::text, '') as ops, bool_or(op = 'd' and cardinality(rivals) = 1) as twice,
         (select array_agg(distinct s.profile_id)
          from pg_temp.delta as d join ${quoteIdentifier(schema)}.snapshot_${row.id} as s on s.recipient = d.recipient
          where d.op in ('x', 'c', 't', 'k') and s.profile_id is not null) as owners
       from pg_temp.delta`,
    ),
    enterState(run, schema),
    leaveOutForgotten(run, row.id),
    countDelta(run, row.members, fieldsOf(inputs, row)),
  ]);
  const { ops, twice, owners } = rows[0] ?? { ops: null, twice: null, owners: null };
  return { ops: new Set(ops ?? ''), twice: twice === true, owners: owners ?? [], counts };
}

/**
 * Compares these profiles, and with them whoever has given up a recipient that another has now, or an exit and an entry of
 * one person would be told as two.
 */
async function compareTogether(
  session: BatchSession,
  plan: Plan,
  { row, now }: Locked,
  profiles: readonly string[],
): Promise<[Evaluated, Found]> {
  const compare = (called: readonly string[]): Promise<[Evaluated, Found]> =>
    evaluate(session, plan, called, now, () => look(session, plan.inputs, row));
  let called = profiles;
  let compared = await compare(called);
  for (let round = 0; round < STRANGERS_ROUNDS; round += 1) {
    const [{ affected }, { owners }] = compared;
    const known = new Set(affected);
    const strangers = owners.filter((id) => !known.has(id));
    if (strangers.length === 0) break;
    called = [...called, ...strangers];
    await session.run.all(`delete from pg_temp.delta; set local search_path = ${session.path}`);
    compared = await compare(called);
  }
  return compared;
}

/** Writes what was evaluated down as done: the due rows, the windows, and what a run that is under way has to leave out. */
function settle(
  { run }: BatchSession,
  { row, full_run }: Locked,
  due: Due,
  { affected, wanted, windows }: Evaluated,
  windowed: boolean,
): Promise<unknown>[] {
  const settling: Promise<unknown>[] = [];
  if (due.ids.length > 0) {
    settling.push(
      run.query(`delete from due where definition_id = ${row.id} and id = any($1::bigint[])`, [due.ids]),
      run.query(
        `delete from due where definition_id = ${row.id} and parked_at is not null and parked_at < ${NOW_KEPT} and profile_id = any($1)`,
        [due.profiles],
      ),
    );
  }
  if (windowed) {
    settling.push(
      run.query(`delete from validity where definition_id = ${row.id} and profile_id = any($1)`, [affected]),
      // A window that has closed by now is looked at again all the same, but not at once for ever.
      run.query(
        `insert into validity (definition_id, profile_id, until)
         select ${row.id}, p, case when u > ${NOW_KEPT} then u else ${NOW_KEPT} + interval '1 second' end
         from unnest($1::text[], $2::timestamptz[]) as w(p, u)`,
        [windows.map(([profile]) => profile), windows.map(([, until]) => until)],
      ),
    );
  }
  if (full_run !== null) {
    settling.push(
      run.query(
        `insert into noted (definition_id, kind, name)
         select ${row.id}, 'p', p from unnest($1::text[]) as p union all select ${row.id}, 'r', r from unnest($2::text[]) as r
         on conflict do nothing`,
        [[...new Set(affected)], wanted],
      ),
    );
  }
  return settling;
}

/** Evaluates what is due of a definition. Throws what the database throws, with everything rolled back. */
export async function evaluateBatch(
  session: BatchSession,
  definition: Definition,
  definitionId: number,
  options: BatchOptions,
): Promise<BatchResult> {
  const { run } = session;
  try {
    const [locked, dueRow] = await lock(session, definitionId, options);
    const { row } = locked;
    const plan = await planOf(session, definition, row);
    const wait = reasonToWait(locked, plan.textHash);
    if (wait !== null) {
      await run.all('rollback');
      return { kind: 'waits', because: wait };
    }
    const windowed = plan.inputs.shape.validUntil !== null;
    const due = dueOf(dueRow, options.limit, windowed);
    if (due.profiles.length === 0) {
      await run.all('rollback');
      return { kind: 'nothing' };
    }
    const [evaluated, { ops, twice, counts }] = await compareTogether(session, plan, locked, due.profiles);
    if (twice) throw givesProfileTwice(definition);
    const differs = ops.size > 0;
    if (differs) {
      const verdict = await judgeHour(run, row.id, definition.guard, counts, locked.hour);
      if (verdict.kind === 'holds') {
        await run.all('rollback');
        return { kind: 'holds', because: verdict.because };
      }
    }
    const inputs = { ...plan.inputs, moments: { ...momentsAt('now', definition), now: `(${NOW_KEPT})` } };
    let raising: Promise<number | null> = Promise.resolve(null);
    const writing: Promise<unknown>[] = [];
    if (differs) {
      const fields = await claimFields(run, inputs, row);
      const { runId = null } = options;
      const applied = appliedOf(inputs, row, { runId, priority: runId === null ? 0 : 1 });
      const conflicts = locked.conflicts > 0;
      const { tracked } = locked;
      raising = applySome(run, { ...applied, some: evaluated.wanted }, { ops, tracked, conflicts });
      writing.push(raising);
      // Before anything more is sent: these ask for something in between.
      if (ops.has('d') || (ops.has('e') && ops.has('x'))) await Promise.all(writing.splice(0));
      if (ops.has('d')) await refuseManyConflicts(session, definition, row);
      if (!plan.isLeft || fields !== row.fields || counts.members !== row.members) {
        const { textHash } = plan;
        writing.push(writeLeft(run, inputs, row.id, { members: counts.members, textHash, recount: false, fields }));
      }
      writing.push(addToHour(run, row.id, counts));
    } else if (locked.conflicts > 0) {
      writing.push(
        run.query(`delete from conflict where definition_id = ${row.id} and recipient = any($1)`, [evaluated.wanted]),
      );
    }
    writing.push(...settle(session, locked, due, evaluated, windowed), run.all('commit'));
    await Promise.all(writing);
    plan.isLeft ||= differs;
    return {
      kind: 'written',
      profiles: due.profiles.length,
      raisedFrom: await raising,
      counts: differs ? counts : null,
      more: due.more,
    };
  } catch (error) {
    await run.all('rollback').catch(() => undefined);
    throw error;
  }
}

async function refuseManyConflicts({ run }: BatchSession, definition: Definition, row: DefinitionRow): Promise<void> {
  const { rows } = await run.query<{ conflicts: string }>(
    `select count(*) as conflicts from conflict where definition_id = ${row.id}`,
  );
  refuseConflicts(definition, { before: row.members, members: row.members, conflicting: Number(rows[0]?.conflicts) });
}
