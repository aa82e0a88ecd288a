import { inTransaction } from '../db/connect.js';
import { isUnreachable } from '../db/failure.js';
import { LeaseLostError } from '../db/lease.js';
import type { RequestKind, State } from '../db/state.js';
import { OperatorError } from '../lib/errors.js';
import { startLoop, type Loop } from '../lib/loop.js';
import { discardDead, retryDead } from '../outbox/dead.js';
import { NOTHING, type RequestArguments, type RequestDeps, type RequestProgress, type Save } from './asking.js';
import { beginBackfill } from './cursor.js';
import { openFindings } from './findings.js';
import { forget } from './forget.js';
import { exitAll } from './removal.js';
import { describeFailure, type RunResult } from './run.js';
import { chosen, lastVersion, summary, sync } from './sync-request.js';
import { verify, type VerifyOptions } from './verify.js';

/**
 * What a command asks of the leader is a row: the leader carries it out and writes down how it ended, the command looks
 * at the row meanwhile. A request whose leader died is carried out by the next; each kind may be carried out twice.
 */
interface RequestRow {
  id: number;
  kind: RequestKind;
  arguments: unknown;
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
    ...NOTHING,
    definitions: [key],
    upTo: await lastVersion(state),
    runs: result === null ? [] : [summary(key, result)],
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
  return { ...NOTHING, definitions: [key] };
}

async function verifyAll(
  deps: RequestDeps,
  { request, options }: { request: number; options: VerifyOptions },
  save: Save,
): Promise<RequestProgress> {
  const { databases, leader } = deps.context;
  const { state } = databases;
  const signal = deps.draining;
  const keys = (await chosen(deps, options.keys)).map(({ key }) => key);
  const verified = await verify(
    {
      state,
      findings: openFindings(state.pool, { request, leader, signal }),
      destinations: deps.destinations(),
      signal,
      onProgress: (count) => save({ ...NOTHING, definitions: keys, count }),
    },
    { ...options, keys },
  );
  deps.nudge();
  return { ...NOTHING, definitions: keys, upTo: await lastVersion(state), verified };
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
      return { ...NOTHING, definitions, upTo: await lastVersion(state), count };
    }
    case 'discard':
      return { ...NOTHING, count: await discardDead(state.pool, row.arguments as RequestArguments['discard']) };
    case 'verify':
      return verifyAll(deps, { request: row.id, options: row.arguments as RequestArguments['verify'] }, save);
    case 'forget': {
      const { rows } = await forget(state, (row.arguments as RequestArguments['forget']).person);
      // The request itself must not remember the person either.
      await state.pool.query(`update request set arguments = '{}' where id = $1`, [row.id]);
      return { ...NOTHING, count: rows };
    }
  }
}

const LOOK_EVERY_MS = 200;

/** Carries out what commands have asked for, several at once, until it is stopped. */
export function startRequests(deps: RequestDeps): Loop {
  const { pool } = deps.context.databases.state;
  const { leader } = deps.context;
  const underWay = new Set<Promise<void>>();

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
      if (deps.draining.aborted || isUnreachable(error) || error instanceof LeaseLostError) {
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
      // One whose row is held, by whoever erases a person or by the last leader, keeps the others waiting no longer.
      `update request set taken_by = $1 where id = any(array(select id from request
         where outcome is null and taken_by is distinct from $1 and kind = any($2) order by id for update skip locked))
       returning id, kind, arguments`,
      [leader, deps.kinds],
    );
    for (const row of rows) {
      const work = handle(row).catch((error: unknown) => deps.log.failure('A request could not be closed', error));
      underWay.add(work);
      void work.finally(() => underWay.delete(work));
    }
  };

  const taking = startLoop('Reading requests', () => deps.lookMs(LOOK_EVERY_MS), deps.log, take);
  return {
    look: taking.look,
    stop: async () => {
      await taking.stop();
      await Promise.allSettled(underWay);
    },
  };
}
