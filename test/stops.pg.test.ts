import { afterEach, describe, expect, it } from 'vitest';
import { listDead, retryDead } from '../src/outbox/dead.js';
import { hashOf } from '../src/outbox/queue.js';
import { tidyUp } from '../src/sync/housekeeping.js';
import { createHarness, type Definitions, type Harness, type HarnessOptions } from './support/harness.js';
import { holdDefinition } from './support/lock.js';

/** What is given up for good or until a person says so: people whom Iterable has forgotten, definitions that it refuses. */
const PEOPLE = 250;
const TABLES = `
  create table people (id bigint primary key, user_id text, email text, vip boolean not null default true);
  insert into people (id, user_id) select n, 'u' || n from generate_series(1, ${PEOPLE}) as n`;
const VIP = { name: 'VIP', sql: 'SELECT id AS profile_id FROM people WHERE vip', guard: 'off' };
const OTHER = { ...VIP, name: 'Other' };
const STATS = { name: 'Stats', sql: `SELECT id AS profile_id, id AS good, 'x' || id AS bad FROM people`, guard: 'off' };
const FILTER = { keys: [], reason: null, destination: null, olderThan: null };

let harness: Harness;
afterEach(() => harness.close());
const begin = async (options: Partial<HarnessOptions> = {}): Promise<void> => {
  harness = await createHarness({ tables: TABLES, audiences: [VIP], simulator: { keepRequests: 2_000 }, ...options });
};
const requestsOf = (person: string): number =>
  harness.simulator.requests().filter(({ body }) => body.includes(`"${person}"`)).length;
const dead = async (): Promise<unknown> =>
  harness.state('select recipient, reason, count(*)::int4 as n from dead_call group by 1, 2 order by 1');

describe('somebody whom Iterable has forgotten', () => {
  it('is never sent again, whatever changes, and nobody can read from the state who it was', async () => {
    await begin({ audiences: [{ ...VIP, send: 'both' }] });
    harness.simulator.forget('u1');
    await harness.sync();
    expect(await dead()).toEqual([{ recipient: 'u:u1', reason: 'ForgottenUserError', n: 2 }]);
    const before = requestsOf('u1');
    await harness.sql('update people set vip = false where id <= 2');
    await harness.sync();
    await harness.sql('update people set vip = true where id <= 2');
    await harness.sync();
    expect(requestsOf('u1')).toBe(before);
    expect(requestsOf('u2')).toBeGreaterThan(2);
    expect(await harness.state('select count(*)::int4 as n from outbox')).toEqual([{ n: 0 }]);
    expect(await harness.state(`select encode(hash, 'escape') like '%u1%' as told from forgotten_there`)).toEqual([
      { told: false },
    ]);
  });

  it('is sent again where a person says so', async () => {
    await begin();
    harness.simulator.faults.failRandomly({
      share: 1,
      seed: 1,
      status: 409,
      body: { code: 'ForgottenUserError', msg: '', params: null },
      match: ({ body }) => body.includes('"u1"'),
    });
    await harness.sync();
    expect(await harness.state('select count(*)::int4 as n from forgotten_there')).toEqual([{ n: 1 }]);
    harness.simulator.faults.clear();
    const { delivery } = await harness.request('retry', FILTER);
    expect(delivery).toMatchObject({ waiting: 0, refused: 0 });
    expect(harness.simulator.user('u1')?.fields).toEqual({ vip: 'true' });
    expect(await harness.state('select count(*)::int4 as n from forgotten_there')).toEqual([{ n: 0 }]);
  });
});

