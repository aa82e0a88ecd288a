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

/** A session that is opened when it is needed, and again after anything has failed on it. One statement after the other. */
export interface KeptSession {
  /** Throws what `work` throws, or what opening throws. */
  use: <T>(work: (client: Client) => Promise<T>) => Promise<T>;
  close: () => void;
}

export function keepSession(pool: Pool, prepare?: (client: Client) => Promise<unknown>): KeptSession {
  let session: Session | null = null;
  const close = (): void => {
    session?.close();
    session = null;
  };
  return {
    use: async (work) => {
      if (session?.isOpen() === false) close();
      session ??= await openSession(pool, prepare);
      try {
        return await work(session.client);
      } catch (error) {
        close();
        throw error;
      }
    },
    close,
  };
}
