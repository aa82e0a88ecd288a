import type { Definition } from '../core/definition.js';
import { quoteIdentifier } from '../db/connect.js';
import { applySome } from './apply.js';
import { appliedOf, claimFields, writeLeft } from './close.js';
import { fieldsOf, givesProfileTwice, momentsAt, refuseConflicts, type DefinitionRow } from './comparison.js';
import { enterState } from './compute.js';
import { countDelta, leaveOutForgotten, toRunCounts, type Counted, type RunCounts } from './delta.js';
import {
  begin,
  beginAgain,
  endComputing,
  planOf,
  type Asked,
  type BatchSession,
  type Found,
  type Plan,
} from './evaluation.js';
import { addToHour, judgeHour } from './hour.js';
import { NOW_KEPT, reasonToWait } from './locked.js';
import type { Inputs } from './statement.js';

/**
 * Evaluates what has changed of one definition, in one transaction from its lock to its commit:
 *
 *   lock ─▶ read what is due, compare these profiles ─▶ guard ─▶ apply ─▶ delete exactly what was read
 *
 * What is due is read by the statement that compares, or by one before it, so a change that comes meanwhile is due under
 * another id and is evaluated again. It all goes in two messages, what differs and what is written (`db/repeated.ts`); most
 * often nothing differs, and nothing but what was due is written. The moment of a batch is read under the lock, so batches of a
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
  | {
      kind: 'written';
      profiles: number;
      /** How many recipients have something else now. */
      changed: number;
      /** The lowest id of what is to be told of them, in the outbox; null: there is nothing. */
      raisedFrom: number | null;
      counts: RunCounts | null;
      /** More waits. */
      more: boolean;
    };

export interface BatchOptions {
  /** How many due rows are taken at once. */
  limit: number;
  /** Only these due rows. */
  only?: readonly number[];
  /** The scheduled run that evaluates them; left out: they are evaluated as they come. */
  runId?: number;
}

const STRANGERS_ROUNDS = 3;

/**
 * Compares what is due, and with it whoever has given up a recipient that another has now, or an exit and an entry of one
 * person would be told as two.
 */
async function compareTogether(session: BatchSession, plan: Plan, definitionId: number, asked: Asked): Promise<Found> {
  let found = await begin(session, plan, definitionId, asked);
  const together: string[] = [];
  for (let round = 0; round < STRANGERS_ROUNDS; round += 1) {
    const known = new Set(found.evaluated.affected);
    const strangers = [...new Set(found.differing.owners)].filter((id) => !known.has(id));
    if (strangers.length === 0) break;
    together.push(...strangers);
    found = await beginAgain(session, plan, found, together, asked);
  }
  return found;
}

/** The bare names of the session become those of the state; whoever was erased on request is left out of `delta`. */
async function countWithoutForgotten(
  { run, context }: BatchSession,
  row: DefinitionRow,
  inputs: Inputs,
): Promise<{ ops: string; counts: RunCounts }> {
  const [, , counts, { rows }] = await Promise.all([
    enterState(run, context.databases.state.schema),
    leaveOutForgotten(run, row.id),
    countDelta(run, row.members, fieldsOf(inputs, row)),
    run.query<{ ops: string | null }>(`select string_agg(op::text, '') as ops from delta`),
  ]);
  return { ops: rows[0]?.ops ?? '', counts };
}

