import { createHash } from 'node:crypto';
import type { Config } from '../config/types.js';
import type { Definition } from '../core/definition.js';
import { isCovered, judgeGuard } from '../core/guard.js';
import { withClient, type Client } from '../db/connect.js';
import { databaseFailure, isUnreachable } from '../db/failure.js';
import type { RunOutcome, RunTrigger } from '../db/state.js';
import { OperatorError, UnavailableError } from '../lib/errors.js';
import { lockDefinition, lockFields } from '../db/locks.js';
import { applyDelta, type Applied } from './apply.js';
import {
  compare,
  leaveOutForgotten,
  fieldTypes,
  momentsAt,
  prepareInputs,
  readDefinition,
  refuseConflicts,
  refuseSharedFields,
  refuseTypeChange,
  riderTypes,
  runLimits,
  type CompareContext,
  type DefinitionRow,
  type RunCounts,
} from './comparison.js';
import { beginRun, withRunSession } from './compute.js';
import { explainRunError } from './privileges.js';
import {
  finishRun,
  readHeldRun,
  recordRun,
  releaseHeldRun,
  replaceHeldRun,
  type Finish,
  type HeldRun,
  type RunRecord,
} from './record.js';
import type { Inputs } from './statement.js';

/**
 * One run of one definition, from its record to its outcome.
 *
 *   (recorded) ─▶ describe ─▶ compute ─▶ guard ─┬─▶ apply ─▶ succeeded     written in the run's own transaction
 *                                               └─▶ held                   a person decides; nothing was written
 *   anywhere ─▶ failed      the error is kept, without a person's data
 *   the process died, or lost its lease ─▶ abandoned     found by the next leader; then it writes nothing any more
 *   held already, by no more than a person could see ─▶ skipped     the held run goes on waiting
 *
 * A definition has one open run at most, which an index guarantees, and one held run.
 */
export interface RunRequest {
  trigger: RunTrigger;
  /** The held run that a person approved. */
  approves: number | null;
  /** When the definition is due again, in milliseconds from the end of the run given how long it took; null: never. */
  nextDueMs: (tookMs: number) => number | null;
}

export interface RunResult {
  id: number;
  outcome: RunOutcome;
  error: string | null;
  counts: RunCounts | null;
  /** The failure was the database's being out of reach. */
  unavailable: boolean;
  /** What was thrown where nobody had thought of it, for the log. */
  cause: unknown;
}

export interface RunContext extends CompareContext {
  /** Who leads; written with each run. */
  leader: string;
}

/** What stands for the meaning of a definition: when it changes, an approval no longer holds. */
function hashDefinition(definition: Definition, config: Config): string {
  const parts = [definition.text.sql, definition.lookback ?? '', config.profiles.text.sql, definition.onMissing];
  return createHash('sha256').update(JSON.stringify(parts)).digest('hex');
}

/** What one run carries along. */
interface Run {
  context: RunContext;
  definition: Definition;
  request: RunRequest;
  row: DefinitionRow;
  record: RunRecord;
  textHash: string;
  clock: Clock;
}

interface Clock {
  phases: Record<string, number>;
  timed: <T>(phase: string, work: () => Promise<T>) => Promise<T>;
  tookMs: () => number;
}

function startClock(): Clock {
  const began = performance.now();
  const phases: Record<string, number> = {};
  return {
    phases,
    timed: async (phase, work) => {
      const start = performance.now();
      try {
        return await work();
      } finally {
        phases[phase] = Math.round((phases[phase] ?? 0) + performance.now() - start);
      }
    },
    tookMs: () => performance.now() - began,
  };
}

