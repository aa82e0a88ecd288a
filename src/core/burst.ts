/** Fewer are evaluated singly whatever that costs: a run in full would make everybody else's changes wait for it. */
const FEWEST = 2_000;
/** More don't wait in the queue, also where nobody evaluates them: a definition that is held or paused. */
export const MOST_WAITING = 100_000;
/** A run in full is taken only where it is clearly cheaper: both are estimates. */
const CLEARLY = 1.2;

export interface Burst {
  /** Profiles that wait to be evaluated. */
  waiting: number;
  /** What evaluating one of them takes, within a batch of many. */
  perProfileMs: number;
  /** What a run in full takes; null: there has been none. */
  fullMs: number | null;
}

/** Whether comparing everybody is the better way to evaluate those who wait. */
export function isFullCheaper({ waiting, perProfileMs, fullMs }: Burst): boolean {
  if (waiting > MOST_WAITING) return true;
  return fullMs !== null && waiting > FEWEST && waiting * perProfileMs > fullMs * CLEARLY;
}
