import { afterAll, beforeAll, expect, it } from 'vitest';
import { openPool, type Client, type Pool } from '../src/db/connect.js';
import { databaseFailure, isUnreachable } from '../src/db/failure.js';
import { repeat, type Repeated } from '../src/db/repeated.js';
import { Secret } from '../src/lib/secret.js';
import { createDatabase, type TestDatabase } from './support/database.js';

let database: TestDatabase;
let pool: Pool;
let client: Client;
let run: Repeated;
beforeAll(async () => {
  database = await createDatabase();
  pool = openPool({ url: new Secret(database.url), purpose: 'test', max: 2 });
  client = await pool.connect();
  run = repeat(client);
  await run.query('create table seen (n int primary key, note text)');
});
afterAll(async () => {
  client.release(true);
  await pool.end();
  await database.drop();
});

const SAME = 'select $1::text as one, $2::text[] as several, $3::int4 as n, $4::boolean as yes, null as none';
const sqlstateOf = (error: unknown): string | undefined => databaseFailure(error)?.sqlstate;

it('gives back what it was given, the first time and by its name', async () => {
  const several = ['', 'NULL', 'a "b" \\c, {d}', 'ü', null];
  for (const one of ['x', '', 'null', '\\']) {
    const { rows, rowCount } = await run.query(SAME, [one, several, 7, true]);
    expect(rows).toEqual([{ one, several, n: 7, yes: true, none: null }]);
    expect(rowCount).toBe(1);
  }
  expect((await run.query(SAME, [null, [], null, undefined])).rows).toEqual([
    { one: null, several: [], n: null, yes: null, none: null },
  ]);
  const { rows } = await run.query<{ n: string }>(
    'select count(*) as n from pg_prepared_statements where statement = $1',
    [SAME],
  );
  expect(rows).toEqual([{ n: '1' }]);
});

it('prepares a text once that comes several times in one message', async () => {
  const text = 'select $1::int4 as n, true as twice';
  const answers = await Promise.all([1, 2, 3].map((n) => run.query(text, [n])));
  expect(answers.flatMap(({ rows }) => rows)).toEqual([1, 2, 3].map((n) => ({ n, twice: true })));
  const { rows } = await run.query('select from pg_prepared_statements where statement = $1', [text]);
  expect(rows).toHaveLength(1);
});

it('answers what is asked in one turn in its order, as one transaction where nothing else was begun', async () => {
  const insert = 'insert into seen values ($1, txid_current())';
  const answers = await Promise.all([
    run.query(insert, [1]),
    run.query(insert, [2]),
    run.query('select n from seen order by n'),
    run.query('select count(distinct note) as transactions from seen'),
    run.query(''),
    run.query('delete from seen'),
  ]);
  expect(answers.map(({ rows }) => rows)).toEqual([[], [], [{ n: 1 }, { n: 2 }], [{ transactions: '1' }], [], []]);
  expect(answers.map(({ rowCount }) => rowCount)).toEqual([1, 1, 2, 1, 0, 2]);
});

it('runs nothing of a message after what fails, and says of all of it why', async () => {
  const answers = await Promise.allSettled([
    run.query('begin'),
    run.query('insert into seen values (3, null)'),
    run.query('insert into seen values ($1, $2)', [3, 'again']),
    run.query('select n from seen'),
    run.query('commit'),
  ]);
  expect(answers.map(({ status }) => status)).toEqual(['fulfilled', 'fulfilled', 'rejected', 'rejected', 'rejected']);
  const reasons = answers.flatMap((answer) => (answer.status === 'rejected' ? [sqlstateOf(answer.reason)] : []));
  expect(reasons).toEqual(['23505', '23505', '23505']);
  expect(sqlstateOf(await run.query('select n from seen').catch((error: unknown) => error))).toBe('25P02');
  await run.query('rollback');
  expect((await run.query('select n from seen')).rows).toEqual([]);
});

it('prepares again what was of a message that failed', async () => {
  const half = 'select 1 / $1::int4 as half';
  await expect(Promise.all([run.query('select 5 as five'), run.query(half, [0])])).rejects.toThrow();
  const [five, one] = await Promise.all([run.query('select 5 as five'), run.query(half, [1])]);
  expect([five.rows, one.rows]).toEqual([[{ five: 5 }], [{ half: 1 }]]);
});

it('fails with the connection, and at once from then on', async () => {
  const other = await pool.connect();
  const cut = repeat(other);
  const { rows } = await cut.query<{ pid: number }>('select pg_backend_pid() as pid');
  const waiting = cut.query('select pg_sleep(60)');
  await client.query('select pg_terminate_backend($1)', [rows[0]?.pid]);
  expect(isUnreachable(await waiting.catch((error: unknown) => error))).toBe(true);
  await expect(cut.query('select 1')).rejects.toThrow();
  other.release(true);
});
