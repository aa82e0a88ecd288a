import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { Change, SqlText } from '../src/core/definition.js';
import { openPool, withClient, type Pool } from '../src/db/connect.js';
import { Secret } from '../src/lib/secret.js';
import { judgeEligibility, judgeScans, type Known, type Subject, type Verdict } from '../src/realtime/eligibility.js';
import { unfollowedOnTheWay } from '../src/realtime/followed.js';
import { createDatabase, type TestDatabase } from './support/database.js';

/**
 * Whether a definition may be evaluated profile by profile. The shop has 300 customers, two thirds of whom have orders;
 * some have dozens, some a single one.
 */
let database: TestDatabase;
let pool: Pool;

beforeAll(async () => {
  database = await createDatabase();
  pool = openPool({ url: new Secret(database.url), purpose: 'test', max: 2 });
  await database.pool.query(`
    create schema shop;
    create table customers (id bigint primary key, email text, name text, city text, doc json);
    create table orders (id bigint primary key, customer_id bigint not null, total numeric not null, weight float not null,
      status text not null, placed_at timestamptz not null);
    create table order_lines (id bigint primary key, order_id bigint not null, sku text not null, quantity int not null);
    create index on order_lines (order_id);
    create table shop."Odd Table" ("Customer Id" bigint, n int);
    create table events (customer_id bigint, at timestamptz, name text) partition by range (at);
    create table events_old partition of events for values from (minvalue) to ('2024-06-01');
    create table events_new partition of events for values from ('2024-06-01') to (maxvalue);
    create table notes (customer_id bigint, text text);
    create table notes_private () inherits (notes);
    create table refunds (order_id bigint);
    create table secrets (customer_id bigint);
    create table settings (least numeric);

    insert into customers select i, 'p' || i || '@x.de', 'n' || i, 'city ' || i % 7, '{}' from generate_series(1, 300) as i;
    insert into orders select i, 1 + floor(200 * power((i * 7919) % 1009 / 1009.0, 2)), (i * 37) % 500, (i * 0.1) * 1.1, case i % 4 when 0 then 'open' else 'completed' end,
      '2024-01-01'::timestamptz + i * interval '7 hours' from generate_series(1, 900) as i;
    insert into order_lines select i, 1 + i % 900, 'sku ' || i % 11, i % 5 from generate_series(1, 2000) as i;
    insert into shop."Odd Table" select 1 + i % 250, i from generate_series(1, 600) as i;
    insert into events select 1 + (i * 7) % 280, '2024-01-01'::timestamptz + i * interval '8 hours', 'event ' || i % 5 from generate_series(1, 900) as i;
    insert into settings values (400);
    insert into notes select i, 'x' from generate_series(1, 100) as i;
    insert into notes_private select i, 'y' from generate_series(50, 150) as i;

    create view big_orders as select * from orders where total > 100;
    create view shop.stats (who, orders) as select customer_id, count(*) from big_orders group by customer_id;
    create view buyers as select distinct customer_id as profile_id from shop.stats join orders on orders.customer_id = stats.who;
    create view people as select c.id, c.email, c.name, count(o.id) as orders from customers as c left join orders as o on o.customer_id = c.id group by c.id;
    create view "Mixed Case" with (security_barrier) as
      with o as (select customer_id as "Who", total from orders union all select customer_id, 1 from events) select "Who", sum(total) as "Sum" from o group by 1;
    alter view "Mixed Case" rename column "Sum" to "How Much";
    create recursive view countdown (customer_id, n) as select customer_id, 2 from orders union select customer_id, n - 1 from countdown where n > 0;
    create view ranked as select customer_id, rank() over (order by sum(total) desc) as place from orders group by customer_id;
    create view above_average as select customer_id from orders where total > (select avg(total) from orders);
    create view today as select customer_id from orders where placed_at > now() - interval '1 day';
    create function half(x numeric) returns numeric language sql as 'select x / 2';
    create function spent(who bigint) returns numeric language sql stable as 'select sum(total) from orders where customer_id = who';
    create function guess(x numeric) returns numeric language plpgsql stable as 'begin return x; end';
  `);
});

