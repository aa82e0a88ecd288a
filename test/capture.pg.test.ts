import pg from 'pg';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, inject, it } from 'vitest';
import { createCaptured, type Captured } from './support/changes.js';
import { startDebianPostgres } from './support/database.js';

const TABLES = `
  create table customers (id bigint primary key, email text);
  create table orders (id bigint primary key, customer_id bigint references customers on delete cascade, total numeric);
  create table order_lines (id bigint primary key, order_id bigint not null references orders on delete cascade, sku text);
  insert into customers select n, n || '@example.com' from generate_series(1, 9) as n;
  insert into orders select n, n, 10 from generate_series(1, 3) as n;
  insert into order_lines select n, (n + 1) / 2, 'a' from generate_series(1, 6) as n`;
const ORDERS = 'public.orders(customer_id)';
const CUSTOMERS = 'public.customers(id)';
const LINES = 'public.order_lines(order_id)';
const OF_LINES = 'SELECT customer_id FROM orders WHERE id IN (SELECT order_id FROM changed)';

const debian = await startDebianPostgres(15);
afterAll(async () => debian?.stop());
const servers = [
  { version: 'the PostgreSQL of the tests', serverUrl: inject('postgresUrl') },
  ...(debian === null ? [] : [{ version: 'PostgreSQL 15', serverUrl: debian.url }]),
];

