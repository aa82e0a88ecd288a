import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { createPace, type Pace } from '../src/delivery/pace.js';

/** Sends whenever the pace allows, from `from` until `to`, looking every `step` milliseconds; gives the times. */
function sendAll(pace: Pace, from: number, to: number, step = 1): number[] {
  const sends: number[] = [];
  for (let now = from; now < to; now += step) {
    while (pace.opensAt() <= now) {
      pace.take(now);
      sends.push(now);
    }
  }
  return sends;
}

/** The most of `times`, which ascend, in any window that is open at one end. */
function mostWithin(times: readonly number[], windowMs: number): number {
  let first = 0;
  return times.reduce((most, time, last) => {
    while ((times[first] ?? time) <= time - windowMs) first += 1;
    return Math.max(most, last - first + 1);
  }, 0);
}

describe('the pace', () => {
  it.each([1, 5, 10, 100, 500, 2_000])(
    'lets through almost all of %i a second, and never more in any second',
    (perSecond) => {
      const pace = createPace(perSecond);
      pace.rest(0);
      const sends = sendAll(pace, 0, 20_000);
      expect(mostWithin(sends, 1_000)).toBeLessThanOrEqual(perSecond);
      expect(sends.length).toBeGreaterThanOrEqual(20 * perSecond * 0.97);
    },
  );

  it.each([
    [0.5, 2_000],
    [0.1, 10_000],
  ])('spaces %d a second by %i ms', (perSecond, gapMs) => {
    const pace = createPace(perSecond);
    const sends = sendAll(pace, 0, 10 * gapMs);
    const gaps = sends.slice(1).map((at, index) => at - (sends[index] ?? 0));
    expect(Math.min(...gaps)).toBeGreaterThanOrEqual(gapMs);
    expect(Math.max(...gaps)).toBeLessThanOrEqual(1.02 * gapMs);
  });

  it.each([1.5, 2.5, 3.5, 4.5, 12.5])('keeps and reaches a quota of %d, which is no whole number', (perSecond) => {
    const sends = sendAll(createPace(perSecond), 0, 60_000);
    expect(mostWithin(sends, 1_000)).toBeLessThanOrEqual(Math.ceil(perSecond));
    expect(mostWithin(sends, 2_000)).toBeLessThanOrEqual(2 * perSecond + 1);
    expect(sends.length).toBeGreaterThanOrEqual(60 * perSecond * 0.97);
    expect(sends.length).toBeLessThanOrEqual(60 * perSecond + 1);
  });

  it('keeps the quota in every second, whatever stalls, pauses and whoever comes', () => {
    const step = fc.oneof(
      fc.record({ kind: fc.constant('send' as const), ms: fc.integer({ min: 1, max: 1_500 }) }),
      fc.record({ kind: fc.constant('stall' as const), ms: fc.integer({ min: 1, max: 1_500 }) }),
      fc.record({ kind: fc.constant('rest' as const), ms: fc.integer({ min: 1, max: 5_000 }) }),
      fc.record({ kind: fc.constant('pause' as const), ms: fc.integer({ min: 1, max: 800 }) }),
    );
    fc.assert(
      fc.property(fc.integer({ min: 1, max: 60 }), fc.array(step, { maxLength: 30 }), (perSecond, steps) => {
        const pace = createPace(perSecond);
        const sends: number[] = [];
        const pauses: { from: number; to: number }[] = [];
        let now = 0;
        for (const { kind, ms } of steps) {
          if (kind === 'pause') {
            pace.pauseFor(ms, now);
            pauses.push({ from: now, to: now + ms });
            continue;
          }
          if (kind === 'send') sends.push(...sendAll(pace, now, now + ms));
          now += ms;
          if (kind === 'rest') pace.rest(now);
        }
        sends.push(...sendAll(pace, now, now + 3_000));
        expect(mostWithin(sends, 1_000)).toBeLessThanOrEqual(perSecond);
        expect(sends.filter((at) => pauses.some(({ from, to }) => at >= from && at < to))).toEqual([]);
      }),
      { numRuns: 300 },
    );
  });

  it('spaces requests evenly', () => {
    const sends = sendAll(createPace(100), 0, 400);
    const gaps = sends.slice(1).map((at, index) => at - (sends[index] ?? 0));
    expect(new Set(gaps.slice(15))).toEqual(new Set([10]));
  });

  it('makes up for a stall of 150 ms at most', () => {
    const pace = createPace(100);
    pace.rest(0);
    sendAll(pace, 0, 100);
    expect(sendAll(pace, 800, 801).length).toBeLessThanOrEqual(16);
    const again = createPace(100);
    again.rest(0);
    sendAll(again, 0, 100);
    expect(sendAll(again, 200, 201).length).toBeLessThanOrEqual(11);
  });

  it('saves up nothing while nobody comes', () => {
    const pace = createPace(100);
    pace.take(0);
    pace.rest(10_000);
    expect(sendAll(pace, 10_000, 10_001)).toHaveLength(1);
  });

  it('lets nobody in while it is paused, and the longer pause stands', () => {
    const pace = createPace(100);
    pace.pauseFor(2_000, 0);
    pace.pauseFor(500, 0);
    expect(pace.pausedMs(0)).toBe(2_000);
    expect(sendAll(pace, 0, 2_000)).toEqual([]);
    expect(sendAll(pace, 2_000, 2_001).length).toBeGreaterThan(0);
  });
});

