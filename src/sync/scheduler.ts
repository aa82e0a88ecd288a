import { createHash } from 'node:crypto';
import { sql } from 'kysely';
import { createTask, setLogger } from 'node-cron';
import type { Config } from '../config/types.js';
import type { Cadence, Definition } from '../core/definition.js';
import type { RunOutcome } from '../db/state.js';
import { UnavailableError } from '../lib/errors.js';
import { inTransaction } from '../db/connect.js';
import type { Logger } from '../lib/logger.js';
import { togetherMs } from '../lib/together.js';
import { abandonOpenRuns } from './record.js';
import { runDefinition, type RunContext, type RunResult } from './run.js';

/**
 * Runs definitions when they are due. A scheduled moment is a column (`definition.due_at`), so it stays due until a run
 * for it has an outcome, whatever is restarted meanwhile; one missed while nothing ran is made up for once. At most
 * `runs.parallel` run at once, longest waiting first, and one definition never twice.
 */
export interface Scheduler {
  /** Runs the definition as soon as there is a place for it. */
  runNow: (
    definition: Definition,
    request: { trigger: 'sync' | 'approve'; approves: number | null },
  ) => Promise<RunResult | null>;
  /** Something may have come to be due. */
  look: () => void;
  stop: () => Promise<void>;
}

const LOOK_EVERY_MS = 500;
const TRIES_AFTER_DEATH = 3;
/** A definition that is polled rests at least ten times as long as it ran. */
const REST_FACTOR = 10;

const hashOf = (key: string): number => createHash('sha256').update(key).digest().readUInt32BE();
/** A fixed place for each key, from 0 to below 1. */
const placeOf = (key: string): number => hashOf(key) / 2 ** 32;

/** A fixed place within the hour for each key, so that hourly runs are spread over it. */
export function hourlyExpression(key: string): string {
  const hash = hashOf(key);
  return `${hash % 60} ${Math.floor(hash / 60) % 60} * * * *`;
}

/** A definition that is followed and held is counted anew so often. */
const HELD_AGAIN_MS = 3_600_000;

/** Milliseconds from the end of a run to the next scheduled moment; null: there is none. */
export function nextRunMs(
  { cadence, key, reconcileMs }: Pick<Definition, 'cadence' | 'key' | 'reconcileMs'>,
  { tookMs, outcome, live }: { tookMs: number; outcome: RunOutcome; live: boolean },
): number | null {
  if (cadence.kind === 'realtime' && live) {
    if (outcome === 'held' || outcome === 'skipped') return HELD_AGAIN_MS;
    // Spread, so that not all are compared in full at one hour.
    if (outcome === 'succeeded') return Math.round(reconcileMs * (1 - placeOf(key) / 4));
  }
  return nextDueMs(cadence, key, tookMs);
}

/** As `nextRunMs`, where changes aren't followed. */
export function nextDueMs(cadence: Cadence, key: string, tookMs: number): number | null {
  switch (cadence.kind) {
    case 'manual':
      return null;
    case 'realtime':
      return nextDueMs(cadence.fallback, key, tookMs);
    case 'poll':
      return Math.max(cadence.everyMs, tookMs * REST_FACTOR);
    case 'hourly':
    case 'cron': {
      const expression = cadence.kind === 'hourly' ? hourlyExpression(key) : cadence.expression;
      // A task knows its next moment only while it is started.
      const task = createTask(expression, () => undefined);
      void task.start();
      const next = task.getNextRun();
      void task.destroy();
      return next === null ? null : Math.max(1, next.getTime() - Date.now());
    }
  }
}