afterAll(async () => {
  await pool.end();
  await database.drop();
});

const place = (offset: number, sql: string) => ({
  file: 'x.yaml',
  line: Array.from(sql).slice(0, offset).join('').split('\n').length,
  column: 1,
});
const textOf = (sql: string): SqlText => ({ sql, placeOf: (offset) => place(offset, sql) });
const column = (written: string, name: string, table = `"${written}"`): Change => ({
  table,
  written,
  place: place(0, ''),
  way: { kind: 'column', column: `"${name}"` },
});
const way = (written: string, sql: string): Change => ({
  ...column(written, ''),
  way: { kind: 'sql', text: textOf(sql) },
});

const LINES = way('order_lines', 'select o.customer_id from orders o join changed on changed.order_id = o.id');
const ORDERS = column('orders', 'customer_id');
const FOLLOWED: readonly Change[] = [
  ORDERS,
  LINES,
  column('Odd Table', 'Customer Id', '"shop"."Odd Table"'),
  column('events', 'customer_id'),
  column('notes', 'customer_id', '"public"."notes"'),
];
const PROFILES = 'select id as profile_id, id::text as user_id, email from customers';
const FOUND: Known = { triggers: new Map(), statement: null, stateSchema: null };
const LIMITS = { workMemMb: 16, timeoutMs: 20_000 };

interface Options {
  changes?: readonly Change[];
  profiles?: string;
  profileChanges?: readonly Change[];
  lookback?: string | null;
  gives?: Partial<Subject['gives']>;
  known?: Partial<Known>;
}

function subjectOf(sql: string | null, options: Options): Subject {
  const {
    changes = FOLLOWED,
    profiles = PROFILES,
    profileChanges = [column('customers', 'id')],
    lookback = null,
  } = options;
  return {
    profiles: { text: textOf(profiles), key: 'hybrid', changes: profileChanges },
    profileType: 'bigint',
    definition: sql === null ? null : { text: textOf(sql), lookback, changes },
    gives: { profileId: true, validUntil: false, ...options.gives },
  };
}

const judge = (sql: string | null, options: Options = {}): Promise<Verdict> =>
  judgeEligibility(pool, subjectOf(sql, options), { ...FOUND, ...options.known }, LIMITS);

const because = async (sql: string | null, options: Options = {}): Promise<string> => {
  const verdict = await judge(sql, options);
  return verdict.kind === 'possible' ? 'possible' : verdict.because;
};

