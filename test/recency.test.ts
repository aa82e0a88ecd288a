import { describe, expect, it } from 'vitest';
import { createRecency } from '../src/delivery/recency.js';

describe('the pipeline of a recipient', () => {
  it('is remembered for a minute from the last call', () => {
    const recency = createRecency(1_000, 0);
    recency.note('u:1', 'single', 0);
    recency.note('u:2', 'bulk', 0);
    recency.note('u:1', 'bulk', 30_000);
    expect(recency.pipelineOf('u:1', 89_000)).toBe('bulk');
    expect(recency.pipelineOf('u:2', 59_000)).toBe('bulk');
    expect(recency.pipelineOf('u:2', 60_010)).toBeNull();
    expect(recency.pipelineOf('u:3', 0)).toBeNull();
  });

  it('is bulk for everybody who isn’t known, where an earlier leader has sent in bulk', () => {
    const recency = createRecency(1_000, 0);
    recency.assumeBulk(-20_000);
    recency.note('u:1', 'single', 0);
    expect(recency.pipelineOf('u:1', 1_000)).toBe('single');
    expect(recency.pipelineOf('u:2', 39_000)).toBe('bulk');
    expect(recency.pipelineOf('u:2', 40_000)).toBeNull();
  });

  it('is known for everybody of the last minute, at the full quota, over minutes', () => {
    const most = 30_000;
    const recency = createRecency(most, 0);
    const perSecond = most / 60 - 1;
    for (let second = 0; second < 200; second += 1) {
      const now = second * 1_000;
      for (let n = 0; n < perSecond; n += 1) recency.note(`u:${second}-${n}`, n % 2 === 0 ? 'bulk' : 'single', now);
    }
    for (let second = 141; second < 200; second += 1) {
      for (let n = 0; n < perSecond; n += 1) {
        const pipeline = recency.pipelineOf(`u:${second}-${n}`, 199_000);
        if (pipeline !== (n % 2 === 0 ? 'bulk' : 'single')) expect({ second, n, pipeline }).toBeNull();
      }
    }
    expect(recency.pipelineOf('u:100-0', 199_000)).toBeNull();
  });

  it('forgets the oldest where there are more than it may hold', () => {
    const recency = createRecency(10_000, 0);
    for (let n = 0; n < 100_000; n += 1) recency.note(`u:${n}`, 'bulk', n / 10);
    expect(recency.pipelineOf('u:99999', 10_000)).toBe('bulk');
    expect(recency.pipelineOf('u:1', 10_000)).toBeNull();
  });

  it('is told apart among many', () => {
    const recency = createRecency(300_000, 0);
    for (let n = 0; n < 200_000; n += 1) recency.note(`u:${n}`, 'bulk', 0);
    let mistaken = 0;
    for (let n = 0; n < 200_000; n += 1) if (recency.pipelineOf(`e:p${n}@example.com`, 0) !== null) mistaken += 1;
    expect(mistaken).toBe(0);
  });

  it('is right after the clock of ticks has gone round', () => {
    const months = (2 ** 31 - 1) * 4;
    const recency = createRecency(1_000, 0);
    recency.note('u:1', 'bulk', months - 1_000);
    expect(recency.pipelineOf('u:1', months + 1_000)).toBe('bulk');
    recency.note('u:2', 'single', months + 2_000);
    expect(recency.pipelineOf('u:2', months + 3_000)).toBe('single');
  });
});