/** Runs a definition; null where another run of it is open. Expected failures are in the result, not thrown. */
export async function runDefinition(
  context: RunContext,
  definition: Definition,
  request: RunRequest,
): Promise<RunResult | null> {
  const { databases, config, leader } = context;
  const { trigger, approves } = request;
  const row = await readDefinition(databases, definition.key);
  const textHash = hashDefinition(definition, config);
  const { pool } = databases.state;
  const record = await recordRun(pool, { definitionId: row.id, trigger, approves, leader, textHash });
  if (record === null) return null;
  const run: Run = { context, definition, request, row, record, textHash, clock: startClock() };
  try {
    const moments = momentsAt(record.now, definition);
    const inputs = await run.clock.timed('describe', () => prepareInputs(context, definition, moments));
    refuseTypeChange(definition, row, inputs.shape);
    await refuseSharedFields(pool, definition, row, inputs.shape);
    const result = (await attempt(run, inputs, false)) ?? (await attempt(run, inputs, true));
    if (result === null) throw new Error('A grouped comparison gave a recipient twice.');
    return result;
  } catch (error) {
    if (context.signal?.aborted === true) return await cancelled(run);
    const explained = await explainRunError(databases.source, error, definition, config.profiles.text.sql);
    const message = describeFailure(explained);
    await finishRun(pool, record, finishOf(run, 'failed', null, message));
    const unavailable = isUnreachable(explained);
    return {
      id: record.id,
      outcome: 'failed',
      error: message,
      counts: null,
      unavailable,
      cause: isExpected(explained) ? null : error,
    };
  }
}

/** A run that was stopped with its leader: its moment stays due. */
async function cancelled(run: Run): Promise<RunResult> {
  const { context, record } = run;
  const finish = finishOf(run, 'cancelled', null, 'Stopped.');
  await finishRun(context.databases.state.pool, record, { ...finish, dueInMs: finish.dueInMs === null ? null : 0 });
  return { id: record.id, outcome: 'cancelled', error: 'Stopped.', counts: null, unavailable: true, cause: null };
}

/** What this instance computed while it led is nothing worth: another leads, and may have written newer results. */
function superseded({ record }: Run): RunResult {
  const error = 'Given up: another instance leads.';
  return { id: record.id, outcome: 'abandoned', error, counts: null, unavailable: true, cause: null };
}

/** Computes and applies in one transaction; null, with nothing written, where a recipient came twice to the plain form. */
async function attempt(run: Run, inputs: Inputs, grouped: boolean): Promise<RunResult | null> {
  const { context, definition, request, row, record, textHash, clock } = run;
  const { databases } = context;
  return withRunSession(databases, context.signal, async (session) => {
    await beginRun(session, runLimits(context));
    const counts = await clock.timed('compute', () => compare(context, session, inputs, row, grouped));
    if (counts === 'twice') {
      await session.query('rollback');
      return null;
    }
    refuseConflicts(definition, counts);
    const held = await readHeldRun(databases.state, row.id);
    const verdict = judgeGuard(definition.guard, counts, { first: row.first });
    const approved =
      held !== null && request.approves === held.id && held.textHash === textHash && isCovered(held.seen, counts);
    if (verdict.kind === 'holds' && !approved) {
      await session.query('rollback');
      return hold(run, held, counts, verdict.because);
    }
    const applied = await clock.timed('apply', async () => {
      // What changes is looked up in the snapshot, which has just been read: its pages are in memory.
      await session.query('set local statement_timeout = 0; set local random_page_cost = 1.1');
      await lockDefinition(session, row.id);
      // Again, now that nobody else can write: somebody may have been erased while this was computed.
      const forgotten = await leaveOutForgotten(session, row);
      const isApplied = await applyDelta(session, appliedOf(run, inputs), { send: definition.initial === 'send' });
      return isApplied ? { forgotten } : null;
    });
    if (applied === null) {
      await session.query('rollback');
      return null;
    }
    const { forgotten } = applied;
    await closeDefinition(session, run, inputs, { counts, recount: grouped || forgotten > 0 });
    if (held !== null) await releaseHeldRun(session, held, approved);
    if (!(await finishRun(session, record, finishOf(run, 'succeeded', counts, null)))) {
      await session.query('rollback');
      return superseded(run);
    }
    await session.query('commit');
    return { id: record.id, outcome: 'succeeded', error: null, counts, unavailable: false, cause: null };
  });
}

function finishOf(
  { clock, request }: Run,
  outcome: RunOutcome,
  counts: RunCounts | null,
  error: string | null,
): Finish {
  return { outcome, counts, error, phases: clock.phases, dueInMs: request.nextDueMs(clock.tookMs()) };
}

