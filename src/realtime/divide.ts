import type { Pool } from '../db/connect.js';
import type { BatchResult } from '../sync/batch.js';
import { park, readWaiting } from '../sync/waiting.js';
import { judgeTrouble } from './trouble.js';

/** More that fail than these aren't a few strange rows: it is the definition. */
const MOST_PARKED = 20;

interface Waiting {
  id: number;
  profileId: string;
}

export interface Division {
  state: Pool;
  definitionId: number;
  /** How many rows the batch that failed had at most. */
  limit: number;
  evaluate: (ids: readonly number[]) => Promise<BatchResult>;
}

/**
 * Evaluates what waits in ever smaller parts, each by itself, until the profiles whose rows make it fail are alone. These
 * are parked, all others are evaluated. Throws what fails for other reasons, and where it fails for too many.
 */
export async function divide({ state, definitionId, limit, evaluate }: Division): Promise<BatchResult> {
  const total = { profiles: 0, changed: 0 };
  let parked = 0;
  /** A result where no part of it may be written at present; otherwise null. */
  const tryAll = async (rows: readonly Waiting[]): Promise<BatchResult | null> => {
    const ids = rows.map(({ id }) => id);
    try {
      const result = await evaluate(ids);
      if (result.kind === 'waits' || result.kind === 'holds') return result;
      if (result.kind === 'written') {
        total.profiles += result.profiles;
        total.changed += result.changed;
      }
      return null;
    } catch (error) {
      const trouble = judgeTrouble(error);
      if (trouble.kind !== 'data' || parked === MOST_PARKED) throw error;
      const halves = halve(rows);
      if (halves !== null) return (await tryAll(halves[0])) ?? (await tryAll(halves[1]));
      parked += 1;
      await park(state, definitionId, ids, trouble.sentence);
      return null;
    }
  };
  const rows = await readWaiting(state, definitionId, limit);
  if (rows.length === 0) return { kind: 'nothing' };
  return (await tryAll(rows)) ?? { kind: 'written', ...total, raisedFrom: null, counts: null, more: true };
}

/** Two halves by profile, whose rows stay together; null where there is but one. */
export function halve(rows: readonly Waiting[]): readonly [readonly Waiting[], readonly Waiting[]] | null {
  const profiles = [...new Set(rows.map(({ profileId }) => profileId))];
  if (profiles.length < 2) return null;
  const first = new Set(profiles.slice(0, Math.ceil(profiles.length / 2)));
  return [rows.filter(({ profileId }) => first.has(profileId)), rows.filter(({ profileId }) => !first.has(profileId))];
}
