import { describe, expect, it } from 'vitest';
import { createUnderWay } from '../src/delivery/under-way.js';
import type { WaitingMark } from '../src/outbox/queue.js';

/** A mark with a value of so many bytes. */
const mark = (id: number, size = 4): WaitingMark => ({
  id,
  version: id,
  priority: 1,
  attempts: 0,
  due: true,
  blocked: false,
  confirm: false,
  confirmStage: 0,
  isForgotten: false,
  definitionId: 1,
  computation: { kind: 'trait', id: 'trait_1', key: 'note' },
  kind: 'm',
  exitOf: null,
  withBeside: false,
  beside: null,
  list: null,
  values: [{ field: 'note', json: '1'.repeat(size), type: 'string' }],
});

describe('a recipient under way', () => {
  it('is not begun again, and what else is seen of them is told when they are free', () => {
    const underWay = createUnderWay();
    underWay.begin('u:1', [mark(5)]);
    const seen = [
      { id: 5, version: 5, recipient: 'u:1' },
      { id: 5, version: 9, recipient: 'u:1' },
      { id: 7, version: 7, recipient: 'u:1' },
      { id: 8, version: 8, recipient: 'u:2' },
    ];
    expect(underWay.sort(seen)).toEqual({ free: ['u:2'], resting: [] });
    expect(underWay.end('u:1')).toBe(5);
    expect(underWay.sort(seen).free).toEqual(['u:1', 'u:2']);
    expect(underWay.end('u:2')).toBe(Infinity);
  });

  it('rests for as long as a request may still be applied, and anything of them is looked at afterwards', () => {
    const underWay = createUnderWay();
    underWay.begin('u:1', [mark(5)]);
    underWay.rest('u:1', 60_000);
    const { free, resting } = underWay.sort([{ id: 9, version: 9, recipient: 'u:1' }]);
    expect(free).toEqual([]);
    expect(resting).toEqual([{ recipient: 'u:1', forMs: expect.any(Number) as number }]);
    expect(resting[0]?.forMs).toBeGreaterThan(59_000);
    expect(underWay.end('u:1')).toBe(0);
    expect(underWay.has('u:1')).toBe(false);
  });
});

describe('recipients under way', () => {
  it('are fewer where their values are large', () => {
    const underWay = createUnderWay();
    expect(underWay.room()).toBeGreaterThan(10_000);
    for (let n = 1; n <= 150; n += 1) underWay.begin(`u:${n}`, [mark(n, 100_000)]);
    expect(underWay.room()).toBeLessThan(20);
    for (let n = 1; n <= 150; n += 1) underWay.end(`u:${n}`);
    expect(underWay.room()).toBeLessThan(200);
    for (let n = 1; n <= 1_000; n += 1) underWay.begin(`u:${n}`, [mark(n)]);
    expect(underWay.room()).toBeGreaterThan(10_000);
  });
});
