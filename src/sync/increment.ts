import type { Definition } from '../core/definition.js';
import type { Client } from '../db/connect.js';
import { evaluateBatch } from './batch.js';
import type { CompareContext } from './comparison.js';
import type { RunCounts } from './delta.js';
import { openBatchSession } from './evaluation.js';

/**
 * A scheduled run for the price of what changed: the profiles whose rows have changed since the last one, and those whose
 * window was reached. Each batch is a transaction of its own, as in real time; the run's record adds them up.
 */
export interface Increment {
  /** False: not all of it could be written singly; a run in full has to be made. */
  isComplete: boolean;
  evaluated: number;
  /** Null: nobody was evaluated. */
  counts: RunCounts | null;
}

const BATCH = 2_000;
/** Beyond this a run in full is the cheaper one, whatever it takes. */
const MOST_BATCHES = 100;

export async function runIncrement(
  context: CompareContext,
  definition: Definition,
  definitionId: number,
  runId: number,
): Promise<Increment> {
  const { databases } = context;
  const pool = databases.same ? databases.direct : databases.state.pool;
  const total: { evaluated: number; counts: RunCounts | null } = { evaluated: 0, counts: null };
  const client = await pool.connect();
  let source: Client | null = null;
  try {
    source = databases.same ? null : await databases.direct.connect();
    const session = await openBatchSession(context, client, source);
    for (let batch = 0; batch < MOST_BATCHES && context.signal?.aborted !== true; batch += 1) {
      const result = await evaluateBatch(session, definition, definitionId, { limit: BATCH, runId });
      if (result.kind === 'nothing') return { ...total, isComplete: true };
      if (result.kind !== 'written') break;
      total.evaluated += result.profiles;
      total.counts = together(total.counts, result.counts);
      if (!result.more) return { ...total, isComplete: true };
    }
    return { ...total, isComplete: false };
  } finally {
    // What the session has prepared is of no use to others.
    source?.release(true);
    client.release(true);
  }
}

/** The counts of one batch after the other, as of one run. */
function together(before: RunCounts | null, next: RunCounts | null): RunCounts | null {
  if (before === null || next === null) return next ?? before;
  return {
    before: before.before,
    members: next.members,
    entered: before.entered + next.entered,
    exited: before.exited + next.exited,
    changed: before.changed + next.changed,
    nulled: before.nulled + next.nulled,
    withoutIdentifier: before.withoutIdentifier + next.withoutIdentifier,
    conflicting: before.conflicting + next.conflicting,
    skippedValues: before.skippedValues + next.skippedValues,
  };
}
