import fc from 'fast-check';
import { afterEach, expect, it } from 'vitest';
import { lead, type Leadership } from '../src/daemon.js';
import { tryLead } from '../src/db/lease.js';
import { startSimulator, type Simulator } from '../src/demo/simulator/server.js';
import { createFeeder } from '../src/sync/cursor.js';
import { tidyUp } from '../src/sync/housekeeping.js';
import { runDefinition, type RunResult } from '../src/sync/run.js';
import { applyConfig } from './support/apply.js';
import { createHarness, type Harness, type HarnessOptions } from './support/harness.js';
import { until } from './support/until.js';

const HISTORIES = Number(process.env['PROPERTY_RUNS'] ?? 20);
const LEADER = '00000000-0000-0000-0000-000000000001';

let harness: Harness;
let leadership: Leadership | null = null;
let other: Simulator | null = null;
afterEach(async () => {
  await stopLeading();
  await harness.close();
  await other?.close();
  other = null;
});

async function stopLeading(): Promise<void> {
  await leadership?.stop();
  leadership = null;
}

/** A harness whose configuration is registered, while nothing runs, feeds or delivers by itself. */
async function begin(options: HarnessOptions): Promise<void> {
  harness = await createHarness(options);
  await tidyUp(harness.opened.databases.state);
  await applyConfig(harness.opened);
}

async function run(key: string): Promise<RunResult> {
  const { databases, config } = harness.opened;
  const definition = config.definitions.find((each) => each.key === key)!;
  const request = { trigger: 'sync', approves: null, nextDueMs: () => null } as const;
  const result = await runDefinition({ databases, config, leader: LEADER }, definition, request);
  expect(result).toMatchObject({ outcome: 'succeeded', error: null });
  return result!;
}

/** Leads from now on, runs every definition once, and waits until everybody has been reached and told. */
async function sync(): Promise<void> {
  if (leadership === null) {
    const lease = await tryLead(harness.opened.databases.state.pool);
    leadership = await lead(harness.opened, lease!, {
      scheduled: false,
      delivers: true,
      confirmRemovals: true,
      kept: null,
    });
  }
  for (const { key } of harness.opened.config.definitions) await run(key);
  while ((await feed()) > 0);
  await until(async () => {
    for (const { dispatcher } of leadership?.deliveries() ?? []) dispatcher.nudge();
    return (await harness.state('select from outbox limit 1')).length === 0;
  });
}

const feed = async (chunk?: number): Promise<number> =>
  (await createFeeder(harness.opened.databases.state, chunk)()).count;

const TABLES = `
  create table people (id int primary key, email text, vip boolean not null default true, spent int);
  insert into people select n, 'p' || n || '@x.de', true, n from generate_series(10, 59) as n`;
const PROFILES = { sql: 'SELECT id AS profile_id, email FROM people' };
const VIP = { key: 'vip', sql: 'SELECT id AS profile_id FROM people WHERE vip', send: 'both', guard: 'off' };
const SPENT = {
  key: 'spent',
  sql: 'SELECT id AS profile_id, spent AS value FROM people WHERE vip',
  send: 'both',
  guard: 'off',
};

/** The bodies that the simulator got, by email. */
const updatesOf = (email: string, from = harness.simulator): unknown[] =>
  from
    .requests()
    .filter(({ endpoint, body }) => endpoint === 'users/update' && body.includes(`"${email}"`))
    .map(({ body }) => JSON.parse(body) as unknown);
const eventsOf = (email: string, from = harness.simulator): string[] => from.events(email).map(({ name }) => name);

it('tells everyone once, though it is cut off in the middle of a chunk', async () => {
  await begin({
    tables: TABLES,
    key: 'email',
    profiles: PROFILES,
    audiences: [VIP],
    simulator: { keepRequests: 1000 },
  });
  await run('vip');
  await feed(15);
  await feed(15);
  // Somebody else's open transaction keeps the third chunk waiting half-way, and then its connection is killed.
  const blocker = await harness.opened.databases.state.pool.connect();
  await blocker.query('begin');
  await blocker.query(
    `insert into outbox (kind, destination_id, definition_id, priority, recipient, columns) select 'm', destination_id, definition_id, 2, 'e:p45@x.de', array['vip'] from definition_destination`,
  );
  const third = feed(15).catch((error: unknown) => error);
  for (let killed = 0; killed === 0;) {
    const victims = await harness.state(
      `select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock' and query like '%insert into outbox%'`,
    );
    killed = victims.length;
  }
  expect(await third).toBeInstanceOf(Error);
  await blocker.query('rollback');
  blocker.release();
  expect(await harness.state('select backfill_done, backfill_position from definition_destination')).toEqual([
    { backfill_done: 30, backfill_position: 'e:p39@x.de' },
  ]);

  await sync();
  expect(harness.simulator.userCount).toBe(50);
  expect(harness.simulator.stats.count('users/update')).toBe(50);
  expect(harness.simulator.stats.count('events/track')).toBe(50);
  expect(harness.simulator.events()).toHaveLength(50);
});

