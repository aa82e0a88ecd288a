import { mkdir, readFile } from 'node:fs/promises';
import { createServer, type Server } from 'node:http';
import type { AddressInfo } from 'node:net';
import { dirname, join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { createHarness, type Definitions, type Harness } from './support/harness.js';

/** Destinations beside Iterable: what takes Segment's HTTP API, and files. */
const TABLES = `
  create table people (id bigint primary key, user_id text, email text, vip boolean not null default true, spent numeric not null);
  insert into people (id, user_id, email, spent) select n, 'u' || n, 'p' || n || '@example.com', n from generate_series(1, 20) as n;
  insert into people values (21, null, 'only@example.com', true, 5)`;
const VIP = { name: 'VIP', sql: 'SELECT id AS profile_id FROM people WHERE vip', guard: 'off' };
const SPENT = { name: 'Spent', sql: 'SELECT id AS profile_id, spent AS value FROM people', guard: 'off' };

interface SegmentCall {
  type: string;
  userId?: string;
  anonymousId?: string;
  messageId: string;
  event?: string;
  traits?: Record<string, unknown>;
  properties?: Record<string, unknown>;
  context: { personas: Record<string, unknown>; traits?: Record<string, unknown> };
}

let harness: Harness;
let server: Server;
let seen: { path: string; authorization: string; body: string }[] = [];
let answer: (body: string) => { status: number; body?: string } = () => ({ status: 200, body: '{"success":true}' });

beforeEach(async () => {
  seen = [];
  answer = () => ({ status: 200, body: '{"success":true}' });
  server = createServer((request, response) => {
    let body = '';
    request.on('data', (chunk: Buffer) => (body += chunk.toString()));
    request.on('end', () => {
      seen.push({ path: request.url ?? '', authorization: request.headers.authorization ?? '', body });
      const { status, body: text = '' } = answer(body);
      response.writeHead(status).end(text);
    });
  });
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
});
afterEach(async () => {
  await harness.close();
  server.closeAllConnections();
  server.close();
});

const url = (): string => `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
const segment = (): Record<string, unknown> => ({ type: 'segment', write_key: 'the-write-key', url: url() });
const begin = async (definitions: Definitions): Promise<void> => {
  harness = await createHarness({ tables: TABLES, ...definitions });
};
const callsOf = (bodies: readonly { body: string }[]): SegmentCall[] =>
  bodies.flatMap(({ body }) => (JSON.parse(body) as { batch: SegmentCall[] }).batch);

describe('a destination of type segment', () => {
  it('gets the calls as Personas sends them, in batches', async () => {
    await begin({ audiences: [{ ...VIP, send: 'both' }], traits: [SPENT], destinations: { segment: segment() } });
    expect((await harness.sync()).delivery).toMatchObject({ waiting: 0, ahead: 0, refused: 0 });
    expect(seen.every(({ path }) => path === '/v1/batch')).toBe(true);
    expect(new Set(seen.map(({ authorization }) => authorization))).toEqual(
      new Set([`Basic ${Buffer.from('the-write-key:').toString('base64')}`]),
    );
    expect(seen.length).toBeLessThan(15);
    const calls = callsOf(seen);
    const mine = calls.filter(({ userId }) => userId === 'u3');
    expect(mine.map(({ type }) => type).sort()).toEqual(['identify', 'identify', 'track']);
    expect(mine.findIndex(({ traits }) => traits?.['vip'] === true)).toBeLessThan(
      mine.findIndex(({ type }) => type === 'track'),
    );
    expect(mine.find(({ traits }) => traits?.['vip'] === true)).toMatchObject({
      traits: { vip: true, email: 'p3@example.com' },
      context: { personas: { computation_class: 'audience', computation_key: 'vip' } },
    });
    expect(mine.find(({ type }) => type === 'track')).toMatchObject({
      event: 'Audience Entered',
      properties: { audience_key: 'vip', audience_name: 'VIP', vip: true },
    });
    expect(calls.filter(({ anonymousId }) => anonymousId === 'only@example.com').map(({ type }) => type)).toContain(
      'track',
    );
    expect(new Set(calls.map(({ messageId }) => messageId)).size).toBe(calls.length);
    expect(calls.every(({ messageId }) => messageId.startsWith('personas_'))).toBe(true);
  });

  it('has the guilty call of a refused batch dead alone', async () => {
    answer = (body) => (body.includes('"u7"') ? { status: 400, body: 'malformed' } : { status: 200, body: 'OK' });
    await begin({ audiences: [VIP], destinations: { segment: segment() } });
    expect((await harness.sync()).delivery).toMatchObject({ waiting: 0, refused: 1 });
    expect(await harness.state('select recipient, reason, answer from dead_call')).toEqual([
      { recipient: 'u:u7', reason: 'HTTP 400', answer: 'malformed' },
    ]);
    const accepted = callsOf(seen.filter(({ body }) => !body.includes('"u7"')));
    expect(new Set(accepted.map(({ userId, anonymousId }) => userId ?? anonymousId)).size).toBe(20);
  });

  it('gets no call over 32 KB: the column that makes it so is dead alone', async () => {
    const columns = 'SELECT id AS profile_id, spent, note FROM people';
    await begin({
      tables: `${TABLES}; alter table people add note text; update people set note = repeat('x', 40000) where id = 7`,
      traits: [{ name: 'Stats', sql: columns, guard: 'off' }],
      destinations: { segment: segment() },
    });
    expect((await harness.sync()).delivery).toMatchObject({ waiting: 0, refused: 1 });
    expect(await harness.state('select recipient, field, reason from dead_call')).toEqual([
      { recipient: 'u:u7', field: 'note', reason: 'TooLarge' },
    ]);
    expect(callsOf(seen).filter(({ userId }) => userId === 'u7')).toMatchObject([{ traits: { spent: 7 } }]);
    expect(seen.every(({ body }) => body.length < 500_000)).toBe(true);
  });

  it('gets no batch over 500 KB, and few that are much smaller', async () => {
    await begin({
      tables: `${TABLES}; alter table people add note text;
        insert into people (id, user_id, spent) select n, 'u' || n, n from generate_series(22, 121) as n;
        update people set note = repeat('é', 10000)`,
      traits: [{ name: 'Stats', sql: 'SELECT id AS profile_id, note FROM people', guard: 'off' }],
      destinations: { segment: segment() },
    });
    expect((await harness.sync()).delivery).toMatchObject({ waiting: 0, refused: 0 });
    const sizes = seen.map(({ body }) => Buffer.byteLength(body));
    expect(Math.max(...sizes)).toBeLessThanOrEqual(500_000);
    expect(sizes.filter((size) => size > 470_000).length).toBeGreaterThanOrEqual(3);
    expect(new Set(callsOf(seen).map(({ userId, anonymousId }) => userId ?? anonymousId)).size).toBe(121);
  });

  it('gets no batch over 500 KB either where one person’s calls are more than that', async () => {
    await begin({
      tables: `${TABLES}; delete from people where id > 1`,
      traits: Array.from({ length: 20 }, (_, n) => ({
        key: `note_${n}`,
        sql: `SELECT id AS profile_id, repeat('x', 30000) || spent AS value FROM people`,
        guard: 'off',
      })),
      destinations: { segment: segment() },
    });
    await harness.sync();
    await harness.state(`update destination set state = 'paused'`);
    await harness.sql('update people set spent = 2');
    await harness.sync();
    seen = [];
    await harness.state(`update destination set state = 'active'`);
    expect((await harness.sync()).delivery).toMatchObject({ waiting: 0, refused: 0 });
    expect(Math.max(...seen.map(({ body }) => Buffer.byteLength(body)))).toBeLessThanOrEqual(500_000);
    expect(new Set(callsOf(seen).flatMap(({ traits }) => Object.keys(traits ?? {}))).size).toBe(20);
  });

  it('sends the same id again with what went unanswered', async () => {
    let failures = 0;
    answer = () => ((failures += 1) === 1 ? { status: 503 } : { status: 200 });
    await begin({
      audiences: [VIP],
      tables: `${TABLES}; delete from people where id > 1`,
      destinations: { segment: segment() },
    });
    await harness.sync();
    await harness.state('update outbox set due_at = now()');
    await harness.sync();
    const ids = callsOf(seen).map(({ messageId }) => messageId);
    expect(ids).toHaveLength(2);
    expect(new Set(ids).size).toBe(1);
  });

  it('stops where it says no to the write key', async () => {
    answer = () => ({ status: 401 });
    await begin({ audiences: [VIP], destinations: { segment: segment() } });
    expect((await harness.sync()).delivery).toMatchObject({
      stopped: 21,
      reason: 'The destination says no to the write key (HTTP 401).',
    });
  });
});

describe('a destination of type file', () => {
  const lines = async (name = 'calls.jsonl'): Promise<SegmentCall[]> =>
    (await readFile(join(dirname(harness.configFile), name), 'utf8'))
      .trimEnd()
      .split('\n')
      .map((line) => JSON.parse(line) as SegmentCall);

  it('gets a line for each call, and what comes later behind it', async () => {
    await begin({
      audiences: [{ ...VIP, send: 'both' }],
      destinations: { look: { type: 'file', path: 'calls.jsonl' } },
    });
    expect((await harness.sync()).delivery).toMatchObject({ waiting: 0, ahead: 0, refused: 0 });
    expect(await lines()).toHaveLength(42);
    await harness.sql('update people set vip = false where id = 1');
    await harness.sync();
    expect((await lines()).slice(42)).toMatchObject([
      { type: 'identify', userId: 'u1', traits: { vip: false } },
      { type: 'track', userId: 'u1', event: 'Audience Exited' },
    ]);
  });

  it('that can’t be written loses nothing, and gets all of it when it can', async () => {
    await begin({ audiences: [VIP], destinations: { look: { type: 'file', path: 'later/calls.jsonl' } } });
    const syncing = harness.sync();
    const failed = async (): Promise<unknown> =>
      (await harness.state('select count(*)::int4 as n from outbox where attempts > 0'))[0]?.['n'];
    await expect.poll(failed, { timeout: 20_000 }).toBeGreaterThan(0);
    await mkdir(join(dirname(harness.configFile), 'later'));
    await harness.state('update outbox set due_at = now()');
    expect((await syncing).delivery).toMatchObject({ waiting: 0, refused: 0 });
    expect(await lines('later/calls.jsonl')).toHaveLength(21);
  });
});

describe('a destination that is added to a definition', () => {
  it('gets everybody, and the others nothing again', async () => {
    await begin({ audiences: [VIP] });
    await harness.sync();
    const before = harness.simulator.stats.count('users/update');
    await harness.reconfigure({
      audiences: [VIP],
      destinations: {
        iterable: { type: 'iterable', api_key: 'test-key', region: harness.simulator.url },
        segment: segment(),
      },
    });
    expect((await harness.sync()).delivery).toMatchObject({ waiting: 0, ahead: 0, refused: 0 });
    expect(callsOf(seen)).toHaveLength(21);
    expect(harness.simulator.stats.count('users/update')).toBe(before);
  });
});
