import { afterEach, describe, expect, it } from 'vitest';
import { createFeeder } from '../src/sync/cursor.js';
import { createHarness, type Definitions, type Harness } from './support/harness.js';

/** A definition whose text changes, which is removed, comes back, is switched off and on. */
const TABLES = `
  create table people (id int primary key, vip boolean not null default true);
  insert into people select n from generate_series(1, 10) as n`;
const PROFILES = { sql: `SELECT id AS profile_id, 'u' || id AS user_id FROM people` };
const VIP = { key: 'vip', sql: 'SELECT id AS profile_id FROM people WHERE vip', send: 'both' };
const OTHER = { key: 'other', sql: 'SELECT id AS profile_id FROM people WHERE id = 1', initial: 'skip' };

let harness: Harness;
afterEach(() => harness.close());

async function begin(definitions: Definitions): Promise<void> {
  harness = await createHarness({
    tables: TABLES,
    key: 'user_id',
    profiles: PROFILES,
    simulator: { keepRequests: 1000 },
    ...definitions,
  });
  await harness.sync();
  requests();
}

const configure = (definitions: Definitions): Promise<void> =>
  harness.reconfigure({ profiles: PROFILES, ...definitions });

/** What has been sent since the last look, in short. */
function requests(): string[] {
  const seen = harness.simulator.requests().slice(looked);
  looked += seen.length;
  return seen
    .map(({ body }) => JSON.parse(body) as { userId: string; eventName?: string; dataFields: Record<string, unknown> })
    .map(({ userId, eventName, dataFields }) => `${userId} ${eventName ?? JSON.stringify(dataFields)}`)
    .sort();
}
let looked = 0;
afterEach(() => {
  looked = 0;
});

const states = async (): Promise<unknown> =>
  Object.fromEntries((await harness.state('select key, state from definition')).map(({ key, state }) => [key, state]));

describe('a definition', () => {
  it('whose text changes is compared with what was sent', async () => {
    await begin({ audiences: [VIP] });
    await configure({
      audiences: [{ ...VIP, sql: 'SELECT id AS profile_id FROM people WHERE id > 1 UNION SELECT 11' }],
    });
    await harness.sql('insert into people values (11, false)');
    await harness.sync();
    expect(requests()).toEqual(['u1 Audience Exited', 'u1 {"vip":false}', 'u11 Audience Entered', 'u11 {"vip":true}']);
    expect(await harness.state('select members from definition')).toEqual([{ members: 10 }]);
  });

  it('that is removed is archived and sends nothing, and one that comes back is compared with what was sent', async () => {
    await begin({ audiences: [VIP, OTHER] });
    await configure({ audiences: [OTHER] });
    await harness.sql('update people set vip = false where id = 2');
    await harness.sync();
    expect(await states()).toEqual({ vip: 'archived', other: 'active' });
    expect(requests()).toEqual([]);
    expect(
      await harness.state('select from snapshot as s join definition as d on d.id = s.definition_id and d.key = $1', [
        'vip',
      ]),
    ).toHaveLength(10);

    await configure({ audiences: [VIP, OTHER] });
    await harness.sync();
    expect(await states()).toEqual({ vip: 'active', other: 'active' });
    expect(requests()).toEqual(['u2 Audience Exited', 'u2 {"vip":false}']);
  });

  it('that is switched off sends nothing, and one that is switched on again sends what has changed', async () => {
    await begin({ audiences: [VIP, OTHER] });
    await configure({ audiences: [{ ...VIP, enabled: false }, OTHER] });
    await harness.sql('update people set vip = false where id = 2');
    await harness.sync();
    expect(await states()).toEqual({ vip: 'disabled', other: 'active' });
    expect(requests()).toEqual([]);
    expect(await harness.sync('vip')).toMatchObject({ outcome: 'refused' });

    await configure({ audiences: [VIP, OTHER] });
    await harness.sync();
    expect(requests()).toEqual(['u2 Audience Exited', 'u2 {"vip":false}']);
  });

  it.each([
    ['removed', [OTHER]],
    ['switched off', [{ ...VIP, enabled: false }, OTHER]],
  ])(
    'that is %s during its first sync sends nothing more, and goes on where it stopped when it is back',
    async (_, without) => {
      await begin({ audiences: [OTHER, { ...VIP, enabled: false }] });
      await configure({ audiences: [VIP, OTHER] });
      await harness.state(`update destination set state = 'paused'`);
      await harness.sync('vip');
      // As if the first sync had come to the third member.
      await harness.state('delete from outbox');
      await harness.state(`update definition_destination set backfill = 'initial', backfill_position = 'u:u2', backfill_total = 10, backfill_done = 3,
      backfill_until = (select max(entered_at) from snapshot) where definition_id = (select id from definition where key = 'vip')`);
      await configure({ audiences: without });
      await harness.state(`update destination set state = 'active'`);
      await harness.sync();
      expect((await createFeeder(harness.opened.databases.state)()).count).toBe(0);
      expect(requests()).toEqual([]);

      await configure({ audiences: [VIP, OTHER] });
      await harness.sync();
      expect(requests().filter((line) => line.includes('vip'))).toEqual(
        [3, 4, 5, 6, 7, 8, 9].map((n) => `u${n} {"vip":true}`),
      );
    },
  );

  it('whose kind changes is refused', async () => {
    await begin({ audiences: [VIP] });
    await configure({ traits: [{ key: 'vip', sql: 'SELECT id AS profile_id, 1 AS value FROM people' }] });
    await expect(harness.sync()).rejects.toThrow(
      /"vip" was an audience and cannot become a trait; give it another key/,
    );
    expect(await states()).toEqual({ vip: 'active' });
  });
});

