import type { Client, Pool } from '../db/connect.js';
import { databaseFailure } from '../db/failure.js';
import { LeaseLostError } from '../db/lease.js';
import { listen, type Listening } from '../db/listen.js';
import type { Session } from '../db/session.js';
import { backoffMs } from '../lib/backoff.js';
import { OperatorError, UnavailableError } from '../lib/errors.js';
import type { Logger } from '../lib/logger.js';
import { createSignal } from '../lib/signal.js';
import { FOREIGN } from './install.js';
import { openSource, type Capture, type Taken } from './capture.js';
import { ASLEEP_UNTIL, CAPTURE_SCHEMA, CHANNEL } from './trigger-sql.js';

/**
 * Takes what is captured, again and again.
 *
 *   awake ── nothing for a second ──▶ `asleep_until` is set ──▶ one more look ──▶ asleep
 *     ▲       a take every 2 ms            renewed every 5 s for 15 s               │  a look every second
 *     └─────── a notification, or a look that finds something: it is cleared ───────┘
 *   deaf: notifications can't be heard, or aren't sent: as awake while there is something, else a take every 100 ms
 *
 * A notification makes every commit of the source's server queue, so the triggers notify only while `asleep_until` lies
 * ahead. A transaction whose trigger ran before it was set doesn't notify: the look after it, and the one every
 * second, find what it wrote. A daemon that has died is asleep for 15 s at most, and costs the source nothing after that.
 */
export interface Mover {
  /**
   * Resolves when all that had been committed in the source when this was called has been moved: true, or false where
   * nothing captures it any more. Rejects where that fails, where another leads, and at the end.
   */
  moveAll: () => Promise<boolean>;
  /** Ends it; what is under way is finished. */
  stop: () => Promise<void>;
}

export interface MoverOptions {
  source: Pool;
  capture: Capture;
  installation: string;
  /** False: takes only where `moveAll` asks. */
  follows: boolean;
  /** Whether the triggers notify at all. */
  notifies: boolean;
  log: Logger;
}

const AWAKE_MS = 2;
const DEAF_MS = 100;
const IDLE_MS = 1_000;
/** The promise: whatever else fails, what is captured is found within this. */
const LOOK_MS = 1_000;
const RENEW_MS = 5_000;
const RETRY = { firstMs: 100, longestMs: 5_000 };
/** What is under way when it is stopped may take so long. */
const STOP_MS = 5_000;
const NEVER_MS = 2 ** 31 - 1;

const FALL_ASLEEP = {
  name: 'personas_asleep',
  text: `select setval('${ASLEEP_UNTIL}', ceil(extract(epoch from clock_timestamp()))::bigint + 15) as until
    from personas_capture.listener where installation = $1`,
};
/** Not what another instance has written since. */
const WAKE = {
  name: 'personas_awake',
  text: `select setval('${ASLEEP_UNTIL}', 1) where pg_sequence_last_value('${ASLEEP_UNTIL}') = $1::bigint`,
};

/** A table, or its schema, isn't there. */
const LACKING = new Set(['42P01', '3F000']);

/** Whether an error comes from nothing being there any more that was installed in the source. */
async function isUninstalled(client: Client | undefined, error: unknown): Promise<boolean> {
  if (client === undefined || !LACKING.has(databaseFailure(error)?.sqlstate ?? '')) return false;
  const { rows } = await client.query<{ gone: boolean }>(
    `select to_regclass('${CAPTURE_SCHEMA}.capture') is null or to_regclass('${ASLEEP_UNTIL}') is null as gone`,
  );
  return rows[0]?.gone === true;
}

interface Asking {
  resolve: (isMoved: boolean) => void;
  reject: (error: unknown) => void;
}

