import { afterEach, describe, expect, it } from 'vitest';
import { parseRaw, type RawJson } from '../src/demo/simulator/json.js';
import { lead, type Leadership } from '../src/daemon.js';
import { tryLead } from '../src/db/lease.js';
import { createFeeder } from '../src/sync/cursor.js';
import { runDefinition, type RunResult } from '../src/sync/run.js';
import { createHarness, type Definitions, type Harness, type HarnessOptions } from './support/harness.js';
import { until } from './support/until.js';

/** What becomes of a value between a column and the bytes of a request. */
let harness: Harness;
let leadership: Leadership;
const closers: (() => Promise<void>)[] = [];
afterEach(async () => {
  for (const close of closers.splice(0).reverse()) await close();
});

const PROFILES = { sql: `SELECT id AS profile_id, 'u' || id AS user_id FROM people` };

async function begin(tables: string, options: Partial<HarnessOptions>): Promise<Ran[]> {
  harness = await createHarness({
    tables: `create table people (id int primary key); insert into people values (1), (2); ${tables}`,
    key: 'user_id',
    profiles: PROFILES,
    simulator: { keepRequests: 1000 },
    ...options,
  });
  closers.push(() => harness.close());
  await beginToLead();
  return sync();
}

/** Leads as a daemon does, but runs nothing by itself. */
async function beginToLead(): Promise<void> {
  const lease = await tryLead(harness.opened.databases.state.pool);
  leadership = await lead(harness.opened, lease!, {
    scheduled: false,
    delivers: true,
    confirmRemovals: true,
    kept: null,
  });
  closers.push(() => leadership.stop());
}

async function reconfigure(definitions: Definitions): Promise<void> {
  await closers.pop()?.();
  await harness.reconfigure({ profiles: PROFILES, ...definitions });
  await beginToLead();
}

/** Runs every definition once, and waits until all that may go now has been delivered. */
async function sync(): Promise<Ran[]> {
  const { databases, config } = harness.opened;
  const context = { databases, config, leader: leadership.leader };
  const request = { trigger: 'sync', approves: null, nextDueMs: () => null } as const;
  const ran = await Promise.all(
    config.definitions.map(async (definition): Promise<Ran> => {
      const result = await runDefinition(context, definition, request);
      return { definition: definition.key, outcome: result?.outcome, error: result?.error, ...result?.counts };
    }),
  );
  const feed = createFeeder(databases.state);
  while ((await feed()).count > 0);
  await until(async () => {
    for (const { dispatcher } of leadership.deliveries()) dispatcher.nudge();
    const due = await harness.state(
      `select from outbox as o join destination as t on t.id = o.destination_id where o.due_at <= now() and t.state = 'active' limit 1`,
    );
    return due.length === 0;
  });
  return ran;
}

type Ran = { definition: string; outcome: string | undefined; error: string | null | undefined } & Partial<
  RunResult['counts']
>;

/** The text that stands for each field in what has been sent since the last look, after the user's id, in their order. */
function told(): [user: string, fields: Record<string, string>][] {
  return bodies()
    .map((body): [string, Record<string, string>] => {
      const request = parseRaw(body);
      const member = (name: string): RawJson | undefined =>
        request.kind === 'object' ? request.members.get(name) : undefined;
      const fields = member('dataFields');
      const texts = fields?.kind === 'object' ? [...fields.members].map(([field, { raw }]) => [field, raw]) : [];
      return [String(JSON.parse(member('userId')?.raw ?? 'null')), Object.fromEntries(texts) as Record<string, string>];
    })
    .sort(([one], [other]) => (one < other ? -1 : one > other ? 1 : 0));
}

/** The bodies of what has been sent since the last look, as they were. */
function bodies(): string[] {
  const seen = harness.simulator.requests().slice(looked);
  looked += seen.length;
  return seen.map(({ body }) => body);
}
let looked = 0;
afterEach(() => {
  looked = 0;
});

