import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { z } from 'zod';
import { createSite, type Site } from './support/cli.js';

/** What the commands print that only look, and the form of their JSON. */
const TABLES = `
  create table people (id bigint primary key, user_id text, email text, vip boolean not null default false);
  insert into people select n, 'u' || n, 'p' || n || '@example.com', n % 2 = 0 from generate_series(1, 20) as n;
  insert into people values (21, null, null, true);
  create table orders (person bigint not null, total numeric(12, 2) not null);
  insert into orders select n, n * 1.5 from generate_series(1, 20) as n;
  -- Named as a temporary table of a run.
  create table delta (person bigint not null, big bigint not null);
  insert into delta select n, 9007199254740993 + n from generate_series(1, 20) as n`;
const VIP = { name: 'VIP', sql: 'SELECT id AS profile_id FROM people WHERE vip', send: 'both' };
const SPENT = {
  key: 'spent',
  sql: 'SELECT person AS profile_id, sum(total) AS value FROM orders GROUP BY person',
  poll: '1 hour',
};
const BIG = { key: 'big', sql: 'SELECT person AS profile_id, big AS value FROM delta', schedule: 'manual' };

const place = z.strictObject({ file: z.string(), line: z.number(), column: z.number() });
const problem = z.strictObject({ place: place.optional(), message: z.string() });
const judged = { ok: z.boolean(), problems: z.array(problem) };
const checkJson = z.strictObject({
  version: z.literal(1),
  definitions: z.array(
    z.strictObject({
      key: z.string(),
      ...judged,
      realtime: z.strictObject({ possible: z.boolean(), because: z.string().nullable() }).nullable(),
    }),
  ),
  triggers: z.array(z.string()).nullable(),
  disabled: z.array(z.string()),
  destinations: z.array(z.strictObject({ name: z.string(), ...judged })),
  profiles: z.strictObject(judged),
  state: z.strictObject(judged),
  configuration: z.strictObject(judged),
  remarks: z.array(z.string()),
});
const call = z.looseObject({ type: z.enum(['identify', 'track']), context: z.object({ personas: z.object({}) }) });
const planJson = z.strictObject({
  version: z.literal(1),
  plans: z.array(
    z.strictObject({
      definition: z.string(),
      members: z.int(),
      entered: z.int(),
      exited: z.int(),
      changed: z.int(),
      withoutIdentifier: z.int(),
      conflicting: z.int(),
      skippedValues: z.int(),
      calls: z.int(),
      guard: z.enum(['passes', 'holds']),
      because: z.string().nullable(),
      samples: z.strictObject({
        entered: z.array(call),
        exited: z.array(call),
        changed: z.array(call),
        conflicting: z.array(z.string()),
      }),
    }),
  ),
  failed: z.array(z.strictObject({ definition: z.string(), problems: z.array(problem) })),
  changes: z.array(
    z.strictObject({
      definition: z.string(),
      change: z.enum(['added', 'returns', 'disabled', 'removed', 'backfill']),
      calls: z.int(),
      held: z.boolean(),
      note: z.string(),
    }),
  ),
  refused: z.string().nullable(),
});
const date = z.iso.datetime();
const statusJson = z.strictObject({
  version: z.literal(1),
  definitions: z.array(
    z.strictObject({
      key: z.string(),
      kind: z.enum(['audience', 'trait']),
      cadence: z.string(),
      state: z.enum(['active', 'paused', 'disabled', 'archived', 'held', 'new']),
      reason: z.string().nullable(),
      heldRun: z.int().nullable(),
      members: z.int(),
      backfill: z.strictObject({ done: z.int(), total: z.int() }).nullable(),
      lastRun: z
        .strictObject({
          id: z.int(),
          trigger: z.string(),
          outcome: z.string().nullable(),
          startedAt: date,
          error: z.string().nullable(),
        })
        .nullable(),
      nextRun: date.nullable(),
      realtime: z
        .strictObject({
          state: z.enum(['live', 'polled']),
          because: z.string().nullable(),
          waiting: z.int(),
          parked: z.int(),
          oldestSeconds: z.int().nullable(),
          corrections: z.int().nullable(),
        })
        .nullable(),
    }),
  ),
  destinations: z.array(
    z.strictObject({
      name: z.string(),
      host: z.string(),
      state: z.enum(['active', 'paused', 'stopped']),
      reason: z.string().nullable(),
      waiting: z.int(),
      oldestWaitingSeconds: z.number().nullable(),
      dead: z.int(),
      configured: z.boolean(),
      drainsInSeconds: z.int().nullable(),
      droppedFields: z.array(z.string()),
      stoppedDefinitions: z.array(z.strictObject({ definition: z.string(), reason: z.string() })),
      stoppedFields: z.array(z.strictObject({ definition: z.string(), field: z.string(), reason: z.string() })),
      lanes: z.array(
        z.strictObject({
          name: z.string(),
          quota: z.number(),
          allowed: z.number(),
          requestsPerSecond: z.number(),
          callsPerSecond: z.number(),
        }),
      ),
    }),
  ),
  leader: z.strictObject({ host: z.string(), pid: z.int(), since: date }).nullable(),
  configurationProblem: z.string().nullable(),
});
const runsJson = z.strictObject({
  version: z.literal(1),
  runs: z.array(
    z.strictObject({
      id: z.int(),
      definition: z.string(),
      trigger: z.enum(['schedule', 'sync', 'approve', 'delete']),
      outcome: z.enum(['succeeded', 'failed', 'held', 'skipped', 'cancelled', 'abandoned']).nullable(),
      decision: z.enum(['approved', 'rejected']).nullable(),
      members: z.int().nullable(),
      entered: z.int().nullable(),
      exited: z.int().nullable(),
      changed: z.int().nullable(),
      withoutIdentifier: z.int().nullable(),
      conflicting: z.int().nullable(),
      skippedValues: z.int().nullable(),
      corrections: z.int().nullable(),
      startedAt: date,
      finishedAt: date.nullable(),
      error: z.string().nullable(),
    }),
  ),
});
const called = {
  destination: z.string(),
  definition: z.string(),
  kind: z.enum(['identify', 'track']),
  recipient: z.string(),
  what: z.array(z.string()),
};
const profileJson = z.strictObject({
  version: z.literal(1),
  recipients: z.array(
    z.strictObject({ recipient: z.string(), profileId: z.string().nullable(), beside: z.string().nullable() }),
  ),
  memberships: z.array(
    z.strictObject({ definition: z.string(), name: z.string(), recipient: z.string(), enteredAt: date }),
  ),
  traits: z.record(z.string(), z.unknown()),
  waiting: z.array(z.strictObject({ ...called, dueAt: date, attempts: z.int() })),
  dead: z.array(
    z.strictObject({ ...called, reason: z.string(), answer: z.string(), diedAt: date, retryAt: date.nullable() }),
  ),
  transitions: z.array(
    z.strictObject({
      at: date,
      definition: z.string(),
      kind: z.enum(['entered', 'exited', 'changed']),
      recipient: z.string(),
      run: z.int().nullable(),
    }),
  ),
  conflicting: z.array(
    z.strictObject({ definition: z.string(), recipient: z.string(), profiles: z.array(z.string()) }),
  ),
  forgotten: z.boolean(),
});

