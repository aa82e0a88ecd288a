import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { openPool, withClient, type Pool } from '../src/db/connect.js';
import { Secret } from '../src/lib/secret.js';
import { sourcesOf, type Sources } from '../src/realtime/sources.js';
import { createDatabase, type TestDatabase } from './support/database.js';

/** What a text of SQL depends on, through views and functions, down to tables. */
let database: TestDatabase;
let pool: Pool;

beforeAll(async () => {
  database = await createDatabase();
  pool = openPool({ url: new Secret(database.url), purpose: 'test', max: 2 });
  await database.pool.query(`
    create schema shop;
    create table customers (id bigint primary key, email text, born date, doc json);
    create table shop.orders (id bigint, customer_id bigint, placed_at timestamptz) partition by range (id);
    create table shop.orders_low partition of shop.orders for values from (0) to (1000);
    create table "Odd ""name""" (id bigint);
    create view buyers as select c.id, count(*) as orders from customers as c join shop.orders as o on o.customer_id = c.id group by c.id;
    create view shop.recent as select * from buyers where orders > 1 and now() > '2024-01-01';
    create materialized view stored as select * from customers;
    create function spent(bigint) returns bigint language sql stable as 'select count(*) from shop.orders where customer_id = $1';
    create function asked(who bigint) returns bigint language sql begin atomic select spent(who); end;
    create function whole(who bigint) returns text language sql return (select email from customers where id = who);
    create function half(x numeric) returns numeric language sql as 'select x / 2';
    create function stamp() returns timestamptz language sql as 'select now()';
    create function dice() returns float language sql as 'select random()';
    create function hidden(x bigint) returns bigint language plpgsql stable as 'begin return x; end';
    create function fixed(x bigint) returns bigint language plpgsql immutable as 'begin return x; end';
    create function elsewhere() returns bigint language sql stable set search_path = shop as 'select count(*) from orders';
    create function many(x bigint, y bigint) returns bigint language plpgsql stable as 'begin return x; end';
    create function many(x bigint) returns bigint language plpgsql immutable as 'begin return x; end';
    create function again(x bigint) returns bigint language sql as 'select case when x > 0 then x else 0 end';
    create or replace function again(x bigint) returns bigint language sql as 'select case when x > 0 then again(x - 1) else 0 end';
    create aggregate total(bigint) (sfunc = int8pl, stype = bigint, initcond = '0');
  `);
});

afterAll(async () => {
  await pool.end();
  await database.drop();
});

async function look(sql: string, known: readonly string[] = []): Promise<Sources> {
  const sources = await withClient(pool, (client) => sourcesOf(client, sql, known));
  if (sources.kind === 'unreadable') throw new Error(`can't be parsed: ${sql}`);
  return sources;
}

describe('the tables behind', () => {
  it.each<[sql: string, tables: string[]]>([
    ['select 1', []],
    ['select * from customers, Customers, public.customers', ['customers']],
    ['select * from shop.orders', ['shop.orders']],
    ['select * from "Odd ""name"""', ['"Odd ""name"""']],
    ['select * from buyers', ['customers', 'shop.orders']],
    ['select * from shop.recent join buyers using (id)', ['customers', 'shop.orders']],
    ['select * from stored', ['stored']],
    ['with orders as (select * from customers) select * from orders', ['customers']],
    ['select spent(id) from customers', ['customers', 'shop.orders']],
    ['select asked(1)', ['shop.orders']],
    ['select public.whole(1)', ['customers']],
    ['select * from asked(1) where exists (select from stored)', ['shop.orders', 'stored']],
    ['select half(2), again(1), total(3)', []],
    ['select count(*) from pg_class', ['pg_class']],
  ])('%s are %j', async (sql, tables) => {
    expect((await look(sql)).tables.map(({ shown }) => shown).sort()).toEqual(tables);
  });

  it('are none for names that stand for no table', async () => {
    expect((await look('select * from changed join customers using (id)', ['changed'])).tables).toMatchObject([
      { name: 'public.customers', isView: false, key: ['id'], columns: ['id', 'email', 'born'] },
    ]);
  });

  it('are told with the views that lead to them, those before that others read', async () => {
    expect((await look('select * from shop.recent')).views.map(({ relation }) => relation.name)).toEqual([
      'public.buyers',
      'shop.recent',
    ]);
  });

  it('are told with the functions that read them', async () => {
    const sql = 'select asked(1), whole(2)';
    expect((await look(sql)).readers).toEqual([
      { written: 'asked()', at: 7, within: null, table: 'shop.orders' },
      { written: 'whole()', at: 17, within: null, table: 'customers' },
    ]);
  });
});

describe('what a text reads beside tables', () => {
  it.each<[sql: string, clock: string[], chance: string[], opaque: string[]]>([
    ['select now(), random()', ['now()'], ['random()'], []],
    ['select clock_timestamp()', ['clock_timestamp()'], [], []],
    ['select lower(email), count(*), max(born) over (partition by id) from customers group by 1, id, born', [], [], []],
    ['select * from shop.recent', ['now() in the view shop.recent'], [], []],
    ['select stamp()', ['now() in the function stamp'], [], []],
    ['select dice()', [], ['random() in the function dice'], []],
    ['select pg_advisory_lock_shared(1)', [], ['pg_advisory_lock_shared()'], []],
    ['select hidden(1)', [], [], ['hidden()']],
    ['select fixed(1), many(1)', [], [], []],
    ['select many(1, 2)', [], [], ['many()']],
    ['select elsewhere()', [], [], ['elsewhere()']],
    ["select query_to_xml('select 1', true, true, '')", [], [], ['query_to_xml()']],
    ["select to_char(born, 'YYYY'), born::timestamptz, age(born, born) from customers", [], [], []],
  ])('in %s is clock %j, chance %j, unknown %j', async (sql, ...expected) => {
    const { clock, chance, opaque } = await look(sql);
    const told = [clock, chance, opaque].map((found) =>
      found.map(({ written, within }) => (within === null ? written : `${written} in ${within}`)),
    );
    expect(told).toEqual(expected);
  });
});
