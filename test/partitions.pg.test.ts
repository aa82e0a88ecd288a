import pg from 'pg';
import { afterEach, describe, expect, it } from 'vitest';
import { openPool } from '../src/db/connect.js';
import { createLogger } from '../src/lib/logger.js';
import { Secret } from '../src/lib/secret.js';
import { inspect } from '../src/realtime/catalogue.js';
import { createPartitions } from '../src/realtime/partitions.js';
import { createCaptured, INSTALLATION, type Captured } from './support/changes.js';
import { openLive, type Live } from './support/live.js';
import { until } from './support/until.js';

/** A table whose partitions come by themselves, one a year, while its changes are followed. */
const ORDERS = `
  create table orders (id bigint generated always as identity, customer_id int, total numeric, year int) partition by range (year);
  create index on orders (customer_id);
  create table orders_2025 partition of orders for values from (2025) to (2026);`;
const SHOP = `
  create table people (id int primary key, user_id text, email text);
  create index on people (user_id); create index on people (lower(btrim(email)));
  insert into people select n, 'u' || n, 'u' || n || '@x.de' from generate_series(1, 20) as n;
  ${ORDERS}
  insert into orders (customer_id, total, year) select n, 100, 2025 from generate_series(1, 5) as n;`;
const NEXT = 'create table orders_2026 partition of orders for values from (2026) to (2027)';
const LACKS = 'public.orders lacks triggers on';

describe('a partition that comes while changes are followed', () => {
  let live: Live;
  afterEach(() => live.close());

  const membersAre = (...ids: readonly string[]): Promise<unknown> =>
    until(async () => {
      const rows = await live.harness.state('select profile_id from snapshot order by profile_id::int');
      return rows.map((row) => row['profile_id']).join() === ids.join();
    });
  const reason = async (): Promise<unknown> =>
    (await live.harness.state('select polled_because as because from definition'))[0]?.['because'];
  const triggersOn = async (table: string): Promise<number> =>
    (await live.harness.sql(`select from pg_trigger where tgrelid = $1::regclass and not tgisinternal`, [table]))
      .length;
  const dropTriggers = async (table: string): Promise<void> => {
    const rows = await live.harness.sql(
      `select format('drop trigger %I on %s', tgname, tgrelid::regclass) as sql from pg_trigger where tgrelid = $1::regclass and not tgisinternal`,
      [table],
    );
    for (const { sql } of rows) await live.harness.sql(String(sql));
  };

  it('gets its triggers, is never polled for it, and has everybody compared once', async () => {
    live = await openLive({ tables: SHOP });
    live.start();
    await live.isLive();
    await live.harness.state(
      `create table was_polled (); create function note() returns trigger language plpgsql as $$
         begin insert into was_polled default values; return null; end $$;
       create trigger note after update on definition for each row when (new.tracking = 'polled') execute function note()`,
    );
    // What is written before the triggers are there, only comparing everybody can find.
    await live.harness.sql(`${NEXT}; insert into orders_2026 (customer_id, total, year) values (9, 150, 2026)`);
    await membersAre('1', '2', '3', '4', '5', '9');
    await live.isLive();
    expect(live.said().filter((line) => line.includes('orders_2026'))).toEqual([
      expect.stringMatching(
        /"level":"info","message":"The new partition public\.orders_2026 has the triggers of public\.orders now\."/,
      ),
    ]);
    const runs = (): Promise<unknown[]> => live.harness.state('select id from run');
    const before = await runs();
    await live.harness.sql('update orders_2026 set customer_id = 10');
    await membersAre('1', '2', '3', '4', '5', '10');
    expect(await runs()).toEqual(before);
    expect(await live.harness.state('select from was_polled')).toEqual([]);
  });

  it('is left without them where somebody has dropped them, also by a daemon that starts later', async () => {
    live = await openLive({ tables: SHOP });
    live.start();
    await live.isLive();
    await live.harness.sql(NEXT);
    const parts = `select from watched where name = 'public.orders' and cardinality(covered) = 3`;
    await until(async () => (await live.harness.state(parts)).length === 1);
    await dropTriggers('orders_2026');
    await until(
      async () => (await reason()) === `${LACKS} public.orders_2026: run \`personas-sync realtime install\`.`,
    );
    await live.stop();
    // One more has come: the table as a whole isn't as it was installed.
    await live.harness.sql('create table orders_2027 partition of orders for values from (2027) to (2028)');
    live.start();
    const both = `${LACKS} public.orders_2026, public.orders_2027: run \`personas-sync realtime install\`.`;
    await until(async () => (await reason()) === both);
    expect([await triggersOn('orders_2026'), await triggersOn('orders_2027')]).toEqual([0, 0]);
  });
});