it('counts no failure of what waits against a column that comes to it', async () => {
  const sql = 'SELECT id AS profile_id, spent, spent + 1 AS more FROM people';
  await begin({ tables: TABLES, key: 'email', profiles: PROFILES, traits: [{ ...SPENT, key: 'stats', sql }] });
  await run('stats');
  await harness.state(
    `insert into outbox (kind, destination_id, definition_id, priority, recipient, columns, attempts, due_at)
     select 'm', destination_id, definition_id, 1, recipient, columns, 23, now() + interval '1 hour'
     from definition_destination, (values ('e:p10@x.de', array['spent']), ('e:p11@x.de', array['more', 'spent'])) as w (recipient, columns)`,
  );
  await feed();
  const waiting = await harness.state(
    `select recipient, attempts, cardinality(columns) as columns, due_at > now() as waits from outbox
     where kind = 'm' and attempts > 0 order by recipient`,
  );
  expect(waiting).toEqual([
    { recipient: 'e:p10@x.de', attempts: 1, columns: 2, waits: true },
    { recipient: 'e:p11@x.de', attempts: 23, columns: 2, waits: true },
  ]);
});

it('sends neither call nor event to somebody who exits before they are reached', async () => {
  await begin({
    tables: TABLES,
    key: 'email',
    profiles: PROFILES,
    audiences: [VIP],
    traits: [SPENT],
    simulator: { keepRequests: 1000 },
  });
  await run('vip');
  await run('spent');
  await feed(20);
  await harness.sql('update people set vip = false where id in (12, 50)');
  await run('vip');
  await run('spent');
  await sync();
  expect(updatesOf('p50@x.de')).toEqual([]);
  expect(eventsOf('p50@x.de')).toEqual([]);
  expect(harness.simulator.user('p50@x.de')).toBeUndefined();
  expect(harness.simulator.user('p12@x.de')?.fields).toEqual({ vip: 'false' });
});

it('leaves no value behind with somebody whose value changed and who exited before they were reached', async () => {
  await begin({ tables: TABLES, key: 'email', profiles: PROFILES, traits: [SPENT], simulator: { keepRequests: 1000 } });
  await run('spent');
  await feed(20);
  await harness.sql('update people set spent = 1000 where id = 50');
  await run('spent');
  // They are told of the new value when they are reached, which they never are.
  expect(await harness.state(`select from outbox where recipient = 'e:p50@x.de'`)).toEqual([]);
  await harness.sql('update people set vip = false where id = 50');
  await run('spent');
  await sync();
  expect(updatesOf('p50@x.de')).toEqual([]);
  expect(harness.simulator.user('p50@x.de')).toBeUndefined();
});

it('tells who enters while it goes on once, with one event', async () => {
  await begin({
    tables: TABLES,
    key: 'email',
    profiles: PROFILES,
    audiences: [VIP],
    simulator: { keepRequests: 1000 },
  });
  await run('vip');
  await feed(20);
  await harness.sql(`insert into people values (9, 'early@x.de', true, 1), (60, 'zoe@x.de', true, 1)`);
  await harness.sql('update people set vip = false where id = 55');
  await run('vip');
  await harness.sql('update people set vip = true where id = 55');
  await run('vip');
  await sync();
  for (const email of ['early@x.de', 'zoe@x.de', 'p55@x.de']) {
    expect(updatesOf(email)).toHaveLength(1);
    expect(eventsOf(email)).toEqual(['Audience Entered']);
  }
});

it('tells of an entry for a person whose address changes before they are reached', async () => {
  await begin({
    tables: TABLES,
    key: 'email',
    profiles: PROFILES,
    audiences: [VIP],
    simulator: { keepRequests: 1000 },
  });
  await run('vip');
  await feed(20);
  await harness.sql(`update people set email = 'a50@x.de' where id = 50`);
  await harness.sql(`update people set email = 'a10@x.de' where id = 10`);
  await run('vip');
  await sync();
  expect(updatesOf('p50@x.de')).toEqual([]);
  expect(eventsOf('a50@x.de')).toEqual(['Audience Entered']);
  // Who was told under the old address neither enters nor leaves under the new one.
  expect([eventsOf('p10@x.de'), eventsOf('a10@x.de')]).toEqual([['Audience Entered'], []]);
});

