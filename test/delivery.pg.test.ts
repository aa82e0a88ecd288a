import { afterEach, describe, expect, it } from 'vitest';
import type { Fault } from '../src/demo/simulator/faults.js';
import { tidyUp } from '../src/sync/housekeeping.js';
import { startDaemon } from './support/daemon.js';
import { createHarness, type Harness, type HarnessOptions } from './support/harness.js';

/** What becomes of calls: what one request holds, and what each answer does. */
const TABLES = `
  create table people (
    id bigint primary key, user_id text, email text, vip boolean not null default true,
    ltv numeric not null default 10, orders int not null default 1, city text not null default 'Bonn');
  insert into people (id, user_id, email) select n, 'u' || n, 'p' || n || '@example.com' from generate_series(1, 3) as n`;
const VIP = { name: 'VIP', sql: 'SELECT id AS profile_id FROM people WHERE vip' };
const BIG = { name: 'Big', sql: 'SELECT id AS profile_id FROM people WHERE ltv > 5' };
const STATS = { name: 'Stats', sql: 'SELECT id AS profile_id, orders, city, ltv FROM people' };

interface Sent {
  path: string;
  outcome: unknown;
  body: { userId?: string; email?: string; eventName?: string; id?: string; dataFields?: Record<string, unknown> };
}

let harness: Harness;
let stopDaemon: (() => Promise<void>) | undefined;
afterEach(async () => {
  await stopDaemon?.();
  stopDaemon = undefined;
  await harness.close();
});

async function lead(): Promise<void> {
  stopDaemon = (await startDaemon(harness.opened)).stop;
}

async function begin(options: Partial<HarnessOptions> = {}): Promise<void> {
  harness = await createHarness({ tables: TABLES, simulator: { keepRequests: 1_000 }, ...options });
}

/** The requests so far, oldest first; reads have no body. */
function sent(path?: string): Sent[] {
  return harness.simulator
    .requests()
    .filter((request) => path === undefined || request.endpoint === path)
    .map(({ path: to, body, outcome }) => ({ path: to, outcome, body: JSON.parse(body || '{}') as Sent['body'] }));
}

/** Writes to Iterable past the daemon. */
async function post(path: string, body: unknown): Promise<void> {
  const answer = await fetch(`${harness.simulator.url}/api/${path}`, {
    method: 'POST',
    headers: { 'Api-Key': 'test-key', 'Content-Type': 'application/json' },
    body: JSON.stringify(body),
  });
  expect(answer.status).toBe(200);
}

const field = (person: string, name: string): string | undefined => harness.simulator.user(person)?.fields[name];
const eventNames = (person: string): string[] => harness.simulator.events(person).map(({ name }) => name);

interface Waiting {
  kind: string;
  recipient: string;
  attempts: number;
  columns: string[] | null;
  event: string | null;
  seconds: number;
}

/** What waits, with the seconds until it is due. */
async function waiting(): Promise<Waiting[]> {
  const rows = await harness.state(
    `select kind, recipient, attempts, columns, event, extract(epoch from due_at - now())::float8::text as seconds from outbox order by id`,
  );
  return rows.map((row) => ({ ...(row as unknown as Waiting), seconds: Number(row['seconds']) }));
}

interface Dead {
  recipient: string;
  field: string | null;
  event: string | null;
  reason: string;
  answer: string;
  retry: boolean;
}

async function dead(): Promise<Dead[]> {
  const rows = await harness.state(
    `select recipient, field, event, reason, answer, retry_at is not null as retry from dead_call order by recipient, field, id`,
  );
  return rows as unknown as Dead[];
}

const pass = (): Promise<unknown> => harness.state('update outbox set due_at = now()');

/** Lets calls pile up while the destination is paused. */
async function whilePaused(change: () => Promise<unknown>): Promise<void> {
  await harness.state(`update destination set state = 'paused'`);
  await change();
  await harness.state(`update destination set state = 'active'`);
}

/** Resolves when a request that fits arrives; it fails in the way that is given. */
function arrival(fault: Fault = {}): Promise<void> {
  return new Promise((resolve) => {
    const match = fault.match ?? (() => true);
    harness.simulator.faults.failNext(1, {
      ...fault,
      match: (request) => {
        if (!match(request)) return false;
        resolve();
        return true;
      },
    });
  });
}