describe('a definition whose calls are refused for their content', () => {
  const refuse = (): void =>
    harness.simulator.faults.failRandomly({
      share: 1,
      seed: 1,
      status: 400,
      body: { code: 'BadParams', msg: 'no', params: null },
      match: ({ body, endpoint }) => endpoint === 'users/update' && body.includes('"vip"'),
    });

  it('a hundred times in a row is stopped, and shown; the others go on, and nothing is lost', async () => {
    await begin({ audiences: [{ ...VIP, send: 'both' }, OTHER] });
    refuse();
    const { delivery } = await harness.sync();
    expect(delivery).toMatchObject({
      waiting: 0,
      refused: 99,
      stopped: 2 * (PEOPLE - 99),
      reason:
        'The calls of "vip" to "iterable" wait: 100 calls in a row were refused for their content, the last with BadParams.',
    });
    expect([...harness.simulator.users()].filter(({ fields }) => fields['other'] === 'true')).toHaveLength(PEOPLE);

    // No event goes before an identify that waits.
    expect(harness.simulator.events().length).toBeLessThanOrEqual(99);
    harness.simulator.faults.clear();
    await harness.resume('vip');
    expect((await harness.request('retry', FILTER)).delivery).toMatchObject({ waiting: 0, refused: 0 });
    expect([...harness.simulator.users()].filter(({ fields }) => fields['vip'] === 'true')).toHaveLength(PEOPLE);
    expect(await harness.state('select count(*)::int4 as n from dead_call')).toEqual([{ n: 0 }]);
  });

  it('a hundred times in a row over many commands is stopped as well', async () => {
    await begin({ tables: TABLES.replace(String(PEOPLE), '99') });
    refuse();
    expect((await harness.sync()).delivery).toMatchObject({ waiting: 0, refused: 99, stopped: 0 });
    await harness.sql(`insert into people (id, user_id) select n, 'u' || n from generate_series(100, 101) as n`);
    expect((await harness.sync()).delivery).toMatchObject({ waiting: 0, refused: 0, stopped: 2 });

    // When it is resumed, counting begins anew.
    await harness.resume('vip');
    expect((await harness.sync()).delivery).toMatchObject({ waiting: 0, refused: 2, stopped: 0 });
    harness.simulator.faults.clear();
    expect((await harness.request('retry', FILTER)).delivery).toMatchObject({ waiting: 0, refused: 0 });
    expect(await harness.state('select streaks from destination')).toEqual([{ streaks: {} }]);
  });

  it('holds up nobody else’s first sync, however many of its calls wait', async () => {
    await begin();
    await harness.sync();
    await harness.state(`update definition_destination set stopped = 'Some reason.'`);
    await harness.state(
      `insert into outbox (kind, destination_id, definition_id, priority, recipient, columns)
       select 'm', 1, 1, 2, 'u:w' || n, array['vip'] from generate_series(1, 46000) as n`,
    );
    await harness.reconfigure({ audiences: [VIP, OTHER] });
    expect((await harness.sync('other')).delivery).toMatchObject({ waiting: 0, ahead: 0, stopped: 0 });
    expect([...harness.simulator.users()].filter(({ fields }) => fields['other'] === 'true')).toHaveLength(PEOPLE);
  });

  it('is not stopped by people who are refused', async () => {
    await begin({ key: 'email', tables: `${TABLES}; update people set email = 'nobody' || id` });
    const { delivery } = await harness.sync();
    expect(delivery).toMatchObject({ waiting: 0, stopped: 0, refused: PEOPLE });
  });

  it('now and then is not stopped', async () => {
    await begin();
    harness.simulator.faults.failRandomly({
      share: 1,
      seed: 1,
      status: 400,
      body: { code: 'BadParams', msg: 'no', params: null },
      match: ({ body }) => /"u\d*[1-7]"/.test(body),
    });
    expect((await harness.sync()).delivery).toMatchObject({ waiting: 0, stopped: 0, refused: 175 });
  });
});