/** Runs of leaders that are gone: their moments are due again, three times, and then given up for that moment. */
export async function abandonRuns(context: RunContext): Promise<number> {
  return inTransaction(context.databases.state.pool, async (client) => {
    const abandoned = await client.query(
      `update run set outcome = 'abandoned', finished_at = clock_timestamp() where outcome is null and leader <> $1`,
      [context.leader],
    );
    await client.query(
      `with ended as (
         update definition as d set full_run = null from run as r where r.id = d.full_run and r.outcome is not null returning d.id)
       update due set claimed_by = null from ended where due.definition_id = ended.id and claimed_by is not null`,
    );
    await client.query(
      `update definition as d set due_at = now() + interval '1 hour'
       where d.due_at is not null and (
         select count(*) from run as r where r.definition_id = d.id and r.scheduled_for = d.due_at and r.outcome = 'abandoned') >= $1`,
      [TRIES_AFTER_DEATH],
    );
    return abandoned.rowCount ?? 0;
  });
}

export interface SchedulerOptions {
  context: RunContext;
  /** False: only `runNow` runs anything. */
  scheduled: boolean;
  /** Nothing new is begun. */
  draining: AbortSignal;
  config: () => Config;
  log: Logger;
  onRun: (definition: Definition, result: RunResult) => void;
}

export function startScheduler({ context, scheduled, draining, config, log, onRun }: SchedulerOptions): Scheduler {
  setLogger({
    info: () => undefined,
    warn: () => undefined,
    debug: () => undefined,
    error: (message) => log.warn(`node-cron: ${message instanceof Error ? message.name : 'error'}`),
  });
  const running = new Set<string>();
  const underWay = new Set<Promise<unknown>>();
  const urgent: (() => void)[] = [];
  let stopping = false;
  let wake: () => void = () => undefined;

  const hasPlace = (): boolean => running.size < config().runs.parallel;
  const run = async (
    definition: Definition,
    request: { trigger: 'schedule' | 'sync' | 'approve'; approves: number | null },
  ): Promise<RunResult | null> => {
    running.add(definition.key);
    const work = abandonOpenRuns(context.databases.state.pool, definition.key).then(() =>
      runDefinition({ ...context, config: config() }, definition, {
        ...request,
        nextDueMs: (ended) => nextRunMs(definition, ended),
      }),
    );
    underWay.add(work);
    try {
      const result = await work;
      if (result !== null) onRun(definition, result);
      return result;
    } finally {
      running.delete(definition.key);
      underWay.delete(work);
      urgent.shift()?.();
      wake();
    }
  };

  draining.addEventListener('abort', () => {
    for (const leave of urgent.splice(0)) leave();
  });

  const startDue = async (): Promise<void> => {
    const due = await context.databases.state.db
      .selectFrom('definition')
      .select('key')
      .where('state', '=', 'active')
      .where('due_at', '<=', sql<Date>`now()`)
      .orderBy('due_at')
      .limit(100)
      .execute();
    for (const { key } of due) {
      if (draining.aborted || urgent.length > 0 || !hasPlace()) return;
      const definition = config().definitions.find((each) => each.key === key);
      if (definition === undefined || running.has(key)) continue;
      void run(definition, { trigger: 'schedule', approves: null }).catch((error: unknown) => {
        log.failure(`The run of "${key}" broke off`, error, { definition: key });
      });
    }
  };

  const sleep = (ms: number): Promise<void> =>
    new Promise((resolve) => {
      const timer = setTimeout(resolve, ms);
      wake = () => {
        clearTimeout(timer);
        resolve();
      };
    });
  const loop = async (): Promise<void> => {
    while (!stopping && !draining.aborted) {
      try {
        await startDue();
      } catch (error) {
        log.failure('The schedule cannot be read; trying again', error);
      }
      await sleep(togetherMs(LOOK_EVERY_MS));
    }
  };
  const looping = scheduled ? loop() : Promise.resolve();

  return {
    runNow: async (definition, request) => {
      while (!draining.aborted && (running.has(definition.key) || !hasPlace())) {
        await new Promise<void>((resolve) => urgent.push(resolve));
      }
      if (draining.aborted) throw new UnavailableError('Stopped.');
      return run(definition, request);
    },
    look: () => wake(),
    stop: async () => {
      stopping = true;
      wake();
      await looping;
      await Promise.allSettled(underWay);
    },
  };
}
