/**
 * The wait before repeat `attempt` (1 is the first): it doubles up to the longest, and is anything from half of that to
 * the whole of it, by `random` from 0 up to 1.
 */
export function backoffMs(
  attempt: number,
  { firstMs, longestMs }: { firstMs: number; longestMs: number },
  random: number,
): number {
  const whole = Math.min(longestMs, firstMs * 2 ** Math.min(attempt - 1, 30));
  return Math.round(whole * (0.5 + random / 2));
}
