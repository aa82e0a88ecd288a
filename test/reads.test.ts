import { describe, expect, it } from 'vitest';
import { readsOf, type Reads } from '../src/realtime/reads.js';

/** What a text of SQL reads, told without a database. */
async function read(sql: string, known: readonly string[] = []): Promise<Reads> {
  const reads = await readsOf(sql, known);
  if (reads === null) throw new Error(`can't be parsed: ${sql}`);
  return reads;
}

describe('the tables of a text', () => {
  it.each<[sql: string, tables: string[]]>([
    ['select 1', []],
    ['select * from orders', ['orders']],
    ['table orders', ['orders']],
    ['select * from Orders o join "Lines" l using (id), shop.refunds', ['orders', '"Lines"', 'shop.refunds']],
    ['select * from a left join (b join c on true) on true', ['a', 'b', 'c']],
    ['select * from only a, lateral (select * from b where b.id = a.id) x', ['only a', 'b']],
    [
      'select (select max(x) from a) from b where exists (select from c) and y in (select z from d)',
      ['a', 'b', 'c', 'd'],
    ],
    ['select array(select x from a), case when (select true from b) then 1 end from c', ['a', 'b', 'c']],
    ['select x from a union select x from b except (select x from c intersect select x from d)', ['a', 'b', 'c', 'd']],
    ['with a as (select * from b) select * from a', ['b']],
    ['with a as (select * from b) select * from a, public.a', ['b', 'public.a']],
    // A CTE that isn't recursive doesn't see itself, nor what comes after it.
    ['with a as (select * from a) select * from a', ['a']],
    ['with a as (select * from b), b as (select * from a) select * from b', ['b']],
    [
      'with recursive t as (select id from a union all select a.id from a join t on a.up = t.id) select * from t',
      ['a', 'a'],
    ],
    ['with recursive a as (select * from b), b as (select 1) select * from a', []],
    ['select * from (with a as (select 1) select * from a) x, a', ['a']],
    ['(with a as (select 1) select * from a) union all select * from a', ['a']],
    ['select * from a where id in (with b as (select * from c) select id from b)', ['a', 'c']],
    ['select * from a order by (select x from b) limit (select n from c)', ['a', 'b', 'c']],
    [
      'select count(*) filter (where exists (select from b)) over (partition by (select x from c)) from a',
      ['b', 'c', 'a'],
    ],
    ['select x from a group by grouping sets ((x), (y)) having exists (select from b)', ['a', 'b']],
    ["select * from json_to_recordset('[]') as a(x int), generate_series(1, (select n from b))", ['b']],
    ["select * from xmltable('/r' passing (select doc from a) columns x int)", ['a']],
    ['select * from a tablesample system (1)', ['a']],
    ['select * from a for update of a', ['a']],
    ['select * from (values ((select x from a))) v', ['a']],
    ['select distinct on (x) * from a', ['a']],
    ["select 'from b' from a -- from c", ['a']],
    ["select E'\\'', $$ from b $$, 'ERROR: no', \"ERROR\" from a", ['a']],
    ['select * from "a b"."c""d" , ä.ö', ['"a b"."c""d"', 'ä.ö']],
    ['select 1 from a; select 2 from b', ['a', 'b']],
  ])('in %j are %j', async (sql, expected) => {
    const { tables } = await read(sql);
    const written = tables.map(
      ({ span, only }) => `${only ? 'only ' : ''}${span === null ? '?' : sql.slice(span.from, span.to)}`,
    );
    expect(written.map((name) => (name === 'Orders' ? 'orders' : name))).toEqual(expected);
  });

  it('are known by the names that PostgreSQL reads, and by where they are written', async () => {
    const sql = `select 'äöü😀' from Shop . "Orders" as o, db.shop.lines`;
    expect((await read(sql)).tables).toEqual([
      { schema: 'shop', name: 'Orders', span: { from: 20, to: 35 }, only: false, isNamed: true },
      { schema: 'shop', name: 'lines', span: { from: 42, to: 55 }, only: false, isNamed: false },
    ]);
    expect(sql.slice(20, 35)).toBe('Shop . "Orders"');
  });

  it('are without those that are said to be none, unless they have a schema', async () => {
    const { tables } = await read('select * from changed, public.changed', ['changed']);
    expect(tables.map(({ schema }) => schema)).toEqual(['public']);
  });

  it('are not told of what is no SQL to this parser', async () => {
    expect(await readsOf('selec 1')).toBeNull();
    expect(await readsOf('select :now')).toBeNull();
    expect(await readsOf(`select ${'('.repeat(50_000)}1${')'.repeat(50_000)}`)).toBeNull();
    expect(await readsOf('select 1')).not.toBeNull();
  });
});