describe.each(servers)('on $version a statement', ({ serverUrl }) => {
  let source: Captured;
  const sorted = async (): Promise<(readonly [string, string[] | null])[]> =>
    (await source.take()).map(({ watch, keys }) => [watch, keys === null ? null : [...keys].sort()] as const);

  beforeAll(async () => {
    source = await createCaptured(TABLES, { serverUrl });
    await source.install(
      await source.plan([
        ['orders', 'customer_id'],
        ['order_lines', OF_LINES],
      ]),
    );
  });
  beforeEach(async () => {
    await source.sql('truncate order_lines, orders, customers');
    await source.sql(TABLES.slice(TABLES.indexOf('insert into')));
    await source.take();
  });
  afterAll(() => source.drop());

  it('that inserts leaves one row with the distinct keys', async () => {
    await source.sql('insert into orders values (11, 4, 1), (12, 4, 1), (13, 5, 1)');
    expect(await sorted()).toEqual([[ORDERS, ['4', '5']]]);
  });

  it('that updates leaves the old and the new key', async () => {
    await source.sql('update orders set customer_id = 7 where id = 1');
    expect(await sorted()).toEqual([[ORDERS, ['1', '7']]]);
    await source.sql('update orders set total = 0 where id = 2');
    expect(await sorted()).toEqual([[ORDERS, ['2']]]);
  });

  it('that deletes leaves the keys that were there', async () => {
    await source.sql('delete from order_lines where id <= 4');
    expect(await sorted()).toEqual([[LINES, ['1', '2']]]);
  });

  it('that truncates asks for everybody', async () => {
    await source.sql('truncate order_lines');
    expect(await sorted()).toEqual([[LINES, null]]);
  });

  it('that touches no row leaves nothing', async () => {
    await source.sql('insert into orders select 99, 1, 1 where false');
    await source.sql('update orders set total = 1 where id = 99');
    await source.sql('delete from orders where id = 99');
    expect(await source.take()).toEqual([]);
  });

  it('that leads to nobody leaves nothing', async () => {
    await source.sql('insert into orders values (11, null, 1)');
    expect(await source.take()).toEqual([]);
    await source.sql('update orders set customer_id = 4 where id = 11');
    expect(await sorted()).toEqual([[ORDERS, ['4']]]);
  });

  it('that is rolled back leaves nothing', async () => {
    const client = await source.pool.connect();
    await client.query(
      'begin; insert into orders values (11, 4, 1); savepoint s; insert into orders values (12, 5, 1)',
    );
    await client.query('rollback to s; commit');
    client.release();
    expect(await sorted()).toEqual([[ORDERS, ['4']]]);
  });

  it('that copies leaves one row', async () => {
    const client = new pg.Client({ connectionString: source.url });
    await client.connect();
    const { from } = await import('pg-copy-streams');
    const stream = client.query(from('copy orders from stdin'));
    stream.end('11\t4\t1\n12\t5\t1\n');
    await new Promise((resolve, reject) => stream.on('finish', resolve).on('error', reject));
    await client.end();
    expect(await sorted()).toEqual([[ORDERS, ['4', '5']]]);
  });

  it('that inserts or updates leaves what each did', async () => {
    await source.sql(
      'insert into orders values (1, 8, 1), (11, 9, 1) on conflict (id) do update set customer_id = excluded.customer_id',
    );
    const taken = (await sorted()).map(([watch, keys]) => [watch, keys?.join()]).sort();
    expect(taken).toEqual([
      [ORDERS, '1,8'],
      [ORDERS, '9'],
    ]);
    await source.sql('insert into orders values (1, 8, 1) on conflict do nothing');
    expect(await source.take()).toEqual([]);
  });

  it('that merges leaves what each part did', async () => {
    await source.sql(
      `merge into orders as o using (values (1, 5), (2, 0), (11, 6)) as w (id, customer_id) on w.id = o.id
       when matched and w.customer_id = 0 then delete
       when matched then update set customer_id = w.customer_id
       when not matched then insert values (w.id, w.customer_id, 1)`,
    );
    const taken = await sorted();
    // The lines of a deleted order go with it.
    expect(taken.filter(([watch]) => watch === LINES)).toEqual([[LINES, ['2']]]);
    const ofOrders = taken.filter(([watch]) => watch === ORDERS).map(([, keys]) => keys?.join());
    expect(ofOrders.sort()).toEqual(['1,5', '2', '6']);
  });

  it('that cascades leaves what it took along', async () => {
    await source.sql('delete from customers where id <= 2');
    expect(await sorted()).toEqual([
      [CUSTOMERS, ['1', '2']],
      [LINES, ['1', '2']],
      [ORDERS, ['1', '2']],
    ]);
  });

  it('that writes within a CTE leaves what it did', async () => {
    await source.sql(
      'with gone as (delete from order_lines where order_id = 3 returning order_id) update orders set total = 0 where id in (select order_id from gone)',
    );
    expect(await sorted()).toEqual([
      [LINES, ['3']],
      [ORDERS, ['3']],
    ]);
  });

  it('with 50,000 keys names them, with one more asks for everybody', async () => {
    await source.sql(`insert into customers select n, null from generate_series(100, 50099) as n`);
    expect((await source.take()).map(({ keys }) => keys?.length)).toEqual([50_000]);
    await source.sql(
      'delete from customers where id >= 100; insert into customers select n, null from generate_series(100, 50100) as n',
    );
    expect((await source.take()).map(({ watch, keys }) => [watch, keys?.length])).toEqual([
      [CUSTOMERS, 50_000],
      [CUSTOMERS, undefined],
    ]);
  });

  it('with many rows of few keys names those', async () => {
    await source.sql('insert into orders select n, 1 + n % 3, 1 from generate_series(100, 60099) as n');
    expect(await sorted()).toEqual([[ORDERS, ['1', '2', '3']]]);
  });
});