describe('a value arrives with the digits that PostgreSQL gave it', () => {
  const CASES: [type: string, value: string, json: string][] = [
    ['numeric(10,2)', '10.00', '10.00'],
    ['numeric', '10', '10.0'],
    ['numeric', '-0.50', '-0.50'],
    ['numeric', '12345678901234567890.123456789', '12345678901234567890.123456789'],
    ['double precision', '10', '10.0'],
    ['double precision', '0.1::float8 + 0.2::float8', '0.3'],
    ['double precision', '1.5', '1.5'],
    ['double precision', '1e21', '1000000000000000000000.0'],
    ['real', '0.1', '0.1'],
    ['bigint', '9007199254740993', '9007199254740993'],
    ['integer', '-7', '-7'],
    ['boolean', 'true', 'true'],
    ['boolean', 'false', 'false'],
    ['text', `'true'`, '"true"'],
    ['text', `'2026-01-02 03:04:05'`, '"2026-01-02 03:04:05"'],
    ['text', `'2026-01-02T03:04:05Z'`, '"2026-01-02T03:04:05Z"'],
    ['text', `'10'`, '"10"'],
    ['text', `''`, '""'],
    ['text', `E'a "quoted" \\\\ line\\n\\u00e9\\U0001F600'`, '"a \\"quoted\\" \\\\ line\\né😀"'],
    ['varchar(5)', `'abc'`, '"abc"'],
    ['uuid', `'0f8fad5b-d9cb-469f-a165-70867728950e'`, '"0f8fad5b-d9cb-469f-a165-70867728950e"'],
    ['timestamptz', `'2026-01-02 03:04:05.678+02'`, '"2026-01-02 01:04:05 +00:00"'],
    ['timestamptz', `'2026-07-01 00:30:00 Europe/Berlin'`, '"2026-06-30 22:30:00 +00:00"'],
    ['timestamp', `'2026-01-02 03:04:05'`, '"2026-01-02 03:04:05 +00:00"'],
    ['date', `'2026-01-02'`, '"2026-01-02"'],
    ['time', `'03:04:05'`, '"03:04:05"'],
    [
      'jsonb',
      `'{"b": [1.5, 2.50], "a": null, "c": {"d": null, "e": true}}'`,
      '{"a": null, "b": [1.5, 2.50], "c": {"d": null, "e": true}}',
    ],
    ['json', `'[{"a": 1}, {"a": null}]'`, '[{"a": 1}, {"a": null}]'],
    ['text[]', `array['x', null, 'y z']`, '["x", null, "y z"]'],
    ['int[]', `array[3, 1]`, '[3, 1]'],
    ['numeric[]', `array[3, 1.50]`, '[3.0, 1.50]'],
    ['float8[]', `array[3, 1.5]`, '[3.0, 1.5]'],
  ];

  it.each([false, true])('whatever its type (a state database of its own: %s)', async (separate) => {
    const columns = CASES.map(([type, value], index) => `(${value})::${type} as c${index}`).join(', ');
    await begin('', { separate, traits: [{ key: 'all', sql: `SELECT 1 AS profile_id, ${columns}` }] });
    expect(told()).toEqual([['u1', Object.fromEntries(CASES.map(([, , json], index) => [`c${index}`, json]))]]);
    expect(await harness.state('select fields from definition')).toMatchObject([
      {
        fields: {
          c0: 'double',
          c1: 'double',
          c4: 'double',
          c9: 'long',
          c11: 'boolean',
          c13: 'string',
          c14: 'string',
          c21: 'date',
          c24: 'date',
          c26: 'object',
          c28: 'string',
          c29: 'long',
        },
      },
    ]);
  });

  it('however many columns there are', async () => {
    const fields = Array.from({ length: 120 }, (_, index) => [`c${index}`, String(index)] as const);
    const columns = fields.map(([name, value]) => `${value} as ${name}`).join(', ');
    await begin('', { traits: [{ key: 'all', sql: `SELECT 1 AS profile_id, ${columns}` }] });
    expect(told()).toEqual([['u1', Object.fromEntries(fields)]]);
  });

  it('an audience is a real boolean, and what rides along has the form of a field', async () => {
    await begin('', {
      audiences: [
        {
          name: 'Big Spenders',
          sql: `SELECT 1 AS profile_id, 10::numeric AS total, timestamptz '2026-01-02 03:04:05+00' AS last, '2026-01-02T03:04:05Z' AS text, NULL::text AS nothing, 1 AS hidden`,
          send: 'both',
          properties: ['total', 'last', 'text', 'nothing'],
        },
      ],
    });
    const [update, track] = bodies();
    expect(update).toBe('{"userId":"u1","dataFields":{"big_spenders":true}}');
    const { dataFields, id, createdAt, ...rest } = JSON.parse(track!) as Record<string, unknown>;
    expect(rest).toEqual({ userId: 'u1', eventName: 'Audience Entered' });
    expect(track).toMatch(/"total": ?10\.0/);
    expect(dataFields).toEqual({
      audience_key: 'big_spenders',
      audience_name: 'Big Spenders',
      big_spenders: true,
      total: 10,
      last: '2026-01-02 03:04:05 +00:00',
      text: '2026-01-02T03:04:05Z',
    });
    expect(id).toMatch(/^personas-[0-9a-f]{32}$/);
    const [run] = await harness.state('select floor(extract(epoch from started_at))::int8 as at from run');
    expect(createdAt).toBe(run!['at']);
  });
});