describe('a field that is refused for everybody', () => {
  const reconfigureWith = (quotas: Record<string, number>, definitions: Definitions): Promise<void> =>
    harness.reconfigure({
      ...definitions,
      destinations: {
        iterable: { type: 'iterable', api_key: 'test-key', region: harness.simulator.url, quotas },
      },
    });
  const giveType = (): Promise<unknown> =>
    fetch(`${harness.simulator.url}/api/users/update`, {
      method: 'POST',
      headers: { 'api-key': 'test-key', 'content-type': 'application/json' },
      body: JSON.stringify({ userId: 'first', dataFields: { bad: 7 } }),
    });
  const stoppedFields = (): Promise<unknown> =>
    harness.state(
      `select d.key, dd.stopped, dd.stopped_fields as fields from definition_destination as dd
       join definition as d on d.id = dd.definition_id where dd.stopped is not null or dd.stopped_fields <> '{}'`,
    );
  const REASON = '100 calls in a row were refused for their content, the last with RequestFieldsTypesMismatched.';
  const have = (field: string): number =>
    [...harness.simulator.users()].filter(({ fields }) => fields[field] !== undefined).length;

  it.each([
    ['singly', 400],
    ['in bulk', 2_500],
  ])('is left out, %s: what is well of its definition goes on, and so do the others', async (_, people) => {
    const definitions = { audiences: [VIP], traits: [STATS] };
    await begin({ tables: TABLES.replace(String(PEOPLE), String(people)), ...definitions });
    await reconfigureWith({ users_bulk_update: 100 }, definitions);
    harness.simulator.setQuota('users/bulkUpdate', 'off');
    await giveType();
    const { delivery } = await harness.sync();
    expect(delivery).toMatchObject({ waiting: 0, ahead: 0, stopped: 0, refused: people });
    expect([have('vip'), have('good'), have('bad')]).toEqual([people, people, 1]);
    expect(harness.simulator.stats.count('users/bulkUpdate')).toBeLessThan(people / 4);
    expect(await stoppedFields()).toEqual([{ key: 'stats', stopped: null, fields: { bad: REASON } }]);
    const [{ tried } = {}] = await harness.state(
      `select count(*) filter (where reason <> 'FieldStopped')::int4 as tried from dead_call`,
    );
    expect(tried).toBeGreaterThanOrEqual(99);
    // Some were under way when it was decided.
    expect(tried).toBeLessThan(people);

    // What changes meanwhile gets through, but for this field.
    await harness.sql(`update people set vip = false where id = 1; delete from people where id = 2`);
    const before = harness.simulator.requests().length;
    await harness.sync();
    expect(harness.simulator.user('u1')?.fields).toMatchObject({ vip: 'false' });
    expect(harness.simulator.user('u2')?.fields).not.toHaveProperty('good');
    expect(
      harness.simulator
        .requests()
        .slice(before)
        .some(({ body }) => body.includes('"bad"')),
    ).toBe(false);
  });

  const refuse = (field: string, endpoint = 'users/update'): void =>
    harness.simulator.faults.failRandomly({
      share: 1,
      seed: 1,
      status: 400,
      body: { code: 'BadParams', msg: 'no', params: null },
      match: (request) => request.endpoint === endpoint && request.body.includes(field),
    });

  it('is sent to everybody when a person resumes its definition', async () => {
    await begin({ traits: [STATS] });
    refuse('"bad"');
    expect((await harness.sync()).delivery).toMatchObject({ waiting: 0, stopped: 0, refused: PEOPLE });
    harness.simulator.faults.clear();
    await harness.resume('stats');
    expect(await stoppedFields()).toEqual([]);
    expect((await harness.sync()).delivery).toMatchObject({ waiting: 0, stopped: 0, refused: 0 });
    // Those who were refused wait for a person: what was refused of them may be theirs.
    const [{ refused } = {}] = await harness.state('select count(*)::int4 as refused from dead_call');
    expect(have('bad')).toBe(PEOPLE - Number(refused));
    expect((await harness.request('retry', FILTER)).delivery).toMatchObject({ waiting: 0, refused: 0 });
    expect([have('good'), have('bad')]).toEqual([PEOPLE, PEOPLE]);
  });

  it('is sent to those, too, who were under way as it was resumed, and not to people whom Iterable has forgotten', async () => {
    await begin({ traits: [STATS] });
    await harness.sync();
    await harness.state(
      `insert into dead_call (destination_id, definition_id, kind, recipient, field, reason, answer)
       select 1, id, 'm', 'u:u' || n, 'bad', 'FieldStopped', '' from definition, generate_series(1, 2) as n where key = 'stats'`,
    );
    await harness.state(`insert into forgotten_there (destination_id, hash) select 1, ${hashOf(`'u:u2'`)}`);
    await tidyUp(harness.opened.databases.state);
    const before = harness.simulator.requests().length;
    expect((await harness.sync()).delivery).toMatchObject({ waiting: 0, refused: 1 });
    const told = harness.simulator
      .requests()
      .slice(before)
      .filter(({ endpoint }) => endpoint === 'users/update');
    expect(told.map(({ body }) => body)).toEqual([expect.stringContaining('"bad":"x1"')]);
    expect(await dead()).toEqual([{ recipient: 'u:u2', reason: 'ForgottenUserError', n: 1 }]);
  });

  it('counts by itself, whatever its name is', async () => {
    const events = {
      ...STATS,
      sql: `SELECT id AS profile_id, id AS good, 'x' || id AS events FROM people`,
      send: 'both',
    };
    await begin({ audiences: [], traits: [events] });
    refuse('"events"');
    expect((await harness.sync()).delivery).toMatchObject({ waiting: 0, stopped: 0, refused: PEOPLE });
    expect(await stoppedFields()).toMatchObject([{ stopped: null, fields: { events: expect.any(String) as string } }]);
    expect(harness.simulator.events()).toHaveLength(PEOPLE);
  });

  it('begins to be counted anew when its definition had stopped and is resumed', async () => {
    await begin({ audiences: [], traits: [{ ...STATS, send: 'both' }] });
    await harness.sync();
    await harness.state(
      `update destination set streaks = jsonb_build_object('1 bad', 50, '1 .events', 99, '11 bad', 50)`,
    );
    refuse('Computed', 'events/track');
    await harness.sql(`insert into people (id, user_id) values (1000, 'u1000')`);
    await harness.sync();
    expect(await stoppedFields()).toMatchObject([{ key: 'stats', stopped: expect.any(String) as string }]);
    expect(await harness.state('select streaks from destination')).toEqual([{ streaks: { '11 bad': 50 } }]);
  });

  it('is sent again by `failed retry`, too', async () => {
    await begin({ traits: [STATS] });
    refuse('"bad"');
    await harness.sync();
    harness.simulator.faults.clear();
    expect((await harness.request('retry', FILTER)).delivery).toMatchObject({ waiting: 0, refused: 0 });
    expect(await stoppedFields()).toEqual([]);
    expect(have('bad')).toBe(PEOPLE);
  });

  it('and was the last of its definition has the calls wait', async () => {
    await begin({ audiences: [], traits: [STATS] });
    refuse('userId');
    const { delivery } = await harness.sync();
    expect(delivery?.stopped).toBeGreaterThan(0);
    expect(delivery).toMatchObject({ waiting: 0, reason: expect.stringContaining('The calls of "stats"') as string });
    expect(await stoppedFields()).toMatchObject([{ key: 'stats', fields: {} }]);
    harness.simulator.faults.clear();
    await harness.resume('stats');
    await harness.sync();
    expect((await harness.request('retry', FILTER)).delivery).toMatchObject({ waiting: 0, refused: 0 });
    expect([have('good'), have('bad')]).toEqual([PEOPLE, PEOPLE]);
  });

  it('may be a place on a list, whose audience is sent as a trait all the same', async () => {
    const audiences = [{ ...VIP, send: ['identify', 'list'] }];
    await begin({ audiences });
    await reconfigureWith({ lists: 100 }, { audiences });
    refuse('subscribers', 'lists/subscribe');
    expect((await harness.sync()).delivery).toMatchObject({ waiting: 0, stopped: 0, refused: PEOPLE });
    expect(have('vip')).toBe(PEOPLE);
    expect(await stoppedFields()).toMatchObject([
      { key: 'vip', stopped: null, fields: { '.list': expect.stringContaining('BadParams') as string } },
    ]);
    harness.simulator.faults.clear();
    await harness.resume('vip');
    await harness.request('retry', FILTER);
    expect(
      harness.simulator
        .lists()
        .find(({ name }) => name === 'vip')
        ?.members(),
    ).toHaveLength(PEOPLE);
  });
});