describe('a writer', () => {
  let source: Captured;
  afterEach(() => source.drop());

  it('needs no right on what is captured, and can neither read it nor call the function', async () => {
    source = await createCaptured(TABLES);
    await source.install(await source.plan([['orders', 'customer_id']]));
    const [row] = await source.sql('select current_database() as name');
    const role = `writer_${String(row?.name)}`;
    await source.sql(
      `create role ${role} login password 'w'; grant insert on orders to ${role}; grant usage on schema public to ${role}`,
    );
    const url = new URL(source.url);
    [url.username, url.password] = [role, 'w'];
    const client = new pg.Client({ connectionString: url.toString() });
    await client.connect();
    await client.query('insert into orders values (11, 4, 1)');
    for (const forbidden of [
      'select from personas_capture.capture',
      `select personas_capture."orders_00000000"()`,
      `insert into personas_capture.capture (watch) values ('x')`,
    ]) {
      await expect(client.query(forbidden)).rejects.toMatchObject({ code: '42501' });
    }
    // Nor by tables of its own that have the names that the function uses.
    await client.query(
      'create temporary table new_rows (customer_id bigint); insert into new_rows values (9); set search_path = pg_temp, public',
    );
    await client.query('insert into public.orders values (12, 5, 1)');
    await client.end();
    expect(await source.take()).toEqual([
      { watch: ORDERS, keys: ['4'] },
      { watch: ORDERS, keys: ['5'] },
    ]);
    await source.sql(`drop owned by ${role}; drop role ${role}`);
  });

  it("can make the function run nothing of its own, whatever it puts before PostgreSQL's", async () => {
    source = await createCaptured(
      `${TABLES}; create table visits (customer_id bigint, at timestamptz, page text);
       create schema evil;
       create function evil.fail() returns boolean language plpgsql as $$ begin raise exception 'run'; end $$;
       create function evil.cardinality(anyarray) returns int language sql as 'select evil.fail()::int';
       create function evil.cardinality(bigint[]) returns int language sql as 'select evil.fail()::int';
       create function evil.cardinality(text[]) returns int language sql as 'select evil.fail()::int';
       create function evil.clock_timestamp() returns timestamptz language sql as 'select evil.fail()::text::timestamptz';
       create function evil.pg_notify(text, text) returns void language sql as 'select evil.fail()';
       create function evil.jsonb_build_array(bigint, timestamptz) returns jsonb language sql as 'select to_jsonb(evil.fail())';
       create function evil.same(text, text) returns boolean language sql as 'select evil.fail()';
       create operator evil.= (leftarg = text, rightarg = text, function = evil.same);
       create function evil.fewer(int, int) returns boolean language sql as 'select evil.fail()';
       create operator evil.<= (leftarg = int, rightarg = int, function = evil.fewer);
       create function evil.later(float8, float8) returns boolean language sql as 'select evil.fail()';
       create operator evil.> (leftarg = float8, rightarg = float8, function = evil.later);
       create domain evil.text as pg_catalog.text check (evil.fail())`,
    );
    const plan = await source.plan([
      ['orders', 'customer_id'],
      ['visits', 'SELECT customer_id FROM changed WHERE at IS NOT NULL'],
      ['visits', 'page'],
    ]);
    await source.install(plan);
    await source.sql(`select setval('personas_capture.asleep_until', 1e12::bigint)`);
    for (const statement of [
      'insert into public.orders values (11, 4, 1)',
      'update public.orders set total = 2',
      'truncate public.orders cascade',
      `insert into public.visits values (1, '2026-01-02Z', '3')`,
    ]) {
      await source.sql(`set local search_path = evil, pg_catalog; ${statement}`);
    }
    expect(await source.take()).toHaveLength(5);
  });

  it('notifies only while the daemon sleeps', async () => {
    source = await createCaptured(TABLES);
    await source.install(await source.plan([['orders', 'customer_id']]));
    const listener = new pg.Client({ connectionString: source.url });
    await listener.connect();
    const heard: string[] = [];
    listener.on('notification', ({ channel }) => heard.push(channel));
    await listener.query('listen personas_capture; listen barrier');
    const write = async (id: number): Promise<void> => {
      await source.sql(`insert into orders values ($1, 4, 1)`, [id]);
      await source.sql('update orders set total = 0 where id = 0');
    };
    // Notifications come in the order of the commits, so what precedes the barrier has been heard with it.
    const barrier = async (): Promise<string[]> => {
      await source.sql('notify barrier');
      await expect.poll(() => heard.includes('barrier')).toBe(true);
      return heard.splice(0);
    };
    await write(11);
    expect(await barrier()).toEqual(['barrier']);
    await source.sql(`select setval('personas_capture.asleep_until', extract(epoch from now())::bigint + 3600)`);
    await write(12);
    expect(await barrier()).toEqual(['personas_capture', 'barrier']);
    await source.sql(`select setval('personas_capture.asleep_until', 1)`);
    await write(13);
    expect(await barrier()).toEqual(['barrier']);
    await listener.end();
  });

  it('with an odd table and odd columns is captured like any other', async () => {
    source = await createCaptured(
      `create schema "Odd ""schema"; create table customers (id bigint);
       create table "Odd ""schema"."it's $personas$ \\ a table with a name of which one would hardly think" ("found" bigint, "one" text, "wake $x$" text, "O'Hara" bigint)`,
    );
    const [table] = await source.sql(`select relname as name from pg_class where relname like 'it''s%'`);
    const name = `"Odd ""schema"."${String(table?.name)}"`;
    const plan = await source.plan([
      [name, '"O\'Hara"'],
      [name, 'SELECT "found" FROM changed WHERE one = \'x\' OR "wake $x$" IS NULL'],
    ]);
    expect(plan.refused).toEqual([]);
    await source.install(plan);
    expect((await source.inspect(plan)).tables.map(({ because }) => because)).toEqual([null, null]);
    await source.sql(`insert into ${name} values (1, 'x', null, 7); update ${name} set one = 'y'; truncate ${name}`);
    expect((await source.take()).map(({ keys }) => keys)).toEqual([
      ['7'],
      ['7'],
      null,
      ['[1, "x", null]'],
      ['[1, "x", null]', '[1, "y", null]'],
      null,
    ]);
  });

  it('asks for everybody where its keys come to more than a writer should keep in memory', async () => {
    source = await createCaptured(`${TABLES}; create table visits (visitor text)`);
    await source.install(await source.plan([['visits', 'visitor']]));
    const visit = (count: number, length: number): Promise<unknown> =>
      source.sql("insert into visits select lpad(n::text, $2, repeat('x', 50)) from generate_series(1, $1) as n", [
        count,
        length,
      ]);
    await visit(15, 1_000_000);
    await visit(17, 1_000_000);
    await visit(2, 17_000_000);
    await visit(50_000, 100);
    expect((await source.take()).map(({ keys }) => keys?.length)).toEqual([15, undefined, undefined, 50_000]);
  });

  it('is captured by a column that is generated, unless that is only computed when it is read', async () => {
    source = await createCaptured(
      `${TABLES}; create table visits (url text, visitor bigint generated always as (length(url)) stored)`,
    );
    await source.install(await source.plan([['visits', 'visitor']]));
    await source.sql(`insert into visits values ('12345')`);
    expect(await source.take()).toEqual([{ watch: 'public.visits(visitor)', keys: ['5'] }]);
    const [server] = await source.sql(`select current_setting('server_version_num')::int as version`);
    if (Number(server?.version) < 180_000) return;
    await source.sql('alter table visits add seen bigint generated always as (length(url)) virtual');
    expect((await source.plan([['visits', 'seen']])).refused).toMatchObject([
      { problem: { message: 'The table public.visits has no column `seen` that a trigger sees.' } },
    ]);
  });

  it('leaves the same key whatever the settings of its session', async () => {
    source = await createCaptured(
      `create table customers (id bigint); create table visits (at timestamptz, amount double precision, code char(4))`,
    );
    const plan = await source.plan([
      ['visits', 'SELECT 1 FROM changed WHERE at IS NOT NULL'],
      ['visits', 'SELECT 1 FROM changed WHERE amount > 0 AND code IS NOT NULL'],
    ]);
    await source.install(plan);
    await source.sql(
      `set local timezone = 'Asia/Tokyo'; set local datestyle = 'German'; set local extra_float_digits = -5;
       insert into visits values ('2026-01-02 03:04:05.678+00', 0.1 + 0.2::float8, 'ab')`,
    );
    expect(await source.take()).toEqual([
      { watch: 'public.visits(amount, code)', keys: ['[0.30000000000000004, "ab  "]'] },
      { watch: 'public.visits(at)', keys: ['2026-01-02 03:04:05.678+00'] },
    ]);
  });
});