describe('the clock', () => {
  it.each<[sql: string, clock: string[]]>([
    ['select now()', ['now()']],
    ['select pg_catalog.now(), NOW()', ['now()', 'now()']],
    ['select shop.now(), "Now"()', []],
    ['select current_date, CURRENT_TIMESTAMP(3), localtime', ['current_date', 'CURRENT_TIMESTAMP', 'localtime']],
    ['select current_user, current_schema, session_user', []],
    ['select * from a where at > clock_timestamp() - interval $$1 day$$', ['clock_timestamp()']],
    ["select 'now'::timestamptz, date 'today', cast(' Yesterday' as timestamp)", ["'now'", "'today'", "'Yesterday'"]],
    ["select * from a where at >= 'today' and at < 'tomorrow 10:00'", ["'today'", "'tomorrow 10:00'"]],
    ["select 'today'::text, 'now'::varchar, properties ->> 'now' from a where name like 'now'", []],
    ["select 'nowhere', 'today is fine', date '2024-01-01'", []],
    ['select age(born), age(a, b) from a', ['age()']],
    ['with a as (select now()) select 1 from b where exists (select timeofday())', ['now()', 'timeofday()']],
    ["select 'epoch'::timestamptz, 'infinity'::timestamptz, interval '1 day', to_timestamp(0)", []],
  ])('is read in %j by %j', async (sql, expected) => {
    expect((await read(sql)).clock.map(({ written }) => written)).toEqual(expected);
  });

  it('is another thing than chance', async () => {
    const { clock, chance } = await read(
      'select random(), pg_catalog.gen_random_uuid(), shop.random() from a tablesample system (1)',
    );
    expect([clock.length, ...chance.map(({ written }) => written).sort()]).toEqual([
      0,
      'TABLESAMPLE',
      'gen_random_uuid()',
      'random()',
    ]);
  });

  it('is found at its place', async () => {
    const sql = "select 'ä', now()";
    expect((await read(sql)).clock).toEqual([{ written: 'now()', at: sql.indexOf('now') }]);
  });
});

describe('functions', () => {
  it('are told by name, number of arguments and place', async () => {
    const sql = 'select shop.f(1, a => 2), count(*), g() over w, h() from k(3) window w as (partition by x)';
    const { functions } = await read(sql);
    expect(functions.map(({ schema, name, argumentCount }) => [schema, name, argumentCount])).toEqual([
      ['shop', 'f', 2],
      [null, 'count', 0],
      [null, 'g', 0],
      [null, 'h', 0],
      [null, 'k', 1],
    ]);
    expect(
      functions.map(({ at, name }) => sql.slice(at, at + 1) === name[0] || sql.startsWith('shop', at)),
    ).not.toContain(false);
  });
});

describe('what is about all rows', () => {
  it.each<[sql: string, found: string[]]>([
    ['select * from a limit 10', ['LIMIT']],
    ['select * from a fetch first 10 rows only', ['LIMIT']],
    ['select * from a offset 10', ['OFFSET']],
    ['select * from a limit all offset 0', []],
    ['select * from a limit null', []],
    ['select * from (select * from a limit 10) x', ['LIMIT']],
    ['with x as (select * from a order by y limit 10) select * from x', ['LIMIT']],
    ['(select * from a limit 1) union all select * from b', ['LIMIT']],
    ['select (select x from b where b.id = a.id order by y limit 1) from a', []],
    ['select * from a cross join lateral (select x from b where b.id = a.id limit 1) y', []],
    ['select row_number() over (order by x) from a', ['OVER']],
    ['select row_number() over () from a', ['OVER']],
    ['select row_number() over (partition by id order by x) from a', []],
    ['select sum(x) over w from a window w as (order by y)', ['WINDOW']],
    ['select sum(x) over w, max(x) over (w order by z) from a window w as (partition by id)', []],
    [
      'select * from a where id in (select id from (select id, rank() over (order by x) r from b where b.id = a.id) y)',
      [],
    ],
    ['select x from a group by x having count(*) > 1', []],
  ])('in %j is %j', async (sql, expected) => {
    expect((await read(sql)).overall.map(({ written }) => written)).toEqual(expected);
  });
});

describe('a GROUP BY', () => {
  const groupsOf = async (sql: string) =>
    (await read(sql)).groupings.map(({ at, columns, tables }) => ({
      before: sql.slice(at),
      columns: columns.map(({ qualifier, name }) => (qualifier === null ? name : `${qualifier}.${name}`)),
      tables: tables.map(({ alias, table }) => `${table.name} ${alias}`),
    }));

  it('of columns is told with the tables beside it', async () => {
    expect(
      await groupsOf('select c.id, email, x + 1 from customers c left join orders on true group by x + 1, c.id, 2'),
    ).toEqual([{ before: 'c.id, 2', columns: ['c.id', 'email'], tables: ['customers c', 'orders orders'] }]);
  });

  it('is left out where more may not be added to it, and so are tables that go by other names', async () => {
    expect(await groupsOf('select x from a group by rollup (x)')).toEqual([]);
    expect(await groupsOf('select x from a group by x, cube (y)')).toEqual([]);
    expect(await groupsOf('select count(*) from a')).toEqual([]);
    expect(
      await groupsOf('select id from a as b (id) join (c join d using (id)) as e using (id), f group by id'),
    ).toEqual([{ before: 'id', columns: ['id'], tables: ['f f'] }]);
  });
});

describe('a SELECT that gives rows one by one', () => {
  it.each<[sql: string, tables: string[] | null]>([
    ['select id from a', ['a']],
    ['select distinct a.id::bigint from a as x join "B" on true, c', ['x', 'B', 'c']],
    ['with x as (select 1) select id from a where exists (select from b)', ['a']],
    ['select id from a left join b on true', ['a']],
    ['select id from a right join (b join c on true) on true', ['b', 'c']],
    ['select id from a full join b on true', []],
    ['select id from (select id from a) x', []],
    ['select max(id) from a', null],
    ['select unnest(ids) from a', null],
    ['select distinct on (x) id from a', null],
    ['select id from a group by id', null],
    ['select id from a limit 1', null],
    ['select id from a union select id from b', null],
    ['values (1)', null],
    ['select 1; select 2', null],
  ])('%s has a row of %j', async (sql, expected) => {
    const { plain } = await read(sql);
    expect(plain === null ? null : plain.tables.map(({ alias }) => alias)).toEqual(expected);
    if (plain !== null) expect(sql.slice(0, plain.at)).toMatch(/select (distinct )?$/);
  });
});
