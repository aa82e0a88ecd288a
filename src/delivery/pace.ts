/**
 * A quota, held exactly: never more than `perSecond` requests in any sliding second, and those evenly spaced. Pure: times
 * are milliseconds of one clock that never goes back.
 *
 * A ring keeps the times of the last `perSecond` requests; the next may begin when the oldest of them is more than a
 * window ago. The window is a little longer than a second, since jitter on the way can bring requests closer together.
 * The even pace may be caught up with after a stall, by 150 ms at most; idleness saves nothing up. A quota that is no
 * whole number, as half of five is, has the window in which the next whole number may go: three in 1.2 seconds.
 *
 * Others use the same quota, so it may turn out to be smaller than what was promised: a 429 pauses, and another within
 * 20 s of that pause lowers the rate to 70 %, again and again down to 5 %. Five seconds after the last of them it climbs back,
 * within a minute.
 */
export interface Pace {
  /** When the next request may begin. */
  opensAt: () => number;
  /** A request begins at `now`, which is `opensAt` or later. */
  take: (now: number) => void;
  /** Nobody has been waiting until now: nothing is to be caught up with. */
  rest: (now: number) => void;
  /** Lets nothing through for so long; a longer pause stands. */
  pauseFor: (ms: number, now: number) => void;
  /** Told that this is too fast (429), while it isn't paused for that already. */
  slowDown: (now: number) => void;
  pausedMs: (now: number) => number;
  /** Requests a second that it lets through at present. */
  perSecond: (now: number) => number;
  /** Until when the last request counts for the quota. */
  busyUntil: () => number;
}

/** A little more than the second for which quotas are given. */
export const QUOTA_WINDOW_MS = 1_020;
const CATCH_UP_MS = 150;
const SUSTAINED_MS = 20_000;
const SLOWER = 0.7;
const SLOWEST = 0.05;
const HOLD_MS = 5_000;
const CLIMB_MS = 60_000;

export function createPace(perSecond: number): Pace {
  const capacity = Math.ceil(perSecond);
  const window = (QUOTA_WINDOW_MS * capacity) / perSecond;
  const sends = new Float64Array(capacity).fill(-Infinity);
  let oldest = 0;
  let last = -Infinity;
  /** When the even pace has the next request. */
  let due = -Infinity;
  let pausedUntil = -Infinity;
  let askedAt = -Infinity;
  /** The share of the quota that was left when the rate was last lowered. */
  let share = 1;

  /** When it was last told to wait, or that wait ended. */
  const lastAsked = (): number => Math.max(askedAt, pausedUntil);
  const shareAt = (now: number): number =>
    share === 1 ? 1 : Math.min(1, share + Math.max(0, now - lastAsked() - HOLD_MS) / CLIMB_MS);

  return {
    opensAt: () => Math.max((sends[oldest] ?? -Infinity) + window, due, pausedUntil),
    take: (now) => {
      sends[oldest] = now;
      last = now;
      oldest = (oldest + 1) % capacity;
      due = Math.max(due, now - CATCH_UP_MS) + 1000 / perSecond / shareAt(now);
    },
    rest: (now) => {
      due = Math.max(due, now);
    },
    pauseFor: (ms, now) => {
      pausedUntil = Math.max(pausedUntil, now + ms);
    },
    slowDown: (now) => {
      // The answers of one moment say it once; they come while the pace is paused for the first of them.
      if (now < pausedUntil) return;
      share =
        askedAt > -Infinity && now - lastAsked() < SUSTAINED_MS
          ? Math.max(SLOWEST, shareAt(now) * SLOWER)
          : shareAt(now);
      askedAt = now;
    },
    pausedMs: (now) => Math.max(0, pausedUntil - now),
    perSecond: (now) => perSecond * shareAt(now),
    busyUntil: () => last + window,
  };
}