describe('a definition may be evaluated profile by profile', () => {
  it.each([
    ['plain', 'select customer_id as profile_id, total from orders where total > 100'],
    ['grouped', 'select customer_id as profile_id, count(*) as n, max(placed_at) as last from orders group by 1'],
    ['with HAVING', 'select customer_id as profile_id from orders group by customer_id having sum(total) > 500'],
    [
      'with DISTINCT ON',
      'select distinct on (customer_id) customer_id as profile_id, total from orders order by customer_id, placed_at desc, id',
    ],
    ['of floats', 'select customer_id as profile_id, sum(weight) as value, avg(weight) as mean from orders group by 1'],
    [
      'with a sub-query about the row',
      'select id as profile_id from customers c where not exists (select from orders where customer_id = c.id)',
    ],
    [
      'with a LIMIT about the row',
      'select id as profile_id, (select total from orders where customer_id = c.id order by id limit 1) as value from customers c',
    ],
    [
      'with a LIMIT in a lateral sub-query',
      'select c.id as profile_id, o.total from customers c cross join lateral (select total from orders where customer_id = c.id order by id limit 1) o',
    ],
    [
      'with a window of its own',
      'select distinct customer_id as profile_id, first_value(total) over w as value from orders window w as (partition by customer_id order by id)',
    ],
    [
      'with a CTE used twice',
      'with o as (select * from orders where total > 50) select customer_id as profile_id, count(*) as n from o where total > (select avg(total) from o as p where p.customer_id = o.customer_id) group by 1',
    ],
    [
      'with a CTE that hides its table',
      'with orders as (select * from orders where total > 50) select customer_id as profile_id, count(*) as n from orders group by 1',
    ],
    [
      'with a materialized CTE',
      'with o as materialized (select customer_id, sum(total) as total from orders group by 1) select customer_id as profile_id from o where total > 300',
    ],
    [
      'with a recursive CTE',
      'with recursive n as (select customer_id, 1 as i from orders union select customer_id, i + 1 from n where i < 3) select customer_id as profile_id, max(i) as value from n group by 1',
    ],
    [
      'with a self join',
      'select distinct a.customer_id as profile_id from orders a join orders b on a.customer_id = b.customer_id and a.id < b.id',
    ],
    [
      'with qualified names',
      'select orders.customer_id as profile_id, count(*) as n from public.orders left join public . order_lines as l on l.order_id = orders.id group by 1',
    ],
    [
      'with columns named by their schema',
      'select public.orders.customer_id as profile_id, max(public . orders.total) as value from public.orders group by 1',
    ],
    [
      'with quoted names',
      `select "Customer Id" as profile_id, max("Odd Table".n) as value from shop."Odd Table" group by "Odd Table"."Customer Id"`,
    ],
    [
      'with texts that are longer in bytes',
      `select customer_id as profile_id, 'äöü😀' as value from public.orders where status <> 'ß' group by customer_id`,
    ],
    ['of a view of a view', 'select who as profile_id, orders from shop.stats'],
    ['of a view by TABLE', 'table buyers'],
    ['of a table by TABLE', 'select * from (table shop."Odd Table") as t(profile_id, value) where value > 590'],
    [
      'of a view and its table',
      'select o.customer_id as profile_id, count(*) as n from orders o join big_orders b using (id) group by 1',
    ],
    [
      'grouped by a primary key',
      'select c.id as profile_id, c.email, upper(name) as name, count(o.id) as n from customers c left join orders o on o.customer_id = c.id group by c.id',
    ],
    ['grouped by a primary key by its place', 'select id as profile_id, email, city from customers group by 1'],
    [
      'grouped by what only looks like a primary key',
      'with customers as (select id, city from customers) select id as profile_id, city from customers group by id, city',
    ],
    ['of a view grouped by a primary key', 'select id as profile_id, email, orders from people'],
    [
      'with set operations',
      'select customer_id as profile_id from orders except select customer_id from events where name = $$event 1$$ union (select id from customers intersect select "Customer Id" from shop."Odd Table")',
    ],
    [
      'with tables on the way',
      'select o.customer_id as profile_id, sum(l.quantity) as value from order_lines l join orders o on o.id = l.order_id group by 1',
    ],
    ['of a partitioned table', 'select customer_id as profile_id, count(*) as n from events group by 1'],
    ['of a part of a table', 'select customer_id as profile_id, count(*) as n from events_old group by 1'],
    [
      'of ONLY one of several tables',
      'select customer_id as profile_id, count(*) as n, count(i.text) as m from only notes join notes i using (customer_id) group by 1',
    ],
    [
      'with whole rows',
      'select customer_id as profile_id, json_agg(row_to_json(o) order by id) as value from orders o group by 1',
    ],
    [
      'with a function of its own',
      'select customer_id as profile_id, sum(half(total)) as value from orders group by 1',
    ],
    [
      'of a condition in each clause',
      'select customer_id as profile_id, count(*) filter (where exists (select from order_lines where order_id = orders.id)) as n from orders group by customer_id order by (select max(id) from events e, orders o where e.customer_id = orders.customer_id)',
    ],
    ['with a semicolon and a comment', 'select customer_id as profile_id from orders; -- all'],
    [
      'of a view with a CTE, a union and other names',
      'select "Who" as profile_id, "How Much" as value from "Mixed Case"',
    ],
    ['of a recursive view', 'select customer_id as profile_id, count(*) as n from countdown group by 1'],
    [
      'with a comment before it',
      '/* with x as */ -- from y\nselect customer_id as profile_id from /* the */ orders /* table */',
    ],
    ['with columns under other names', 'select b as profile_id, max(c) as value from orders as o (a, b, c) group by b'],
    [
      'with a natural join',
      'select customer_id as profile_id, count(*) as n from public.orders natural join (select id, customer_id from orders) x group by 1',
    ],
    [
      'with one name at several depths',
      'with o as (with o as (select * from orders) select * from o) select o.customer_id as profile_id, count(*) as n from o, lateral (select o.id from orders o2 where o2.id = o.id) x group by 1',
    ],
    [
      'with sub-queries in its joins',
      'select c.id as profile_id from customers c join orders o on o.customer_id = c.id and o.id in (select order_id from order_lines where quantity = 4)',
    ],
    [
      'ordered',
      'select customer_id as profile_id, array_agg(total order by id) as value from orders group by 1 order by count(*) desc, 1',
    ],
    [
      'with GROUPING SETS',
      'select customer_id as profile_id, count(*) as n from orders group by grouping sets ((customer_id), (customer_id, id)) having grouping(id) = 1',
    ],
    [
      'with a table in brackets',
      'select (o).customer_id as profile_id, (o.*)::text as value from (orders as o join order_lines l on l.order_id = o.id and l.id < 1000)',
    ],
    [
      'with VALUES',
      'select customer_id as profile_id, max(n) as value from orders join (values ($$open$$, 1), ($$completed$$, 2)) as v (s, n) on s = status group by 1',
    ],
    [
      'with NaN and large numbers',
      'select customer_id as profile_id, $$NaN$$::float as a, 9007199254740993 + customer_id as b, null as c from orders group by 1',
    ],
    ['of nothing', 'select customer_id as profile_id from orders where false'],
  ])('%s', async (_, sql) => {
    expect(await because(sql)).toBe('possible');
  });

  it('with `:now`, where it gives `valid_until`', async () => {
    const sql = `select customer_id as profile_id, max(placed_at) + :lookback as valid_until from orders where placed_at > :now - :lookback group by 1`;
    expect(await because(sql, { lookback: '1000 days', gives: { validUntil: true } })).toBe('possible');
  });

  it.each([
    ['joined', 'select o.customer_id from changed c join public.orders o on o.id = c.order_id'],
    ['each once', 'select distinct customer_id from orders, changed where order_id = orders.id'],
    [
      'by a CTE',
      'with o as (select id, customer_id as c from orders) select c from o join changed as "New" on order_id = o.id',
    ],
    ['by a sub-query', 'select customer_id from orders where id in (select order_id from changed)'],
    ['grouped', 'select max(customer_id) from orders join changed on order_id = orders.id group by orders.id'],
    [
      'of both sides',
      'select customer_id from orders join changed on order_id = orders.id union select o.customer_id from orders o where id in (select order_id from changed)',
    ],
    ['by a left join', 'select customer_id from changed left join orders on order_id = orders.id'],
    ['by a right join', 'select customer_id from orders right join changed on order_id = orders.id'],
    ['by all columns', 'select customer_id from orders join (select * from changed) as c on c.order_id = orders.id'],
  ])('with a way to profiles that is %s', async (_, sql) => {
    const lines = `select o.customer_id as profile_id, sum(l.quantity) as value from only order_lines l join orders o on o.id = l.order_id group by 1`;
    expect(await because(lines, { changes: [ORDERS, way('order_lines', sql)] })).toBe('possible');
  });

  it('by several ways to one table', async () => {
    const sql =
      'select c.id as profile_id, count(d.id) as n from customers c left join customers d on d.name = c.name group by c.id';
    const byName = way('customers', 'select d.id from customers d join changed using (name)');
    expect(await because(sql, { changes: [byName] })).toBe('possible');
  });

  it('with a sub-query about what leads to everyone', async () => {
    const sql = 'select customer_id as profile_id from orders where total > (select max(least) from settings)';
    const changes = [ORDERS, way('settings', 'select id from customers cross join changed')];
    expect(await because(sql, { changes })).toBe('possible');
  });

  it.each(['text', 'character varying', 'character', 'uuid', 'numeric', 'date', 'integer'])(
    'with profiles whose id is %s',
    async (profileType) => {
      const name = `by_${profileType.replace(' ', '_')}`;
      const make: Record<string, string> = {
        uuid: 'md5(i::text)::uuid',
        date: `'2024-01-01'::date + i`,
        character: `lpad(i::text, 3, '0')`,
      };
      const id = make[profileType] ?? `i::${profileType}`;
      const type = profileType === 'character' ? 'character(3)' : profileType;
      await database.pool.query(
        `create table ${name} (id ${type}, n int); insert into ${name} select ${id}, i % 7 from generate_series(1, 150) as i`,
      );
      const changes = [column(name, 'id')];
      const subject = {
        ...subjectOf(`select id as profile_id, n from ${name} where n > 2`, {
          changes,
          profiles: `select id as profile_id from ${name}`,
          profileChanges: changes,
        }),
        profileType,
      };
      expect(await judgeEligibility(pool, subject, FOUND, LIMITS)).toEqual({ kind: 'possible' });
      const overall = `select id as profile_id, rank() over (partition by n order by id) as value from ${name}`;
      const together = { ...subject, definition: { text: textOf(overall), lookback: null, changes } };
      expect(await judgeEligibility(pool, together, FOUND, LIMITS)).toMatchObject({
        kind: 'impossible',
        because: expect.stringContaining('differ when evaluated alone') as unknown,
      });
    },
  );

  it('when nobody is there', async () => {
    await database.pool.query('create table nobody (customer_id bigint)');
    const changes = [column('nobody', 'customer_id')];
    const profiles = 'select customer_id as profile_id from nobody';
    const subject = { changes, profiles, profileChanges: changes };
    expect(await because('select customer_id as profile_id from nobody', subject)).toBe('possible');
  });
});

