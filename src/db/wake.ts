import type { Logger } from '../lib/logger.js';
import { togetherMs } from '../lib/together.js';
import type { Pool, Queryable } from './connect.js';
import { listen, type Listening } from './listen.js';

/**
 * What a person asks for is a row that whoever leads finds by looking. So that it needn't look all the time, the command
 * says on a channel that there is something; what is lost is found by the next look.
 */
const CHANNEL = 'personas_state';

/** Has whoever leads look at once; what there is to be found has been committed. */
export async function wakeLeader(pool: Queryable): Promise<void> {
  await pool.query(`select pg_notify('${CHANNEL}', '')`);
}

const HEARD_LOOK_MS = 1_000;

export interface Wakes {
  /**
   * How long to wait before looking again at what commands change: `deafMs`, but up to a second while they are heard.
   */
  lookMs: (deafMs: number) => number;
  stop: () => Promise<void>;
}

/** `onWake` must not throw. */
export function hearWakes(pool: Pool, log: Logger, onWake: () => void): Wakes {
  const listening: Listening = listen({ pool, channel: CHANNEL, onNotify: onWake, onGap: onWake, log });
  return {
    lookMs: (deafMs) => (listening.isUp() ? togetherMs(HEARD_LOOK_MS) : deafMs),
    stop: listening.stop,
  };
}