it('sends nothing with `initial: skip` but what changes later', async () => {
  await begin({ tables: TABLES, key: 'email', profiles: PROFILES, audiences: [{ ...VIP, initial: 'skip' }] });
  await sync();
  expect(await harness.state('select members from definition')).toEqual([{ members: 50 }]);
  expect(harness.simulator.requests()).toHaveLength(0);
  await harness.sql('update people set vip = false where id = 10');
  await sync();
  expect(harness.simulator.userCount).toBe(1);
  expect(harness.simulator.user('p10@x.de')?.fields).toEqual({ vip: 'false' });
});

it('repeats the original ids of its events in a backfill that asks for events', async () => {
  await begin({
    tables: TABLES,
    key: 'email',
    profiles: PROFILES,
    audiences: [VIP],
    traits: [SPENT],
    simulator: { keepRequests: 1000 },
  });
  await sync();
  await harness.sql(`insert into people values (9, 'later@x.de', true, 1)`);
  await sync();
  const ids = harness.simulator.events().map(({ id }) => id);
  expect(new Set(ids).size).toBe(102);

  for (const key of ['vip', 'spent']) await harness.request('backfill', { key, events: true, resumes: false });
  expect(
    harness.simulator
      .events()
      .map(({ id }) => id)
      .sort(),
  ).toEqual([...ids].sort());
  expect(ids.map((id) => harness.simulator.applications(id))).toEqual(ids.map(() => 2));
});

it('sends everyone again in a backfill, without events unless asked', async () => {
  await begin({ tables: TABLES, key: 'email', profiles: PROFILES, audiences: [VIP] });
  await sync();
  await harness.sql('update people set vip = false where id = 10');
  await sync();
  const before = harness.simulator.stats.count('users/update');
  const { delivery } = await harness.request('backfill', { key: 'vip', events: false, resumes: false });
  expect(delivery).toMatchObject({ waiting: 0, ahead: 0 });
  expect(harness.simulator.stats.count('users/update')).toBe(before + 49);
  expect(harness.simulator.stats.count('events/track')).toBe(51);
});

it('begins no second backfill where the one that was to go on has ended meanwhile', async () => {
  await begin({ tables: TABLES, key: 'email', profiles: PROFILES, audiences: [VIP] });
  await sync();
  const before = harness.simulator.stats.count();
  const { outcome, delivery } = await harness.request('backfill', { key: 'vip', events: true, resumes: true });
  expect({ outcome, waiting: delivery?.waiting }).toEqual({ outcome: 'done', waiting: 0 });
  expect(harness.simulator.stats.count()).toBe(before);
});

it('gives a destination that is added later everyone, without events', async () => {
  await begin({ tables: TABLES, key: 'email', profiles: PROFILES, audiences: [VIP] });
  await sync();
  other = await startSimulator({ projectType: 'email', quotas: 'off' });
  await stopLeading();
  await harness.reconfigure({
    profiles: PROFILES,
    audiences: [VIP],
    destinations: {
      iterable: { type: 'iterable', api_key: 'test-key', region: harness.simulator.url },
      second: { type: 'iterable', api_key: 'other-key', region: other.url },
    },
  });
  await sync();
  expect(other.userCount).toBe(50);
  expect(other.events()).toHaveLength(0);
  expect(harness.simulator.stats.count()).toBe(100);

  await harness.sql('update people set vip = false where id = 10');
  await sync();
  expect(eventsOf('p10@x.de', other)).toEqual(['Audience Exited']);
  expect(eventsOf('p10@x.de')).toEqual(['Audience Entered', 'Audience Exited']);
});

it('gives everyone the calls of a `send` that is added later, without events', async () => {
  await begin({ tables: TABLES, key: 'hybrid', profiles: PROFILES, audiences: [{ ...VIP, send: 'track' }] });
  await sync();
  expect([harness.simulator.stats.count('users/update'), harness.simulator.stats.count('events/track')]).toEqual([
    0, 50,
  ]);
  await stopLeading();
  await harness.reconfigure({ profiles: PROFILES, audiences: [VIP] });
  await sync();
  expect([harness.simulator.stats.count('users/update'), harness.simulator.stats.count('events/track')]).toEqual([
    50, 50,
  ]);
});

interface Person {
  id: number;
  email: string | null;
  vip: boolean;
  spent: number | null;
}