let site: Site;
const open = (tables: string, sections: Readonly<Record<string, unknown>>) => async (): Promise<void> => {
  site = await createSite(tables, sections);
};

describe('before the first sync', () => {
  beforeAll(open(TABLES, { audiences: [VIP], traits: [SPENT, BIG] }));
  afterAll(() => site.close());

  it('check finds everything fine, and says what comes next', async () => {
    const { code, stdout, stderr } = await site.run('check');
    expect({ code, stderr }).toEqual({ code: 0, stderr: '' });
    expect(stdout).toContain('✓ vip');
    expect(stdout).toContain('✓ destination iterable');
    expect(stdout).toMatch(/All is well. `personas-sync plan`/);
  });

  it('plan says that everyone enters, with the calls that would be sent', async () => {
    const { code, stdout } = await site.run('plan');
    expect(code).toBe(0);
    expect(stdout).toContain('✓ vip (new): 10 members; 10 would enter, 0 exit');
    expect(stdout).toContain('1 profile has no identifier');
    expect(stdout).toMatch(/enters u10 \{"type": "identify", "userId": "u10", .*"vip": true/);
    expect(stdout).toContain('"event": "Audience Entered"');
    expect(stdout).toContain('`personas-sync sync` would send 60 calls at most');
  });

  it('plan and check write nothing: there is no schema afterwards', async () => {
    expect(await site.sql(`select nspname from pg_namespace where nspname = 'personas'`)).toEqual([]);
    expect(site.simulator.userCount).toBe(0);
  });

  it('plan gives numbers with the digits that PostgreSQL has, in JSON too', async () => {
    const { stdout, json } = await site.run('plan', 'big', '--json');
    const { plans, changes } = planJson.parse(json);
    expect(plans).toMatchObject([{ definition: 'big', members: 20, entered: 20, guard: 'passes', calls: 20 }]);
    expect(plans[0]?.samples.entered).toHaveLength(3);
    expect(stdout).toMatch(/"big": 90071992547409\d\d[,}]/);
    expect(stdout).toContain('9007199254740994');
    expect(changes).toMatchObject([{ definition: 'big', change: 'added' }]);
  });

  it('status says that nothing has been synced, and how that is changed', async () => {
    const { code, stderr, json } = await site.run('status', '--json');
    expect(code).toBe(2);
    expect(stderr).toContain('`personas-sync sync`');
    expect(json).toMatchObject({ version: 1, error: { code: 2 } });
  });
});