export function startMover({ source, capture, installation, follows, notifies, log }: MoverOptions): Mover {
  const signal = createSignal();
  let session: Session | null = null;
  /** The second up to which the triggers notify; null: awake. */
  let asleep: { until: string; since: number } | null = null;
  let busyAt = -Infinity;
  let wholeAt = -Infinity;
  let failures = 0;
  let asking: Asking[] = [];
  /** Why nothing is taken any more. */
  let ended: Error | null = null;
  const hasEnded = (): boolean => ended !== null;

  const listening: Listening | null =
    follows && notifies
      ? listen({
          pool: source,
          channel: CHANNEL,
          onNotify: () => {
            if (asleep !== null) signal.notify();
          },
          onGap: () => {
            wholeAt = -Infinity;
            signal.notify();
          },
          log,
        })
      : null;

  const take = async (client: Client): Promise<Taken> => {
    const asked = asking.length;
    const began = performance.now();
    // A timer may fire a little early.
    const whole = asked > 0 || began - wholeAt > LOOK_MS * 0.9;
    const taken = await capture.take(client, whole);
    if (whole) wholeAt = began;
    if (whole && !taken.isFull) for (const { resolve } of asking.splice(0, asked)) resolve(true);
    return taken;
  };
  const fallAsleep = async (client: Client): Promise<void> => {
    const { rows } = await client.query<{ until: string }>({ ...FALL_ASLEEP, values: [installation] });
    const [row] = rows;
    if (row === undefined) {
      throw new OperatorError(FOREIGN);
    }
    asleep = { until: row.until, since: performance.now() };
    failures = 0;
  };
  const wake = async (client: Client): Promise<void> => {
    if (asleep === null) return;
    const { until } = asleep;
    asleep = null;
    await client.query({ ...WAKE, values: [until] });
  };

  /** How long to wait for the next take. */
  const rest = async (client: Client, { found, isFull }: Taken): Promise<number> => {
    if (!follows) return asking.length > 0 ? 0 : NEVER_MS;
    const now = performance.now();
    if (found > 0) [busyAt, failures] = [now, 0];
    const isBusy = now - busyAt < IDLE_MS;
    const hears = listening?.isUp() ?? false;
    if (isBusy || !hears) {
      // The next statement waits for it, and tells if it fails.
      wake(client).catch(() => undefined);
      if (isFull || asking.length > 0) return 0;
      return isBusy ? AWAKE_MS : DEAF_MS;
    }
    if (asleep !== null && now - asleep.since < RENEW_MS) return LOOK_MS;
    const isNew = asleep === null;
    await fallAsleep(client);
    if (isNew) wholeAt = -Infinity;
    return isNew ? 0 : LOOK_MS;
  };

  const forget = (): void => {
    capture.forget();
    session?.close();
    session = null;
    asleep = null;
  };
  /** Whoever looks at the source finds it out, too, and ends this; unless it is installed again before. */
  const goWithout = (): void => {
    forget();
    for (const { resolve } of asking.splice(0)) resolve(false);
    failures += 1;
    if (failures === 1) log.warn('Nothing captures changes in the source any more: definitions are polled.');
  };
  const fail = (error: unknown): void => {
    forget();
    for (const { reject } of asking.splice(0)) reject(error);
    if (error instanceof LeaseLostError) {
      ended ??= error;
      return;
    }
    failures += 1;
    if (failures > 1 || ended !== null) return;
    if (error instanceof OperatorError) log.error(error.message);
    else log.failure('What has changed in the source cannot be taken; trying again', error);
  };

  const step = async (): Promise<number> => {
    if (!follows && asking.length === 0) return NEVER_MS;
    session ??= await openSource(source);
    return rest(session.client, await take(session.client));
  };
  const loop = async (): Promise<void> => {
    while (!hasEnded()) {
      try {
        const waitMs = await step();
        if (waitMs > 0) await signal.wait(waitMs);
      } catch (error) {
        if (await isUninstalled(session?.client, error).catch(() => false)) goWithout();
        else fail(error);
        if (!hasEnded()) await signal.wait(backoffMs(failures, RETRY, Math.random()));
      }
    }
    if (session === null) return;
    const { client, close } = session;
    try {
      await capture.sweep(client);
      await wake(client);
    } catch {
      // What has been moved is moved again, and the triggers stop notifying by themselves.
    }
    close();
  };
  const looping = loop();

  return {
    moveAll: () =>
      new Promise((resolve, reject) => {
        if (ended !== null) {
          reject(ended);
          return;
        }
        asking.push({ resolve, reject });
        signal.notify();
      }),
    stop: async () => {
      const stopped = new UnavailableError('Stopped.');
      ended ??= stopped;
      signal.notify();
      const late = setTimeout(() => session?.close(), STOP_MS);
      await looping;
      clearTimeout(late);
      for (const { reject } of asking.splice(0)) reject(stopped);
      asking = [];
      await listening?.stop();
    },
  };
}