const step = fc.oneof(
  {
    weight: 4,
    arbitrary: fc.record({
      do: fc.constant('be' as const),
      people: fc.array(
        fc.record({
          id: fc.integer({ min: 1, max: 3 }),
          email: fc.constantFrom(null, 'a', 'b', 'b', 'c'),
          vip: fc.constantFrom(true, true, false),
          spent: fc.constantFrom(null, 1, 2),
        }),
        { minLength: 1, maxLength: 2 },
      ),
    }),
  },
  { weight: 1, arbitrary: fc.record({ do: fc.constant('feed' as const), size: fc.integer({ min: 1, max: 2 }) }) },
  { weight: 2, arbitrary: fc.record({ do: fc.constant('deliver' as const) }) },
);

/** Iterable as it would be, had it taken what was delivered. */
interface Told {
  vip: Map<string, boolean>;
  spent: Map<string, number | null>;
  /** By id: who, what, when. */
  events: Map<string, { who: string; name: string; at: string }>;
}

/** Delivers all that waits, in its order, as the sender does: values as of now. */
async function deliver(told: Told): Promise<void> {
  const rows = await harness.state(
    `select o.*, d.key, s.value, s.recipient is not null as there, o.occurred_at::text as at
     from outbox as o join definition as d on d.id = o.definition_id
     left join snapshot as s on s.definition_id = o.definition_id and s.recipient = o.recipient order by o.id`,
  );
  for (const row of rows) {
    const who = row['recipient'] as string;
    const value = (row['value'] as { spent?: number } | null)?.spent ?? null;
    if (row['kind'] === 'e')
      told.events.set(row['message_id'] as string, { who, name: row['event'] as string, at: row['at'] as string });
    else if (row['key'] === 'vip') told.vip.set(who, row['there'] as boolean);
    else told.spent.set(who, value);
  }
  await harness.state('delete from outbox');
}

it('ends with what the snapshot says and one event for each entry and exit, whatever happens meanwhile', async () => {
  await begin({
    tables: `create table people (id int primary key, email text, vip boolean, spent int)`,
    key: 'email',
    profiles: PROFILES,
    audiences: [VIP],
    traits: [SPENT],
  });
  const be = async (people: readonly Person[]): Promise<void> => {
    for (const { id, email, vip, spent } of people) {
      await harness.sql(
        'insert into people values ($1, $2, $3, $4) on conflict (id) do update set email = $2, vip = $3, spent = $4',
        [id, email === null ? null : `${email}${id}@x.de`, vip, spent],
      );
    }
    await run('vip');
    await run('spent');
  };
  const everybody = [1, 2, 3].map((id) => ({ id, email: 'b', vip: true, spent: 1 }));

  const property = fc.asyncProperty(fc.array(step, { minLength: 1, maxLength: 9 }), async (steps) => {
    for (const table of ['people', 'snapshot', 'outbox', 'transition', 'run'])
      await harness.state(`delete from ${table === 'people' ? 'public.people' : table}`);
    await harness.state(`update definition set first_run_at = null, members = 0, fields = '{}'`);
    const told: Told = { vip: new Map(), spent: new Map(), events: new Map() };
    await be(everybody);
    for (const each of steps) {
      if (each.do === 'be') await be(each.people);
      else if (each.do === 'feed') await feed(each.size);
      else await deliver(told);
    }
    while ((await feed(2)) > 0);
    await deliver(told);

    const held = await harness.state(
      'select d.key, s.recipient, s.profile_id, s.value from snapshot as s join definition as d on d.id = s.definition_id order by s.recipient',
    );
    const of = (key: string): Record<string, unknown>[] => held.filter((row) => row['key'] === key);
    expect(
      [...told.vip]
        .filter(([, is]) => is)
        .map(([who]) => who)
        .sort(),
    ).toEqual(of('vip').map((row) => row['recipient']));
    expect(Object.fromEntries([...told.spent].filter(([, value]) => value !== null))).toEqual(
      Object.fromEntries(of('spent').map((row) => [row['recipient'], (row['value'] as { spent: number }).spent])),
    );
    for (const { id } of everybody) {
      const names = [...told.events.values()]
        .filter(({ who, name }) => who.endsWith(`${id}@x.de`) && name !== 'Trait Computed')
        .sort((a, b) => (a.at < b.at ? -1 : 1))
        .map(({ name }) => name);
      expect(names).toEqual(names.map((_, index) => (index % 2 === 0 ? 'Audience Entered' : 'Audience Exited')));
      expect(names.length % 2 === 1).toBe(of('vip').some((row) => row['profile_id'] === String(id)));
    }
  });
  await fc.assert(property, { numRuns: HISTORIES });
}, 600_000);
