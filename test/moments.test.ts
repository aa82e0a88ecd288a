import { expect, it } from 'vitest';
import { bindMoments, findLookback, findMoments, hasName, secondStatement, withoutEnd } from '../src/core/moments.js';

const VALUES = { now: 'NOW', lookback: 'BACK' };
const bind = (sql: string): string => bindMoments(sql, VALUES).text;

it.each([
  ['select :now', 'select NOW'],
  ['select :now - :lookback', 'select NOW - BACK'],
  [':now:lookback', 'NOW:lookback'],
  ['select(:now)', 'select(NOW)'],
  ['at>:now', 'at>NOW'],
  ['at between :now-:lookback and :now', 'at between NOW-BACK and NOW'],
  ['f(at := :now)', 'f(at := NOW)'],
  ['array[:now, :now]', 'array[NOW, NOW]'],
  [':now::date', 'NOW::date'],
  ['(:now)::timestamp', '(NOW)::timestamp'],
  ["'a' || :now", "'a' || NOW"],
  ["'it''s' || :now", "'it''s' || NOW"],
  ['-- a comment\n:now', '-- a comment\nNOW'],
  ['-- a comment\r:now', '-- a comment\rNOW'],
  ['/* a /* nested */ comment */ :now', '/* a /* nested */ comment */ NOW'],
  ['$$ a $$ :now', '$$ a $$ NOW'],
  ['$a$ $b$ $a$ :now', '$a$ $b$ $a$ NOW'],
  ['1 - -:now', '1 - -NOW'],
  ["e'\\\\' || :now", "e'\\\\' || NOW"],
  ["'\\' || :now", "'\\' || NOW"],
  ['select "x" , :now', 'select "x" , NOW'],
])('binds the moments in %j', (sql, bound) => {
  expect(bind(sql)).toBe(bound);
});

it.each([
  "':now'",
  "'it''s :now'",
  "e'\\' :now'",
  "E'a\\'b''c :now'",
  '":now"',
  '"a"":now"',
  '-- :now',
  '--:now and :lookback',
  '/* :now */',
  '/* a /* :now */ :now */',
  '/* never closed :now',
  '$$:now$$',
  '$fn$ $$ :now $fn$',
  '$a$ $A$ :now $a$',
  '$é$ :now $é$',
  'now()',
  'x::now',
  "'2026-01-01'::now",
  'x :: now',
  'a[1:now]',
  'a[n:lookback]',
  'a[f(1):now]',
  'a[b[1]:now]',
  'a["n":now]',
  ':nowhere',
  ':now_',
  ':NOW',
  'a$b$:now$b$',
])('leaves %j as it is', (sql) => {
  expect(bind(sql)).toBe(sql);
  expect(findLookback(sql)).toBeNull();
});

it('says whether the window is asked for', () => {
  expect(findLookback('at > :now - :lookback')).toBe(12);
  expect(findLookback("'😀' > :lookback")).toBe(6);
  expect(findLookback('at > :now')).toBeNull();
  expect(findLookback("at > :now - ':lookback' -- :lookback")).toBeNull();
});

it('finds the way back from a place in the bound text to the text as written', () => {
  const { text, originalOffset } = bindMoments("select '😀', :now, :lookback, x", VALUES);
  expect(text).toBe("select '😀', NOW, BACK, x");
  const back = (word: string): number => originalOffset(Array.from(text.slice(0, text.indexOf(word))).length);
  const written = Array.from("select '😀', :now, :lookback, x");
  expect(back('select')).toBe(0);
  expect(back('NOW')).toBe(written.indexOf(':'));
  expect(back('W, BACK')).toBe(written.indexOf(':'));
  expect(back('BACK')).toBe(written.lastIndexOf(':'));
  expect(written.slice(back(', x')).join('')).toBe(', x');
  expect(originalOffset(1_000)).toBeGreaterThanOrEqual(written.length);
});

it.each([
  ['select 1', 'select 1'],
  ['select 1;', 'select 1'],
  ['select 1 ;\n;\n', 'select 1'],
  ['select 1 -- all', 'select 1'],
  ['select 1; -- all; of them', 'select 1'],
  ['select 1 /* ; */ ; /* /* ; */ */', 'select 1'],
  ["select ';' -- ;", "select ';'"],
  ['select $$;$$;', 'select $$;$$'],
  ['-- first;\nselect 1 /* then */ as x;', '-- first;\nselect 1 /* then */ as x'],
  ['select 1; select 2', 'select 1; select 2'],
  ['-- nothing', ''],
  ['', ''],
])('leaves out what ends %j', (sql, rest) => {
  expect(withoutEnd(sql)).toBe(rest);
});

it.each([
  ['select 1; select 2', 10],
  ["select '😀';\n-- then\nselect 2", 20],
  ['select 1;', null],
  ['select 1;; -- select 2', null],
  ["select ';' || $$;$$", null],
  ['', null],
])('finds the second statement in %j', (sql, at) => {
  expect(secondStatement(sql)).toBe(at);
});

it('finds each moment, counted in characters', () => {
  expect(findMoments("select '😀 :now', :now - :lookback")).toEqual([
    { name: ':now', at: 17 },
    { name: ':lookback', at: 24 },
  ]);
});

it.each([
  ['select * from changed', true],
  ['select * from Changed', true],
  ['select * from "changed"', true],
  ['select * from "Changed"', false],
  ["select 'changed'", false],
  ['select 1 -- changed', false],
  ['select 1 /* changed */', false],
  ['select $$changed$$', false],
  ['select unchanged, changed_at', false],
])('knows whether %j has the name `changed`: %j', (sql, expected) => {
  expect(hasName(sql, 'changed')).toBe(expected);
});
