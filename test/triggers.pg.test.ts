import { rm } from 'node:fs/promises';
import pg from 'pg';
import { afterEach, describe, expect, it } from 'vitest';
import { openPool } from '../src/db/connect.js';
import { startEmbedded } from '../src/demo/embedded.js';
import { Secret } from '../src/lib/secret.js';
import { inspect } from '../src/realtime/catalogue.js';
import { install, installScript, uninstall } from '../src/realtime/install.js';
import { readWatchPlan } from '../src/realtime/tables.js';
import {
  createCaptured,
  definitionOf,
  describe as describeConfig,
  INSTALLATION,
  type Captured,
  type Written,
} from './support/changes.js';
import { temporaryFolder } from './support/postgres.js';

const TABLES = `
  create table customers (id bigint primary key, email text);
  create table orders (id bigint primary key, customer_id bigint, total numeric);
  create table order_lines (id bigint primary key, order_id bigint not null, sku text)`;
const PARTITIONS = `
  create table customers (id bigint primary key, email text);
  create table orders (id bigint, customer_id bigint, year int) partition by range (year);
  create table orders_old partition of orders for values from (0) to (2000) partition by list (year);
  create table orders_1998 partition of orders_old for values in (1998);
  create table orders_1999 partition of orders_old for values in (1999);
  create table orders_new partition of orders for values from (2000) to (3000)`;
const ORDERS = 'public.orders(customer_id)';
const NEVER = new AbortController().signal;

let source: Captured;
afterEach(() => source.drop());

const taken = async (): Promise<string[]> =>
  (await source.take()).map(({ watch, keys }) => `${watch} ${keys === null ? 'everybody' : keys.sort().join()}`);
const because = async (changes: readonly Written[]): Promise<(string | null)[]> =>
  (await source.inspect(await source.plan(changes))).tables.map((table) => table.because);

describe('a partitioned table', () => {
  it('is captured wherever it is written to, once', async () => {
    source = await createCaptured(PARTITIONS);
    await source.install(await source.plan([['orders', 'customer_id']]));
    await source.sql('insert into orders values (1, 1, 1998), (2, 2, 2001)');
    expect(await taken()).toEqual([`${ORDERS} 1,2`]);
    await source.sql('insert into orders_old values (3, 3, 1999)');
    expect(await taken()).toEqual([`${ORDERS} 3`]);
    await source.sql('update orders_1999 set customer_id = 4');
    expect(await taken()).toEqual([`${ORDERS} 3,4`]);
    await source.sql('update orders set year = 2002, customer_id = 5 where id = 1');
    expect(await taken()).toEqual([`${ORDERS} 1,5`]);
    await source.sql('delete from orders_new where id = 2');
    expect(await taken()).toEqual([`${ORDERS} 2`]);
    await source.sql('truncate orders_1998');
    expect(await taken()).toEqual([`${ORDERS} everybody`]);
    await source.sql('truncate orders');
    expect(new Set(await taken())).toEqual(new Set([`${ORDERS} everybody`]));
  });

  it('wants triggers for what is attached to it, and tells that it has changed', async () => {
    source = await createCaptured(PARTITIONS);
    const plan = await source.plan([['orders', 'customer_id']]);
    await source.install(plan);
    const signature = async (): Promise<string | undefined> =>
      (await source.inspect(plan)).tables.find(({ watched }) => watched.table.name === 'orders')?.signature;
    const before = await signature();
    await source.sql('create table orders_2000s (like orders); insert into orders_2000s values (9, 9, 1997)');
    await source.sql('alter table orders_old attach partition orders_2000s for values in (1997)');
    expect(await because([['orders', 'customer_id']])).toEqual([
      null,
      'lacks triggers on public.orders_2000s: run `personas-sync realtime install`',
    ]);
    const attached = await signature();
    expect(await source.install(plan)).toEqual(['triggers on public.orders_2000s']);
    const installed = await signature();
    await source.sql('alter table orders_old detach partition orders_2000s');
    const signatures = [before, attached, installed, await signature()];
    expect(new Set(signatures).size).toBe(3);
    expect(signatures[3]).toBe(before);
  });

  it('and one of its partitions can be watched each by a column of its own', async () => {
    source = await createCaptured(PARTITIONS);
    await source.install(
      await source.plan([
        ['orders', 'customer_id'],
        ['orders_new', 'id'],
      ]),
    );
    await source.sql('insert into orders_new values (7, 1, 2001)');
    expect(await taken()).toEqual([`${ORDERS} 1`, 'public.orders_new(id) 7']);
  });

  it('may be one by inheritance', async () => {
    source = await createCaptured(
      `${TABLES}; create table web_orders (customer_id bigint, id bigint not null, url text, total numeric); alter table web_orders inherit orders`,
    );
    await source.install(await source.plan([['orders', 'customer_id']]));
    await source.sql(`insert into web_orders (id, customer_id) values (1, 1)`);
    await source.sql('update orders set customer_id = 2');
    expect(await taken()).toEqual([`${ORDERS} 1`, `${ORDERS} 1,2`]);
  });
});

