import { afterEach, describe, expect, it } from 'vitest';
import { createHarness, type Harness, type HarnessOptions } from './support/harness.js';

/** Single and bulk: which pipeline calls take, and that no recipient is in both within a minute. */
const MANY = 3_000;
const TABLES = `
  create table people (id bigint primary key, user_id text, email text, vip boolean not null default true, spent numeric not null default 10);
  insert into people (id, user_id, email) select n, 'u' || n, 'p' || n || '@example.com' from generate_series(1, ${MANY}) as n`;
const VIP = { name: 'VIP', sql: 'SELECT id AS profile_id FROM people WHERE vip', guard: 'off' };
const SPENT = { name: 'Spent', sql: 'SELECT id AS profile_id, spent AS value FROM people', guard: 'off' };

let harness: Harness;
afterEach(() => harness.close());
const begin = async (options: Partial<HarnessOptions> = {}): Promise<void> => {
  harness = await createHarness({ tables: TABLES, simulator: { keepRequests: 20_000 }, ...options });
};
const count = (endpoint: 'users/update' | 'users/bulkUpdate' | 'events/track' | 'events/trackBulk'): number =>
  harness.simulator.stats.count(endpoint);
/** Users whom requests to an endpoint were about, each time. */
const usersIn = (endpoint: string): string[] =>
  harness.simulator
    .requests()
    .filter((request) => request.endpoint === endpoint)
    .flatMap(({ body }) => body.match(/"userId":"u\d+"/g) ?? []);

describe('calls go in bulk', () => {
  it('while more than 2,000 recipients wait, users and events alike, each in the order of a recipient', async () => {
    await begin({ audiences: [{ ...VIP, send: 'both' }] });
    expect((await harness.sync()).delivery).toMatchObject({ waiting: 0, ahead: 0, refused: 0 });
    expect(count('users/bulkUpdate')).toBeGreaterThan(2);
    expect(count('events/trackBulk')).toBeGreaterThan(2);
    expect(usersIn('users/bulkUpdate').length).toBeGreaterThan(500);
    expect(harness.simulator.userCount).toBe(MANY);
    expect(harness.simulator.events()).toHaveLength(MANY);
    expect(harness.simulator.violations).toMatchObject({ duplicateInBatch: 0, mixedPipelines: 0 });
    expect(harness.simulator.events().every(({ applications }) => applications === 1)).toBe(true);
  });

  it('and singly where few wait', async () => {
    await begin({ audiences: [VIP], tables: TABLES.replace(String(MANY), '500') });
    await harness.sync();
    expect([count('users/update'), count('users/bulkUpdate')]).toEqual([500, 0]);
  });

  it('again for whoever was sent in bulk within the last minute, also by an earlier leader', async () => {
    await begin({ audiences: [VIP] });
    await harness.sync();
    const bulk = new Set(usersIn('users/bulkUpdate'));
    await harness.sql(`update people set vip = false where id <= 40`);
    const before = count('users/update');
    await harness.sync();
    // Whoever was sent singly, at the end of the backlog, is taken to have been sent in bulk by the next leader.
    expect(count('users/update')).toBe(before);
    expect(bulk.size).toBeGreaterThan(1_000);
    expect(harness.simulator.user('u1')?.fields).toEqual({ vip: 'false' });
  });

  it('with the values of the moment, once for all definitions of a recipient', async () => {
    await begin({ audiences: [VIP], traits: [SPENT] });
    await harness.sync();
    await harness.state(`update destination set state = 'paused'`);
    await harness.sql('update people set vip = false, spent = spent + 1');
    await harness.sync();
    await harness.sql('update people set spent = spent + 1 where id % 2 = 0');
    await harness.sync('spent');
    await harness.state(`update destination set state = 'active'`);
    const before = usersIn('users/bulkUpdate').length + usersIn('users/update').length;
    await harness.sync();
    expect(usersIn('users/bulkUpdate').length + usersIn('users/update').length - before).toBe(MANY);
    expect(harness.simulator.user('u1')?.fields).toEqual({ vip: 'false', spent: '11.0' });
    expect(harness.simulator.user('u2')?.fields).toEqual({ vip: 'false', spent: '12.0' });
  });
});

