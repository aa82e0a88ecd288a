import { afterEach, describe, expect, it } from 'vitest';
import { createHarness, type Definitions, type Harness } from './support/harness.js';

/** What a definition may give beyond the ordinary: many columns, odd names, odd values, fields of others. */
const TABLES = `
  create table people (id bigint primary key, user_id text, email text);
  insert into people select n, 'u' || n, null from generate_series(1, 3) as n`;

let harness: Harness;
afterEach(() => harness.close());

async function syncOf(definitions: Definitions) {
  harness = await createHarness({ tables: TABLES, ...definitions });
  const { progress } = await harness.sync();
  return progress.runs;
}
const fields = (user = 'u1') => harness.simulator.user(user)?.fields ?? {};
const columns = (count: number, value: (n: number) => string): string =>
  Array.from({ length: count }, (_, n) => `${value(n)} AS c${n}`).join(', ');
const trait = (select: string) => [{ key: 'given', sql: `SELECT id AS profile_id, ${select} FROM people` }];

describe('a trait', () => {
  it('may have more columns than a function takes arguments, of every kind', async () => {
    const select = [
      columns(120, (n) => `(${n} + id)::float8`),
      `'{"a": null}'::jsonb AS document`,
      `NULL::jsonb AS nothing`,
      `'null'::jsonb AS null_within`,
    ].join(', ');
    expect(await syncOf({ traits: trait(select) })).toMatchObject([{ outcome: 'succeeded', members: 3 }]);
    expect(Object.keys(fields())).toHaveLength(121);
    expect(fields()).toMatchObject({ c0: '1.0', c119: '120.0' });

    await harness.sql('update people set id = id + 10 where id = 1');
    await harness.sync();
    expect(fields()).toMatchObject({ c0: '11.0', c119: '130.0' });
  });

  it('never waits for its many expressions to be compiled', async () => {
    harness = await createHarness({ tables: TABLES });
    const { source, state } = harness.opened.databases;
    for (const pool of [source, state.pool]) {
      expect((await pool.query(`select current_setting('jit') as jit`)).rows).toEqual([{ jit: 'off' }]);
    }
  });

  it('may have columns that are named like members of any object', async () => {
    const select = 'id AS "toString", id AS "constructor", id AS "__proto__", id AS "hasOwnProperty"';
    expect(await syncOf({ traits: trait(select) })).toMatchObject([{ outcome: 'succeeded', members: 3 }]);
    await harness.sql('update people set id = id + 10 where id = 1');
    const { progress, delivery } = await harness.sync();
    expect(progress.runs).toMatchObject([{ outcome: 'succeeded', changed: 1 }]);
    expect(delivery).toMatchObject({ waiting: 0, refused: 0 });
    expect(fields()).toMatchObject({ toString: '11', constructor: '11', hasOwnProperty: '11' });
  });

  it('keeps the nulls within its JSON values', async () => {
    await syncOf({ traits: trait(`'{"a": 1.0, "b": null}'::jsonb AS value`) });
    expect(await harness.state('select distinct value::text as value from snapshot')).toEqual([
      { value: '{"given": {"a": 1.0, "b": null}}' },
    ]);
  });

  it('sends arrays of numbers as doubles, and leaves out one that holds NaN', async () => {
    const select = `CASE id WHEN 1 THEN array[10, 1.5]::float8[] WHEN 2 THEN array['NaN'::float8] ELSE '{}' END AS value`;
    expect(await syncOf({ traits: trait(select) })).toMatchObject([{ members: 2, skippedValues: 1 }]);
    expect(fields('u1').given).toBe('[10.0, 1.5]');
    expect(harness.simulator.user('u2')).toBeUndefined();
  });

  it('leaves out a number that no double can hold, and counts it', async () => {
    const select = `CASE id WHEN 1 THEN 10::numeric ^ 400 ELSE 10::numeric ^ 300 END AS value`;
    expect(await syncOf({ traits: trait(select) })).toMatchObject([{ members: 2, skippedValues: 1 }]);
    expect(harness.simulator.user('u1')).toBeUndefined();
  });
});

describe('a field', () => {
  const both = [
    { key: 'one', sql: 'SELECT id AS profile_id, id AS shared, 1 AS own_one FROM people' },
    { key: 'two', sql: `SELECT id AS profile_id, 'x' AS shared, 1 AS own_two FROM people` },
  ];

  it('that another definition fills fails the later one, and names both', async () => {
    harness = await createHarness({ tables: TABLES, traits: both });
    await harness.sync('one');
    const { progress } = await harness.sync('two');
    expect(progress.runs).toMatchObject([{ definition: 'two', outcome: 'failed' }]);
    expect(progress.runs[0]?.error).toMatch(/`shared` of "two" is filled by "one" too/);
    expect(fields()).toEqual({ shared: '1', own_one: '1' });
  });

  it('is free again when the other definition is gone', async () => {
    harness = await createHarness({ tables: TABLES, traits: both.slice(0, 1) });
    await harness.sync();
    await harness.reconfigure({
      traits: [{ ...both[1], sql: 'SELECT id AS profile_id, id * 2 AS shared FROM people' }],
    });
    expect((await harness.sync()).progress.runs).toMatchObject([{ definition: 'two', outcome: 'succeeded' }]);
  });

  it('may not be a trait’s column and an audience’s key', async () => {
    harness = await createHarness({
      tables: TABLES,
      audiences: [{ key: 'shared', sql: 'SELECT id AS profile_id FROM people' }],
      traits: both.slice(0, 1),
    });
    await harness.sync('shared');
    expect((await harness.sync('one')).progress.runs).toMatchObject([{ outcome: 'failed' }]);
  });
});

describe('a removal with `on_delete: exit_all`', () => {
  it('is told by `sync` until somebody decides', async () => {
    const all = { key: 'everybody', sql: 'SELECT id AS profile_id FROM people' };
    harness = await createHarness({
      tables: TABLES,
      audiences: [all, { ...all, key: 'leaving', on_delete: 'exit_all' }],
    });
    await harness.sync();
    await harness.reconfigure({ audiences: [all] });
    const { progress } = await harness.sync();
    expect(progress.runs).toMatchObject([
      { definition: 'everybody', outcome: 'succeeded' },
      { definition: 'leaving', outcome: 'held', exited: 3 },
    ]);
    await harness.request('approve', { run: progress.runs[1]?.run ?? 0 });
    expect(fields()).toEqual({ everybody: 'true', leaving: 'false' });
    expect((await harness.sync()).progress.runs).toHaveLength(1);
  });
});
