import type { GuardLimits } from './definition.js';

/**
 * The guard: whether a run may write what it found, or is held until a person approves it. An upstream fault must not
 * empty an audience. Small audiences move a lot by nature: the shares count from 1,000 members, emptying from 50.
 */
export interface Counts {
  /** Members before the run. */
  before: number;
  entered: number;
  exited: number;
  changed: number;
  /** The most values of any one field that would turn to null. */
  nulled: number;
}

export type GuardVerdict = { kind: 'passes' } | { kind: 'holds'; because: string };

const SHARES_COUNT_FROM = 1_000;
const EMPTYING_COUNTS_FROM = 50;
/** An approval covers a little more than the person saw. */
const APPROVED_MARGIN = 1.1;

const percent = (share: number): string => `${Math.round(share * 1000) / 10} %`;

/** Judges a run's counts. `first` is a definition's first run, which may grow as it likes. */
export function judgeGuard(limits: GuardLimits | null, counts: Counts, { first }: { first: boolean }): GuardVerdict {
  const { before, entered, exited, nulled } = counts;
  if (limits === null) return { kind: 'passes' };
  const after = before + entered - exited;
  const holds = (because: string): GuardVerdict => ({ kind: 'holds', because });
  if (after === 0 && before >= EMPTYING_COUNTS_FROM && limits.exits !== null) {
    return holds(`all ${before} members would exit`);
  }
  if (before < SHARES_COUNT_FROM) return { kind: 'passes' };
  if (limits.exits !== null && exited > before * limits.exits) {
    return holds(`${exited} of ${before} members would exit (over ${percent(limits.exits)})`);
  }
  if (limits.growth !== null && !first && after > before * (1 + limits.growth)) {
    return holds(`${before} members would become ${after} (over ${percent(limits.growth)} more)`);
  }
  if (limits.nulls !== null && nulled > before * limits.nulls) {
    return holds(`${nulled} of ${before} values would become null (over ${percent(limits.nulls)})`);
  }
  return { kind: 'passes' };
}

/** What a run or batch does together with what was done within the hour before it, as if it were one. */
export function overHour(counts: Counts, hour: Omit<Counts, 'before'>): Counts {
  return {
    before: counts.before - hour.entered + hour.exited,
    entered: counts.entered + hour.entered,
    exited: counts.exited + hour.exited,
    changed: counts.changed + hour.changed,
    nulled: counts.nulled + hour.nulled,
  };
}

/** Whether an approval of the counts `seen` covers a run that found `now`. */
export function isCovered(seen: Omit<Counts, 'before'>, now: Omit<Counts, 'before'>): boolean {
  return (['entered', 'exited', 'changed', 'nulled'] as const).every(
    (name) => now[name] <= seen[name] * APPROVED_MARGIN,
  );
}
