import type { Definition } from '../core/definition.js';
import { inTransaction } from '../db/connect.js';
import { isUnreachable } from '../db/failure.js';
import type { RequestKind, State } from '../db/state.js';
import { OperatorError, UnavailableError } from '../lib/errors.js';
import type { Logger } from '../lib/logger.js';
import { discardDead, retryDead, type DeadFilter } from '../outbox/dead.js';
import { beginBackfill } from './cursor.js';
import { forget } from './forget.js';
import { exitAll } from './removal.js';
import { describeFailure, type RunContext, type RunResult } from './run.js';
import type { Scheduler } from './scheduler.js';
import { verify, type CompareUser, type Difference, type Verified, type VerifyOptions } from './verify.js';

/**
 * What a command asks of the leader is a row: the leader carries it out and writes down how it ended, the command looks
 * at the row meanwhile. A request whose leader died is carried out by the next; each kind may be carried out twice.
 */
export interface RequestArguments {
  sync: { keys: readonly string[]; confirmRemovals: boolean };
  /** `resumes`: the person saw one that was begun, and only that goes on, though it may have ended meanwhile. */
  backfill: { key: string; events: boolean; resumes: boolean };
  approve: { run: number };
  reject: { run: number };
  retry: DeadFilter;
  discard: DeadFilter;
  forget: { person: string };
  verify: VerifyOptions;
}

/** What a request has come to: definitions whose calls it caused, up to which version, and the runs that it made. */
export interface RequestProgress {
  definitions: readonly string[];
  /** Calls with a higher version arose later; null until all have arisen. */
  upTo: number | null;
  runs: readonly {
    definition: string;
    run: number;
    outcome: string;
    error: string | null;
    unavailable: boolean;
    members: number | null;
    entered: number | null;
    exited: number | null;
    changed: number | null;
    /** Profiles that have neither userId nor email. */
    withoutIdentifier: number | null;
    /** Recipients for whom two profiles have different values. */
    conflicting: number | null;
    /** Rows with a value that can't be sent. */
    skippedValues: number | null;
  }[];
  count: number | null;
  verified?: readonly Verified[];
  /** People are in it: it is taken out when it has been read. */
  differences?: readonly Difference[];
}

interface RequestRow {
  id: number;
  kind: RequestKind;
  arguments: unknown;
}

/** Requests that cause no calls: a command that leads for one of them sends nothing at all. */
export const QUIET_REQUESTS: readonly RequestKind[] = ['reject', 'discard', 'forget'];
export const ALL_REQUESTS: readonly RequestKind[] = [
  ...QUIET_REQUESTS,
  'sync',
  'backfill',
  'approve',
  'retry',
  'verify',
];

export interface RequestDeps {
  context: RunContext;
  /** Nothing new is begun. */
  draining: AbortSignal;
  /** Those that are carried out. */
  kinds: readonly RequestKind[];
  scheduler: Scheduler;
  definitions: () => readonly Definition[];
  /** Reads the configuration again; throws where it may not be applied. */
  reload: (confirmRemovals: boolean) => Promise<void>;
  nudge: () => void;
  /** The destinations that are sent to; `compare` null where their users can't be read. */
  destinations: () => readonly { id: number; name: string; compare: CompareUser | null }[];
  log: Logger;
}

async function lastVersion(state: State): Promise<number> {
  const { rows } = await state.pool.query<{ last: number }>('select last_value as last from version');
  return rows[0]?.last ?? 0;
}

async function readRun(state: State, id: number): Promise<{ definitionId: number; key: string; trigger: string }> {
  const row = await state.db
    .selectFrom('run')
    .innerJoin('definition', 'definition.id', 'run.definition_id')
    .select([
      'run.definition_id as definitionId',
      'definition.key as key',
      'run.trigger as trigger',
      'run.outcome as outcome',
      'run.error as error',
      'run.decision as decision',
    ])
    .where('run.id', '=', id)
    .executeTakeFirst();
  if (row === undefined) throw new OperatorError(`There is no run ${id}; \`personas-sync runs\` lists them.`);
  if (row.outcome !== 'held' || row.decision !== null) {
    const why = row.decision === null ? (row.error ?? '') : ` It was ${row.decision}.`;
    throw new OperatorError(
      `Run ${id} is not held${row.outcome === 'held' || why !== '' ? ' any more' : ''}.${why === '' ? '' : ` ${why.trim()}`}`,
    );
  }
  return row;
}

function summary(definition: string, result: RunResult): RequestProgress['runs'][number] {
  const { id, outcome, error, counts, unavailable } = result;
  return {
    definition,
    run: id,
    outcome,
    error,
    unavailable,
    members: counts?.members ?? null,
    entered: counts?.entered ?? null,
    exited: counts?.exited ?? null,
    changed: counts?.changed ?? null,
    withoutIdentifier: counts?.withoutIdentifier ?? null,
    conflicting: counts?.conflicting ?? null,
    skippedValues: counts?.skippedValues ?? null,
  };
}