describe('installing', () => {
  it('makes what is missing, and the second time nothing', async () => {
    source = await createCaptured(TABLES);
    const plan = await source.plan([['orders', 'customer_id']]);
    expect(await because([['orders', 'customer_id']])).toEqual(
      Array<string>(2).fill('has no triggers: run `personas-sync realtime install`'),
    );
    expect(await source.install(plan)).toEqual([
      'schema personas_capture',
      'function of public.customers',
      'triggers on public.customers',
      'function of public.orders',
      'triggers on public.orders',
    ]);
    expect(await source.inspect(plan)).toMatchObject({
      capture: { kind: 'fine' },
      stale: [],
      tables: [
        { because: null, notifies: true },
        { because: null, notifies: true },
      ],
    });
    expect(await source.install(plan)).toEqual([]);
  });

  it('brings up to date what the configuration has changed, and drops what it needs no more', async () => {
    source = await createCaptured(TABLES);
    await source.install(await source.plan([['orders', 'customer_id']]));
    const next = [['orders', 'id']] as const;
    expect(await because(next)).toEqual([
      null,
      'has triggers that are out of date: run `personas-sync realtime install`',
    ]);
    expect(await source.install(await source.plan(next))).toEqual(['function of public.orders']);
    await source.sql('insert into orders values (5, 1, 1)');
    expect(await taken()).toEqual(['public.orders(id) 5']);
    const dropped = await source.install(await source.plan([['order_lines', 'order_id']]));
    expect(dropped.at(-1)).toMatch(/^dropped personas_capture\.orders_[0-9a-f]{8} and its triggers/);
    await source.sql('insert into orders values (6, 1, 1)');
    expect(await taken()).toEqual([]);
  });

  it('repairs a trigger that was dropped, switched off or made otherwise, which another signature tells', async () => {
    source = await createCaptured(TABLES);
    const plan = await source.plan([['orders', 'customer_id']]);
    await source.install(plan);
    const signatures = new Set<string>();
    const look = async (): Promise<string | null | undefined> => {
      const { tables } = await source.inspect(plan);
      const table = tables.find(({ watched }) => watched.table.name === 'orders');
      signatures.add(table?.signature ?? '');
      return table?.because;
    };
    expect(await look()).toBeNull();
    await source.sql('insert into orders values (1, 1, 1); update orders set total = 2');
    await source.sql('vacuum analyze orders');
    expect(await look()).toBeNull();
    expect(signatures.size).toBe(1);

    await source.sql('alter table orders disable trigger user');
    expect(await look()).toBe(
      'has triggers that are switched off on public.orders: run `personas-sync realtime install`',
    );
    expect(await source.install(plan)).toEqual(['triggers on public.orders']);
    expect(await look()).toBeNull();
    expect(signatures.size).toBe(3);

    await source.sql('alter table orders disable trigger user; alter table orders enable trigger user');
    expect(await look()).toBeNull();
    expect(signatures.size).toBe(4);

    const [trigger] = await source.sql(
      `select tgname as name from pg_trigger where tgrelid = 'orders'::regclass and tgname like '%update'`,
    );
    await source.sql(`drop trigger ${String(trigger?.name)} on orders`);
    expect(await look()).toBe('has no triggers: run `personas-sync realtime install`');
    await source.install(plan);

    const [fn] = await source.sql(
      `select oid::regprocedure::text as name from pg_proc where proname like 'orders\\_%'`,
    );
    await source.sql(`alter function ${String(fn?.name)} security invoker`);
    expect(await look()).toBe('has triggers that are out of date: run `personas-sync realtime install`');
    await source.install(plan);

    // Values are written anew, and no trigger fires.
    await source.sql('alter table orders alter total type text using 7');
    signatures.clear();
    await look();
    await source.sql('alter table orders alter total type numeric using 8');
    expect(await look()).toBeNull();
    expect(signatures.size).toBe(2);
  });

  it('is refused where another state consumes what is captured', async () => {
    source = await createCaptured(TABLES);
    const plan = await source.plan([['orders', 'customer_id']]);
    await source.install(plan);
    const installation = '00000000-0000-4000-8000-000000000000';
    expect(await inspect(source.pool, plan, installation)).toMatchObject({ capture: { kind: 'foreign' } });
    await expect(source.install(plan, { installation })).rejects.toThrow(
      'The source is captured for another personas-sync (its state has another id). Uninstall there first, or give this one a source of its own.',
    );
  });

  it('tells a role what it lacks, before anything is made', async () => {
    source = await createCaptured(TABLES);
    const [row] = await source.sql('select current_database() as name');
    const database = String(row?.name);
    const role = `role_${database}`;
    await source.sql(
      `revoke all on database ${database} from public; create role ${role} login password 'r'; grant connect on database ${database} to ${role};
       grant select on all tables in schema public to ${role}; grant trigger on customers to ${role}`,
    );
    const url = new URL(source.url);
    [url.username, url.password] = [role, 'r'];
    const pool = openPool({ url: new Secret(url.toString()), purpose: 'test', max: 2 });
    const config = describeConfig([definitionOf('d', [['orders', 'customer_id']])], [['customers', 'id']]);
    const plan = await readWatchPlan(pool, config, 'bigint');
    const options = { installation: INSTALLATION, notify: true, signal: NEVER, onDone: () => undefined };
    await expect(install(pool, plan, options)).rejects.toThrow(
      `The role may not make the schema \`personas_capture\`: GRANT CREATE ON DATABASE "${database}" TO "${role}", or run what \`personas-sync realtime sql\` prints as a role that may.
The role may make no triggers on public.orders: GRANT TRIGGER ON public.orders TO "${role}".`,
    );
    expect(await source.sql(`select from pg_namespace where nspname = 'personas_capture'`)).toEqual([]);

    // Somebody else runs the script, and the role can do what the daemon does with it.
    await source.sql(installScript(await inspect(pool, plan, INSTALLATION), options));
    const { capture, tables } = await inspect(pool, plan, INSTALLATION);
    expect([capture, ...tables.map((table) => table.because)]).toEqual([{ kind: 'fine' }, null, null]);
    await source.sql('insert into orders values (1, 1, 1)');
    const { rows } = await pool.query<{ watch: string }>('delete from personas_capture.capture returning watch');
    expect(rows).toEqual([{ watch: ORDERS }]);
    await pool.query(`select setval('personas_capture.asleep_until', 1) from personas_capture.listener`);

    // What is there is another's, who alone can bring it up to date.
    await source.sql('alter table orders add column more bigint');
    const next = describeConfig([definitionOf('d', [['orders', 'more']])], [['customers', 'email']]);
    const anothers = (table: string): string =>
      `${table}: only the role that \`personas_capture\` belongs to may make its function and triggers; run what \`personas-sync realtime sql\` prints as that one.`;
    await expect(install(pool, await readWatchPlan(pool, next, 'text'), options)).rejects.toThrow(
      `${anothers('public.customers')}\n${anothers('public.orders')}`,
    );
    await source.sql(`revoke usage on schema personas_capture from ${role}`);
    await expect(install(pool, plan, options)).rejects.toThrow(`GRANT USAGE ON SCHEMA personas_capture TO "${role}"`);
    await pool.end();
    await source.sql(`drop owned by ${role}; drop role ${role}`);
  });

  it('makes by its script the same as by itself, also over what is there', async () => {
    source = await createCaptured(PARTITIONS);
    const plan = await source.plan([
      ['orders', 'customer_id'],
      ['orders', 'SELECT customer_id FROM orders WHERE id IN (SELECT id FROM changed)'],
    ]);
    const script = async (): Promise<string> =>
      installScript(await source.inspect(plan), { installation: INSTALLATION, notify: true });
    await source.sql(await script());
    expect(await source.install(plan)).toEqual([]);
    await source.sql(await script());
    expect((await source.inspect(plan)).tables.map((table) => table.because)).toEqual([null, null]);
  });

  it('never keeps writers waiting for longer than half a second behind somebody who holds a table', async () => {
    source = await createCaptured(TABLES);
    const plan = await source.plan([['orders', 'customer_id']]);
    const holder = new pg.Client({ connectionString: source.url });
    await holder.connect();
    await holder.query('begin; insert into orders values (1, 1, 1)');
    const installing = source.install(plan);
    // The writers that come meanwhile, one after the other; the second try is waited for, and one more.
    let longestMs = 0;
    const seen: number[] = [];
    let waiting = false;
    for (let id = 2; seen.length < 2; id += 1) {
      const began = performance.now();
      await source.sql('insert into orders values ($1, 1, 1)', [id]);
      longestMs = Math.max(longestMs, performance.now() - began);
      const rows = await source.sql(
        `select from pg_locks where relation = 'orders'::regclass and mode = 'ShareRowExclusiveLock' and not granted`,
      );
      const waits = rows.length > 0;
      if (waiting && !waits) seen.push(id);
      waiting = waits;
    }
    expect(longestMs).toBeLessThan(600);
    await holder.query('commit');
    await holder.end();
    expect(await installing).toContain('triggers on public.orders');
  });

  it('gives a table up that stays locked, and completes it the next time', async () => {
    source = await createCaptured(TABLES);
    const plan = await source.plan([['orders', 'customer_id']]);
    const holder = new pg.Client({ connectionString: source.url });
    await holder.connect();
    await holder.query('begin; insert into orders values (1, 1, 1)');
    await expect(source.install(plan, { patienceMs: 1 })).rejects.toThrow(
      'The table public.orders is locked by others; run it again.',
    );
    await holder.query('commit');
    await holder.end();
    expect(await source.install(plan)).toEqual(['triggers on public.orders']);
  });

  it('may be done by two at once', async () => {
    source = await createCaptured(TABLES);
    const plan = await source.plan([['orders', 'customer_id']]);
    await Promise.all([source.install(plan), source.install(plan)]);
    expect((await source.inspect(plan)).tables.map((table) => table.because)).toEqual([null, null]);
  });
});

