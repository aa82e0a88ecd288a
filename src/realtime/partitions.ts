import type { Pool } from '../db/connect.js';
import { databaseFailure, isUnreachable } from '../db/failure.js';
import { backoffMs } from '../lib/backoff.js';
import type { Logger } from '../lib/logger.js';
import type { Inspection, Node, TableState } from './catalogue.js';
import { attempt } from './install.js';
import { createTriggers, tableName, type SourceTable } from './trigger-sql.js';

/**
 * Gives partitions that have come the triggers of their table. `install` was a person's word that the table may have them,
 * and a partition is one more place where its rows are. What must hold:
 *
 * - Nothing that a person has undone is done again: a partition that had its triggers before is left alone, and so is a
 *   table of which anything else isn't as `install` made it.
 * - Writers wait for half a second at most, and seldom: a partition that somebody holds is tried again after a while that
 *   doubles.
 * - One that the role may make no triggers on isn't tried: it would be locked for nothing.
 */
export interface Partitions {
  /**
   * Returns whether any triggers were made. `covered` gives what of a table has been seen with its triggers, by `Node.id`.
   * Throws where the source is out of reach.
   */
  complete: (found: Inspection, covered: (table: SourceTable) => readonly string[]) => Promise<boolean>;
}

/** No more are tried at once after this; the last may take a lock's time longer. */
const TRY_FOR_MS = 2_000;
const AGAIN = { firstMs: 1_000, longestMs: 60_000 };
/** Dropped since it was looked at: the partition, the function, or the schema. */
const IS_GONE = new Set(['42P01', '42883', '3F000']);

/** The partitions that have come, of a table that can be completed by their triggers. */
export function newPartitions(
  { watched: { table }, nodes, function: of, mayCall }: TableState,
  covered: readonly string[],
): readonly Node[] {
  const isRoot = ({ schema, name }: Node): boolean => schema === table.schema && name === table.name;
  const lacking = nodes.filter(({ state }) => state !== 'fine');
  const isNew = (node: Node): boolean => node.state === 'missing' && !isRoot(node) && !covered.includes(node.id);
  const isPossible =
    of === 'fine' && mayCall && nodes.some(isRoot) && lacking.every((node) => isNew(node) && node.mayTrigger);
  return isPossible ? lacking : [];
}

export function createPartitions(source: Pool, log: Logger): Partitions {
  /** Those that couldn't be completed, by `Node.id`. */
  let failed = new Map<string, { times: number; until: number }>();

  const make = async ({ watched: { table } }: TableState, node: Node): Promise<boolean> => {
    const times = (failed.get(node.id)?.times ?? 0) + 1;
    try {
      if (await attempt(source, createTriggers(table, node))) {
        log.info(`The new partition ${tableName(node)} has the triggers of ${tableName(table)} now.`);
        return true;
      }
    } catch (error) {
      const failure = databaseFailure(error);
      if (failure === null || isUnreachable(error)) throw error;
      if (times === 1 && !IS_GONE.has(failure.sqlstate))
        log.warn(`Making the triggers of the new partition ${tableName(node)} ${failure.sentence}.`);
    }
    failed.set(node.id, { times, until: performance.now() + backoffMs(times, AGAIN, Math.random()) });
    return false;
  };

  return {
    complete: async ({ capture, tables }, covered) => {
      if (capture.kind !== 'fine') return false;
      const ends = performance.now() + TRY_FOR_MS;
      const wanted = tables.flatMap((table) =>
        newPartitions(table, covered(table.watched.table)).map((node) => ({ table, node })),
      );
      const ids = new Set(wanted.map(({ node }) => node.id));
      failed = new Map([...failed].filter(([id]) => ids.has(id)));
      let made = false;
      for (const { table, node } of wanted) {
        const now = performance.now();
        if (now > ends) break;
        if (now >= (failed.get(node.id)?.until ?? 0)) made = (await make(table, node)) || made;
      }
      return made;
    },
  };
}
