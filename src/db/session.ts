import type { Client, Pool } from './connect.js';

/**
 * A connection that is kept for statements that come again and again, prepared: planned once, for arrays of any length.
 * What it prepares and what temporary tables it has last as long as it does. It is never given back to the pool, whose
 * sessions have other settings.
 */
export interface Session {
  client: Client;
  /** Whether it can still be used; it never becomes so again. */
  isOpen: () => boolean;
  /** Ends it, also in the middle of a statement, which then fails. Twice does nothing more. */
  close: () => void;
}

/** A plan for one row must not be given up for the whole of a table because its pages were thought to lie on a slow disk. */
const SETTINGS = 'set plan_cache_mode = force_generic_plan; set random_page_cost = 1.1';

/** Opens a session; `prepare` makes what has to be there before its first statement, such as temporary tables. */
export async function openSession(
  pool: Pool,
  prepare: (client: Client) => Promise<unknown> = () => Promise.resolve(),
): Promise<Session> {
  const client = await pool.connect();
  let state: 'open' | 'broken' | 'closed' = 'open';
  const markBroken = (): void => {
    if (state === 'open') state = 'broken';
  };
  client.on('error', markBroken);
  client.on('end', markBroken);
  const session: Session = {
    client,
    isOpen: () => state === 'open',
    close: () => {
      if (state === 'closed') return;
      state = 'closed';
      client.release(true);
    },
  };
  try {
    await client.query(SETTINGS);
    await prepare(client);
  } catch (error) {
    session.close();
    throw error;
  }
  return session;
}

/**
 * A session that is opened when it is needed, and again after anything has failed on it, or when nothing was asked of it for
 * so long that it may have been dropped on the way without a word. One statement after the other.
 */
export interface KeptSession<T> {
  /** Throws what `work` throws, or what opening throws. */
  use: <R>(work: (opened: T) => Promise<R>) => Promise<R>;
  close: () => void;
}

const UNUSED_MS = 60_000;

/** `open` makes what the session is used by. */
export function keepSession<T>(pool: Pool, open: (client: Client) => Promise<T>): KeptSession<T> {
  let kept: { session: Session; opened: T } | null = null;
  let usedAt = 0;
  const close = (): void => {
    kept?.session.close();
    kept = null;
  };
  const openOne = async (): Promise<{ session: Session; opened: T }> => {
    const session = await openSession(pool);
    try {
      return { session, opened: await open(session.client) };
    } catch (error) {
      session.close();
      throw error;
    }
  };
  return {
    use: async (work) => {
      if (kept !== null && (!kept.session.isOpen() || performance.now() - usedAt > UNUSED_MS)) close();
      kept ??= await openOne();
      try {
        return await work(kept.opened);
      } catch (error) {
        close();
        throw error;
      } finally {
        usedAt = performance.now();
      }
    },
    close,
  };
}
