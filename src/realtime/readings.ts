import { createHash } from 'node:crypto';
import type { Config } from '../config/types.js';
import type { Definition, SqlText } from '../core/definition.js';
import { bindMoments } from '../core/moments.js';
import { withClient, type Client, type Pool } from '../db/connect.js';
import { databaseFailure, isUnreachable } from '../db/failure.js';
import { momentsAt } from '../sync/comparison.js';
import { sourcesOf } from './sources.js';

/**
 * How definitions are evaluated, the views and functions of the source that they read by included: when one of those is
 * replaced, a definition means something else though its own text is what it was. They are looked at once a minute.
 */
export type Readings = (
  config: Pick<Config, 'profiles'>,
  definitions: readonly Definition[],
  evaluates: ReadonlyMap<string, string>,
) => Promise<ReadonlyMap<string, string>>;

const READ_FOR_MS = 60_000;
/** Reading the catalogue takes milliseconds; more is a view that somebody holds. */
const PATIENCE_MS = 5_000;

/** Gives for each of `evaluates`, the hashes of what the configuration says of a definition, one that covers these too. */
export function createReadings(source: Pool): Readings {
  const known = new Map<string, { texts: readonly string[]; until: number }>();

  const behind = async (text: SqlText, lookback: Pick<Definition, 'lookback'>): Promise<readonly string[]> => {
    const { text: sql } = bindMoments(text.sql, momentsAt('now', lookback));
    const before = known.get(sql);
    if (before !== undefined && performance.now() < before.until) return before.texts;
    const texts = (await withClient(source, (client) => read(client, sql))) ?? before?.texts ?? [];
    known.set(sql, { texts, until: performance.now() + READ_FOR_MS });
    return texts;
  };

  return async ({ profiles }, definitions, evaluates) => {
    const covering = new Map<string, string>();
    for (const definition of definitions) {
      const hash = evaluates.get(definition.key);
      if (hash === undefined) continue;
      const texts = [
        ...(await behind(definition.text, definition)),
        ...(await behind(profiles.text, { lookback: null })),
      ];
      covering.set(definition.key, texts.length === 0 ? hash : hashOf([hash, ...texts]));
    }
    return covering;
  };
}

/** Null where it can't be known now. */
async function read(client: Client, sql: string): Promise<readonly string[] | null> {
  await client.query(`begin transaction read only; set local statement_timeout = ${PATIENCE_MS}`);
  try {
    const sources = await sourcesOf(client, sql);
    return sources.kind === 'read' ? sources.behind : [];
  } catch (error) {
    if (isUnreachable(error) || databaseFailure(error) === null) throw error;
    return null;
  } finally {
    await client.query('rollback');
  }
}

const hashOf = (texts: readonly string[]): string => createHash('sha256').update(JSON.stringify(texts)).digest('hex');