describe('uninstalling', () => {
  it('leaves what belongs to another role, and says what that one may run: a table at a time, and nothing that waits', async () => {
    source = await createCaptured(TABLES);
    await source.install(await source.plan([['orders', 'customer_id']]));
    const [row] = await source.sql('select current_database() as name, current_user as role');
    const role = `role_${String(row?.name)}`;
    await source.sql(`create role ${role} login password 'r'`);
    const url = new URL(source.url);
    [url.username, url.password] = [role, 'r'];
    const pool = openPool({ url: new Secret(url.toString()), purpose: 'test', max: 1 });
    const said = await uninstall(pool, { signal: NEVER, onDone: () => undefined }).catch(String);
    await pool.end();
    await source.sql(`drop role ${role}`);
    const [sentence, script] = /^OperatorError: (.+?)\n([^]*)$/.exec(String(said))?.slice(1) ?? [];
    expect(sentence).toBe(
      `What is installed belongs to ${String(row?.role)}: run this as a role that may drop it. A table that others hold makes it give up after half a second; then run it again.`,
    );
    expect(script?.split('commit;\n')).toEqual([
      expect.stringMatching(
        /^begin;\nset local lock_timeout = '500ms';\ndrop function .*"customers_\w+"\(\) cascade;\n$/,
      ),
      expect.stringMatching(/^begin;\nset local lock_timeout = '500ms';\ndrop function .*"orders_\w+"\(\) cascade;\n$/),
      expect.stringMatching(
        /^begin;\nset local lock_timeout = '500ms';\n[^]*drop schema if exists personas_capture;\ncommit;$/,
      ),
    ]);

    // Somebody holds a table: as psql does, each statement is run whatever became of the one before.
    const run = async (): Promise<void> => {
      const client = new pg.Client({ connectionString: source.url });
      await client.connect();
      for (const statement of script?.split(';\n') ?? []) await client.query(statement).catch(() => undefined);
      await client.end();
    };
    const left = (): Promise<unknown[]> =>
      source.sql(`select from pg_proc where pronamespace = to_regnamespace('personas_capture')`);
    const holder = new pg.Client({ connectionString: source.url });
    await holder.connect();
    await holder.query('begin; insert into orders values (1, 1, 1)');
    await run();
    expect(await left()).toHaveLength(1);
    await holder.query('commit');
    await holder.end();
    await source.sql('insert into orders values (2, 1, 1)');
    expect(await taken()).toEqual([`${ORDERS} 1`, `${ORDERS} 1`]);
    await run();
    expect(await source.sql(`select from pg_namespace where nspname = 'personas_capture'`)).toEqual([]);
  });

  it('leaves the source as it was before', async () => {
    source = await createCaptured(PARTITIONS);
    const everything = (): Promise<Record<string, unknown>[]> =>
      source.sql(`
        select 'class' as kind, oid::text as id, relacl::text as more from pg_class where oid >= 16384 and relnamespace <> 'pg_toast'::regnamespace
        union all select 'proc', oid::text, null from pg_proc where oid >= 16384
        union all select 'trigger', oid::text, tgname from pg_trigger
        union all select 'namespace', oid::text, null from pg_namespace where nspname not like 'pg\\_%'
        union all select 'depend', format('%s %s %s', classid, objid, objsubid), format('%s %s', refclassid, refobjid) from pg_depend where objid >= 16384
        union all select 'acl', format('%s %s', classid, objid), null from pg_shdepend where dbid = (select oid from pg_database where datname = current_database())
        order by 1, 2, 3`);
    const before = await everything();
    await source.install(await source.plan([['orders', 'customer_id']]));
    expect(await everything()).not.toEqual(before);
    const done: string[] = [];
    expect(await uninstall(source.pool, { signal: NEVER, onDone: (what) => done.push(what) })).toBe(true);
    expect(done.at(-1)).toBe('dropped the schema personas_capture');
    expect(await everything()).toEqual(before);
    expect(await uninstall(source.pool, { signal: NEVER, onDone: () => undefined })).toBe(false);
  });

  it('waits for a table no longer than half a second at a time', async () => {
    source = await createCaptured(TABLES);
    await source.install(await source.plan([['orders', 'customer_id']]));
    const holder = new pg.Client({ connectionString: source.url });
    await holder.connect();
    await holder.query('begin; insert into orders values (1, 1, 1)');
    const options = { signal: NEVER, onDone: () => undefined };
    await expect(uninstall(source.pool, { ...options, patienceMs: 1 })).rejects.toThrow(
      'is locked by others; run it again',
    );
    await holder.query('commit');
    await holder.end();
    expect(await uninstall(source.pool, options)).toBe(true);
  });
});

