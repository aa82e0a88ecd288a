import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { keyFromName, keyProblem } from '../src/core/key.js';

describe('the key of a name', () => {
  it.each([
    ['Big spenders', 'big_spenders'],
    ['Order Completed Last 30 Days', 'order_completed_last_30_days'],
    ['First time shopper', 'first_time_shopper'],
    ['  Trimmed  ', 'trimmed'],
    ['Two  spaces', 'two__spaces'],
    ['Spend (total, $)', 'spend_total_'],
    ['a.b-c_d', 'abc_d'],
    ['Café', 'caf'],
    ['日本', ''],
    ['', ''],
  ])('of %j is %j', (name, key) => {
    expect(keyFromName(name)).toBe(key);
  });

  it('has no characters but a-z, 0-9 and _, and is its own key', () => {
    fc.assert(
      fc.property(fc.string({ unit: 'grapheme' }), (name) => {
        const key = keyFromName(name);
        expect(key).toMatch(/^[a-z0-9_]*$/);
        expect(keyFromName(key)).toBe(key);
      }),
    );
  });
});

describe('a key', () => {
  it.each(['big_spenders', '_', '30_days', 'user_id', 'a'.repeat(255)])('may be %s', (key) => {
    expect(keyProblem(key)).toBeNull();
  });

  it.each([
    ['', 'is empty'],
    ['a.b', 'has a dot'],
    ['Big Spenders', 'such as `big_spenders`'],
    ['日本', 'use these alone'],
    ['a'.repeat(256), 'is too long; use at most 255'],
    ['email', 'is reserved by Iterable'],
    ['Email', 'is reserved by Iterable'],
    ['userid', 'is reserved by Iterable'],
    ['emaillistids', 'is reserved by Iterable'],
  ])('can not be %j: it %s', (key, message) => {
    expect(keyProblem(key)).toContain(message);
  });
});