describe('after a sync', () => {
  beforeAll(async () => {
    site = await createSite(TABLES, { audiences: [VIP], traits: [SPENT, BIG] });
    site.simulator.faults.failNext(9, {
      endpoint: 'users/update',
      status: 400,
      body: { code: 'RequestFieldsTypesMismatched', msg: 'no', params: {} },
      match: ({ body }) => body.includes('"u3"'),
    });
    expect((await site.run('sync')).code).toBe(2);
    await site.sql('update people set vip = not vip where id <= 2');
  });
  afterAll(() => site.close());

  it('status tells of definitions, destinations, the leader and what to do', async () => {
    const { code, json } = await site.run('status', '--json');
    expect(code).toBe(0);
    const { definitions, destinations, leader } = statusJson.parse(json);
    expect(definitions.map(({ key, state, members }) => ({ key, state, members }))).toEqual([
      { key: 'vip', state: 'active', members: 10 },
      { key: 'big', state: 'active', members: 20 },
      { key: 'spent', state: 'active', members: 20 },
    ]);
    expect(definitions.find(({ key }) => key === 'big')?.nextRun).toBeNull();
    expect(destinations).toMatchObject([{ name: 'iterable', state: 'active', waiting: 0 }]);
    const idle = { requestsPerSecond: 0, callsPerSecond: 0 };
    expect(destinations[0]?.lanes).toEqual([
      { name: 'users_update', quota: 500, allowed: 500, ...idle },
      { name: 'users_bulk_update', quota: 5, allowed: 5, ...idle },
      { name: 'events_track', quota: 2000, allowed: 2000, ...idle },
      { name: 'events_track_bulk', quota: 10, allowed: 10, ...idle },
      { name: 'lists', quota: 5, allowed: 5, ...idle },
      { name: 'reads', quota: 100, allowed: 100, ...idle },
    ]);
    expect(leader).toBeNull();
    const text = await site.run('status', 'vip');
    expect(text.stdout).toMatch(/vip +audience +every 1 min +active +10/);
    expect(text.stdout).not.toContain('spent');
    expect(text.stdout).toContain('No daemon is running');
  });

  it('runs lists the last ones, of one definition where it is named', async () => {
    const all = runsJson.parse((await site.run('runs', '--json')).json).runs;
    expect(all.map(({ definition, outcome }) => [definition, outcome])).toEqual(
      expect.arrayContaining([
        ['vip', 'succeeded'],
        ['spent', 'succeeded'],
      ]),
    );
    const one = await site.run('runs', 'vip', '--limit', '1');
    expect(one.stdout).toMatch(/vip +sync +succeeded +10 +10 +0 +0/);
    expect(one.stdout).not.toContain('spent');
  });

  it('plan shows who would enter and exit', async () => {
    const { code, json } = await site.run('plan', 'vip', '--json');
    expect(code).toBe(0);
    const [vip] = planJson.parse(json).plans;
    expect(vip).toMatchObject({ definition: 'vip', members: 10, entered: 1, exited: 1, changed: 0, calls: 4 });
    expect(vip?.samples.entered).toMatchObject([
      { type: 'identify', userId: 'u1', traits: { vip: true, email: 'p1@example.com' } },
      { type: 'track', userId: 'u1', event: 'Audience Entered' },
    ]);
    expect(vip?.samples.exited).toMatchObject([
      { type: 'identify', userId: 'u2', traits: { vip: false } },
      { type: 'track', userId: 'u2', event: 'Audience Exited' },
    ]);
  });

  it('plan says what a changed configuration would do', async () => {
    const stopped = { ...SPENT, enabled: false };
    await site.configure({
      audiences: [{ name: 'Everyone', sql: 'SELECT id AS profile_id FROM people' }],
      traits: [stopped, BIG],
    });
    const { changes } = planJson.parse((await site.run('plan', '--json')).json);
    expect(changes).toMatchObject([
      { definition: 'everyone', change: 'added' },
      { definition: 'spent', change: 'disabled', calls: 0 },
      { definition: 'vip', change: 'removed', calls: 0, held: false },
    ]);
    const { stdout } = await site.run('plan', 'vip');
    expect(stdout).toContain('vip is gone from the configuration; nothing is sent');
    await site.configure({ audiences: [VIP], traits: [SPENT, BIG] });
  });

  it('profile knows a person by userId and by email, and what became of their calls', async () => {
    const byId = profileJson.parse((await site.run('profile', 'u4', '--json')).json);
    expect(byId.recipients).toEqual([{ recipient: 'u:u4', profileId: '4', beside: 'p4@example.com' }]);
    expect(byId.memberships).toMatchObject([{ definition: 'vip', recipient: 'u:u4' }]);
    expect(byId.traits).toMatchObject({ spent: 6 });
    const { stdout, code } = await site.run('profile', 'P4@example.com ');
    expect(code).toBe(0);
    expect(stdout).toContain('u4 userId, with p4@example.com, profile 4');
    expect(stdout).toMatch(/big +9007199254740997/);
    expect(stdout).toMatch(/spent +6.00/);
  });

  it('profile says that nobody is known, without repeating whom it was asked for on stderr', async () => {
    const { code, stdout, stderr } = await site.run('profile', 'nobody@example.com');
    expect(code).toBe(0);
    expect(stdout).toContain('Nothing is known');
    expect(stderr).not.toContain('nobody');
  });
});

