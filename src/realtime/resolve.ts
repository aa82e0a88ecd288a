import { createHash } from 'node:crypto';
import type { Client } from '../db/connect.js';
import { databaseFailure, isUnreachable } from '../db/failure.js';

/**
 * Finds, in the source, the profiles that captured keys lead to. The statement is a person's: it may fail, or take long. So
 * it runs in a transaction of its own that may only read, for some seconds at most, and one that has failed isn't run again
 * for a minute: what it concerns waits for a run in full, all else goes on.
 */
export type Found =
  | { kind: 'profiles'; ids: readonly string[] }
  /** So many that comparing everybody is better; or this time it couldn't be known. */
  | { kind: 'everybody' }
  /** The statement fails. */
  | { kind: 'fails'; sentence: string };

/** `source` is in no transaction and is left in none. Throws where the database is out of reach. */
export type Resolve = (source: Client, sql: string, keys: ReadonlySet<string>) => Promise<Found>;

/** More profiles than these aren't looked at one by one. */
export const MOST_PROFILES = 50_000;
/** A server that hasn't answered by then won't. */
export const ANSWER_MS = 15_000;
const RESOLVE_MS = 5_000;
const FAILS_MS = 60_000;
/** At another moment it would have passed: nothing is wrong with the statement. */
const PASSING = new Set(['40001', '40P01', '55P03']);
/** A prepared statement that no longer fits its tables, or isn't there. */
const STALE = new Set(['0A000', '26000']);

const BEGIN = `begin read only; set local enable_seqscan = on; set local statement_timeout = ${RESOLVE_MS}`;

export function createResolve(): Resolve {
  /** What fails, and until when it isn't tried. */
  const failing = new Map<string, { until: number; sentence: string }>();
  return async (source, sql, keys) => {
    const known = failing.get(sql);
    if (known !== undefined && performance.now() < known.until) return { kind: 'fails', sentence: known.sentence };
    failing.delete(sql);
    try {
      const ids = await find(source, sql, [...keys]);
      return ids.length > MOST_PROFILES ? { kind: 'everybody' } : { kind: 'profiles', ids };
    } catch (error) {
      const failure = databaseFailure(error);
      if (failure === null || isUnreachable(error)) throw error;
      await source.query('rollback');
      if (PASSING.has(failure.sqlstate)) return { kind: 'everybody' };
      const sentence = `The SQL in \`changes\` that finds whose rows have changed ${failure.sentence}.`;
      failing.set(sql, { until: performance.now() + FAILS_MS, sentence });
      return { kind: 'fails', sentence };
    }
  };
}

/** One more than too many at most. */
async function find(source: Client, sql: string, keys: readonly string[]): Promise<readonly string[]> {
  const ask = async (name: { name?: string }): Promise<readonly string[]> => {
    await source.query(BEGIN);
    const asked = {
      ...name,
      text: `select * from (${sql}\n) as found limit ${MOST_PROFILES + 1}`,
      values: [keys],
      query_timeout: ANSWER_MS,
      rowMode: 'array' as const,
    };
    const { rows } = await source.query<[string | null]>(asked);
    await source.query('commit');
    return rows.flatMap(([id]) => (id === null ? [] : [id]));
  };
  try {
    return await ask({ name: createHash('sha256').update(sql).digest('hex').slice(0, 40) });
  } catch (error) {
    if (!STALE.has(databaseFailure(error)?.sqlstate ?? '')) throw error;
    await source.query('rollback');
    return ask({});
  }
}