describe('what is not there', () => {
  const TABLE = 'create table facts (id int primary key, a int, b int, score float8, total numeric, seen timestamptz);';
  const FACTS = { key: 'facts', sql: 'SELECT id AS profile_id, a, b, score, total, seen FROM facts', guard: 'off' };
  const lastRun = async (): Promise<Record<string, unknown>> =>
    (
      await harness.state('select members, entered, exited, changed, skipped_values from run order by id desc limit 1')
    )[0]!;

  it('a NULL that was never sent is not sent, one in the place of a value removes it', async () => {
    await begin(`${TABLE} insert into facts values (1, 1, null)`, { traits: [FACTS] });
    expect(told()).toEqual([['u1', { a: '1' }]]);
    await harness.sql('update facts set a = null, b = 2');
    await sync();
    expect(told()).toEqual([['u1', { a: 'null', b: '2' }]]);
    await sync();
    expect(told()).toEqual([]);
  });

  it('a row of NULLs alone is no row', async () => {
    await begin(`${TABLE} insert into facts (id, a) values (1, null), (2, 1)`, { traits: [FACTS] });
    expect(await lastRun()).toMatchObject({ members: 1, entered: 1 });
    expect(await harness.state('select recipient from snapshot')).toEqual([{ recipient: 'u:u2' }]);
    await harness.sql('update facts set a = null');
    await sync();
    expect(await lastRun()).toMatchObject({ members: 0, exited: 1 });
    expect(told().slice(1)).toEqual([['u2', { a: 'null' }]]);
  });

  it('NaN and infinity are skipped and counted, and what was sent before stays', async () => {
    await begin(
      `${TABLE} insert into facts values (1, 1, null, 'NaN', 'Infinity', 'infinity'), (2, null, null, '-Infinity', null, null)`,
      { traits: [FACTS] },
    );
    expect(told()).toEqual([['u1', { a: '1' }]]);
    expect(await lastRun()).toEqual({ members: 1, entered: 1, exited: 0, changed: 0, skipped_values: 2 });
    await harness.sql(`update facts set score = 2, total = 3, seen = '2026-01-01'`);
    await sync();
    expect(told()).toEqual([
      ['u1', { seen: '"2026-01-01 00:00:00 +00:00"', score: '2.0', total: '3.0' }],
      ['u2', { seen: '"2026-01-01 00:00:00 +00:00"', score: '2.0', total: '3.0' }],
    ]);
    await harness.sql(`update facts set score = 'NaN', total = 4`);
    await sync();
    expect(told()).toEqual([
      ['u1', { total: '4.0' }],
      ['u2', { total: '4.0' }],
    ]);
    expect(await lastRun()).toEqual({ members: 2, entered: 0, exited: 0, changed: 2, skipped_values: 2 });
    await harness.sql('update facts set score = 2');
    await sync();
    expect(told()).toEqual([]);
  });

  it('a row that goes takes all its values with it, whatever number of columns there were', async () => {
    await begin(`${TABLE} insert into facts values (1, 1, 2)`, { traits: [FACTS] });
    await harness.sql('delete from facts');
    await sync();
    expect(told()).toEqual([
      ['u1', { a: '1', b: '2' }],
      ['u1', { a: 'null', b: 'null' }],
    ]);
  });

  it('with `on_missing: keep` a row that goes leaves its values, and one that comes back sends only what differs', async () => {
    await begin(`${TABLE} insert into facts values (1, 1, 2), (2, 5, 5)`, {
      traits: [{ ...FACTS, on_missing: 'keep' }],
    });
    told();
    await harness.sql('delete from facts where id = 1');
    await sync();
    expect(told()).toEqual([]);
    expect(await lastRun()).toMatchObject({ members: 1, exited: 0 });
    await sync();
    expect(await lastRun()).toMatchObject({ members: 1, exited: 0, changed: 0 });
    await harness.sql('insert into facts values (1, 1, 3)');
    await sync();
    expect(told()).toEqual([['u1', { b: '3' }]]);
    expect(await lastRun()).toMatchObject({ members: 2, entered: 0, changed: 1 });
    await harness.sql('delete from facts where id = 1');
    await sync();
    await harness.sql('insert into facts values (1, 1, 3)');
    await sync();
    expect(told()).toEqual([]);
    expect(await lastRun()).toMatchObject({ members: 2, entered: 0, changed: 0 });
  });

  it('a mark that waits still finds the value of a row that is kept', async () => {
    await begin(`${TABLE} insert into facts values (1, 1, 2)`, { traits: [{ ...FACTS, on_missing: 'keep' }] });
    told();
    await harness.state(`update destination set state = 'paused'`);
    await harness.sql('update facts set b = 3');
    await sync();
    await harness.sql('delete from facts');
    await sync();
    expect(told()).toEqual([]);
    await harness.state(`update destination set state = 'active'`);
    await sync();
    expect(told()).toEqual([['u1', { b: '3' }]]);
  });
});

