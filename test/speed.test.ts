import { describe, expect, it } from 'vitest';
import { learnSpeed, tooSlowMs, UNKNOWN_SPEED, type Speed } from '../src/core/speed.js';

/** The speed after batches of so many profiles, each profile of which took so long, one every so many milliseconds. */
function after(batches: readonly number[], { profiles = 1, everyMs = 5_000 } = {}): { speed: Speed; now: number } {
  let [speed, now] = [UNKNOWN_SPEED, 1_000];
  for (const eachMs of batches) {
    now += everyMs;
    speed = learnSpeed(speed, { profiles, tookMs: eachMs * profiles }, now);
  }
  return { speed, now };
}
const verdict = ({ speed, now }: { speed: Speed; now: number }): number | null => tooSlowMs(speed, now);

describe('a definition', () => {
  it('is too slow when each of five batches in a row took more than 50 ms a profile', () => {
    expect(verdict(after([60, 70, 80, 51]))).toBeNull();
    expect(verdict(after([60, 70, 80, 51, 90]))).toBe(51);
  });

  it('is not too slow when one of them was fast, or when all of them ran within a busy moment', () => {
    expect(verdict(after([60, 70, 50, 80, 90]))).toBeNull();
    expect(verdict(after([60, 70, 80, 90, 100, 110], { everyMs: 1_000 }))).toBeNull();
  });

  it('counts what each profile takes, so a large batch may take long', () => {
    expect(verdict(after([4, 4, 4, 4, 4, 4], { profiles: 500 }))).toBeNull();
  });

  it('is known by its batches of many, of which the last ones count most', () => {
    expect(after([30, 30, 30]).speed.perProfileMs).toBe(UNKNOWN_SPEED.perProfileMs);
    const { perProfileMs } = after(
      Array.from({ length: 30 }, () => 2),
      { profiles: 100 },
    ).speed;
    expect(perProfileMs).toBeGreaterThan(1.99);
    expect(perProfileMs).toBeLessThan(2);
  });
});