describe('one request', () => {
  it('carries all that waits for a recipient, with the values of the moment when it is sent', async () => {
    await begin({ audiences: [VIP, BIG], traits: [STATS], tables: `${TABLES}; truncate people` });
    await harness.sync();
    await whilePaused(async () => {
      await harness.sql(`insert into people (id, user_id) values (1, 'u1'), (2, 'u2')`);
      expect((await harness.sync()).delivery).toMatchObject({
        stopped: 6,
        reason: 'Destination "iterable" is paused.',
      });
      await harness.sql(`update people set city = 'Kiel', vip = false where id = 1`);
      await harness.sync();
    });
    expect(sent()).toEqual([]);
    await harness.sync();
    const bodies = sent().map(({ body }) => body);
    expect(bodies).toHaveLength(2);
    expect(bodies).toContainEqual({
      userId: 'u1',
      dataFields: { vip: false, big: true, orders: 1, city: 'Kiel', ltv: 10 },
    });
    expect(bodies).toContainEqual({
      userId: 'u2',
      dataFields: { vip: true, big: true, orders: 1, city: 'Bonn', ltv: 10 },
    });
    expect(await waiting()).toEqual([]);
  });

  it('identifies before an event about the same person, by both identifiers when they enter', async () => {
    await begin({ audiences: [{ ...VIP, send: 'both' }] });
    await harness.sync();
    for (const person of ['u1', 'u2', 'u3']) {
      const mine = sent().filter(({ body }) => body.userId === person);
      expect(mine.map(({ path }) => path)).toEqual(['/api/users/update', '/api/events/track']);
      expect(mine.map(({ body }) => body.email)).toEqual([
        `p${person.slice(1)}@example.com`,
        `p${person.slice(1)}@example.com`,
      ]);
    }
    await harness.sql('update people set vip = false where id = 1');
    await harness.sync();
    expect(sent().slice(-2)).toMatchObject([
      { body: { userId: 'u1', dataFields: { vip: false } } },
      { body: { userId: 'u1', eventName: 'Audience Exited', dataFields: { audience_key: 'vip', vip: false } } },
    ]);
    expect(sent().at(-1)?.body).not.toHaveProperty('email');
  });

  it('tracks by the names that the definition gives, and new values of a trait', async () => {
    await begin({
      audiences: [{ ...VIP, send: { iterable: 'track', entered: 'Became VIP', exited: 'No longer VIP' } }],
      traits: [{ name: 'City', sql: 'SELECT id AS profile_id, city AS value FROM people', send: 'both' }],
    });
    await harness.sync();
    expect(eventNames('u1').sort()).toEqual(['Became VIP', 'Trait Computed']);
    await harness.sql(`update people set vip = false, city = 'Kiel' where id = 1`);
    await harness.sync();
    expect(eventNames('u1').sort()).toEqual(['Became VIP', 'No longer VIP', 'Trait Computed', 'Trait Computed']);
    expect(
      harness.simulator
        .events('u1')
        .filter(({ name }) => name === 'Trait Computed')
        .at(-1)?.fields,
    ).toEqual({
      trait_key: '"city"',
      city: '"Kiel"',
    });
    expect(harness.simulator.user('u1')?.fields).toEqual({ city: '"Kiel"' });
  });
});

