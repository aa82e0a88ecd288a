import type { Pool } from './connect.js';

/**
 * Waits until all that has been committed before the call is on disk. Several calls at once are one flush of the log.
 *
 * What a crash of the server may take back without harm, since it is then done again, commits without waiting for the disk
 * (`synchronous_commit = off`); whoever acts on it outside of the database waits for this first. A crash takes back the
 * newest commits only, never one of two in a row without the other: the log is written in order
 * (https://www.postgresql.org/docs/current/wal-async-commit.html).
 */
export type Flush = () => Promise<void>;

/**
 * A record in the log that nobody reads: a transaction that writes nothing to it doesn't wait for it. It waits whatever its
 * session does otherwise: a pooler may have lent that to one that doesn't.
 */
const FLUSH = `select set_config('synchronous_commit', 'on', true), pg_logical_emit_message(true, 'personas', '')`;

export function createFlush(pool: Pool): Flush {
  let running: Promise<void> | null = null;
  let next: Promise<void> | null = null;
  const begin = (): Promise<void> => {
    next = null;
    running = pool
      .query(FLUSH)
      .then(() => undefined)
      .finally(() => {
        running = null;
      });
    return running;
  };
  return () => {
    if (running === null) return begin();
    // What runs may have begun before the commit.
    next ??= running.then(begin, begin);
    return next;
  };
}
