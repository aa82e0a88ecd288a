import type { Definition } from '../core/definition.js';
import { isCovered, judgeGuard } from '../core/guard.js';
import { withClient } from '../db/connect.js';
import { databaseFailure, isUnreachable } from '../db/failure.js';
import { lockDefinition } from '../db/locks.js';
import type { RunOutcome, RunTrigger } from '../db/state.js';
import { OperatorError, UnavailableError } from '../lib/errors.js';
import { hashDefinition } from './close.js';
import {
  compare,
  countChanges,
  momentsAt,
  readClock,
  prepareInputs,
  readDefinition,
  readMembers,
  refuseConflicts,
  refuseSharedFields,
  refuseTypeChange,
  runLimits,
  type CompareContext,
  type DefinitionRow,
} from './comparison.js';
import { beginRun, withRunSession } from './compute.js';
import type { RunCounts } from './delta.js';
import { runIncrement } from './increment.js';
import { countCorrections, leaveOut, markStart, type Start } from './due.js';
import { judgeHour, readHour } from './hour.js';
import { explainRunError } from './privileges.js';
import {
  finishRun,
  readHeldRun,
  recordRun,
  replaceHeldRun,
  type Finish,
  type HeldRun,
  type RunRecord,
} from './record.js';
import type { Inputs } from './statement.js';
import { writeFound, type Found } from './write.js';

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
  /** When the definition is due again, in milliseconds from the end of the run given what became of it; null: never. */
  nextDueMs: (ended: { tookMs: number; outcome: RunOutcome; live: boolean }) => number | null;
}

export interface RunResult {
  id: number;
  outcome: RunOutcome;
  error: string | null;
  counts: RunCounts | null;
  /** What it found that following changes had missed; null: it can't tell. */
  corrections: number | null;
  /** The failure was the database's being out of reach. */
  unavailable: boolean;
  /** What was thrown where nobody had thought of it, for the log. */
  cause: unknown;
}

export interface RunContext extends CompareContext {
  /** Who leads; written with each run. */
  leader: string;
  /**
   * Moves all that was captured in the source so far to where it is evaluated; false where that isn't known to be all. Left
   * out where nothing is captured.
   */
  moveCaptured?: () => Promise<boolean>;
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
  /** Null: changes of the definition aren't followed. */
  start: Start | null;
  /** Whether all that was due had been evaluated singly when the run in full began. */
  incremented: boolean;
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
  const run: Run = {
    context,
    definition,
    request,
    row,
    record,
    textHash,
    clock: startClock(),
    start: null,
    incremented: false,
  };
  try {
    const isIncremental = row.live && definition.cadence.kind === 'hourly' && trigger === 'schedule' && !row.stuck;
    if (isIncremental) {
      const result = await increment(run);
      if (result !== null) return result;
    }
    if (row.live) run.start = await beginFollowed(run);
    // Not before changes are told apart: whoever was evaluated before this moment is compared as of this moment.
    const moments = momentsAt(await readClock(databases), definition);
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
      corrections: null,
      unavailable,
      cause: isExpected(explained) ? null : error,
    };
  }
}

/**
 * A scheduled run of what has changed alone; null where everybody has to be compared: since something asks for it, since it
 * is time to prove that nothing was missed, or since what has changed can't be written singly.
 */
async function increment(run: Run): Promise<RunResult | null> {
  const { context, definition, row, record } = run;
  await context.moveCaptured?.();
  const { isComplete, evaluated, counts } = await run.clock.timed('compute', () =>
    runIncrement(context, definition, row.id, record.id),
  );
  run.incremented = isComplete;
  if (!isComplete || !row.settled) return null;
  const found = counts ?? { ...NOTHING_FOUND, before: row.members, members: row.members };
  const finish = { ...finishOf(run, 'succeeded', found, null), evaluated };
  if (!(await finishRun(context.databases.state.pool, record, finish))) return superseded(run);
  return {
    id: record.id,
    outcome: 'succeeded',
    error: null,
    counts: found,
    corrections: null,
    unavailable: false,
    cause: null,
  };
}

const NOTHING_FOUND: Omit<RunCounts, 'before' | 'members'> = {
  entered: 0,
  exited: 0,
  changed: 0,
  nulled: 0,
  withoutIdentifier: 0,
  conflicting: 0,
  skippedValues: 0,
};

/**
 * What is due can't be evaluated singly before a first run or one of a new text, while it fails or its guard holds it, or
 * while a person decides: then this run does it.
 */