describe('a refusal of the content', () => {
  it('that names a field makes that column dead alone, and the rest is delivered', async () => {
    await begin({ audiences: [VIP], traits: [STATS] });
    await post('users/update', { userId: 'seed', dataFields: { city: 5 } });
    const { delivery } = await harness.sync();
    expect(delivery).toMatchObject({ waiting: 0, later: 0, refused: 3 });
    expect(await waiting()).toEqual([]);
    expect(await dead()).toMatchObject(
      ['u1', 'u2', 'u3'].map((person) => ({
        recipient: `u:${person}`,
        field: 'city',
        reason: 'RequestFieldsTypesMismatched',
        answer: expect.stringContaining("Field 'city'") as string,
        retry: false,
      })),
    );
    expect(harness.simulator.user('u1')?.fields).toEqual({ vip: 'true', orders: '1', ltv: '10.0' });
  });

  it('that names none is taken apart definition by definition, then column by column', async () => {
    await begin({ audiences: [VIP], traits: [STATS], tables: `${TABLES}; truncate people` });
    await harness.sync();
    await whilePaused(async () => {
      await harness.sql(`insert into people (id, user_id) values (1, 'u1')`);
      await harness.sync();
    });
    harness.simulator.faults.failRandomly({
      share: 1,
      seed: 1,
      status: 400,
      body: { code: 'BadParams', msg: 'no', params: null },
      match: ({ body }) => body.includes('city'),
    });
    await harness.sync();
    // A machine that stands still for a second has what is left begun again: each request counts once.
    const columns = [
      ...new Set(
        sent('users/update').map(({ body }) =>
          Object.keys(body.dataFields ?? {})
            .sort()
            .join(' '),
        ),
      ),
    ];
    expect(columns).toHaveLength(6);
    expect(columns[0]).toBe('city ltv orders vip');
    expect(columns.slice(1).sort()).toEqual(['city', 'city ltv orders', 'ltv', 'orders', 'vip']);
    expect(columns.indexOf('city ltv orders')).toBeLessThan(columns.indexOf('city'));
    expect(await waiting()).toEqual([]);
    expect(await dead()).toMatchObject([{ recipient: 'u:u1', field: 'city', reason: 'BadParams' }]);
  });

  it('of an event makes that event dead, and what came after it goes on', async () => {
    await begin({
      audiences: [
        { ...VIP, send: 'track' },
        { ...BIG, send: 'track' },
      ],
    });
    await harness.sync();
    await whilePaused(async () => {
      await harness.sql('update people set vip = false where id = 1');
      await harness.sync('vip');
      await harness.sql('update people set ltv = 0 where id = 1');
      await harness.sync('big');
    });
    harness.simulator.faults.failNext(1, { status: 400, body: { code: 'BadParams', msg: 'no', params: null } });
    await harness.sync();
    expect(await dead()).toMatchObject([
      { recipient: 'u:u1', field: null, event: 'Audience Exited', reason: 'BadParams' },
    ]);
    expect(harness.simulator.events('u1').at(-1)).toMatchObject({ name: 'Audience Exited', fields: { big: 'false' } });
  });

  it('with a body that PostgreSQL would refuse is kept all the same', async () => {
    await begin({ audiences: [VIP] });
    harness.simulator.faults.failNext(3, { status: 400, body: 'a\0b' });
    await harness.sync();
    expect((await dead()).map(({ reason, answer }) => [reason, answer])).toEqual(
      Array(3).fill(['HTTP 400', 'a\uFFFDb']),
    );
  });
});

