import { backoffMs } from '../lib/backoff.js';
import type { Logger } from '../lib/logger.js';
import { until, within } from '../lib/until.js';
import { quoteIdentifier, type Client, type Pool } from './connect.js';

/**
 * Hears the notifications of a channel. Some are lost: whatever comes while no connection listens. So `onGap` says, once
 * for each connection and after it has begun to listen, that there may have been some.
 *
 *   away ──connected, LISTEN──▶ up ──connection broken, or no answer to the heartbeat──▶ away, again after a wait
 *
 * A connection whose server has gone without a word looks like one on which nothing happens, and a pooler can put another
 * backend behind it, which listens to nothing: so the heartbeat asks the backend what it listens to.
 */
export interface Listening {
  /** Whether a notification of now would be heard, as far as is known. */
  isUp: () => boolean;
  stop: () => Promise<void>;
}

export interface ListenOptions {
  pool: Pool;
  channel: string;
  onNotify: () => void;
  onGap: () => void;
  log: Logger;
  /** How often it is asked whether the connection still listens, and how long an answer may take. */
  heartbeat?: { everyMs: number; answerMs: number };
}

const HEARTBEAT = { everyMs: 5_000, answerMs: 2_000 };
const RETRY = { firstMs: 100, longestMs: 5_000 };

class DeafError extends Error {
  constructor() {
    super('The connection no longer listens.');
    this.name = 'DeafError';
  }
}

/** Listens until stopped. `onNotify` and `onGap` must not throw. */
export function listen(options: ListenOptions): Listening {
  const { pool, channel, onNotify, onGap, log, heartbeat = HEARTBEAT } = options;
  const stopping = new AbortController();
  let isUp = false;
  let failures = 0;

  /** Returns when stopped; throws when the connection broke or listens no more. */
  const hear = async (client: Client): Promise<void> => {
    const ended = new AbortController();
    const either = AbortSignal.any([ended.signal, stopping.signal]);
    const end = (): void => {
      isUp = false;
      ended.abort();
    };
    client.on('error', end);
    client.on('end', end);
    client.on('notification', onNotify);
    await client.query(`listen ${quoteIdentifier(channel)}`);
    isUp = true;
    onGap();
    for (;;) {
      await until(heartbeat.everyMs, either);
      if (stopping.signal.aborted) return;
      const answered = client.query<{ channel: string }>('select pg_listening_channels() as channel');
      // What comes after the time is of no interest any more, a failure neither.
      answered.catch(() => undefined);
      const answer = await within(heartbeat.answerMs, answered);
      if (answer?.rows.some((row) => row.channel === channel) !== true) throw new DeafError();
      failures = 0;
    }
  };
  const loop = async (): Promise<void> => {
    while (!stopping.signal.aborted) {
      try {
        const client = await pool.connect();
        try {
          await hear(client);
        } finally {
          isUp = false;
          client.removeListener('notification', onNotify);
          client.release(true);
        }
      } catch (error) {
        failures += 1;
        if (failures === 1) log.failure('Notifications cannot be heard; listening again', error, { channel });
        await until(backoffMs(failures, RETRY, Math.random()), stopping.signal);
      }
    }
  };
  const looping = loop();
  return {
    isUp: () => isUp,
    stop: async () => {
      stopping.abort();
      await looping;
    },
  };
}
