/**
 * The token bucket that stands before an endpoint: it holds as many tokens as its quota, each request takes one, and they
 * come back evenly over the quota's window.
 */

/** So many requests in a window of so many milliseconds. */
export interface Quota {
  requests: number;
  windowMs: number;
}

export type Grant = { kind: 'granted' } | { kind: 'refused'; resetSeconds: number; remaining: number; limit: number };

export interface Bucket {
  /** Takes a token. `nowMs` is a monotonic time. */
  take: (nowMs: number) => Grant;
}

/** Refilling in steps never quite makes a whole token. */
const ROUNDING = 1e-9;

/** `tolerance` is the share above the quota that is let through all the same. */
export function createBucket({ requests, windowMs }: Quota, tolerance: number): Bucket {
  const capacity = Math.max(1, requests) * (1 + tolerance);
  const perMs = (requests * (1 + tolerance)) / windowMs;
  let tokens = capacity;
  let filledAt = -Infinity;
  return {
    take: (nowMs) => {
      tokens = Math.min(capacity, tokens + Math.max(0, nowMs - filledAt) * perMs);
      filledAt = nowMs;
      if (tokens > 1 - ROUNDING) {
        tokens = Math.max(0, tokens - 1);
        return { kind: 'granted' };
      }
      const resetSeconds = Math.ceil((1 - tokens) / perMs / 1000);
      return { kind: 'refused', resetSeconds, remaining: Math.floor(tokens), limit: requests };
    },
  };
}