describe('a refusal of the person', () => {
  it('for a conflict of the identifiers is tried once more with the key alone', async () => {
    await begin({ audiences: [{ ...VIP, send: 'both' }] });
    await post('users/update', { userId: 'other', email: 'p1@example.com' });
    await post('users/update', { userId: 'u1' });
    harness.simulator.faults.failRandomly({
      share: 1,
      seed: 1,
      endpoint: 'events/track',
      status: 409,
      body: { code: 'ExternalKeyConflict', msg: '', params: null },
      match: ({ body }) => body.includes('p1@example.com'),
    });
    const { delivery } = await harness.sync();
    expect(delivery).toMatchObject({ waiting: 0, refused: 0 });
    const mine = sent()
      .filter(({ body }) => body.userId === 'u1')
      .slice(1);
    expect(mine.map(({ path, outcome, body }) => [path, outcome, body.email])).toEqual([
      ['/api/users/update', 409, 'p1@example.com'],
      ['/api/users/update', 200, undefined],
      ['/api/events/track', 409, 'p1@example.com'],
      ['/api/events/track', 200, undefined],
    ]);
    expect(field('u1', 'vip')).toBe('true');
    expect(field('other', 'vip')).toBeUndefined();
  });

  it('is final where they were forgotten or the identifier is none, with the answer kept and no address in it', async () => {
    await begin({ key: 'email', audiences: [VIP], simulator: { forgottenStatus: 409 } });
    harness.simulator.forget('p1@example.com');
    await harness.sql(`update people set email = 'nobody' where id = 2`);
    await harness.sync();
    const refused = await dead();
    expect(refused).toMatchObject([
      { recipient: 'e:nobody', field: 'vip', reason: 'InvalidEmailAddressError', retry: false },
      { recipient: 'e:p1@example.com', field: 'vip', reason: 'ForgottenUserError', retry: false },
    ]);
    expect(refused.map(({ answer }) => answer).join()).not.toMatch(/@/);
    expect(refused[0]?.answer).toContain('InvalidEmailAddressError');
    expect(field('p3@example.com', 'vip')).toBe('true');
  });

  it('for an event because they are unknown is tried again after 1, 2 and 5 minutes, whatever failed between', async () => {
    await begin({
      key: 'email',
      audiences: [{ ...VIP, send: 'track' }],
      tables: `${TABLES}; delete from people where id > 1`,
    });
    expect((await harness.sync()).delivery).toMatchObject({ waiting: 0, later: 1, refused: 0 });
    const waits = [(await waiting())[0]?.seconds ?? 0];
    for (let n = 0; n < 3; n += 1) {
      harness.simulator.faults.failNext(1, { status: 500 });
      await pass();
      await harness.sync();
      waits.push((await waiting())[0]?.seconds ?? 0);
      if (n < 2) continue;
      await pass();
      await harness.sync();
    }
    // Each failure was tried again within the same sync, and its answer had the person unknown again.
    expect(waits.slice(0, 3).map((seconds) => Math.round(seconds / 10) * 10)).toEqual([60, 120, 300]);
    expect(await waiting()).toEqual([]);
    expect(await dead()).toMatchObject([{ event: 'Audience Entered', reason: 'UnknownEmailError', retry: true }]);
    expect(sent('events/track').map(({ outcome }) => outcome)).toEqual([400, 500, 400, 500, 400, 500, 400]);
  });

  it('is asked for before an exit where the source has lost them, and isn’t made again where Iterable has, too', async () => {
    await begin({ audiences: [{ ...VIP, send: 'both' }] });
    await harness.sync();
    harness.simulator.deleteUser('u1');
    await harness.sql('delete from people where id < 3');
    expect((await harness.sync()).delivery).toMatchObject({ later: 2 });
    expect(field('u2', 'vip')).toBe('false');
    expect(eventNames('u2')).toEqual(['Audience Entered', 'Audience Exited']);
    expect((await waiting()).map(({ recipient, seconds }) => [recipient, Math.round(seconds / 10)])).toEqual([
      ['u:u1', 6],
      ['u:u1', 6],
    ]);
    await pass();
    await harness.sync();
    expect(await waiting()).toEqual([]);
    expect(await dead()).toEqual([]);
    expect(harness.simulator.user('u1')).toBeUndefined();
    expect(
      sent('users/get')
        .map(({ path }) => path)
        .sort(),
    ).toEqual(['u1', 'u1', 'u2'].map((person) => `/api/users/byUserId/${person}`));
  });
});