describe('a table', () => {
  it.each([
    ['nowhere', 'is not in the source, or in a schema that is not looked in: write it with its schema'],
    ['a_view', 'is a view, which has no triggers of that kind: name the tables that it reads'],
    ['a_copy', 'is a materialised view, which has no triggers: name the tables that it is made from'],
    ['a_foreign', 'is a foreign table, whose changes happen elsewhere'],
    ['with_foreign', 'has a foreign table as a part, whose changes happen elsewhere'],
    ['subscribed', 'is filled by a logical subscription, for whose changes no such trigger fires'],
    ['unlogged', 'is unlogged: a crash empties it, and no trigger fires'],
  ])('%s is refused, and the definition with it', async (table, sentence) => {
    source = await createCaptured(`${TABLES};
      create view a_view as select * from orders; create materialized view a_copy as select * from orders;
      create extension if not exists file_fdw; create server files foreign data wrapper file_fdw;
      create foreign table a_foreign (customer_id bigint) server files options (filename '/dev/null');
      create table with_foreign (customer_id bigint) partition by list (customer_id);
      create foreign table a_part partition of with_foreign for values in (1) server files options (filename '/dev/null');
      create table subscribed (customer_id bigint); create unlogged table unlogged (customer_id bigint)`);
    await source.sql(
      `create subscription s connection 'dbname=nowhere' publication p with (connect = false, slot_name = none, enabled = false)`,
    );
    await source.sql(
      `insert into pg_subscription_rel (srsubid, srrelid, srsubstate) select oid, 'subscribed'::regclass, 'r' from pg_subscription where subname = 's' and subdbid = (select oid from pg_database where datname = current_database())`,
    );
    const plan = await source.plan([
      [table, 'customer_id'],
      ['orders', 'customer_id'],
    ]);
    expect(plan.refused).toMatchObject([
      { definitions: ['d'], problem: { message: `The table \`${table}\` of \`changes\` ${sentence}.` } },
    ]);
    expect(plan.tables).toEqual([]);
    await source.sql('drop subscription s');
  });

  it('of a standby is refused', async () => {
    // A function of that name that is found first stands for the standby itself.
    source = await createCaptured(
      `${TABLES}; create schema first; create function first.pg_is_in_recovery() returns boolean language sql return true`,
    );
    const url = new URL(source.url);
    url.searchParams.set('options', '-c search_path=first,pg_catalog,public');
    const pool = openPool({ url: new Secret(url.toString()), purpose: 'test', max: 1 });
    const config = describeConfig([definitionOf('d', [['orders', 'customer_id']])], [['customers', 'id']]);
    const plan = await readWatchPlan(pool, config, 'bigint');
    expect(plan.refused.map(({ problem }) => problem.message)).toContain(
      'The source is a standby, which has no triggers of its own.',
    );
    await pool.end();
  });
});