describe('a change of value', () => {
  it('of a float counts only beyond a hair, however many hairs there are', async () => {
    await begin(
      'create table scores (id int primary key, score float8, plan text); insert into scores values (1, 1, null)',
      {
        traits: [{ key: 'scores', sql: 'SELECT id AS profile_id, score, plan FROM scores' }],
      },
    );
    told();
    await harness.sql('update scores set score = 1.0000000009');
    await sync();
    expect(told()).toEqual([]);
    await harness.sql(`update scores set plan = 'gold'`);
    await sync();
    expect(told()).toEqual([['u1', { plan: '"gold"' }]]);
    await harness.sql('update scores set score = 1.0000000018');
    await sync();
    expect(told()).toEqual([['u1', { score: '1.0000000018' }]]);
    await harness.sql('update scores set score = -1e308');
    await sync();
    await harness.sql('update scores set score = 1e308');
    await sync();
    expect(told()).toHaveLength(2);
  });

  it('of the scale of a numeric alone is none', async () => {
    await begin(
      'create table totals (profile_id int primary key, value numeric); insert into totals values (1, 10.50)',
      { traits: [{ key: 'total', table: 'totals' }] },
    );
    await harness.sql('update totals set value = 10.5');
    await sync();
    expect(told()).toEqual([['u1', { total: '10.50' }]]);
  });

  it('goes out for several columns in one request, and for no other column', async () => {
    await begin(
      "create table orders (id int primary key, n bigint, last date, plan text); insert into orders values (1, 1, '2026-01-01', 'free')",
      {
        traits: [
          {
            key: 'order_stats',
            sql: 'SELECT id AS profile_id, n AS orders_count, last AS last_order_at, plan FROM orders',
            prefix: 'shop_',
          },
        ],
      },
    );
    expect(told()).toEqual([
      ['u1', { shop_plan: '"free"', shop_orders_count: '1', shop_last_order_at: '"2026-01-01"' }],
    ]);
    await harness.sql(`update orders set n = 2, last = '2026-02-01'`);
    await sync();
    expect(told()).toEqual([['u1', { shop_last_order_at: '"2026-02-01"', shop_orders_count: '2' }]]);
  });

  it('of several definitions for one person is one request', async () => {
    await begin('create table orders (id int primary key, n int); insert into orders values (1, 5)', {
      audiences: [{ key: 'vip', sql: 'SELECT id AS profile_id FROM orders' }],
      traits: [{ key: 'n', sql: 'SELECT id AS profile_id, n AS value FROM orders' }],
    });
    expect(harness.simulator.user('u1')?.fields).toEqual({ vip: 'true', n: '5' });
  });

  it('of the type of a field fails the run, and says what to do', async () => {
    await begin('create table orders (id int primary key, n int); insert into orders values (1, 5)', {
      traits: [{ key: 'n', sql: 'SELECT id AS profile_id, n AS value FROM orders' }],
    });
    told();
    await reconfigure({
      profiles: PROFILES,
      traits: [{ key: 'n', sql: 'SELECT id AS profile_id, n::numeric + 0.5 AS value FROM orders' }],
    });
    const runs = await sync();
    expect(runs).toMatchObject([{ outcome: 'failed' }]);
    expect(runs[0]?.error).toMatch(
      /personas\.yaml:\d+:\d+: The field `n` was sent as long and would now be double, which Iterable refuses\. Cast it back to the old type, or give it another name\.$/,
    );
    expect(told()).toEqual([]);
    expect(await harness.state('select value from snapshot')).toEqual([{ value: { n: 5 } }]);
  });

  it('of a column that is left out removes the field, and with `on_missing: keep` leaves it', async () => {
    const columns = (text: string, more = {}) => [{ key: 'facts', sql: `SELECT 1 AS profile_id, ${text}`, ...more }];
    await begin('', { traits: columns('1 AS a, 2 AS b') });
    told();
    await reconfigure({ traits: columns('1 AS a') });
    await sync();
    expect(told()).toEqual([['u1', { b: 'null' }]]);
    await reconfigure({ traits: columns('3 AS c', { on_missing: 'keep' }) });
    await sync();
    expect(told()).toEqual([['u1', { c: '3' }]]);
  });
});