describe('a destination', () => {
  it('that refuses the key stops, loses nothing, and goes on when a person resumes it', async () => {
    await begin({ audiences: [{ ...VIP, send: 'both' }] });
    harness.simulator.faults.failRandomly({ share: 1, seed: 1, status: 401 });
    const { delivery } = await harness.sync();
    expect(delivery).toMatchObject({
      waiting: 0,
      stopped: 6,
      reason: 'Iterable refused the API key (HTTP 401, BadApiKey).',
    });
    expect(await harness.state('select state, reason from destination')).toMatchObject([{ state: 'stopped' }]);
    expect((await waiting()).map(({ attempts }) => attempts)).toEqual([0, 0, 0, 0, 0, 0]);
    const requests = sent().length;
    expect((await harness.sync()).delivery).toMatchObject({ stopped: 6 });
    expect(sent()).toHaveLength(requests);

    harness.simulator.faults.clear();
    await harness.state(`update destination set state = 'active', reason = null`);
    expect((await harness.sync()).delivery).toMatchObject({ waiting: 0, stopped: 0, refused: 0 });
    expect(['u1', 'u2', 'u3'].map((person) => field(person, 'vip'))).toEqual(['true', 'true', 'true']);
    expect(harness.simulator.events()).toHaveLength(3);
  });

  it('that says 429 is waited for as long as it asks, which is no attempt', async () => {
    await begin({ audiences: [VIP] });
    const body = { code: 'RateLimitExceeded', msg: '', params: { rateLimitReset: 1 } };
    const refused = arrival({ status: 429, body });
    harness.simulator.faults.failNext(1, { status: 429, body });
    const syncing = harness.sync();
    await refused;
    expect((await waiting()).map(({ attempts }) => attempts)).toEqual([0, 0, 0]);
    expect((await syncing).delivery).toMatchObject({ waiting: 0, later: 0, refused: 0 });
    const times = harness.simulator.stats.arrivals('users/update');
    const waited = (times[3] ?? 0) - (times[1] ?? 0);
    expect(waited).toBeGreaterThanOrEqual(990);
    expect(waited).toBeLessThan(5_000);
    expect(harness.simulator.userCount).toBe(3);
  });

  it('that fails is tried again, after a wait that doubles', async () => {
    await begin({ audiences: [VIP], tables: `${TABLES}; delete from people where id > 1` });
    harness.simulator.faults.failNext(2, { status: 503, body: '<html>' });
    expect((await harness.sync()).delivery).toMatchObject({ waiting: 0, refused: 0 });
    const [first = 0, second = 0, third = 0] = harness.simulator.stats.arrivals('users/update');
    expect(second - first).toBeGreaterThanOrEqual(490);
    expect(third - second).toBeGreaterThanOrEqual(990);

    // Others get through, so that it counts.
    await harness.sql(`insert into people (id, user_id) values (2, 'u2')`);
    await lead();
    await harness.sync();
    await harness.sql('update people set vip = false where id = 1');
    for (const [attempts, least, most] of [
      [7, 64, 128],
      [20, 300, 600],
    ] as const) {
      await whilePaused(async () => {
        await harness.sync();
        await harness.state('update outbox set attempts = $1, due_at = now()', [attempts]);
      });
      harness.simulator.faults.failNext(1, { status: 500 });
      expect((await harness.sync()).delivery).toMatchObject({ later: 1 });
      const [mark] = await waiting();
      expect(mark?.attempts).toBe(attempts + 1);
      expect(mark?.seconds).toBeGreaterThan(least - 3);
      expect(mark?.seconds).toBeLessThanOrEqual(most);
    }
    await pass();
    await harness.sync();
    expect(field('u1', 'vip')).toBe('false');
  });

  it('is told of everybody though somebody else is writing to one of them, who is written down a little later', async () => {
    await begin({ audiences: [{ ...VIP, send: 'both' }] });
    await harness.sync();
    await whilePaused(async () => {
      await harness.sql('update people set vip = false');
      await harness.sync();
    });
    const writer = await harness.database.pool.connect();
    await writer.query(`begin; select from personas.outbox where recipient = 'u:u1' and kind = 'm' for update`);
    const syncing = harness.sync();
    const left = async (): Promise<unknown> => harness.state('select distinct recipient from outbox');
    await expect.poll(left, { timeout: 10_000 }).toEqual([{ recipient: 'u:u1' }]);
    expect(field('u1', 'vip')).toBe('false');
    await writer.query('commit');
    writer.release();
    expect((await syncing).delivery).toMatchObject({ waiting: 0, refused: 0 });
    expect(harness.simulator.requests().filter(({ body }) => body.includes('"u1"'))).toHaveLength(4);
  });

  it('that has trouble of its own with a call gets it after one, two and five minutes, and then it is dead until the next day', async () => {
    await begin({ audiences: [{ ...VIP, send: 'both' }] });
    const trouble = { status: 400, body: { code: 'GenericError', msg: 'no', params: null } };
    harness.simulator.faults.failRandomly({ share: 1, seed: 1, match: ({ body }) => body.includes('u1'), ...trouble });
    await harness.sync();
    for (const minutes of [1, 2, 5]) {
      const [mark] = (await waiting()).filter(({ kind }) => kind === 'm');
      expect(mark?.seconds).toBeGreaterThan(minutes * 60 - 10);
      expect(mark?.seconds).toBeLessThanOrEqual(minutes * 60);
      await pass();
      await harness.sync();
    }
    expect((await dead()).filter(({ recipient }) => recipient === 'u:u1')).toMatchObject([
      { field: 'vip', reason: 'GenericError', retry: true },
      ...(await dead()).filter(({ event }) => event !== null),
    ]);
    expect(field('u2', 'vip')).toBe('true');
  });

  it('that gave no answer may have applied the request: it is sent again after a minute', async () => {
    await begin({ audiences: [{ ...VIP, send: 'both' }] });
    harness.simulator.faults.failNext(1, { endpoint: 'users/update', reset: true, afterApplying: true });
    harness.simulator.faults.failNext(1, { endpoint: 'events/track', reset: true, afterApplying: true });
    expect((await harness.sync()).delivery).toMatchObject({ waiting: 0, later: 3, refused: 0 });
    const late = await waiting();
    expect(late.map(({ kind }) => kind).sort()).toEqual(['e', 'e', 'm']);
    for (const { seconds } of late) {
      expect(seconds).toBeGreaterThan(55);
      expect(seconds).toBeLessThanOrEqual(60);
    }
    expect(late.map(({ attempts }) => attempts).sort()).toEqual([0, 1, 1]);
    await pass();
    expect((await harness.sync()).delivery).toMatchObject({ waiting: 0, later: 0 });
    expect(
      harness.simulator
        .events()
        .map(({ applications }) => applications)
        .sort(),
    ).toEqual([1, 1, 2]);
  });

  it('that gave no answer is sent no newer value either until the minute is over', async () => {
    await begin({ audiences: [VIP], tables: `${TABLES}; delete from people where id > 1` });
    harness.simulator.faults.failNext(1, { reset: true });
    await lead();
    await expect.poll(() => sent().length, { timeout: 5_000 }).toBe(1);
    await expect.poll(async () => (await waiting())[0]?.attempts, { timeout: 5_000 }).toBe(1);
    await harness.sql('update people set vip = false');
    expect((await harness.sync()).delivery).toMatchObject({ waiting: 0, later: 1 });
    expect((await waiting())[0]?.seconds).toBeGreaterThan(50);
    expect(sent()).toHaveLength(1);
  });

  it('that can’t be reached was sent nothing: it is tried again soon', async () => {
    await begin({
      audiences: [VIP],
      destinations: { iterable: { type: 'iterable', api_key: 'k', region: 'http://127.0.0.1:9' } },
    });
    const syncing = harness.sync();
    const dueTimes = new Set<unknown>();
    const triedAgain = async (): Promise<number> => {
      const [row] = await harness.state(`select due_at::text from outbox where recipient = 'u:u1' and attempts > 0`);
      if (row !== undefined) dueTimes.add(row['due_at']);
      return dueTimes.size;
    };
    await expect.poll(triedAgain, { timeout: 10_000 }).toBeGreaterThan(1);
    for (const { seconds } of await waiting()) expect(seconds).toBeLessThan(5);
    await harness.state(`update destination set state = 'paused'`);
    expect((await syncing).delivery).toMatchObject({ stopped: 3 });
  });

  it('that has stopped holds up no other one', async () => {
    const options: Partial<HarnessOptions> = { audiences: [VIP] };
    await begin(options);
    const destination = { type: 'iterable', region: harness.simulator.url };
    await harness.reconfigure({
      ...options,
      destinations: {
        iterable: { ...destination, api_key: 'test-key' },
        other: { ...destination, api_key: 'other-key', region: `${harness.simulator.url}/nowhere` },
      },
    });
    expect((await harness.sync()).delivery).toMatchObject({
      waiting: 0,
      stopped: 3,
      reason: expect.stringMatching(/404/) as string,
    });
    expect(['u1', 'u2', 'u3'].map((person) => field(person, 'vip'))).toEqual(['true', 'true', 'true']);
  });
});