describe('a batch', () => {
  it('that is refused for one value has that column dead alone, and all else delivered', async () => {
    await begin({
      audiences: [VIP],
      traits: [{ name: 'Stats', sql: 'SELECT id AS profile_id, spent, nick FROM people', guard: 'off' }],
      tables: `${TABLES}; alter table people add nick jsonb; update people set nick = '"Bo"'; update people set nick = '5' where id in (17, 1234)`,
    });
    const answer = await fetch(`${harness.simulator.url}/api/users/update`, {
      method: 'POST',
      headers: { 'Api-Key': 'k', 'Content-Type': 'application/json' },
      body: '{"userId":"seed","dataFields":{"nick":"text"}}',
    });
    expect(answer.status).toBe(200);
    expect((await harness.sync()).delivery).toMatchObject({ waiting: 0, ahead: 0, refused: 2 });
    const dead = await harness.state('select recipient, field, reason from dead_call order by recipient');
    expect(dead).toEqual([
      { recipient: 'u:u1234', field: 'nick', reason: 'RequestFieldsTypesMismatched' },
      { recipient: 'u:u17', field: 'nick', reason: 'RequestFieldsTypesMismatched' },
    ]);
    expect(harness.simulator.user('u17')?.fields).toEqual({ vip: 'true', spent: '10.0' });
    expect(harness.simulator.user('u18')?.fields).toEqual({ vip: 'true', spent: '10.0', nick: '"Bo"' });
    expect(harness.simulator.userCount).toBe(MANY + 1);
  });

  it('half of whom fail is acknowledged for the others', async () => {
    await begin({
      key: 'email',
      audiences: [VIP],
      tables: `${TABLES}; update people set email = 'nobody' || id where id % 2 = 0`,
    });
    harness.simulator.forget('p1@example.com');
    const { delivery } = await harness.sync();
    expect(delivery).toMatchObject({ waiting: 0, ahead: 0, refused: MANY / 2 + 1 });
    expect(harness.simulator.userCount).toBe(MANY / 2 - 1);
    expect(await harness.state('select reason, count(*)::int4 as n from dead_call group by 1 order by 1')).toEqual([
      { reason: 'ForgottenUserError', n: 1 },
      { reason: 'InvalidEmailAddressError', n: MANY / 2 },
    ]);
  });
});

describe('what may still be applied', () => {
  it('is waited for by what has changed meanwhile, also under another leader', async () => {
    await begin({ audiences: [VIP], traits: [SPENT], tables: TABLES.replace(String(MANY), '3') });
    await harness.sync();
    await harness.sql('update people set spent = 11 where id = 1');
    harness.simulator.faults.failNext(1, { reset: true, afterApplying: true });
    expect((await harness.sync()).delivery).toMatchObject({ later: 1 });
    await harness.sql('update people set spent = 12 where id = 1');
    const before = count('users/update');
    expect((await harness.sync()).delivery).toMatchObject({ waiting: 0, later: 1 });
    expect(count('users/update')).toBe(before);
    const [mark] = await harness.state(
      `select due_at > now() + interval '30 seconds' as waits, due_at <= now() + interval '60 seconds' as ends from outbox`,
    );
    expect(mark).toEqual({ waits: true, ends: true });
    await harness.state('update outbox set due_at = now(), not_before = null');
    await harness.sync();
    expect(harness.simulator.user('u1')?.fields).toMatchObject({ spent: '12.0' });
  });
});

describe('a recipient', () => {
  it('with very many events gets all of them, in their order', async () => {
    await begin({ audiences: [{ ...VIP, send: 'both' }], tables: TABLES.replace(String(MANY), '2') });
    await harness.sync();
    await harness.state(
      `insert into outbox (kind, destination_id, definition_id, priority, recipient, event, message_id, occurred_at, properties)
       select 'e', 1, 1, 1, 'u:u1', 'Event ' || n, 'personas_' || n, now(), '{}' from generate_series(1, 75) as n`,
    );
    expect((await harness.sync()).delivery).toMatchObject({ waiting: 0 });
    expect(
      harness.simulator
        .events('u1')
        .slice(1)
        .map(({ name }) => name),
    ).toEqual(Array.from({ length: 75 }, (_, n) => `Event ${n + 1}`));
  });

  it('is sent by the key alone where the identifier beside it is refused', async () => {
    await begin({
      audiences: [{ ...VIP, send: 'both' }],
      tables: `${TABLES.replace(String(MANY), '3')}; update people set email = 'nobody' where id = 1`,
    });
    expect((await harness.sync()).delivery).toMatchObject({ waiting: 0, refused: 0 });
    expect(harness.simulator.user('u1')).toMatchObject({ email: null, fields: { vip: 'true' } });
    expect(harness.simulator.events('u1')).toHaveLength(1);
  });
});

/** 600 people of whom all has been told, and from now on a hundred user updates a second. */
async function beginSlowly(): Promise<void> {
  const slow = { type: 'iterable', api_key: 'test-key', quotas: { users_update: 100 } };
  const definitions = { audiences: [{ ...VIP, schedule: 'manual' }] };
  await begin({ ...definitions, tables: TABLES.replace(String(MANY), '600') });
  await harness.sync();
  await harness.reconfigure({ ...definitions, destinations: { iterable: { ...slow, region: harness.simulator.url } } });
}