describe('a profile that comes twice', () => {
  it('is refused for a trait', async () => {
    const runs = await begin('create table orders (id int, n int); insert into orders values (1, 5), (1, 6), (2, 7)', {
      traits: [{ key: 'n', sql: 'SELECT id AS profile_id, n AS value FROM orders' }],
    });
    expect(runs).toMatchObject([{ outcome: 'failed' }]);
    expect(runs[0]?.error).toMatch(
      /personas\.yaml:\d+:\d+: The SQL of "n" gives a profile more than once; GROUP BY profile_id, or take one row of each\.$/,
    );
    await harness.sql('delete from orders where n = 5');
    expect(await sync()).toMatchObject([{ outcome: 'succeeded', members: 2 }]);
    await harness.sql('insert into orders values (2, 7)');
    expect(await sync()).toMatchObject([{ outcome: 'failed' }]);
    expect(told()).toEqual([
      ['u1', { n: '6' }],
      ['u2', { n: '7' }],
    ]);
  });

  it('is one member of an audience', async () => {
    const runs = await begin('create table orders (id int); insert into orders values (1), (1), (2), (2), (2)', {
      audiences: [{ key: 'vip', sql: 'SELECT id AS profile_id FROM orders' }],
    });
    expect(runs).toMatchObject([{ outcome: 'succeeded', members: 2, entered: 2 }]);
    await harness.sql('delete from orders where id = 2; insert into orders values (1)');
    expect(await sync()).toMatchObject([{ outcome: 'succeeded', members: 1, exited: 1 }]);
    expect(await sync()).toMatchObject([{ outcome: 'succeeded', members: 1, exited: 0 }]);
    expect(told()).toEqual([
      ['u1', { vip: 'true' }],
      ['u2', { vip: 'true' }],
      ['u2', { vip: 'false' }],
    ]);
  });
});