describe('a definition with `on_delete: exit_all` that is removed', () => {
  const EXIT_ALL = { ...VIP, on_delete: 'exit_all' };
  const heldRun = async (): Promise<number> =>
    Number((await harness.state(`select id from run where trigger = 'delete' order by id desc limit 1`))[0]?.['id']);

  it('is held, and everybody exits once a person has approved', async () => {
    await begin({ audiences: [EXIT_ALL, OTHER] });
    await configure({ audiences: [OTHER] });
    await harness.sync();
    expect(requests()).toEqual([]);
    const run = await heldRun();
    expect(await harness.state('select outcome, exited, error from run where id = $1', [run])).toEqual([
      {
        outcome: 'held',
        exited: 10,
        error: 'Held: the definition was removed with on_delete: exit_all; all 10 members would exit.',
      },
    ]);
    const { outcome, delivery } = await harness.request('approve', { run });
    expect([outcome, delivery?.waiting]).toEqual(['done', 0]);
    const everybody = [1, 10, 2, 3, 4, 5, 6, 7, 8, 9];
    expect(requests()).toEqual(everybody.flatMap((n) => [`u${n} Audience Exited`, `u${n} {"vip":false}`]).sort());
    expect(await harness.state(`select state, members from definition where key = 'vip'`)).toEqual([
      { state: 'archived', members: 0 },
    ]);
    expect(await harness.state('select decision from run where id = $1', [run])).toEqual([{ decision: 'approved' }]);

    // Back again, everybody enters anew.
    await configure({ audiences: [EXIT_ALL, OTHER] });
    await harness.sync();
    expect(requests()).toEqual(everybody.flatMap((n) => [`u${n} Audience Entered`, `u${n} {"vip":true}`]).sort());
  });

  it('has its exits sent once a person has resumed it, where its calls had stopped', async () => {
    await begin({ audiences: [EXIT_ALL, OTHER] });
    await configure({ audiences: [OTHER] });
    await harness.sync();
    await harness.state(`update definition_destination set stopped = 'They were refused.' where definition_id = 1`);
    expect((await harness.request('approve', { run: await heldRun() })).delivery).toMatchObject({ stopped: 20 });
    await harness.resume('vip');
    expect(await states()).toMatchObject({ vip: 'archived' });
    // A command waits for what it has caused, and sends what else it can meanwhile.
    const left = async (): Promise<unknown[]> => (await harness.sync(), harness.state('select from outbox'));
    await expect.poll(left, { timeout: 20_000 }).toEqual([]);
    expect(harness.simulator.user('u1')?.fields).toMatchObject({ vip: 'false' });
  });

  it('leaves everybody where they are once a person has rejected', async () => {
    await begin({ audiences: [EXIT_ALL, OTHER] });
    await configure({ audiences: [OTHER] });
    await harness.sync();
    await harness.request('reject', { run: await heldRun() });
    await harness.sync();
    expect(requests()).toEqual([]);
    expect(await states()).toEqual({ vip: 'archived', other: 'active' });
  });

  it('is forgiven when it comes back before anybody decides', async () => {
    await begin({ audiences: [EXIT_ALL, OTHER] });
    await configure({ audiences: [OTHER] });
    await harness.sync();
    const run = await heldRun();
    await configure({ audiences: [EXIT_ALL, OTHER] });
    await harness.sync();
    expect(await harness.request('approve', { run })).toMatchObject({ outcome: 'refused' });
    expect(requests()).toEqual([]);
  });
});