describe("one person's rows decide about another's", () => {
  it.each([
    [
      'a LIMIT over everyone in a condition',
      'select id as profile_id from customers where id in (select customer_id from orders order by total desc, id limit 5)',
    ],
    [
      'an average of everyone',
      'select customer_id as profile_id from orders group by 1 having sum(total) > (select avg(total) * 3 from orders)',
    ],
    [
      'a sum of everyone beside it',
      'select customer_id as profile_id, sum(total) / (select sum(total) from orders) as value from orders group by 1',
    ],
    [
      'a window over a city',
      'select c.id as profile_id, rank() over (partition by city order by c.id) as value from customers c',
    ],
    [
      'a window in a sub-query',
      'select id as profile_id from (select id, count(*) over (partition by city) as n from customers) x where n > 42',
    ],
    ['DISTINCT over something else', 'select distinct on (city) id as profile_id from customers order by city, id'],
    ['a view that compares with everyone', 'select distinct customer_id as profile_id from above_average'],
    [
      'a CTE over everyone, used twice',
      'with o as (select * from orders) select customer_id as profile_id from o group by 1 having max(total) = (select max(total) from o)',
    ],
    [
      'a self join over a city',
      'select a.id as profile_id, count(*) as n from customers a join customers b on a.city = b.city group by a.id',
    ],
    [
      'a query that asks whether anyone has ordered',
      `select id as profile_id, exists (select from orders where status = 'open' and total > 480) as value from customers`,
    ],
    [
      'a query about whoever is the first',
      'select id as profile_id from customers where id <= (select min(customer_id) + 3 from orders)',
    ],
  ])('where there is %s', async (_, sql) => {
    expect(await because(sql)).toMatch(
      /^one person's rows decide about another's \([1-9]\d* of \d+ differ when evaluated alone\): a LIMIT, a window over all, a sub-query over everyone, or a column in `changes` that isn't the profile's$/,
    );
  });

  it('where `changes` names another column than that of the profile', async () => {
    const sql = 'select customer_id as profile_id, count(*) as n from orders group by 1';
    expect(await because(sql, { changes: [column('orders', 'id')] })).toMatch(/^one person's rows decide/);
  });

  it('where the way to profiles leads to others', async () => {
    const sql =
      'select o.customer_id as profile_id, sum(l.quantity) as value from order_lines l join orders o on o.id = l.order_id group by 1';
    const astray = way('order_lines', 'select customer_id from orders join changed on changed.id = orders.id');
    expect(await because(sql, { changes: [ORDERS, astray] })).toMatch(/^one person's rows decide/);
  });

  it.each([
    [
      'select customer_id as profile_id from orders\ngroup by 1 order by sum(total)\nlimit 1000000',
      'a LIMIT at line 3',
    ],
    ['select customer_id as profile_id\nfrom orders offset 5', 'an OFFSET at line 2'],
    [
      'with x as (select * from orders fetch first 5 rows only) select customer_id as profile_id from x',
      'a LIMIT at line 1',
    ],
    [
      'select customer_id as profile_id,\n ntile(4) over (order by total) as value from orders',
      'a window over all at line 2',
    ],
    ['select customer_id as profile_id, place from ranked', 'a window over all in the view ranked'],
  ])('in %j, which needs no trial', async (sql, what) => {
    expect(await because(sql)).toBe(`one person's rows decide about another's: ${what}`);
  });
});

describe('a sub-query over everyone that makes no difference as yet', () => {
  it.each([
    'select customer_id as profile_id from orders where (select count(*) from orders) < 1000000',
    'select id as profile_id from customers where exists (select from orders where total > 1000000)',
    'with o as (select * from orders) select customer_id as profile_id from o where total > (select max(total) from o join order_lines on order_id = o.id)',
    'select customer_id as profile_id from orders where total > (select max(total) from orders)',
  ])('is found by the plan of %s', async (sql) => {
    expect(await because(sql)).toBe(
      "one person's rows decide about another's: a sub-query reads `orders` for everyone",
    );
  });

  it.each([
    'select id as profile_id, (select max(total) from orders where customer_id = c.id) as value from customers c',
    'select c.id as profile_id, o.m as value from customers c cross join lateral (select max(total) as m from orders where customer_id = c.id) o',
    'select id as profile_id from customers where id not in (select customer_id from orders)',
    'with o as materialized (select customer_id, max(total) as m from orders group by 1) select customer_id as profile_id, m from o join o as p using (customer_id, m)',
  ])('is none in %s', async (sql) => {
    expect(await because(sql)).toBe('possible');
  });
});

describe('a definition is polled', () => {
  it.each<[sql: string, sentence: string, options?: Options]>([
    [
      'select email from customers',
      'gives email directly: real time needs `profile_id`',
      { gives: { profileId: false } },
    ],
    [
      "select customer_id as profile_id from orders\nwhere placed_at > now() - interval '30 days'",
      'reads the clock (`now()` at line 2), so that people enter and leave without a change: return `valid_until`, or leave it polled',
    ],
    [
      'select customer_id as profile_id from orders where placed_at > current_date and placed_at < :now',
      'reads the clock (`current_date` at line 1), so that people enter and leave without a change: write `:now` instead, or leave it polled',
      { gives: { validUntil: true } },
    ],
    [
      "select customer_id as profile_id from orders\n -- ä\n where placed_at > 'today'",
      "reads the clock (`'today'` at line 3), so that people enter and leave without a change: return `valid_until`, or leave it polled",
    ],
    [
      'select customer_id as profile_id from orders\nwhere placed_at < :now',
      'reads the clock (`:now` at line 2), so that people enter and leave without a change: return `valid_until`, or leave it polled',
    ],
    [
      "select customer_id as profile_id from orders\nwhere placed_at < :now\n and placed_at > 'yesterday'",
      "reads the clock (`'yesterday'` at line 3), so that people enter and leave without a change: write `:now` instead, or leave it polled",
      { gives: { validUntil: true } },
    ],
    [
      'select customer_id as profile_id from today',
      'reads the clock (`now()` in the view today), so that people enter and leave without a change: return `valid_until`, or leave it polled',
    ],
    [
      'select customer_id as profile_id from orders where random() < 0.5',
      'gives another result each time (`random()` at line 1)',
    ],
    [
      'select customer_id as profile_id, guess(total) as value from orders',
      'calls `guess()` at line 1, which may read anything',
    ],
    [
      'select customer_id as profile_id from orders join refunds on order_id = orders.id',
      'reads `refunds`, which `changes` lacks',
    ],
    ['select who as profile_id from shop.stats', 'reads `orders`, which `changes` lacks', { changes: [LINES] }],
    [
      'select customer_id as profile_id from secrets where exists (select from refunds)',
      'reads `secrets` and `refunds`, which `changes` lack',
    ],
    [
      'select customer_id as profile_id from events',
      'reads `events`, which `changes` lacks',
      { changes: [column('events_old', 'customer_id')] },
    ],
    ['select id as profile_id from gone', 'names a table that does not exist [SQLSTATE 42P01]'],
    [
      'select id as profile_id, spent(id) as value from customers',
      "can't be tried alone: it calls `spent()`, which reads `orders`",
    ],
    [
      'select customer_id as profile_id, ctid::text as value from orders',
      "can't be tried alone: it names a column that does not exist [SQLSTATE 42703] when its tables are cut down",
    ],
    [
      'select customer_id as profile_id from orders',
      '`orders` has no triggers: run `personas-sync realtime install`',
      {
        known: { triggers: new Map([['"orders"', '`orders` has no triggers: run `personas-sync realtime install`']]) },
      },
    ],
  ])('where it is %j', async (sql, sentence, options) => {
    expect(await because(sql, options)).toBe(sentence);
  });

  it('where row level security reads another table', async () => {
    await database.pool.query(`
      create table guarded (customer_id bigint); alter table guarded enable row level security; alter table guarded force row level security;
      create policy p on guarded using (customer_id in (select customer_id from secrets));
      create role personas_reader; grant select on guarded, secrets, customers to personas_reader`);
    const client = await pool.connect();
    try {
      await client.query('set role personas_reader');
      const reader = Object.assign(Object.create(pool) as Pool, { connect: () => Promise.resolve(client) });
      const release = client.release.bind(client);
      client.release = () => undefined;
      const subject = subjectOf('select customer_id as profile_id from guarded', {
        changes: [column('guarded', 'customer_id')],
      });
      const verdict = await judgeEligibility(reader, subject, FOUND, LIMITS);
      client.release = release;
      expect(verdict).toEqual({ kind: 'impossible', because: 'reads `secrets`, which `changes` lacks' });
      await client.query('reset role');
    } finally {
      client.release(true);
      await database.pool.query(
        'drop table guarded; revoke all on secrets, customers from personas_reader; drop role personas_reader',
      );
    }
  });

  it('where the time allowed is over', async () => {
    const sql =
      'select customer_id as profile_id from orders where (select count(*) from generate_series(1, 100000) g where g + customer_id > 0) > 0';
    const verdict = await judgeEligibility(pool, subjectOf(sql, {}), FOUND, { workMemMb: 16, timeoutMs: 50 });
    expect(verdict).toEqual({
      kind: 'impossible',
      because:
        "can't be tried alone: it took longer than the time allowed, or was cancelled [SQLSTATE 57014] when its tables are cut down",
    });
  });
});

describe('`profiles`', () => {
  it('may be a row, or several, of each person', async () => {
    expect(await because(null)).toBe('possible');
    const profiles = `${PROFILES} union all select id, null, name from customers`;
    expect(await because(null, { profiles })).toBe('possible');
  });

  it.each([
    [
      'select id as profile_id, email from customers order by id limit 10',
      "one person's rows decide about another's: a LIMIT at line 1",
    ],
    [
      'select id as profile_id, (select min(email) from customers) as email from customers',
      "one person's rows decide about another's (100 of 100 differ when evaluated alone): a LIMIT, a window over all, a sub-query over everyone, or a column in `changes` that isn't the profile's",
    ],
    [
      'select id as profile_id, email from customers where :now > $$2024-01-01$$',
      'reads the clock (`:now` at line 1), so that people change without a change of a table',
    ],
    ['select customer_id as profile_id, text as email from notes', 'reads `notes`, which `profiles.changes` lacks'],
  ])('can not be followed where it is %j', async (profiles, sentence) => {
    expect(await because(null, { profiles })).toBe(sentence);
  });
});

describe('the statement that evaluates a few', () => {
  const scans = (statement: string, options: Options = {}): Promise<string | null> =>
    withClient(pool, (client) => judgeScans(client, subjectOf('', options), statement, 'state'));

  beforeAll(async () => {
    await database.pool.query(`
      create schema state;
      create table state.snapshot (profile_id text); create table big (id bigint primary key, customer_id bigint, email text);
      create table uncounted (customer_id bigint); alter table uncounted set (autovacuum_enabled = off);
      create table parted (customer_id bigint) partition by hash (customer_id);
      create table parted_0 partition of parted for values with (modulus 2, remainder 0);
      create table parted_1 partition of parted for values with (modulus 2, remainder 1);
      insert into state.snapshot select i::text from generate_series(1, 20000) as i;
      insert into big select i, i % 1000, i || '@x.de' from generate_series(1, 20000) as i;
      insert into uncounted select i from generate_series(1, 100000) as i;
      insert into parted select i from generate_series(1, 16000) as i;
      analyze state.snapshot, big, parted`);
  });

  it.each<[statement: string, sentence: string | null]>([
    ["select * from big where id = any('{1,2,3}')", null],
    ["select * from orders where customer_id = any('{1,2,3}')", null],
    ["select * from state.snapshot where profile_id = any('{1}')", null],
    [
      "select * from big where customer_id = any('{1,2,3}') and email <> ''",
      'evaluating one person reads all of `big` (Seq Scan): run `CREATE INDEX ON big (customer_id)`, or leave it polled',
    ],
    [
      "select * from big where lower(btrim(email)) = any(array(select 'a'))",
      'evaluating one person reads all of `big` (Seq Scan): run `CREATE INDEX ON big (lower(btrim(email)))`, or leave it polled',
    ],
    [
      "select from big where customer_id = any('{1,2}') union all select from big where email = any('{a}') union all select from parted",
      'evaluating one person reads all of `big` (Seq Scan) and `parted` (Seq Scan): run `CREATE INDEX ON big (customer_id)`, `CREATE INDEX ON big (email)` and `CREATE INDEX ON parted ("customer_id")`, or leave it polled',
    ],
    [
      'select * from orders o join big b on b.email = o.status',
      'evaluating one person reads all of `big` (Seq Scan): index what it is joined by, or leave it polled',
    ],
    [
      'select * from uncounted',
      'evaluating one person reads all of `uncounted` (Seq Scan): index what it is joined by, or leave it polled',
    ],
    [
      'select * from parted',
      'evaluating one person reads all of `parted` (Seq Scan): run `CREATE INDEX ON parted ("customer_id")`, or leave it polled',
    ],
  ])('%s', async (statement, sentence) => {
    expect(await scans(statement, { changes: [column('parted', 'customer_id')] })).toBe(sentence);
  });

  it('is asked before anything is tried', async () => {
    const statement = 'select email from big';
    const sql = 'select customer_id as profile_id from orders limit 5';
    expect(await because(sql, { known: { statement } })).toBe(
      'evaluating one person reads all of `big` (Seq Scan): index what it is joined by, or leave it polled',
    );
  });
});

it('finds the tables on the way to profiles that nothing follows', async () => {
  const missing = await withClient(pool, (client) => unfollowedOnTheWay(client, [LINES], [LINES]));
  expect(missing).toEqual([{ change: LINES, table: 'orders' }]);
  expect(await withClient(pool, (client) => unfollowedOnTheWay(client, FOLLOWED, FOLLOWED))).toEqual([]);
});