const NO_LOSSES = { withoutIdentifier: null, conflicting: null, skippedValues: null };

async function chosen(deps: RequestDeps, keys: readonly string[]): Promise<readonly Definition[]> {
  const known = deps.definitions();
  const unknown = keys.filter((key) => !known.some((definition) => definition.key === key));
  if (unknown.length > 0) {
    throw new OperatorError(
      `No definition has the key ${unknown.map((key) => `"${key}"`).join(', ')}; known: ${known.map(({ key }) => key).join(', ') || 'none'}.`,
    );
  }
  const states = await deps.context.databases.state.db.selectFrom('definition').select(['key', 'state']).execute();
  const stateOf = new Map(states.map(({ key, state }) => [key, state]));
  const paused = keys.filter((key) => stateOf.get(key) === 'paused');
  if (paused.length > 0)
    throw new OperatorError(`"${paused.join('", "')}" is paused; \`personas-sync resume ${paused.join(' ')}\` first.`);
  const disabled = keys.filter((key) => stateOf.get(key) === 'disabled');
  if (disabled.length > 0) throw new OperatorError(`"${disabled.join('", "')}" is disabled (\`enabled: false\`).`);
  return known.filter(({ key }) => (keys.length === 0 ? stateOf.get(key) === 'active' : keys.includes(key)));
}

type Save = (progress: RequestProgress) => Promise<void>;

const NOTHING: RequestProgress = { definitions: [], upTo: null, runs: [], count: null };

async function sync(
  deps: RequestDeps,
  { keys, confirmRemovals }: RequestArguments['sync'],
  save: Save,
): Promise<RequestProgress> {
  await deps.reload(confirmRemovals);
  const definitions = await chosen(deps, keys);
  const runs: RequestProgress['runs'][number][] = [];
  const keysChosen = definitions.map(({ key }) => key);
  await save({ ...NOTHING, definitions: keysChosen });
  await Promise.all(
    definitions.map(async (definition) => {
      const result = await deps.scheduler.runNow(definition, { trigger: 'sync', approves: null });
      if (result === null) return;
      if (result.outcome === 'cancelled') throw new UnavailableError('Stopped.');
      runs.push(summary(definition.key, result));
      deps.nudge();
      await save({ ...NOTHING, definitions: keysChosen, runs });
    }),
  );
  if (keys.length === 0) runs.push(...(await heldRemovals(deps.context.databases.state)));
  return { definitions: keysChosen, upTo: await lastVersion(deps.context.databases.state), runs, count: null };
}

/** Definitions that were removed with `on_delete: exit_all`, and wait for a person to decide. */
async function heldRemovals(state: State): Promise<RequestProgress['runs']> {
  const rows = await state.db
    .selectFrom('run')
    .innerJoin('definition', 'definition.id', 'run.definition_id')
    .select([
      'definition.key as definition',
      'run.id as run',
      'run.error',
      'run.members',
      'run.entered',
      'run.exited',
      'run.changed',
    ])
    .where('run.trigger', '=', 'delete')
    .where('run.outcome', '=', 'held')
    .where('run.decision', 'is', null)
    .orderBy('run.id')
    .execute();
  return rows.map((row) => ({ ...row, outcome: 'held', unavailable: false, ...NO_LOSSES }));
}

async function approve(deps: RequestDeps, { run }: RequestArguments['approve']): Promise<RequestProgress> {
  const { state } = deps.context.databases;
  const { definitionId, key, trigger } = await readRun(state, run);
  let result: RunResult | null;
  if (trigger === 'delete') result = await exitAll(deps.context, definitionId, run);
  else {
    const [definition] = await chosen(deps, [key]);
    if (definition === undefined) throw new OperatorError(`"${key}" is no longer in the configuration.`);
    result = await deps.scheduler.runNow(definition, { trigger: 'approve', approves: run });
  }
  deps.nudge();
  return {
    definitions: [key],
    upTo: await lastVersion(state),
    runs: result === null ? [] : [summary(key, result)],
    count: null,
  };
}

async function reject(deps: RequestDeps, { run }: RequestArguments['reject']): Promise<RequestProgress> {
  const { state } = deps.context.databases;
  const { definitionId, key, trigger } = await readRun(state, run);
  await inTransaction(state.pool, async (client) => {
    await client.query(`update run set decision = 'rejected' where id = $1 and outcome = 'held' and decision is null`, [
      run,
    ]);
    if (trigger === 'delete') return;
    await client.query(`update definition set state = 'paused', paused_because = $2 where id = $1`, [
      definitionId,
      `Run ${run} was rejected.`,
    ]);
  });
  return { ...NOTHING, definitions: [key] };
}