describe('very many dead calls', () => {
  const ALL = { keys: [], reason: null, destination: null, olderThan: null };

  it('are listed with three samples of each reason, and sent again in parts', async () => {
    await begin();
    await harness.sync();
    await harness.state(
      `insert into dead_call (destination_id, definition_id, kind, recipient, field, reason, answer)
       select 1, 1, 'm', 'u:w' || n, 'vip', case when n % 10000 = 0 then 'Rare' else 'BadParams' end, 'no'
       from generate_series(1, 12000) as n`,
    );
    const { state } = harness.opened.databases;
    expect(await listDead(state.pool, ALL)).toMatchObject([
      {
        reason: 'BadParams',
        count: 11_999,
        samples: [{ recipient: 'u:w1' }, { recipient: 'u:w2' }, { recipient: 'u:w3' }],
      },
      { reason: 'Rare', count: 1, samples: [{ recipient: 'u:w10000', field: 'vip', answer: 'no' }] },
    ]);
    const held = await holdDefinition(state.pool);
    let isOver = false;
    const retrying = retryDead(state.pool, ALL).finally(() => (isOver = true));
    // A run that writes the same marks isn't met halfway.
    const isWaiting = async (): Promise<unknown> =>
      (
        await harness.state(`select count(*)::int4 as n from pg_locks where locktype = 'advisory' and not granted`)
      )[0]?.['n'];
    await expect.poll(isWaiting).toBe(1);
    expect(isOver).toBe(false);
    await held.release();
    expect(await retrying).toEqual({ count: 12_000, definitions: ['vip'] });
    expect(await harness.state('select count(*)::int4 as n from outbox')).toEqual([{ n: 12_000 }]);
    expect(await harness.state('select from dead_call')).toEqual([]);
  });
});
