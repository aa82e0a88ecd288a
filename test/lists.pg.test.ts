import { afterEach, describe, expect, it } from 'vitest';
import { createHarness, type Harness, type HarnessOptions } from './support/harness.js';

/** `send: list` keeps a static list equal to an audience. */
const TABLES = `
  create table people (id bigint primary key, user_id text, email text, vip boolean not null default true);
  insert into people (id, user_id, email) select n, 'u' || n, 'p' || n || '@example.com' from generate_series(1, 30) as n`;
const VIP = { name: 'VIP', sql: 'SELECT id AS profile_id FROM people WHERE vip', guard: 'off', send: 'list' };

let harness: Harness;
afterEach(() => harness.close());
const begin = async (options: Partial<HarnessOptions> = {}): Promise<void> => {
  harness = await createHarness({ tables: TABLES, audiences: [VIP], simulator: { keepRequests: 1_000 }, ...options });
};
const list = (name = 'vip'): { id: number; members: string[] } | undefined => {
  const found = harness.simulator.lists().find((each) => each.name === name);
  return found && { id: found.id, members: found.members().sort() };
};
const members = async (): Promise<string[]> =>
  (await harness.sql('select user_id from people where vip order by user_id collate "C"')).map(({ user_id }) =>
    String(user_id),
  );
const bodies = (endpoint: string): Record<string, unknown>[] =>
  harness.simulator
    .requests()
    .filter((request) => request.endpoint === endpoint)
    .map(({ body }) => JSON.parse(body) as Record<string, unknown>);
const call = async (method: string, path: string, body?: object): Promise<unknown> => {
  const answer = await fetch(`${harness.simulator.url}/api/${path}`, {
    method,
    headers: { 'Api-Key': 'k', 'Content-Type': 'application/json' },
    ...(body === undefined ? {} : { body: JSON.stringify(body) }),
  });
  return answer.json();
};