describe('a dead call', () => {
  /** Everybody's city is refused, as long as Iterable takes it for a number. */
  async function refuseCities(): Promise<void> {
    await begin({ traits: [STATS] });
    await post('users/update', { userId: 'seed', dataFields: { city: 5 } });
    await harness.sync();
    expect((await dead()).map(({ field: column }) => column)).toEqual(['city', 'city', 'city']);
  }
  const everything = { keys: [], reason: null, destination: null, olderThan: null };

  it('gives way to the next change of its column, and to no other', async () => {
    await refuseCities();
    harness.simulator.faults.clear();
    await harness.sql(`update people set orders = 2 where id = 1; update people set city = 'Kiel' where id = 2`);
    await whilePaused(() => harness.sync());
    expect((await dead()).map(({ recipient }) => recipient)).toEqual(['u:u1', 'u:u3']);
    await harness.sync();
    expect((await dead()).map(({ recipient }) => recipient)).toEqual(['u:u1', 'u:u2', 'u:u3']);
    expect(field('u1', 'orders')).toBe('2');
  });

  it('is sent again as it is now when a person says so, and is dead no more once it was acknowledged', async () => {
    await refuseCities();
    expect(await harness.request('retry', { ...everything, keys: ['stats'] })).toMatchObject({
      progress: { count: 3 },
      delivery: { waiting: 0, refused: 3 },
    });
    expect(await dead()).toHaveLength(3);

    harness.simulator.faults.failRandomly({
      share: 1,
      seed: 1,
      status: 200,
      body: { code: 'Success', msg: '', params: null },
    });
    const before = sent().length;
    expect(await harness.request('retry', { ...everything, reason: 'RequestFieldsTypesMismatched' })).toMatchObject({
      progress: { count: 3 },
      delivery: { waiting: 0, refused: 0 },
    });
    expect(
      sent()
        .slice(before)
        .map(({ body }) => body.dataFields),
    ).toEqual(Array(3).fill({ city: 'Bonn' }));
    expect(await dead()).toEqual([]);
    expect(await waiting()).toEqual([]);
  });

  it('is dead no more when its column was acknowledged by a backfill', async () => {
    await refuseCities();
    harness.simulator.faults.failRandomly({
      share: 1,
      seed: 1,
      status: 200,
      body: { code: 'Success', msg: '', params: null },
    });
    await harness.request('backfill', { key: 'stats', events: false, resumes: false });
    expect(await dead()).toEqual([]);
  });

  it('is dropped when a person says so', async () => {
    await refuseCities();
    expect(await harness.request('discard', { ...everything, reason: 'Other' })).toMatchObject({
      progress: { count: 0 },
    });
    expect(await harness.request('discard', { ...everything, keys: ['stats'] })).toMatchObject({
      progress: { count: 3 },
    });
    expect(await dead()).toEqual([]);
  });

  it('of an event is sent again with its id', async () => {
    await begin({ audiences: [{ ...VIP, send: 'track' }] });
    harness.simulator.faults.failNext(3, { status: 400, body: { code: 'BadParams', msg: '', params: null } });
    await harness.sync();
    const ids = sent()
      .map(({ body }) => body.id)
      .sort();
    expect(await dead()).toHaveLength(3);
    await harness.request('retry', everything);
    expect(
      harness.simulator
        .events()
        .map(({ id }) => id)
        .sort(),
    ).toEqual(ids);
    expect(await dead()).toEqual([]);
  });

  it('whose refusal may pass is tried again by itself after a day, five times', async () => {
    await begin({
      key: 'email',
      audiences: [{ ...VIP, send: 'track' }],
      tables: `${TABLES}; delete from people where id > 1`,
    });
    await harness.sync();
    for (let life = 0; life <= 5; life += 1) {
      await harness.state('update outbox set attempts = 300, due_at = now()');
      await harness.sync();
      expect(
        await harness.state(
          `select retries, retry_at between now() + interval '23 hours' and now() + interval '1 day' as tomorrow from dead_call`,
        ),
      ).toEqual([{ retries: life, tomorrow: true }]);
      await harness.state('update dead_call set retry_at = now()');
      await tidyUp(harness.opened.databases.state);
    }
    expect(await waiting()).toEqual([]);
    expect(await dead()).toHaveLength(1);
    await harness.state(`update dead_call set died_at = now() - interval '91 days'`);
    await tidyUp(harness.opened.databases.state);
    expect(await dead()).toEqual([]);
  });
});