describe('the pace that is told to wait', () => {
  const refuse = (pace: Pace, now: number): void => {
    pace.slowDown(now);
    pace.pauseFor(1_000, now);
  };

  it('keeps its rate when it is paused for another reason', () => {
    const pace = createPace(500);
    for (let at = 0; at < 60_000; at += 2_000) pace.pauseFor(1_000, at);
    expect(pace.perSecond(60_000)).toBe(500);
  });

  it('keeps its rate after one 429, since that may have been an accident', () => {
    const pace = createPace(500);
    for (let n = 0; n < 50; n += 1) refuse(pace, n);
    expect(pace.perSecond(60)).toBe(500);
    expect(pace.perSecond(1_100)).toBe(500);
  });

  it('slows down where it is told again and again, down to a twentieth', () => {
    const pace = createPace(500);
    refuse(pace, 0);
    refuse(pace, 2_000);
    expect(pace.perSecond(2_000)).toBeCloseTo(350);
    refuse(pace, 4_000);
    expect(pace.perSecond(4_000)).toBeCloseTo(245);
    for (let at = 6_000; at < 60_000; at += 2_000) refuse(pace, at);
    expect(pace.perSecond(58_000)).toBeCloseTo(25);
    expect(sendAll(pace, 60_000, 61_000).length).toBeLessThanOrEqual(29);
  });

  it('slows down however long the pauses are', () => {
    const pace = createPace(500);
    for (let at = 0; at < 600_000; at += 61_000) {
      pace.slowDown(at);
      pace.pauseFor(60_000, at);
    }
    expect(pace.perSecond(600_000)).toBeCloseTo(25);
  });

  it('climbs back within some seconds more than a minute, and holds its quota then', () => {
    const pace = createPace(500);
    for (let at = 0; at < 60_000; at += 2_000) refuse(pace, at);
    const last = 58_000;
    expect(pace.perSecond(last + 6_000)).toBeCloseTo(25);
    expect(pace.perSecond(last + 36_000)).toBeCloseTo(275);
    expect(pace.perSecond(last + 66_000)).toBe(500);
    const sends = sendAll(pace, last + 1_000, last + 90_000);
    expect(mostWithin(sends, 1_000)).toBeLessThanOrEqual(500);
    expect(sends.filter((at) => at > last + 70_000 && at <= last + 80_000).length).toBeGreaterThan(4_850);
  });
});
