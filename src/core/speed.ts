/** A profile that is evaluated by itself may take so long; the same for each of many. */
const MOST_MS = 50;
/** Slow so often and for so long without exception: it isn't the machine that was busy for a moment. */
const OFTEN = 5;
const LONG_MS = 10_000;
/** Of few one learns what a batch costs, not what a profile does. */
const MANY = 20;
const FIRST_GUESS_MS = 0.2;
const WEIGHT = 0.2;

/** How fast profiles of a definition are evaluated. */
export interface Speed {
  /** Of one, within a batch of many. */
  perProfileMs: number;
  /** Batches in a row in which a profile took too long, since when, and the least that one took. */
  slow: { count: number; since: number; leastMs: number } | null;
}

export const UNKNOWN_SPEED: Speed = { perProfileMs: FIRST_GUESS_MS, slow: null };

/** The speed after a batch that ended at `now`, in milliseconds of any clock. */
export function learnSpeed(
  speed: Speed,
  { profiles, tookMs }: { profiles: number; tookMs: number },
  now: number,
): Speed {
  const eachMs = tookMs / profiles;
  const perProfileMs =
    profiles < MANY ? speed.perProfileMs : speed.perProfileMs + (eachMs - speed.perProfileMs) * WEIGHT;
  if (eachMs <= MOST_MS) return { perProfileMs, slow: null };
  const { count, since, leastMs } = speed.slow ?? { count: 0, since: now, leastMs: eachMs };
  return { perProfileMs, slow: { count: count + 1, since, leastMs: Math.min(leastMs, eachMs) } };
}

/** What a profile takes at least, where that is too long for changes to be followed at once; otherwise null. */
export function tooSlowMs({ slow }: Speed, now: number): number | null {
  return slow !== null && slow.count >= OFTEN && now - slow.since >= LONG_MS ? slow.leastMs : null;
}