describe('while a request is under way', () => {
  it('a newer change stays due, and comes after it', async () => {
    await begin({ audiences: [VIP], tables: `${TABLES}; delete from people where id > 1` });
    const first = arrival({ delayMs: 1_000 });
    await lead();
    await first;
    await harness.sql('update people set vip = false');
    expect((await harness.sync()).delivery).toMatchObject({ waiting: 0, refused: 0 });
    expect(sent().map(({ body }) => body.dataFields)).toEqual([{ vip: true }, { vip: false }]);
    const [one = 0, two = 0] = harness.simulator.stats.arrivals('users/update');
    expect(two - one).toBeGreaterThanOrEqual(990);
    expect(two - one).toBeLessThan(5_000);
    expect(await waiting()).toEqual([]);
  });

  it('a newer change outlives the refusal of the older one', async () => {
    await begin({ traits: [STATS], tables: `${TABLES}; delete from people where id > 1` });
    const body = { code: 'BadParams', msg: '', params: null };
    harness.simulator.faults.failRandomly({
      share: 1,
      seed: 1,
      status: 400,
      body,
      delayMs: 300,
      match: (request) => request.body.includes('Bonn'),
    });
    await lead();
    await expect.poll(() => sent().length).toBe(1);
    await harness.sql(`update people set city = 'Kiel'`);
    await harness.sync();
    expect(field('u1', 'city')).toBe('"Kiel"');
    expect(await dead()).toEqual([]);
    expect(await waiting()).toEqual([]);
  });

  it('nothing else is sent for its recipient, and others don’t wait for it', async () => {
    await begin({ audiences: [{ ...VIP, send: 'both' }] });
    harness.simulator.faults.failNext(1, { delayMs: 700, match: ({ body }) => body.includes('"u1"') });
    await harness.sync();
    const at = (person: string): number[] =>
      harness.simulator
        .requests()
        .filter(({ body }) => body.includes(`"${person}"`))
        .map((request) => request.at);
    const [held = 0, after = 0] = at('u1');
    expect(after - held).toBeGreaterThanOrEqual(690);
    for (const person of ['u2', 'u3']) for (const time of at(person)) expect(time).toBeLessThan(after - 300);
  });
});