/** Writes what was evaluated down as done: the due rows, the windows, and what a run that is under way has to leave out. */
function settle(
  { run, context }: BatchSession,
  { locked: { row, full_run, parked }, due, evaluated: { affected, wanted, windows } }: Found,
  windowed: boolean,
): Promise<unknown>[] {
  const schema = quoteIdentifier(context.databases.state.schema);
  const settling: Promise<unknown>[] = [];
  if (due.ids.length > 0) {
    settling.push(
      run.query(`delete from ${schema}.due where definition_id = ${row.id} and id = any($1::bigint[])`, [due.ids]),
    );
  }
  if (due.ids.length > 0 && parked) {
    settling.push(
      run.query(
        `delete from ${schema}.due where definition_id = ${row.id} and parked_at is not null and parked_at < ${NOW_KEPT} and profile_id = any($1)`,
        [due.profiles],
      ),
    );
  }
  if (windowed) {
    // An id may be written otherwise where its rows are than where it changed: 7 and 7.0 are one profile.
    const looked = [...new Set([...affected, ...windows.map(([profile]) => profile)])];
    settling.push(
      run.query(`delete from ${schema}.validity where definition_id = ${row.id} and profile_id = any($1)`, [looked]),
    );
    // A window that has closed by now is looked at again all the same, but not at once for ever.
    const next = run.query(
      `insert into ${schema}.validity (definition_id, profile_id, until)
       select ${row.id}, p, case when u > ${NOW_KEPT} then u else ${NOW_KEPT} + interval '1 second' end
       from unnest($1::text[], $2::timestamptz[]) as w(p, u)`,
      [windows.map(([profile]) => profile), windows.map(([, until]) => until)],
    );
    settling.push(next);
  }
  if (full_run !== null) {
    settling.push(
      run.query(
        `insert into ${schema}.noted (definition_id, kind, name)
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
  const plan = await planOf(session, definition);
  try {
    const found = await compareTogether(session, plan, definitionId, options);
    const { locked, due, differing } = found;
    session.deltaRows += differing.ops.length;
    const wait = reasonToWait(locked, plan.textHash);
    if (wait !== null || due.profiles.length === 0) {
      await run.query('rollback');
      return wait === null ? { kind: 'nothing' } : { kind: 'waits', because: wait };
    }
    if (differing.twice) throw givesProfileTwice(definition);
    const written = differing.ops === '' ? null : await applyFound(session, plan, found, options);
    if (written?.kind === 'holds') {
      await run.query('rollback');
      return written;
    }
    const ending = written === null ? leaveUntouched(session, plan, found) : [...written.writing];
    ending.push(...settle(session, found, plan.windowed));
    if (written !== null) ending.push(run.query('delete from pg_temp.delta'));
    ending.push(run.query('commit'));
    await Promise.all(ending);
    plan.isLeft ||= written !== null;
    const counts = written?.counts ?? null;
    return {
      kind: 'written',
      profiles: due.profiles.length,
      changed: counts === null ? 0 : counts.entered + counts.exited + counts.changed,
      raisedFrom: (await written?.raising) ?? null,
      counts,
      more: due.more,
    };
  } catch (error) {
    session.deltaRows = Infinity;
    await run.query('rollback').catch(() => undefined);
    throw error;
  }
}

/** Nothing differs, so nobody disagrees about these recipients any more, either. */
function leaveUntouched({ run, context }: BatchSession, plan: Plan, { locked, evaluated }: Found): Promise<unknown>[] {
  const leaving: Promise<unknown>[] = endComputing(plan).map((text) => run.query(text));
  if (!locked.conflicts) return leaving;
  const { schema } = context.databases.state;
  const forgetting = run.query(
    `delete from ${quoteIdentifier(schema)}.conflict where definition_id = ${locked.row.id} and recipient = any($1)`,
    [evaluated.wanted],
  );
  return [...leaving, forgetting];
}

type Applying =
  | { kind: 'holds'; because: string }
  /** What is under way hasn't been waited for; `raising` gives the lowest id of what is raised. */
  | { kind: 'applies'; counts: RunCounts; raising: Promise<number | null>; writing: readonly Promise<unknown>[] };

/** Judges what differs, and writes it where it may be written. The bare names of the session become those of the state. */
async function applyFound(
  session: BatchSession,
  plan: Plan,
  { locked, evaluated, differing }: Found,
  options: BatchOptions,
): Promise<Applying> {
  const { run, context } = session;
  const { row } = locked;
  const runId = options.runId ?? null;
  const { definition, textHash } = plan;
  const writing: Promise<unknown>[] = endComputing(plan).map((text) => run.query(text));
  let ops = differing.ops;
  let counts = toRunCounts(row.members, JSON.parse(differing.counts) as Counted);
  if (locked.forgotten) {
    const [counted] = await Promise.all([countWithoutForgotten(session, row, plan.inputs), ...writing.splice(0)]);
    ({ ops, counts } = counted);
  } else writing.push(enterState(run, context.databases.state.schema));
  const verdict = await judgeHour(run, row.id, definition.guard, counts, locked.hour);
  if (verdict.kind === 'holds') {
    await Promise.all(writing);
    return verdict;
  }
  const inputs = { ...plan.inputs, moments: { ...momentsAt('now', definition), now: `(${NOW_KEPT})` } };
  const fields = await claimFields(run, inputs, row);
  const applied = appliedOf(inputs, row, { runId, priority: runId === null ? 0 : 1 });
  const found = new Set(ops);
  const { tracked, conflicts } = locked;
  const raising = applySome(run, { ...applied, some: evaluated.wanted }, { ops: found, tracked, conflicts });
  writing.push(raising);
  if (found.has('d')) {
    // Before anything more is sent: that asks for something in between.
    await Promise.all(writing.splice(0));
    await refuseManyConflicts(session, definition, row);
  }
  if (!plan.isLeft || fields !== row.fields || counts.members !== row.members) {
    writing.push(writeLeft(run, inputs, row.id, { members: counts.members, textHash, recount: false, fields }));
  }
  writing.push(addToHour(run, row.id, counts));
  return { kind: 'applies', counts, raising, writing };
}

async function refuseManyConflicts({ run }: BatchSession, definition: Definition, row: DefinitionRow): Promise<void> {
  const { rows } = await run.query<{ conflicts: string }>(
    `select count(*) as conflicts from conflict where definition_id = ${row.id}`,
  );
  refuseConflicts(definition, { before: row.members, members: row.members, conflicting: Number(rows[0]?.conflicts) });
}