function appliedOf({ definition, row, record }: Run, inputs: Inputs): Applied {
  const { key, name, kind } = definition;
  const fields = new Set([...Object.keys(fieldTypes(inputs.shape)), ...Object.keys(row.fields)]);
  return {
    definitionId: row.id,
    runId: record.id,
    key,
    name,
    kind,
    computationId: row.computationId,
    fields: kind === 'trait' ? [...fields] : [],
    now: inputs.moments.now,
    first: row.first,
    priority: 1,
  };
}

/**
 * The fields of a definition with their types, those included of which this run has the first value: what was never sent
 * has no type in Iterable. A field that is new is claimed under a lock, since two definitions could take it at once.
 */
async function claimFields(session: Client, run: Run, { shape }: Inputs): Promise<Readonly<Record<string, string>>> {
  const { definition, row } = run;
  const unknown = Object.entries(fieldTypes(shape)).filter(([field]) => !Object.hasOwn(row.fields, field));
  if (unknown.length === 0 && !row.first) return row.fields;
  const { rows } = await session.query<{ field: string }>(
    `select f as field from unnest($1::text[]) as f
     where exists (select from delta where op in ('e', 'c') and value ? f)`,
    [unknown.map(([field]) => field)],
  );
  const found = new Set(rows.map(({ field }) => field));
  await lockFields(session);
  await refuseSharedFields(session, definition, row, shape);
  return { ...row.fields, ...Object.fromEntries(unknown.filter(([field]) => found.has(field))) };
}

/** What a run leaves on its definition: the fields that Iterable now knows, the text that made them, the members. */
async function closeDefinition(
  session: Client,
  run: Run,
  inputs: Inputs,
  { counts, recount }: { counts: RunCounts; recount: boolean },
): Promise<void> {
  const { row, textHash } = run;
  const fields = await claimFields(session, run, inputs);
  const members = recount
    ? `(select count(*) from snapshot where definition_id = ${row.id} and not kept)`
    : `${counts.members}`;
  await session.query(
    `update definition set members = ${members}, fields = $2, riders = $4, text_hash = $3, first_run_at = coalesce(first_run_at, ${inputs.moments.now}) where id = $1`,
    [row.id, JSON.stringify(fields), textHash, JSON.stringify(riderTypes(inputs.shape))],
  );
}

/**
 * Holds a run. One that an approval of the run that is held already would cover is skipped; otherwise it takes that one's
 * place, under a number of its own: nobody may approve by an old number what they have not seen.
 */
async function hold(run: Run, held: HeldRun | null, counts: RunCounts, why: string): Promise<RunResult> {
  const { context, record, textHash } = run;
  const { pool } = context.databases.state;
  if (held !== null && held.textHash === textHash && isCovered(held.seen, counts)) {
    const error = `Run ${held.id} is held: ${why}.`;
    await finishRun(pool, record, finishOf(run, 'skipped', counts, error));
    return { id: held.id, outcome: 'held', error, counts, unavailable: false, cause: null };
  }
  const error = `Held: ${why}.`;
  const isHeld = await withClient(pool, async (client) => {
    await client.query('begin');
    if (held !== null) await replaceHeldRun(client, held, record.id);
    const isFinished = await finishRun(client, record, finishOf(run, 'held', counts, error));
    await client.query(isFinished ? 'commit' : 'rollback');
    return isFinished;
  });
  if (!isHeld) return superseded(run);
  return { id: record.id, outcome: 'held', error, counts, unavailable: false, cause: null };
}

/** Whether a failure is a person's or the database's, and no bug. */
function isExpected(error: unknown): boolean {
  return error instanceof OperatorError || isUnreachable(error) || databaseFailure(error) !== null;
}

/** What is kept of a failure: for a bug its class alone, since its text may hold anything. */
export function describeFailure(error: unknown): string {
  if (error instanceof OperatorError || error instanceof UnavailableError) return error.message;
  if (isUnreachable(error)) return 'The database is out of reach.';
  const failure = databaseFailure(error);
  if (failure !== null) return `A statement of personas-sync ${failure.sentence}.`;
  return `An error in personas-sync itself (${error instanceof Error ? error.name : 'unknown'}); the log has its trace.`;
}