describe('completing a table', () => {
  let source: Captured;
  afterEach(() => source.drop());
  const log = createLogger({ level: 'error', format: 'json', secrets: [] });
  const covered = (): readonly string[] => [];
  const open = async (): Promise<Awaited<ReturnType<Captured['plan']>>> => {
    source = await createCaptured(`create table customers (id bigint primary key, email text); ${ORDERS}`);
    const plan = await source.plan([['orders', 'customer_id']], [['customers', 'id']]);
    await source.install(plan);
    await source.sql(NEXT);
    return plan;
  };

  it('waits for nobody: a partition that somebody holds is tried again later', async () => {
    const plan = await open();
    const partitions = createPartitions(source.pool, log);
    const complete = async (): Promise<boolean> => partitions.complete(await source.inspect(plan), covered);
    const holder = new pg.Client({ connectionString: source.url });
    await holder.connect();
    await holder.query('begin; insert into orders_2026 (customer_id, total, year) values (1, 1, 2026)');
    expect(await complete()).toBe(false);
    await holder.query('commit');
    await holder.end();
    // It would succeed now, and isn't tried yet.
    expect(await complete()).toBe(false);
    await until(complete);
    expect((await source.inspect(plan)).tables.map(({ because }) => because)).toEqual([null, null]);
    expect(await complete()).toBe(false);
  });

  it.each([
    ['a trigger is switched off elsewhere', 'alter table orders_2025 disable trigger user'],
    [
      'the table itself has lost its triggers',
      `do $$ declare t record; begin
       for t in select tgname from pg_trigger where tgrelid = 'orders'::regclass and not tgisinternal
       loop execute format('drop trigger %I on orders', t.tgname); end loop; end $$`,
    ],
    [
      'its function was changed',
      `do $$ begin execute (select format('alter function %s security invoker', oid::regprocedure)
       from pg_proc where proname like 'orders\\_%'); end $$`,
    ],
  ])('is left to a person where %s', async (_, change) => {
    const plan = await open();
    await source.sql(change);
    expect(await createPartitions(source.pool, log).complete(await source.inspect(plan), covered)).toBe(false);
  });

  it('does not lock what the role may make no triggers on, or none that call the function', async () => {
    const plan = await open();
    const [row] = await source.sql('select current_database() as name');
    const role = `role_${String(row?.['name'])}`;
    await source.sql(
      `create role ${role} login password 'r'; grant select on all tables in schema public to ${role};
       grant usage on schema personas_capture to ${role}; grant select, delete on personas_capture.capture to ${role};
       grant select on personas_capture.listener to ${role}; grant select, update on sequence personas_capture.asleep_until to ${role}`,
    );
    const url = new URL(source.url);
    [url.username, url.password] = [role, 'r'];
    const pool = openPool({ url: new Secret(url.toString()), purpose: 'test', max: 2 });
    const partitions = createPartitions(pool, log);
    const complete = async (): Promise<boolean> =>
      partitions.complete(await inspect(pool, plan, INSTALLATION), covered);
    // Whoever tried would be tried again only after a while.
    expect(await complete()).toBe(false);
    await source.sql(`grant trigger on orders_2026 to ${role}`);
    expect(await complete()).toBe(false);
    await source.sql(`grant execute on all functions in schema personas_capture to ${role}`);
    expect(await complete()).toBe(true);
    await pool.end();
    await source.sql(`drop owned by ${role}; drop role ${role}`);
  });
});