describe('where something is wrong', () => {
  beforeAll(open(TABLES, {}));
  afterAll(() => site.close());

  it('check names every mistake with its line, and goes on after each', async () => {
    await site.configure({
      audiences: [
        { name: 'No such column', sql: 'SELECT id AS profile_id\nFROM people\nWHERE wrong > 1' },
        { name: 'Wrong type', sql: 'SELECT email AS profile_id FROM people' },
        { name: 'Writes', sql: 'WITH w AS (DELETE FROM people RETURNING id) SELECT id AS profile_id FROM w' },
        { name: 'Locks', sql: 'SELECT id AS profile_id FROM people FOR UPDATE' },
        { name: 'Fine', sql: 'SELECT id AS profile_id FROM people' },
        { name: 'Off', sql: 'SELECT nonsense', enabled: false },
      ],
      traits: [{ key: 'several', sql: 'SELECT person AS profile_id, 1 AS fine FROM orders' }],
    });
    const { code, json } = await site.run('check', '--json');
    expect(code).toBe(2);
    const { definitions, disabled } = checkJson.parse(json);
    const problems = Object.fromEntries(definitions.map((each) => [each.key, each.problems]));
    expect(problems['no_such_column']?.[0]?.place?.file).toBe(`${site.folder}/personas.yaml`);
    expect(problems['no_such_column']?.[0]?.message).toContain('names a column that does not exist');
    expect(problems['wrong_type']?.[0]?.message).toContain("can't be compared");
    expect(problems['writes']).toHaveLength(1);
    expect(problems['locks']?.[0]?.message).toContain('tries to write');
    expect(problems['fine']).toEqual([]);
    expect(problems['several']?.[0]?.message).toContain('is filled by "fine" too');
    expect(disabled).toEqual(['off']);
    expect(await site.sql('select count(*) from people')).toEqual([{ count: '21' }]);

    const { stdout } = await site.run('check');
    expect(stdout).toMatch(/personas\.yaml:\d+:\d+: The SQL of "no_such_column" names a column/);
    expect(stdout).toContain('✓ fine');
    expect(stdout).toContain('5 problems.');
  });

  it('check finds a mistake in `profiles` once, and those of the definitions beside it', async () => {
    await site.configure({
      profiles: { sql: 'SELECT id AS profile_id, nope AS user_id FROM people', key: 'hybrid' },
      audiences: [VIP, { name: 'Broken', sql: 'SELECT id FROM people' }],
    });
    const { json } = await site.run('check', '--json');
    const { profiles, definitions } = checkJson.parse(json);
    expect(profiles.problems).toHaveLength(1);
    expect(definitions.map(({ key, ok }) => [key, ok])).toEqual([
      ['vip', true],
      ['broken', false],
    ]);
  });

  it('check compares fields with those of Iterable and with what was sent', async () => {
    await site.configure({ traits: [{ ...SPENT, sql: 'SELECT person AS profile_id, 1 AS value FROM orders' }] });
    expect((await site.run('sync')).code).toBe(0);
    await site.configure({
      traits: [SPENT, { key: 'other', sql: `SELECT person AS profile_id, 'x' AS value FROM orders` }],
      audiences: [VIP],
    });
    await fetch(`${site.simulator.url}/api/users/update`, {
      method: 'POST',
      headers: { 'api-key': 'test-key', 'content-type': 'application/json' },
      body: JSON.stringify({ userId: 'x', dataFields: { other: 1, vip: 'yes' } }),
    });
    const { code, json } = await site.run('check', '--json');
    expect(code).toBe(2);
    const { definitions } = checkJson.parse(json);
    const messages = Object.fromEntries(
      definitions.map((each) => [each.key, each.problems.map(({ message }) => message)]),
    );
    expect(messages['spent']).toEqual([expect.stringContaining('was sent as long and would now be double')]);
    expect(messages['other']).toEqual([expect.stringContaining('is long in Iterable')]);
    expect(messages['vip']).toEqual([expect.stringContaining('is string in Iterable')]);
  });

  it('check says that the key is refused, and that Iterable is out of reach', async () => {
    await site.configure({ audiences: [VIP] });
    site.simulator.faults.failNext(1, { endpoint: 'users/getFields', status: 401 });
    const refused = await site.run('check');
    expect(refused.code).toBe(2);
    expect(refused.stdout).toContain('Iterable refused the API key');
    site.simulator.faults.failNext(1, { endpoint: 'users/getFields', status: 503 });
    const away = await site.run('check', '--json');
    expect(away.code).toBe(75);
    expect(checkJson.parse(away.json).destinations).toMatchObject([{ name: 'iterable', ok: false }]);
  });

  it('check says which privileges the role lacks', async () => {
    await site.configure({ audiences: [VIP] });
    const role = `reader_${Date.now()}`;
    const database = new URL(site.database.url).pathname.slice(1);
    await site.sql(`create role ${role} login password 'reader'`);
    await site.sql(`revoke all on database ${database} from public; grant connect on database ${database} to ${role}`);
    const url = new URL(site.database.url);
    url.username = role;
    url.password = 'reader';
    await site.configure({ source: { url: url.toString() }, audiences: [VIP], state: { schema: 'other' } });
    const { code, json } = await site.run('check', '--json');
    expect(code).toBe(2);
    const { state, definitions } = checkJson.parse(json);
    expect(state.problems.map(({ message }) => message)).toEqual([
      expect.stringContaining('GRANT TEMPORARY ON DATABASE'),
      expect.stringContaining('GRANT CREATE ON DATABASE'),
    ]);
    expect(definitions[0]?.problems[0]?.message).toContain(`GRANT SELECT ON public.people TO "${role}".`);
    await site.sql(`drop owned by ${role}; drop role ${role}`);
  });

  it('plan shows the others where one fails, and ends with 2', async () => {
    await site.configure({
      audiences: [VIP, { name: 'Broken', sql: 'SELECT 1 / 0 AS profile_id' }],
      traits: [{ key: 'shared', sql: 'SELECT id AS profile_id, id AS value FROM people' }],
      profiles: { sql: `SELECT id AS profile_id, 'u' || (id / 2) AS user_id FROM people`, key: 'hybrid' },
    });
    const { code, json } = await site.run('plan', '--json');
    expect(code).toBe(2);
    const { plans, failed } = planJson.parse(json);
    expect(plans.map(({ definition }) => definition)).toEqual(['vip', 'shared']);
    expect(plans[1]?.conflicting).toBeGreaterThan(0);
    expect(plans[1]?.samples.conflicting).toHaveLength(3);
    expect(failed).toMatchObject([{ definition: 'broken' }, { definition: 'shared' }]);
    expect(failed[0]?.problems[0]?.message).toContain('divides by zero');
    expect(failed[1]?.problems[0]?.message).toContain('over 1 % of its members');
  });
});
