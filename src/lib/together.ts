/** A timer may fire a little early. */
const EARLY_MS = 5;

/**
 * How long to wait for the next moment at which everybody wakes who looks every `everyMs`, which is no longer than that but
 * for a timer's inaccuracy: for a process that sleeps, waking costs more than looking.
 */
export function togetherMs(everyMs: number, now = performance.now()): number {
  const leftMs = everyMs - (now % everyMs);
  return leftMs > EARLY_MS ? leftMs : leftMs + everyMs;
}
