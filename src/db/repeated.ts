import type pg from 'pg';
import type { Client, Runner } from './connect.js';

/**
 * Statements that come again and again on a connection that is kept. A text is prepared when it first comes, and run by its
 * name from then on; and a statement doesn't wait for the answer to the one before. So a transaction of thirty statements
 * costs as many short messages instead of as many parsings, plans and waits.
 *
 * What must hold:
 * - Texts are constant: what differs from time to time is a parameter, or a setting of the transaction.
 * - Whoever sends several before the first is answered waits for them by `Promise.all`: after one that fails, those behind
 *   it in the transaction fail, too, and the first failure is the one that tells why.
 */
export interface Repeated extends Runner {
  /** Several statements without parameters as one message; what they give isn't read. */
  all: (text: string) => Promise<unknown>;
}

/** Texts that would be prepared beyond these are run without: they can't be constant. */
const MOST = 1_000;

export function repeat(client: Client): Repeated {
  // An option of a connection, which a pool would give to all of its connections; a cursor or COPY can't be had with it.
  Object.assign(client, { pipeline: true });
  const names = new Map<string, string>();
  const nameOf = (text: string): string | undefined => {
    const known = names.get(text);
    if (known !== undefined || names.size >= MOST) return known;
    const name = `personas_${names.size + 1}`;
    names.set(text, name);
    return name;
  };
  return {
    query: <R extends pg.QueryResultRow>(text: string, values: unknown[] = []) => {
      const name = nameOf(text);
      return client.query<R>(name === undefined ? { text, values } : { name, text, values });
    },
    all: (text) => client.query(text),
  };
}