describe('what waits', () => {
  it('for the exit of an earlier key goes right after it', async () => {
    await begin({ audiences: [VIP], tables: `${TABLES}; update people set user_id = null` });
    await harness.sync();
    await harness.sql(`update people set user_id = 'u' || id`);
    const began = performance.now();
    await harness.sync();
    expect(performance.now() - began).toBeLessThan(8_000);
    for (const id of [1, 2, 3]) {
      const mine = sent().filter(({ body }) => body.email === `p${id}@example.com`);
      expect(mine.map(({ body }) => [body.userId, body.dataFields])).toEqual([
        [undefined, { vip: true }],
        [undefined, { vip: false }],
        [`u${id}`, { vip: true }],
      ]);
    }
  });

  it('holds back nobody’s other calls where its definition is paused, and goes when it is resumed', async () => {
    await begin({
      audiences: [
        { ...VIP, send: 'both' },
        { ...BIG, send: 'track' },
      ],
    });
    await harness.sync();
    await whilePaused(async () => {
      await harness.sql('update people set vip = false, ltv = 0 where id = 1');
      await harness.sync('vip');
      await harness.sync('big');
    });
    await harness.state(
      `update outbox set due_at = now() + interval '10 minutes', attempts = 9 where definition_id = (select id from definition where key = 'vip')`,
    );
    await harness.state(`update definition set state = 'paused' where key = 'vip'`);
    await lead();
    await harness.sync('big');
    expect(field('u1', 'vip')).toBe('true');
    expect(harness.simulator.events('u1').at(-1)).toMatchObject({ name: 'Audience Exited', fields: { big: 'false' } });
    await harness.state('update outbox set due_at = now(), attempts = 0');
    await harness.sync('big');
    expect(await waiting()).toHaveLength(2);

    await harness.state(`update definition set state = 'active' where key = 'vip'`);
    await expect.poll(waiting, { timeout: 5_000 }).toEqual([]);
    expect(field('u1', 'vip')).toBe('false');
    expect(harness.simulator.events('u1').at(-1)?.fields).toMatchObject({ audience_key: '"vip"' });
  });

  it('goes in the order in which it arose, whatever fails on the way', async () => {
    await begin({
      audiences: [
        { ...VIP, send: 'track' },
        { ...BIG, send: 'both' },
      ],
      tables: `${TABLES}; delete from people where id > 1`,
    });
    await harness.sync();
    const before = harness.simulator.eventHistory.length;
    await whilePaused(async () => {
      for (let n = 0; n < 4; n += 1) {
        await harness.sql(
          n % 2 === 0 ? 'update people set vip = not vip' : 'update people set vip = not vip, ltv = 10 - ltv',
        );
        await harness.sync();
      }
    });
    const arisen = await harness.state(
      `select replace(message_id, '_', '-') as event_id from outbox where kind = 'e' order by id`,
    );
    expect(arisen).toHaveLength(6);
    harness.simulator.faults.failRandomly({ share: 0.5, seed: 3, endpoint: 'events/track', status: 500 });
    await lead();
    await expect
      .poll(
        async () => {
          await harness.state('update outbox set due_at = now() where due_at > now()');
          return waiting();
        },
        { timeout: 20_000 },
      )
      .toEqual([]);
    expect(harness.simulator.eventHistory.slice(before).map(({ id }) => ({ event_id: id }))).toEqual(arisen);
    expect(harness.simulator.stats.count('events/track', 500)).toBeGreaterThan(0);
  });

  it('behind a call that has to wait long is not waited for', async () => {
    await begin({ audiences: [{ ...VIP, send: 'both' }], tables: `${TABLES}; delete from people where id > 1` });
    await harness.sync();
    await harness.sql('update people set vip = false');
    await whilePaused(() => harness.sync());
    await harness.state('update outbox set attempts = 20 where kind = $$m$$');
    harness.simulator.faults.failNext(1, { status: 500 });
    expect((await harness.sync()).delivery).toMatchObject({ waiting: 0, later: 2, stalled: false });
  });
});
