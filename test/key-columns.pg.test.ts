import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { createCaptured, type Captured } from './support/changes.js';

const TABLES = `
  create table customers (id bigint primary key, email text);
  create table orders (order_id bigint primary key, customer_id bigint, "Shipped To" bigint, total numeric);
  create table order_lines (id bigint primary key, order_id bigint, sku text, total numeric, "Shipped To" bigint, code char(3), at timestamptz);
  insert into orders values (1, 11, 21, 5), (2, 12, 22, 6), (3, null, 23, 7);
  create function to_profile(text) returns bigint language sql immutable return 5`;

let source: Captured;
beforeAll(async () => {
  source = await createCaptured(TABLES);
});
afterAll(() => source.drop());

async function watchesOf(sql: string): Promise<string[]> {
  const plan = await source.plan([['order_lines', sql]]);
  expect(plan.refused).toEqual([]);
  return [...plan.routes.keys()].filter((name) => name.includes('order_lines'));
}

describe('of a row that changes are kept', () => {
  it.each([
    [
      'the column that is joined',
      'SELECT o.customer_id FROM changed AS c JOIN orders AS o ON o.order_id = c.order_id',
      'order_id',
    ],
    ['a column by USING', 'SELECT customer_id FROM changed JOIN orders USING (order_id)', 'order_id'],
    [
      'a column that the table around it has too',
      'SELECT customer_id FROM orders WHERE order_id IN (SELECT order_id FROM changed)',
      'order_id',
    ],
    [
      'such a column where it is cast',
      'SELECT customer_id FROM orders WHERE order_id::text IN (SELECT order_id::text FROM changed)',
      'order_id',
    ],
    [
      'such a column where nothing but NULL counts',
      'SELECT customer_id FROM orders WHERE EXISTS (SELECT FROM changed WHERE order_id IS NULL)',
      'order_id',
    ],
    [
      'all that a natural join compares',
      'SELECT o.customer_id FROM orders AS o NATURAL JOIN changed',
      'order_id, total, "Shipped To"',
    ],
    [
      'several',
      `SELECT customer_id FROM changed JOIN orders USING (order_id) WHERE changed.sku <> 'x'`,
      'order_id, sku',
    ],
    [
      'a quoted one',
      'SELECT customer_id FROM changed AS c JOIN orders AS o ON c."Shipped To" = o."Shipped To"',
      '"Shipped To"',
    ],
    [
      'all of them in a whole row as JSON',
      `SELECT (to_jsonb(c) ->> 'id')::bigint FROM changed AS c`,
      'id, order_id, sku, total, "Shipped To", code, at',
    ],
    [
      'all of them in whole rows that are compared',
      'SELECT customer_id FROM orders AS o WHERE EXISTS (SELECT * FROM changed EXCEPT SELECT l.* FROM order_lines AS l)',
      'id, order_id, sku, total, "Shipped To", code, at',
    ],
    [
      'what is used of `*`',
      'SELECT o.customer_id FROM (SELECT * FROM changed) AS c JOIN orders AS o USING (order_id)',
      'order_id',
    ],
    ['none where the rows only have to be there', 'SELECT id FROM customers WHERE EXISTS (SELECT FROM changed)', ''],
    [
      'what a CTE of its own uses',
      'WITH c AS (SELECT order_id FROM changed) SELECT customer_id FROM c JOIN orders USING (order_id); -- end',
      'order_id',
    ],
  ])('%s', async (_, sql, columns) => {
    expect(await watchesOf(sql)).toEqual([`public.order_lines(${columns})`]);
  });
});

