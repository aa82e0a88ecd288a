import { describe, expect, it } from 'vitest';
import type { GuardLimits } from '../src/core/definition.js';
import { isCovered, judgeGuard, type Counts } from '../src/core/guard.js';

const DEFAULTS: GuardLimits = { exits: 0.3, growth: 1, nulls: 0.3 };
const NOTHING = { entered: 0, exited: 0, changed: 0, nulled: 0 };

function judge(limits: GuardLimits | null, counts: Partial<Counts>, first = false): string {
  const verdict = judgeGuard(limits, { before: 0, ...NOTHING, ...counts }, { first });
  return verdict.kind === 'holds' ? verdict.because : 'passes';
}

describe('a run', () => {
  it.each<[what: string, counts: Partial<Counts>, verdict: string]>([
    ['changes nothing', { before: 5_000 }, 'passes'],
    ['is of an audience without members', { before: 0, entered: 1_000_000 }, 'passes'],
    // Emptying, from 50.
    ['empties an audience of 49', { before: 49, exited: 49 }, 'passes'],
    ['empties an audience of 50', { before: 50, exited: 50 }, 'all 50 members would exit'],
    ['leaves one of 50', { before: 50, exited: 49 }, 'passes'],
    ['changes all of 50 for one other', { before: 50, exited: 50, entered: 1 }, 'passes'],
    ['empties an audience of 5,000', { before: 5_000, exited: 5_000 }, 'all 5000 members would exit'],
    // Exits, from 1,000.
    ['loses all but one of 999', { before: 999, exited: 998 }, 'passes'],
    ['loses 30 % of 1,000', { before: 1_000, exited: 300 }, 'passes'],
    ['loses more than 30 % of 1,000', { before: 1_000, exited: 301 }, '301 of 1000 members would exit (over 30 %)'],
    [
      'loses many and gains as many',
      { before: 1_000, exited: 500, entered: 500 },
      '500 of 1000 members would exit (over 30 %)',
    ],
    // Growth, from 1,000.
    ['grows from 999 without measure', { before: 999, entered: 1_000_000 }, 'passes'],
    ['doubles 1,000', { before: 1_000, entered: 1_000 }, 'passes'],
    ['more than doubles 1,000', { before: 1_000, entered: 1_001 }, '1000 members would become 2001 (over 100 % more)'],
    ['gains many and loses some', { before: 1_000, entered: 1_200, exited: 200 }, 'passes'],
    // Nulls, from 1,000.
    ['turns all values of 999 to null', { before: 999, changed: 999, nulled: 999 }, 'passes'],
    ['turns 30 % of the values of 1,000 to null', { before: 1_000, changed: 300, nulled: 300 }, 'passes'],
    [
      'turns more than 30 % of the values of 1,000 to null',
      { before: 1_000, changed: 301, nulled: 301 },
      '301 of 1000 values would become null (over 30 %)',
    ],
    ['changes every value of 5,000', { before: 5_000, changed: 5_000 }, 'passes'],
  ])('that %s', (_, counts, verdict) => {
    expect(judge(DEFAULTS, counts)).toBe(verdict);
    expect(judge(null, counts)).toBe('passes');
  });

  it('that is the first may grow as it likes', () => {
    expect(judge(DEFAULTS, { before: 1_000, entered: 10_000 }, true)).toBe('passes');
  });

  it.each<[limits: GuardLimits, counts: Partial<Counts>, verdict: string]>([
    [{ ...DEFAULTS, exits: 0.055 }, { before: 1_000, exited: 56 }, '56 of 1000 members would exit (over 5.5 %)'],
    [{ ...DEFAULTS, exits: 1 }, { before: 1_000, exited: 999 }, 'passes'],
    [{ ...DEFAULTS, exits: 1 }, { before: 1_000, exited: 1_000 }, 'all 1000 members would exit'],
    [{ ...DEFAULTS, exits: null }, { before: 1_000, exited: 1_000, nulled: 0 }, 'passes'],
    [{ ...DEFAULTS, exits: 0 }, { before: 1_000, exited: 1 }, '1 of 1000 members would exit (over 0 %)'],
    [{ ...DEFAULTS, growth: 0.1 }, { before: 1_000, entered: 101 }, '1000 members would become 1101 (over 10 % more)'],
    [{ ...DEFAULTS, growth: null }, { before: 1_000, entered: 50_000 }, 'passes'],
    [{ ...DEFAULTS, nulls: null }, { before: 1_000, nulled: 1_000 }, 'passes'],
    [{ ...DEFAULTS, nulls: 0.5 }, { before: 1_000, nulled: 501 }, '501 of 1000 values would become null (over 50 %)'],
  ])('is judged by the limits %j', (limits, counts, verdict) => {
    expect(judge(limits, counts)).toBe(verdict);
  });
});

describe('an approval', () => {
  const seen = { entered: 100, exited: 10, changed: 0, nulled: 5 };
  it.each<[now: Partial<typeof seen>, covered: boolean]>([
    [{}, true],
    [{ entered: 0, exited: 0, nulled: 0 }, true],
    [{ entered: 110 }, true],
    [{ entered: 111 }, false],
    [{ exited: 11 }, true],
    [{ exited: 12 }, false],
    [{ changed: 1 }, false],
    [{ nulled: 5 }, true],
    [{ nulled: 6 }, false],
  ])('of counts covers a run with %j: %s', (now, covered) => {
    expect(isCovered(seen, { ...seen, ...now })).toBe(covered);
  });
});