async function beginFollowed({ context, definition, row, record, textHash, incremented }: Run): Promise<Start> {
  const { state } = context.databases;
  // What is left of an hourly one would wait for another hour.
  const waits = definition.cadence.kind === 'hourly' && !incremented;
  const claims =
    waits || row.first || row.stuck || row.textHash !== textHash || (await readHeldRun(state, row.id)) !== null;
  // What was captured by now is settled, too.
  if (claims) await context.moveCaptured?.();
  return markStart(state.pool, { definitionId: row.id, runId: record.id, claims });
}

/** A run that was stopped with its leader: its moment stays due. */
async function cancelled(run: Run): Promise<RunResult> {
  const { context, record } = run;
  const finish = finishOf(run, 'cancelled', null, 'Stopped.');
  await finishRun(context.databases.state.pool, record, { ...finish, dueInMs: finish.dueInMs === null ? null : 0 });
  return {
    id: record.id,
    outcome: 'cancelled',
    error: 'Stopped.',
    counts: null,
    corrections: null,
    unavailable: true,
    cause: null,
  };
}

/** What this instance computed while it led is nothing worth: another leads, and may have written newer results. */
function superseded({ record }: Run): RunResult {
  const error = 'Given up: another instance leads.';
  return {
    id: record.id,
    outcome: 'abandoned',
    error,
    counts: null,
    corrections: null,
    unavailable: true,
    cause: null,
  };
}

/** Computes and applies in one transaction; null, with nothing written, where a recipient came twice to the plain form. */
async function attempt(run: Run, inputs: Inputs, grouped: boolean): Promise<RunResult | null> {
  const { context, definition, request, record, textHash, clock } = run;
  const { databases } = context;
  return withRunSession(databases, context.signal, async (session) => {
    await beginRun(session, runLimits(context));
    const compared = await clock.timed('compute', () => compare(context, session, inputs, run.row, grouped));
    if (compared === 'twice') {
      await session.query('rollback');
      return null;
    }
    const isMoved = run.start !== null && ((await context.moveCaptured?.()) ?? true);
    // What changes is looked up in the snapshot, which has just been read: its pages are in memory.
    await session.query('set local statement_timeout = 0; set local random_page_cost = 1.1');
    const held = await readHeldRun(databases.state, run.row.id);
    await lockDefinition(session, run.row.id);
    // Nobody else writes from here on: who was erased meanwhile is left out, and the members stand still.
    const row = { ...run.row, members: await readMembers(session, run.row.id) };
    const isComplete = run.start !== null && !row.first && (await leaveOut(session, row.id, run.start)) && isMoved;
    const counts = await countChanges(session, inputs, row);
    const corrections = run.start !== null && isComplete ? await countCorrections(session, row.id, run.start) : null;
    refuseConflicts(definition, counts);
    const verdict =
      row.live && !row.first
        ? await judgeHour(
            session,
            row.id,
            definition.guard,
            counts,
            await readHour(session, databases.state.schema, row.id),
          )
        : judgeGuard(definition.guard, counts, { first: row.first });
    const approved =
      held !== null && request.approves === held.id && held.textHash === textHash && isCovered(held.seen, counts);
    if (verdict.kind === 'holds' && !approved) {
      await session.query('rollback');
      return hold(run, held, counts, verdict.because);
    }
    const found: Found = { row, start: run.start, counts, held, approved, recount: grouped };
    const finish = finishOf(run, 'succeeded', counts, null);
    const ending = { record, textHash, finish: { ...finish, fullDone: run.start?.fullWanted ?? null, corrections } };
    switch (await clock.timed('apply', () => writeFound(databases.state.schema, session, inputs, found, ending))) {
      case 'twice':
        return null;
      case 'superseded':
        return superseded(run);
      case 'written':
        return {
          id: record.id,
          outcome: 'succeeded',
          error: null,
          counts,
          corrections,
          unavailable: false,
          cause: null,
        };
    }
  });
}

function finishOf(
  { clock, request, row, definition }: Run,
  outcome: RunOutcome,
  counts: RunCounts | null,
  error: string | null,
): Finish {
  const dueInMs = request.nextDueMs({ tookMs: clock.tookMs(), outcome, live: row.live });
  return {
    outcome,
    counts,
    error,
    phases: clock.phases,
    dueInMs,
    fullDone: null,
    evaluated: null,
    reconcileInMs: definition.reconcileMs,
    corrections: null,
  };
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
    return { id: held.id, outcome: 'held', error, counts, corrections: null, unavailable: false, cause: null };
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
  return { id: record.id, outcome: 'held', error, counts, corrections: null, unavailable: false, cause: null };
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