async function backfill(
  deps: RequestDeps,
  { key, events, resumes }: RequestArguments['backfill'],
): Promise<RequestProgress> {
  const { state } = deps.context.databases;
  await chosen(deps, [key]);
  const row = await state.db
    .selectFrom('definition')
    .select(['id', 'first_run_at'])
    .where('key', '=', key)
    .executeTakeFirst();
  if (!row?.first_run_at)
    throw new OperatorError(`"${key}" has not been synced yet; \`personas-sync sync ${key}\` sends everyone.`);
  if (!resumes) await beginBackfill(state, row.id, { events });
  deps.nudge();
  return { definitions: [key], upTo: null, runs: [], count: null };
}

async function verifyAll(deps: RequestDeps, options: VerifyOptions, save: Save): Promise<RequestProgress> {
  const { state } = deps.context.databases;
  const keys = (await chosen(deps, options.keys)).map(({ key }) => key);
  const found = await verify(
    {
      state,
      destinations: deps.destinations(),
      signal: deps.draining,
      onProgress: (count) => save({ ...NOTHING, definitions: keys, count }),
    },
    { ...options, keys },
  );
  if (deps.draining.aborted) throw new UnavailableError('Stopped.');
  deps.nudge();
  return { ...NOTHING, definitions: keys, upTo: await lastVersion(state), ...found };
}

async function carryOut(deps: RequestDeps, row: RequestRow, save: Save): Promise<RequestProgress> {
  const { state } = deps.context.databases;
  switch (row.kind) {
    case 'sync':
      return sync(deps, row.arguments as RequestArguments['sync'], save);
    case 'backfill':
      return backfill(deps, row.arguments as RequestArguments['backfill']);
    case 'approve':
      return approve(deps, row.arguments as RequestArguments['approve']);
    case 'reject':
      return reject(deps, row.arguments as RequestArguments['reject']);
    case 'retry': {
      const filter = row.arguments as RequestArguments['retry'];
      const { count, definitions } = await retryDead(state.pool, filter);
      deps.nudge();
      return { definitions, upTo: await lastVersion(state), runs: [], count };
    }
    case 'discard':
      return { ...NOTHING, count: await discardDead(state.pool, row.arguments as RequestArguments['discard']) };
    case 'verify':
      return verifyAll(deps, row.arguments as RequestArguments['verify'], save);
    case 'forget': {
      const { rows } = await forget(state, (row.arguments as RequestArguments['forget']).person);
      // The request itself must not remember the person either.
      await state.pool.query(`update request set arguments = '{}' where id = $1`, [row.id]);
      return { ...NOTHING, count: rows };
    }
  }
}

export interface RequestLoop {
  stop: () => Promise<void>;
}

const LOOK_EVERY_MS = 200;

/** Carries out what commands have asked for, several at once, until it is stopped. */
export function startRequests(deps: RequestDeps): RequestLoop {
  const { pool } = deps.context.databases.state;
  const { leader } = deps.context;
  const underWay = new Set<Promise<void>>();
  let stopping = false;

  const handle = async (row: RequestRow): Promise<void> => {
    const save: Save = async (progress) => {
      await pool.query('update request set progress = $2 where id = $1', [row.id, JSON.stringify(progress)]);
    };
    const finish = async (outcome: 'done' | 'refused' | 'failed', answer: string | null): Promise<void> => {
      // Where another leads meanwhile, it is that one's.
      await pool.query(
        `update request set finished_at = now(), outcome = $2, answer = $3
         where id = $1 and outcome is null and taken_by = $4`,
        [row.id, outcome, answer, leader],
      );
    };
    try {
      await save(await carryOut(deps, row, save));
      await finish('done', null);
    } catch (error) {
      if (deps.draining.aborted || isUnreachable(error)) {
        // Whoever leads next carries it out, or this instance once more.
        await pool.query('update request set taken_by = null where id = $1 and outcome is null and taken_by = $2', [
          row.id,
          leader,
        ]);
        return;
      }
      if (!(error instanceof OperatorError)) deps.log.failure(`The request "${row.kind}" failed`, error);
      await finish(error instanceof OperatorError ? 'refused' : 'failed', describeFailure(error));
    }
  };

  const take = async (): Promise<void> => {
    const { rows } = await pool.query<RequestRow>(
      `update request set taken_by = $1 where outcome is null and taken_by is distinct from $1 and kind = any($2)
       returning id, kind, arguments`,
      [leader, deps.kinds],
    );
    for (const row of rows) {
      const work = handle(row).catch((error: unknown) => deps.log.failure('A request could not be closed', error));
      underWay.add(work);
      void work.finally(() => underWay.delete(work));
    }
  };

  const loop = async (): Promise<void> => {
    while (!stopping) {
      try {
        await take();
      } catch (error) {
        deps.log.failure('Requests cannot be read; trying again', error);
      }
      await new Promise((resolve) => setTimeout(resolve, LOOK_EVERY_MS));
    }
  };
  const looping = loop();
  return {
    stop: async () => {
      stopping = true;
      await looping;
      await Promise.allSettled(underWay);
    },
  };
}