describe('a list', () => {
  it('is made by the key, filled by a first sync, and follows entries and exits', async () => {
    await begin();
    expect((await harness.sync()).delivery).toMatchObject({ waiting: 0, ahead: 0, refused: 0 });
    expect(list()?.members).toEqual(await members());
    expect(harness.simulator.stats.count('lists/create')).toBe(1);
    expect(harness.simulator.stats.count('users/update')).toBe(0);

    await harness.sql(`update people set vip = id > 25 where id > 20; insert into people values (31, 'u31', null)`);
    await harness.sync();
    expect(list()?.members).toEqual(await members());
    // The second leader knows the list.
    expect(harness.simulator.stats.count('lists/create')).toBe(1);
    expect(harness.simulator.stats.count('lists/get')).toBe(1);
    expect(bodies('lists/unsubscribe').every((body) => body['channelUnsubscribe'] === false)).toBe(true);
    expect(JSON.stringify([...harness.simulator.users()])).not.toContain('unsubscribedChannelIds');
  });

  it('that is there already, by its name, is taken', async () => {
    await begin({ audiences: [{ ...VIP, list: 'Best customers' }] });
    const made = await call('POST', 'lists', { name: 'Best customers' });
    await call('POST', 'lists', { name: 'vip' });
    await harness.sync();
    expect(list('Best customers')).toEqual({ id: (made as { listId: number }).listId, members: await members() });
    expect(list('vip')?.members).toEqual([]);
  });

  it('goes together with identify, which goes first, and with track', async () => {
    await begin({ key: 'email', audiences: [{ ...VIP, send: ['both', 'list'] }] });
    await harness.sync();
    expect(list()?.members).toHaveLength(30);
    expect(harness.simulator.user('p1@example.com')?.fields).toEqual({ vip: 'true' });
    expect(harness.simulator.events('p1@example.com')).toHaveLength(1);
    const paths = harness.simulator
      .requests()
      .filter(({ body }) => body.includes('p7@example.com'))
      .map(({ endpoint }) => endpoint);
    expect(paths).toEqual(['users/update', 'lists/subscribe', 'events/track']);
    await harness.sql('update people set vip = false where id = 7');
    await harness.sync();
    expect(list()?.members).toHaveLength(29);
    expect(harness.simulator.user('p7@example.com')?.fields).toEqual({ vip: 'false' });
  });

  it('that is filled with nobody new waits for those who are yet unknown, and then leaves them out', async () => {
    await begin({ audiences: [{ ...VIP, list: { existing_only: true } }] });
    await call('POST', 'users/update', { userId: 'u1', dataFields: {} });
    expect((await harness.sync()).delivery).toMatchObject({ later: 29 });
    expect(list()?.members).toEqual(['u1']);
    for (let wait = 0; wait < 3; wait += 1) {
      await harness.state('update outbox set due_at = now()');
      await harness.sync();
    }
    expect(await harness.state('select count(*)::int4 as n from outbox')).toEqual([{ n: 0 }]);
    expect(await harness.state('select count(*)::int4 as n from dead_call')).toEqual([{ n: 0 }]);
    expect(harness.simulator.userCount).toBe(1);
  });

  it('takes an exit for done where the person is unknown', async () => {
    await begin();
    await harness.sync();
    harness.simulator.deleteUser('u3');
    await harness.sql('update people set vip = false where id <= 5');
    expect((await harness.sync()).delivery).toMatchObject({ waiting: 0, refused: 0 });
    expect(list()?.members).toEqual(await members());
  });

  it('that is deleted stops the calls of its definition, and no others; it is made anew with everybody on resume', async () => {
    await begin({ audiences: [VIP, { ...VIP, name: 'Other', send: 'identify' }] });
    await harness.sync();
    const first = list()?.id ?? 0;
    await call('DELETE', `lists/${first}`);
    await harness.sql('update people set vip = false where id <= 5');
    expect((await harness.sync()).delivery).toMatchObject({
      waiting: 0,
      stopped: 5,
      reason: `The calls of "vip" to "iterable" wait: The list ${first} is no longer in Iterable.`,
    });
    expect(harness.simulator.user('u1')?.fields).toEqual({ other: 'false' });

    await harness.resume('vip');
    expect((await harness.sync()).delivery).toMatchObject({ waiting: 0, ahead: 0, stopped: 0 });
    expect(list()?.id).not.toBe(first);
    expect(list()?.members).toEqual(await members());
  });

  it('that a synced definition gains gets everybody, and one that it loses is left as it is', async () => {
    await begin({ audiences: [{ ...VIP, send: 'identify' }] });
    await harness.sync();
    await harness.reconfigure({ audiences: [{ ...VIP, send: ['identify', 'list'] }] });
    await harness.sync();
    expect(list()?.members).toEqual(await members());
    await harness.reconfigure({ audiences: [{ ...VIP, send: 'identify' }] });
    await harness.sync();
    await harness.sql('update people set vip = false where id <= 5');
    await harness.sync();
    expect(list()?.members).toHaveLength(30);
    await harness.reconfigure({ audiences: [{ ...VIP, send: ['identify', 'list'] }] });
    await harness.sync();
    expect(list()?.members).toEqual(await members());
  });

  it('that is gained while a cursor is under way gets those, too, whom it has passed', async () => {
    await begin({ audiences: [{ ...VIP, send: 'identify' }] });
    await harness.sync();
    await harness.state(
      `update definition_destination set backfill = 'backfill', backfill_until = now(), backfill_position = 'u:u29'`,
    );
    await harness.reconfigure({ audiences: [{ ...VIP, send: ['identify', 'list'] }] });
    expect((await harness.sync()).delivery).toMatchObject({ waiting: 0, ahead: 0 });
    expect(list()?.members).toEqual(await members());
  });

  it('that can’t be made stops the calls of its definition, and says why', async () => {
    await begin({ audiences: [{ ...VIP, send: ['both', 'list'] }] });
    harness.simulator.faults.failRandomly({
      share: 1,
      seed: 1,
      endpoint: 'lists/create',
      status: 400,
      body: { code: 'BadParams', msg: 'no', params: null },
    });
    const { delivery } = await harness.sync();
    expect(delivery).toMatchObject({
      waiting: 0,
      refused: 0,
      reason: expect.stringMatching(/can't be made \(BadParams\)/) as string,
    });
    expect(harness.simulator.stats.count('lists/create')).toBeLessThan(10);
    harness.simulator.faults.clear();
    await harness.resume('vip');
    expect((await harness.sync()).delivery).toMatchObject({ waiting: 0, ahead: 0, stopped: 0 });
    expect(list()?.members).toEqual(await members());
    expect(harness.simulator.events()).toHaveLength(30);
  });

  it('that its definition fills no more is left as it is, though somebody’s place was due', async () => {
    await begin({ audiences: [{ ...VIP, send: ['identify', 'list'] }] });
    await harness.sync();
    await harness.state(`update destination set state = 'paused'`);
    await harness.sql('update people set vip = false where id = 1');
    await harness.sync();
    await harness.state(`update destination set state = 'active'`);
    await harness.reconfigure({ audiences: [{ ...VIP, send: 'identify' }] });
    expect((await harness.sync()).delivery).toMatchObject({ waiting: 0, stopped: 0 });
    expect(harness.simulator.user('u1')?.fields).toEqual({ vip: 'false' });
    expect(list()?.members).toHaveLength(30);
  });

  it('is acknowledged apart from the field: what one refuses, the other gets', async () => {
    await begin({
      audiences: [{ ...VIP, send: ['identify', 'list'] }],
      tables: `${TABLES}; delete from people where id > 1`,
    });
    harness.simulator.faults.failNext(1, { endpoint: 'lists/subscribe', status: 503 });
    await harness.sync();
    // The field was acknowledged by the first request; only the list was tried again.
    expect(harness.simulator.stats.count('users/update')).toBe(1);
    expect(harness.simulator.stats.count('lists/subscribe')).toBe(2);
    expect(harness.simulator.user('u1')?.fields).toEqual({ vip: 'true' });
    expect(list()?.members).toEqual(['u1']);
  });
});
