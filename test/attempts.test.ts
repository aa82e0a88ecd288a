import { describe, expect, it } from 'vitest';
import { again, giveUp, isDoubtful, waitFor } from '../src/delivery/attempts.js';
import { singleOut, type Part, type Parts } from '../src/delivery/parts.js';
import type { WaitingMark } from '../src/outbox/queue.js';

/** What failing again and again comes to. */
const row = (attempts = 0): { id: number; version: number; attempts: number } => ({ id: 7, version: 9, attempts });
const FAILED = { kind: 'again', waitMs: null, late: false, reason: 'HTTP 500', answer: '<html>' } as const;
const AWAY = { ...FAILED, waitMs: 5_000, isBlameless: true } as const;
const LATE = { ...FAILED, waitMs: 60_000, late: true, reason: 'NoAnswer' } as const;

/** Fails until it is given up; the waits between, in milliseconds. */
function waitsUntilTheEnd(verdict: Parameters<typeof again>[1]): number[] {
  const waits: number[] = [];
  for (let tried = row(); giveUp([tried], verdict) === null;) {
    const { attempts, afterMs } = again(tried, verdict);
    waits.push(afterMs);
    tried = row(attempts);
  }
  return waits;
}
const sum = (waits: readonly number[]): number => waits.reduce((all, each) => all + each, 0);
const HOUR = 3_600_000;

describe('a call that fails again and again', () => {
  it('is refused after 24 failures, which take hours, as the destination’s own trouble with it', () => {
    const waits = waitsUntilTheEnd(FAILED);
    expect(waits).toHaveLength(23);
    expect(sum(waits)).toBeGreaterThan(HOUR);
    expect(sum(waits)).toBeLessThan(2.5 * HOUR);
    expect(giveUp([row(23)], FAILED)).toEqual({
      kind: 'refused',
      about: 'trouble',
      reason: 'HTTP 500',
      field: null,
      answer: '<html>',
    });
  });

  it('without an answer waits a minute at least each time, and comes to its end as late', () => {
    const waits = waitsUntilTheEnd(LATE);
    expect(waits).toHaveLength(23);
    expect(waits.slice(0, 6)).toEqual(Array(6).fill(60_000));
    expect(Math.min(...waits.slice(10))).toBeGreaterThanOrEqual(300_000);
    expect(sum(waits)).toBeGreaterThan(HOUR);
    // What is newer waits no longer than the request may still be applied.
    expect(again(row(20), LATE).lateMs).toBe(60_000);
  });

  it('is asked to wait by its answer, and yet waits longer each time', () => {
    expect(again(row(), { ...FAILED, waitMs: 7_000 }).afterMs).toBe(7_000);
    expect(again(row(22), { ...FAILED, waitMs: 7_000 }).afterMs).toBeGreaterThanOrEqual(300_000);
  });

  it('is given up with none beside it that has failed less often', () => {
    expect(giveUp([row(23), row(22)], FAILED)).toBeNull();
    expect(giveUp([row(23), row(123)], FAILED)).not.toBeNull();
  });

  it('is doubtful after five failures, and begins anew after an answer that is waited for', () => {
    expect([0, 4, 5, 23, 100, 104, 105, 300].map((attempts) => isDoubtful(row(attempts)))).toEqual([
      ...[false, false, true, true],
      ...[false, false, true, false],
    ]);
    expect(waitFor(row(7), 'unknown')).toMatchObject({ afterMs: 60_000, attempts: 100 });
    expect(again(row(100), FAILED).attempts).toBe(101);
    expect(waitFor(row(123), 'trouble')).toBeNull();
  });
});

describe('a call that fails while nothing gets through', () => {
  it('is never given up, however often it finds out that the destination is away', () => {
    let tried = row(23);
    for (let probes = 0; probes < 1_000; probes += 1) {
      expect(giveUp([tried], AWAY)).toBeNull();
      const { attempts, afterMs } = again(tried, AWAY);
      expect(afterMs).toBe(5_000);
      tried = row(attempts);
    }
    expect(tried.attempts).toBe(23);
  });

  it('has one attempt, by which it is found when its time has come', () => {
    expect(again(row(), AWAY).attempts).toBe(1);
    expect(again(row(1), AWAY).attempts).toBe(1);
    expect(again(row(200), AWAY).attempts).toBe(200);
  });

  it('after a minute goes with others than those whose request wasn’t answered with its own', () => {
    expect(again(row(), { ...LATE, isBlameless: true }).afterMs).toBe(60_000);
    const waits = Array.from({ length: 200 }, () => again(row(1), { ...LATE, isBlameless: true }).afterMs);
    expect(Math.min(...waits)).toBeGreaterThanOrEqual(60_000);
    expect(Math.max(...waits) - Math.min(...waits)).toBeGreaterThan(30_000);
  });
});

describe('an update of which a part has failed again and again', () => {
  const part = (attempts: number, ...columns: string[]): Part => {
    const values = columns.map((field) => ({ field, json: '1', type: 'number' }));
    return { of: { mark: { attempts, values } as unknown as WaitingMark, accepted: [], refused: [] }, columns };
  };
  const pieces = (...parts: [Part, ...Part[]]): string[] =>
    singleOut(parts, isDoubtful).map((piece: Parts) => piece.flatMap(({ columns }) => columns).join(' '));

  it('goes without that part, and that part column by column after it', () => {
    expect(pieces(part(0, 'a', 'b'), part(6, 'x', 'y'), part(4, 'c'))).toEqual(['a b c', 'x', 'y']);
  });

  it('begins with another column each time, so that one which is never answered keeps none from its turn', () => {
    const firsts = [6, 7, 8].map((attempts) => pieces(part(attempts, 'x', 'y', 'z'))[0]);
    expect(firsts.sort()).toEqual(['x', 'y', 'z']);
  });
});