describe('without notifying', () => {
  it('a transaction can be prepared', async () => {
    source = await createCaptured('select');
    const directory = await temporaryFolder();
    const first = await startEmbedded({ directory });
    const admin = new pg.Client({ connectionString: first.url });
    await admin.connect();
    await admin.query('alter system set max_prepared_transactions = 5');
    await admin.end();
    await first.stop();
    const server = await startEmbedded({ directory });
    const prepared = await createCaptured(TABLES, { serverUrl: server.url });
    const plan = await prepared.plan([['orders', 'customer_id']]);
    const write = async (name: string): Promise<void> => {
      const client = new pg.Client({ connectionString: prepared.url });
      await client.connect();
      try {
        await client.query(`begin; insert into orders values (${name.length}, 1, 1)`);
        await client.query(`prepare transaction '${name}'`);
      } finally {
        await client.end();
      }
    };
    await prepared.install(plan);
    await prepared.sql(`select setval('personas_capture.asleep_until', 1e12::bigint)`);
    await expect(write('x')).rejects.toMatchObject({ code: '0A000' });

    expect(await prepared.install(plan, { notify: false })).toEqual([
      'function of public.customers',
      'function of public.orders',
    ]);
    expect((await prepared.inspect(plan)).tables.map(({ notifies, because: wrong }) => [notifies, wrong])).toEqual([
      [false, null],
      [false, null],
    ]);
    await write('xx');
    expect(await prepared.take()).toEqual([]);
    await prepared.sql(`commit prepared 'xx'`);
    expect(await prepared.take()).toEqual([{ watch: ORDERS, keys: ['1'] }]);
    await prepared.drop();
    await server.stop();
    await rm(directory, { recursive: true, maxRetries: 10, retryDelay: 100 });
  });
});
