import type { Config } from '../config/types.js';
import type { Definition } from '../core/definition.js';
import { isUnreachable } from '../db/failure.js';
import { OperatorError, UnavailableError } from '../lib/errors.js';
import type { Logger } from '../lib/logger.js';
import { until } from '../lib/until.js';
import type { CompareContext } from '../sync/comparison.js';
import { createCapture, type Capture } from './capture.js';
import { startEvaluator } from './evaluator.js';
import { startMover, type Mover } from './mover.js';
import { createTracking, giveUp } from './tracking.js';
import { openWorker } from './worker.js';

/**
 * Real time as one thing with a beginning and an end: `tracking` says what is followed, the mover takes what the triggers
 * captured to `due`, the evaluator evaluates that. Only the leader has one.
 */
export interface RealTime {
  /** Looks at a changed configuration before anything runs by it. */
  configure: () => Promise<void>;
  /** Resolves when all that has been captured by now is due: true, or false where it isn't known what is captured. */
  moveCaptured: () => Promise<boolean>;
  /** Evaluates what is due of a definition; false where some of it stays. */
  drain: (key: string) => Promise<boolean>;
  stop: () => Promise<void>;
}

export interface RealTimeOptions {
  context: Omit<CompareContext, 'config'>;
  config: () => Config;
  leader: string;
  /** False: moves and evaluates only what is asked for. */
  follows: boolean;
  /** Something is to be told, with this id in the outbox or a higher one. */
  onRaised: (lowestId: number) => void;
  log: Logger;
}

const LOOK_EVERY_MS = 5_000;

export async function startRealTime(options: RealTimeOptions): Promise<RealTime> {
  const { context, config, leader, follows, onRaised, log } = options;
  const { databases } = context;
  const { pool } = databases.state;
  const installation = await readInstallation(options);
  const tracking = createTracking({ context, leader, installation, completes: follows, log });
  const stopping = new AbortController();

  let compared: CompareContext = { ...context, config: config() };
  /** The same object until the configuration is another. */
  const compareContext = (): CompareContext => {
    if (compared.config !== config()) compared = { ...context, config: config() };
    return compared;
  };
  const followed = (): readonly Definition[] =>
    config().definitions.filter(({ cadence }) => cadence.kind === 'realtime');
  const evaluator = startEvaluator({
    state: pool,
    definitions: followed,
    openWorker: () => openWorker(compareContext),
    follows,
    onRaised,
    onTooSlow: async (definitionId, sentence) => {
      const { rows } = await pool.query<{ key: string }>('select key from definition where id = $1', [definitionId]);
      await giveUp(
        pool,
        rows.map(({ key }) => key),
        sentence,
      );
      log.warn(`"${rows[0]?.key ?? ''}" is polled from now on. ${sentence}`);
    },
    log,
  });
  const capture: Capture = createCapture({
    state: pool,
    same: databases.same,
    leader,
    installation,
    mapping: tracking.mapping,
    perProfileMs: evaluator.perProfileMs,
    onDue: evaluator.notify,
    onUnresolved: (keys, sentence) => giveUp(pool, keys, sentence),
  });

  let mover: { notifies: boolean; running: Mover } | null = null;
  /** The mover that what is captured asks for: none, or one that hears notifications or doesn't wait for any. */
  const adjustMover = async (): Promise<void> => {
    const captured = tracking.captured();
    if (mover?.notifies === captured?.notifies && (mover === null) === (captured === null)) return;
    const old = mover;
    mover = null;
    await old?.running.stop();
    if (captured === null || stopping.signal.aborted) return;
    const { notifies } = captured;
    mover = {
      notifies,
      running: startMover({ source: databases.direct, capture, installation, follows, notifies, log }),
    };
  };

  let looking: Promise<void> = Promise.resolve();
  /** One after the other. */
  const look = (): Promise<void> => {
    const next = looking.then(async () => {
      await tracking.look(config());
      await adjustMover();
    });
    looking = next.catch(() => undefined);
    return next;
  };
  let said = '';
  const lookAndSay = async (): Promise<void> => {
    try {
      await look();
      said = '';
    } catch (error) {
      const what =
        error instanceof OperatorError ? error.message : 'Whether changes can be followed is not known; trying again';
      if (what !== said && !isUnreachable(error)) {
        if (error instanceof OperatorError) log.error(what);
        else log.failure(what, error);
      }
      said = what;
    }
  };
  const loop = async (): Promise<void> => {
    for (;;) {
      await until(LOOK_EVERY_MS, stopping.signal);
      if (stopping.signal.aborted) return;
      await lookAndSay();
    }
  };
  await lookAndSay();
  const looping = loop();

  return {
    configure: lookAndSay,
    moveCaptured: async () => {
      // The source was out of reach when it was looked at; now it may not be.
      if (mover === null) await lookAndSay();
      return (await mover?.running.moveAll()) ?? false;
    },
    drain: (key) => evaluator.drain(key),
    stop: async () => {
      stopping.abort();
      await looping;
      await looking;
      await mover?.running.stop();
      await evaluator.stop();
    },
  };
}

/** The id of the state, by which a source knows who consumes what is captured in it. */
async function readInstallation({ context }: RealTimeOptions): Promise<string> {
  const row = await context.databases.state.db
    .selectFrom('setting')
    .select('value')
    .where('name', '=', 'installation')
    .executeTakeFirst();
  if (typeof row?.value !== 'string') throw new UnavailableError('The state has no id.');
  return row.value;
}
