import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { parseDuration, parseInterval } from '../src/lib/duration.js';

const SECOND = 1_000;
const MINUTE = 60 * SECOND;
const HOUR = 60 * MINUTE;
const DAY = 24 * HOUR;

describe('a length of time', () => {
  const table: [text: string, ms: number | null, interval: string | null][] = [
    ['30 days', 30 * DAY, '30 days'],
    ['1 day', DAY, '1 day'],
    ['90s', 90 * SECOND, '90 seconds'],
    ['90 sec', 90 * SECOND, '90 seconds'],
    ['90 secs', 90 * SECOND, '90 seconds'],
    ['1h', HOUR, '1 hour'],
    ['2 hrs', 2 * HOUR, '2 hours'],
    ['1 minute', MINUTE, '1 minute'],
    ['5m', 5 * MINUTE, '5 minutes'],
    ['5 mins', 5 * MINUTE, '5 minutes'],
    ['2 Weeks', 14 * DAY, '2 weeks'],
    ['3w', 21 * DAY, '3 weeks'],
    ['7d', 7 * DAY, '7 days'],
    ['1 hour 30 minutes', 90 * MINUTE, '1 hour 30 minutes'],
    ['1h30m', 90 * MINUTE, '1 hour 30 minutes'],
    ['  12   hours ', 12 * HOUR, '12 hours'],
    ['0 days 5 minutes', 5 * MINUTE, '5 minutes'],
    ['1 month', null, '1 month'],
    ['18 months', null, '18 months'],
    ['1 year 6 months', null, '1 year 6 months'],
    ['0 days', null, null],
    ['0 months', null, null],
    ['', null, null],
    ['   ', null, null],
    ['30', null, null],
    ['days', null, null],
    ['1.5 hours', null, null],
    ['-1 day', null, null],
    ['1 fortnight', null, null],
    ['5 ms', null, null],
    ['5 ss', null, null],
    ['1 day ago', null, null],
    ['1 day,', null, null],
    ['1 constructor', null, null],
    ["1 day'; drop table x", null, null],
    ['9999999 days', null, null],
  ];

  it.each(table)('%j is %s ms and the interval %j', (text, ms, interval) => {
    expect(parseDuration(text)).toBe(ms);
    expect(parseInterval(text)).toBe(interval);
  });

  it('is nothing but words and digits as an interval, and the same when it is read again', () => {
    fc.assert(
      fc.property(
        fc.string(),
        fc.nat(10_000),
        fc.constantFrom('s', 'min', 'hours', 'days', 'w', 'months'),
        (text, n, unit) => {
          for (const candidate of [text, `${n}${unit}`, `${n} ${unit}${text}`]) {
            const interval = parseInterval(candidate);
            if (interval === null) continue;
            expect(interval).toMatch(/^[1-9]\d* [a-z]+( [1-9]\d* [a-z]+)*$/);
            expect(parseInterval(interval)).toBe(interval);
          }
        },
      ),
    );
  });
});