describe('an SQL way is refused', () => {
  it.each([
    ['SELECT order_id, id FROM changed', 'gives 2 columns; it must give one, the profile_id.', 1],
    ['SELECT nothing FROM changed', 'names a column that does not exist [SQLSTATE 42703].', 8],
    ['SELECT id FROM changed JOIN', 'has a syntax error [SQLSTATE 42601].', 28],
    ['SELECT at FROM changed', "gives timestamp with time zone, which can't be a profile_id (bigint).", 1],
    ['SELECT id FROM changed; DELETE FROM orders', 'has a syntax error [SQLSTATE 42601].', 23],
  ])('%s', async (sql, sentence, column) => {
    const plan = await source.plan([['order_lines', sql]]);
    expect(plan.refused).toMatchObject([
      { problem: { message: `The SQL of \`changes.order_lines\` ${sentence}`, place: { column } } },
    ]);
    expect(plan.tables).toEqual([]);
  });
});

describe('a column way is refused', () => {
  it.each([
    [
      'custmer_id',
      'The table public.orders has no column `custmer_id` that a trigger sees: did you mean `customer_id`?',
    ],
    [
      '"Customer_id"',
      'The table public.orders has no column `"Customer_id"` that a trigger sees: did you mean `customer_id`?',
    ],
  ])('%s', async (column, message) => {
    expect((await source.plan([['orders', column]])).refused).toMatchObject([{ problem: { message } }]);
  });

  it('where its values can be no profile', async () => {
    expect((await source.plan([['order_lines', 'at']])).refused).toMatchObject([
      {
        problem: {
          message:
            "The column `at` of public.order_lines is timestamp with time zone, which can't be a profile_id (bigint): name the column that holds it, or write a SELECT.",
        },
      },
    ]);
  });
});

describe('profiles are found', () => {
  const find = async (table: string, way: string, change: string): Promise<Record<string, unknown>[]> => {
    const plan = await source.plan([[table, way]]);
    await source.install(plan);
    await source.take();
    await source.sql(change);
    const found: Record<string, unknown>[] = [];
    for (const { watch, keys } of await source.take()) {
      for (const { statement } of plan.routes.get(watch) ?? []) {
        if (statement === null) found.push(...(keys ?? []).map((profile_id) => ({ profile_id })));
        else found.push(...(await source.pool.query<Record<string, unknown>>(statement, [keys])).rows);
      }
    }
    return found.sort((a, b) => (String(a['profile_id']) < String(b['profile_id']) ? -1 : 1));
  };

  it('by a column of their own type as they are, by another cast to it', async () => {
    expect(await find('orders', 'CUSTOMER_ID', 'update orders set customer_id = customer_id')).toEqual([
      { profile_id: '11' },
      { profile_id: '12' },
    ]);
    expect(await find('orders', 'total', 'update orders set total = 5.0 where order_id < 3')).toEqual([
      { profile_id: '5' },
      { profile_id: '6' },
    ]);
  });

  it('by SQL over one column, each once and none for NULL', async () => {
    const sql = 'SELECT customer_id FROM orders WHERE order_id IN (SELECT order_id FROM changed) UNION ALL SELECT 11';
    expect(await find('order_lines', sql, 'insert into order_lines (id, order_id) values (1, 1), (2, 3)')).toEqual([
      { profile_id: '11' },
    ]);
  });

  it('by SQL over several, of whatever type', async () => {
    const sql = `SELECT customer_id FROM changed AS c JOIN orders AS o USING (order_id)
      WHERE c.sku = E'a"\\'\\\\' AND c.code = 'ab' AND c.at = '2026-01-02 03:04:05.678Z' AND c."Shipped To" IS NULL`;
    const insert = `insert into order_lines (id, order_id, sku, code, at) values (7, 2, E'a"\\'\\\\', 'ab', '2026-01-02 03:04:05.678Z'), (8, 1, null, null, null)`;
    expect(await find('order_lines', sql, insert)).toEqual([{ profile_id: '12' }]);
  });

  it('by SQL over none', async () => {
    const sql = 'SELECT customer_id FROM orders WHERE EXISTS (SELECT FROM changed)';
    expect(await find('order_lines', sql, 'delete from order_lines where id = 7')).toEqual([
      { profile_id: '11' },
      { profile_id: '12' },
    ]);
  });
});
