import { expect, it } from 'vitest';
import { isFullCheaper, type Burst } from '../src/core/burst.js';

const CASES: readonly [string, Burst, boolean][] = [
  ['few wait, whatever they cost', { waiting: 2_000, perProfileMs: 100, fullMs: 10 }, false],
  ['many wait, and everybody is compared in less', { waiting: 20_000, perProfileMs: 0.2, fullMs: 3_000 }, true],
  ['many wait, and everybody takes longer', { waiting: 20_000, perProfileMs: 0.2, fullMs: 4_000 }, false],
  ['both take about as long', { waiting: 20_000, perProfileMs: 0.2, fullMs: 3_900 }, false],
  ['there has been no run in full', { waiting: 50_000, perProfileMs: 10, fullMs: null }, false],
  ['more wait than the queue should hold', { waiting: 100_001, perProfileMs: 0, fullMs: 1e9 }, true],
  ['as many wait as the queue should hold', { waiting: 100_000, perProfileMs: 0, fullMs: 1e9 }, false],
];

it.each(CASES)('compares everybody or not: %s', (_, burst, expected) => {
  expect(isFullCheaper(burst)).toBe(expected);
});
