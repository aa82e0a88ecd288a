import fc from 'fast-check';
import nodeCron from 'node-cron';
import { describe, expect, it } from 'vitest';
import { isCron } from '../src/config/cron.js';

describe('a cron expression', () => {
  it.each([
    '* * * * *',
    '0 3 * * *',
    '*/15 * * * *',
    '*/30 * * * * *',
    '0,30 8-18/2 1-15,20 * mon-fri',
    '0 0 * jan,JUL *',
    '0 0 * * 7',
    '0 22-2 * * *',
    '0 0 * * sat-mon',
    '0 0 29 2 *',
    '0  3  * * *',
  ])('may be %j', (expression) => {
    expect(isCron(expression)).toBe(true);
    expect(nodeCron.validate(expression)).toBe(true);
  });

  it.each([
    '',
    'daily',
    '@daily',
    '* * * *',
    '* * * * * * *',
    '60 * * * *',
    '* 24 * * *',
    '* * 0 * *',
    '* * 32 * *',
    '* * * 13 *',
    '* * * * 8',
    '*/0 * * * *',
    '5/10 * * * *',
    '1- * * * *',
    '-1 * * * *',
    '1-2-3 * * * *',
    '1,,2 * * * *',
    '* * * mon *',
    '1.5 * * * *',
    '0 0 30 2 *',
    '0 0 31 4,6,9,11 *',
  ])("can't be %j", (expression) => {
    expect(isCron(expression)).toBe(false);
  });

  it('is never one that the scheduler refuses', () => {
    const value = fc.oneof(fc.nat(70).map(String), fc.constantFrom('*', 'mon', 'Sun', 'jan', 'DEC', '', '?', 'L'));
    const range = fc.oneof(
      value,
      fc.tuple(value, value).map(([from, to]) => `${from}-${to}`),
    );
    const entry = fc.oneof(
      range,
      fc.tuple(range, fc.nat(70)).map(([of, step]) => `${of}/${step}`),
    );
    const field = fc.array(entry, { minLength: 1, maxLength: 3 }).map((entries) => entries.join(','));
    const likely = fc.oneof({ weight: 4, arbitrary: fc.constant('*') }, { weight: 1, arbitrary: field });
    fc.assert(
      fc.property(fc.array(likely, { minLength: 5, maxLength: 6 }), (fields) => {
        const expression = fields.join(' ');
        if (isCron(expression)) expect([expression, nodeCron.validate(expression)]).toEqual([expression, true]);
      }),
      { numRuns: 2_000 },
    );
  });
});