describe('what waits', () => {
  it('goes live before scheduled before backfill, whichever came first', async () => {
    await beginSlowly();
    const before = harness.simulator.requests().length;
    // Backfill first, live last.
    await harness.state(
      `insert into outbox (kind, destination_id, definition_id, priority, recipient, columns)
       select 'm', 1, 1, 2 - (n - 1) / 200, 'u:u' || n, array['vip'] from generate_series(1, 600) as n order by n`,
    );
    await harness.sync('vip');
    const people = harness.simulator
      .requests()
      .slice(before)
      .map(({ body }) => (JSON.parse(body) as { userId: string }).userId);
    const priorities = people.map((userId) => 2 - Math.floor((Number(userId.slice(1)) - 1) / 200));
    expect(priorities).toHaveLength(600);
    // Requests under way at the same time may overtake each other, and whoever is given back goes a little later.
    expect(priorities.slice(0, 200).filter((priority) => priority > 0).length).toBeLessThan(20);
    expect(priorities.slice(200, 400).filter((priority) => priority > 1).length).toBeLessThan(20);
  });

  it('is taken in portions by a slow lane, not one by one', async () => {
    await beginSlowly();
    await harness.state(
      `insert into outbox (kind, destination_id, definition_id, priority, recipient, columns)
       select 'm', 1, 1, 1, 'u:u' || n, array['vip'] from generate_series(1, 400) as n order by n`,
    );
    const before = harness.simulator.requests().length;
    let statements = 0;
    // Each portion waits for the disk by a statement of the pool.
    harness.opened.databases.state.pool.on('acquire', () => (statements += 1));
    await harness.sync('vip');
    expect(harness.simulator.requests().length - before).toBe(400);
    expect(statements).toBeLessThan(200);
  });
});

describe('live changes', () => {
  it('go singly beside a backfill in bulk, but for those who were sent in bulk within the last minute', async () => {
    const slow = { type: 'iterable', api_key: 'test-key', quotas: { users_bulk_update: 1 } };
    await begin({
      audiences: [VIP],
      tables: `${TABLES}; insert into people (id, user_id, vip) values (9001, 'u9001', false)`,
    });
    await harness.reconfigure({
      audiences: [VIP],
      destinations: { iterable: { ...slow, region: harness.simulator.url } },
    });
    const begun = new Promise<void>((resolve) => {
      harness.simulator.faults.failRandomly({ share: 0, seed: 1, match: () => (resolve(), false) });
    });
    const syncing = harness.sync();
    await begun;
    const inBulk = new Set(usersIn('users/bulkUpdate'));
    const [sent] = [...inBulk].map((name) => /u\d+/.exec(name)?.[0] ?? '');
    await harness.state(
      `insert into outbox (kind, destination_id, definition_id, priority, recipient, columns)
       select 'm', 1, 1, 0, recipient, array['vip'] from unnest(array['u:u9001', 'u:' || $1]) as recipient
       on conflict (recipient, destination_id, definition_id) where kind = 'm' do update set
         priority = 0, version = nextval('version')`,
      [sent],
    );
    await syncing;
    expect(usersIn('users/update')).toEqual(['"userId":"u9001"']);
    expect(usersIn('users/bulkUpdate').filter((name) => name === `"userId":"${sent}"`)).toHaveLength(2);
    const order = harness.simulator.requests().map(({ endpoint }) => endpoint);
    expect(order.indexOf('users/update')).toBeLessThan(order.lastIndexOf('users/bulkUpdate'));
    expect(harness.simulator.violations).toMatchObject({ mixedPipelines: 0 });
  });

  it('go at the head of the next batch, while a backfill is under way', async () => {
    const slow = { type: 'iterable', api_key: 'test-key', quotas: { users_update: 1, users_bulk_update: 1 } };
    await begin({
      audiences: [
        { ...VIP, name: 'Backfilled', sql: 'SELECT id AS profile_id FROM people WHERE id <= 3000' },
        { ...VIP, name: 'Live', sql: 'SELECT id AS profile_id FROM people WHERE id > 3000' },
      ],
    });
    await harness.sync();
    await harness.reconfigure({
      audiences: [
        { ...VIP, name: 'Backfilled', sql: 'SELECT id AS profile_id FROM people WHERE id <= 3000' },
        { ...VIP, name: 'Live', sql: 'SELECT id AS profile_id FROM people WHERE id > 3000' },
      ],
      destinations: { iterable: { ...slow, region: harness.simulator.url } },
    });
    const before = count('users/bulkUpdate');
    const begun = new Promise<void>((resolve) => {
      harness.simulator.faults.failRandomly({ share: 0, seed: 1, match: () => (resolve(), false) });
    });
    const backfill = harness.request('backfill', { key: 'backfilled', events: false, resumes: false });
    await begun;
    await harness.sql(`insert into people (id, user_id) select n, 'u' || n from generate_series(9001, 9005) as n`);
    await harness.sync('live');
    await backfill;
    const batches = harness.simulator
      .requests()
      .filter(({ endpoint }) => endpoint === 'users/bulkUpdate')
      .slice(before)
      .map(({ body }): string[] => body.match(/u\d+/g) ?? []);
    const withLive = batches.findIndex((people) => people.includes('u9001'));
    expect(withLive).toBeGreaterThan(0);
    expect(withLive).toBeLessThan(batches.length - 1);
    expect(batches[withLive]?.slice(0, 5).sort()).toEqual(['u9001', 'u9002', 'u9003', 'u9004', 'u9005']);
  });
});
