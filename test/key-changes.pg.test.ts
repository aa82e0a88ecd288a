import { readdir, readFile } from 'node:fs/promises';
import { afterEach, describe, expect, it } from 'vitest';
import { startDaemon } from './support/daemon.js';
import { createHarness, type Harness } from './support/harness.js';

/**
 * What is sent of a person whom Iterable knows by two of our keys: an address that they had, and a userId that they get.
 * Whether those are one user there or two, each key is to have what is true of it, and nobody is made anew.
 */
const TABLES = `
  create table people (id bigint primary key, user_id text, email text, vip boolean not null default true, large boolean not null default true);
  insert into people (id, user_id, email) values (1, 'u1', 'old@x.de')`;
const VIP = { key: 'vip', sql: 'SELECT id AS profile_id FROM people WHERE vip' };
const LARGE = { key: 'large', sql: 'SELECT id AS profile_id FROM people WHERE large' };
const EVERYTHING = { keys: [], reason: null, destination: null, olderThan: null };

let harness: Harness;
let stopDaemon: (() => Promise<void>) | undefined;
afterEach(async () => {
  await stopDaemon?.();
  stopDaemon = undefined;
  await harness.close();
});

/** Both audiences have reached one user, `u1` and old@x.de, and the person is known by that address alone by now. */
async function begin(): Promise<void> {
  harness = await createHarness({ tables: TABLES, audiences: [VIP, LARGE], simulator: { keepRequests: 1_000 } });
  await harness.sync();
  await harness.sql('update people set user_id = null');
  await harness.sync();
  expect(sent().splice(0).at(-1)).toEqual(['old@x.de', { vip: true, large: true }]);
  expect(userOf('u1')).toMatchObject({ email: 'old@x.de', fields: { vip: 'true', large: 'true' } });
}

async function lead(): Promise<void> {
  stopDaemon = (await startDaemon(harness.opened)).stop;
}

const userOf = (key: string): unknown => harness.simulator.user(key);

/** Whom each update named, by all of their keys, and what it carried. */
function sent(): (readonly [string, unknown])[] {
  return harness.simulator
    .requests()
    .filter(({ endpoint }) => endpoint === 'users/update')
    .map(({ body }) => JSON.parse(body) as { userId?: string; email?: string; dataFields: unknown })
    .map(({ userId, email, dataFields }) => [[userId, email].filter(Boolean).join(' '), dataFields] as const);
}

/** Raises what `vip` has to say, as if that had failed before and were to be tried again after a long while. */
async function raiseLate(): Promise<void> {
  await harness.state(`update destination set state = 'paused'`);
  await harness.sync('vip');
  await harness.state(`update outbox set attempts = 5, due_at = now() + interval '1 hour'`);
  await harness.state(`update destination set state = 'active'`);
}

const waitNoLonger = (): Promise<unknown> => harness.state('update outbox set due_at = now()');
const waiting = (): Promise<unknown> => harness.state('select recipient, columns from outbox order by id');

describe('somebody who leaves an audience as they get a userId and another address', () => {
  const move = (): Promise<unknown> => harness.sql(`update people set user_id = 'u1', email = 'new@x.de', vip = false`);

  it('is told so under the old address before another audience tells the new one', async () => {
    await begin();
    await move();
    await raiseLate();
    await harness.sync('large');
    expect(userOf('u1')).toMatchObject({ email: 'old@x.de' });
    await waitNoLonger();
    await harness.sync();
    expect(await waiting()).toEqual([]);
    expect(harness.simulator.userCount).toBe(1);
    expect(userOf('u1')).toMatchObject({ email: 'new@x.de', fields: { vip: 'false', large: 'true' } });
  });

  it('has left it under the userId, too, where another audience has told that before', async () => {
    await begin();
    await move();
    await harness.sync('large');
    expect(userOf('u1')).toMatchObject({ email: 'new@x.de', fields: { vip: 'true', large: 'true' } });
    await harness.sync('vip');
    expect(await waiting()).toEqual([]);
    expect(userOf('u1')).toMatchObject({ fields: { vip: 'false', large: 'true' } });
  });

  it('waits for no audience that is paused, and has left that one, too, when it is resumed', async () => {
    await begin();
    await move();
    await raiseLate();
    await harness.state(`update definition set state = 'paused' where key = 'vip'`);
    await harness.sync('large');
    expect(userOf('u1')).toMatchObject({ email: 'new@x.de', fields: { vip: 'true', large: 'true' } });
    await harness.resume('vip');
    await waitNoLonger();
    await harness.sync();
    expect(await waiting()).toEqual([]);
    expect(userOf('u1')).toMatchObject({ fields: { vip: 'false', large: 'true' } });
  });
});

describe('somebody who has got a userId, another address, and lost the userId, before a definition that lags looks', () => {
  it('has left it under the address of now, by which the destination knows them', async () => {
    harness = await createHarness({
      tables: `${TABLES.replace("'u1'", 'null')}; alter table people add column spent int not null default 0`,
      audiences: [VIP],
      traits: [{ key: 'spent', sql: 'SELECT id AS profile_id, spent AS value FROM people' }],
    });
    await harness.sync();
    for (const change of [`user_id = 'u1'`, `email = 'new@x.de', spent = 1`, `user_id = null`]) {
      await harness.sql(`update people set ${change}`);
      await harness.sync('spent');
    }
    expect(userOf('u1')).toMatchObject({ email: 'new@x.de', fields: { vip: 'true', spent: '1' } });
    await harness.sql('update people set vip = false');
    await harness.sync('vip');
    expect(await waiting()).toEqual([]);
    expect(userOf('new@x.de')).toMatchObject({ key: 'u1', fields: { vip: 'false', spent: '1' } });
  });

  it('is told once under each of several addresses', async () => {
    harness = await createHarness({
      tables: `create table people (id bigint primary key, vip boolean not null default true, large boolean not null default true);
        insert into people values (1);
        create table addresses (id bigint, email text); insert into addresses values (1, 'old@x.de')`,
      profiles: { sql: 'SELECT id AS profile_id, null::text AS user_id, email FROM people JOIN addresses USING (id)' },
      audiences: [VIP, LARGE],
      simulator: { keepRequests: 100 },
    });
    await harness.sync();
    await harness.sql(
      `delete from addresses; insert into addresses select 1, 'new' || n || '@x.de' from generate_series(1, 3) as n`,
    );
    await harness.sync('large');
    sent();
    const before = sent().length;
    await harness.sql('update people set vip = false');
    await harness.sync('vip');
    expect(await waiting()).toEqual([]);
    const told = sent().slice(before);
    expect(told.map(([key]) => key).sort()).toEqual(['new1@x.de', 'new2@x.de', 'new3@x.de', 'old@x.de']);
    expect(told.every(([, fields]) => JSON.stringify(fields) === '{"vip":false}')).toBe(true);
  });

  it('and has left under all of several addresses at once is told nothing twice', async () => {
    harness = await createHarness({
      tables: `create table people (id bigint primary key, vip boolean not null default true, large boolean not null default true);
        insert into people values (1);
        create table addresses (id bigint, email text); insert into addresses select 1, 'a' || n || '@x.de' from generate_series(1, 3) as n`,
      profiles: { sql: 'SELECT id AS profile_id, null::text AS user_id, email FROM people JOIN addresses USING (id)' },
      audiences: [VIP, LARGE],
      simulator: { keepRequests: 100 },
    });
    await harness.sync();
    const before = sent().length;
    await harness.sql('update people set vip = false');
    await harness.sync('vip');
    expect(sent().slice(before)).toHaveLength(3);
  });
});

describe('an exit that waits while the person enters under another key', () => {
  const leave = (): Promise<unknown> => harness.sql('update people set vip = false');
  /** A member again, who is known by the userId by now. */
  const enter = (): Promise<unknown> => harness.sql(`update people set vip = true, user_id = 'u1'`);

  it('goes before the entry', async () => {
    await begin();
    await leave();
    await raiseLate();
    await enter();
    await harness.sync('vip');
    expect(sent().slice(-1)).toEqual([['old@x.de', { vip: true, large: true }]]);
    await waitNoLonger();
    await harness.sync('vip');
    expect(sent().slice(-2)).toEqual([
      ['old@x.de', { vip: false }],
      ['u1 old@x.de', { vip: true }],
    ]);
    expect(await waiting()).toEqual([]);
    expect(userOf('u1')).toMatchObject({ fields: { vip: 'true' } });
  });

  it('of a userId goes before the entry of an address', async () => {
    harness = await createHarness({ tables: TABLES, audiences: [VIP], simulator: { keepRequests: 1_000 } });
    await harness.sync();
    await harness.sql('update people set vip = false');
    await raiseLate();
    await harness.sql('update people set vip = true, user_id = null');
    await harness.sync();
    await waitNoLonger();
    await harness.sync();
    expect(sent().slice(-2)).toEqual([
      ['u1', { vip: false }],
      ['old@x.de', { vip: true }],
    ]);
    expect(userOf('u1')).toMatchObject({ fields: { vip: 'true' } });
  });

  it('and is refused lets it go, and has it sent again when a person has the exit sent again', async () => {
    await begin();
    await leave();
    harness.simulator.faults.failNext(1, { status: 400, body: { code: 'BadParams', msg: '', params: null } });
    await harness.sync('vip');
    await enter();
    await harness.sync('vip');
    expect(sent().slice(-1)).toEqual([['u1 old@x.de', { vip: true }]]);
    await harness.request('retry', EVERYTHING);
    expect(sent().slice(-2)).toEqual([
      ['old@x.de', { vip: false }],
      ['u1 old@x.de', { vip: true }],
    ]);
    expect(await waiting()).toEqual([]);
  });

  it('under way is followed by the entry', async () => {
    await begin();
    await lead();
    await leave();
    const arrived = new Promise<void>((resolve) => {
      harness.simulator.faults.failNext(1, {
        delayMs: 1_000,
        match: ({ body }) => {
          const fits = body.includes('vip');
          if (fits) resolve();
          return fits;
        },
      });
    });
    const leaving = harness.sync('vip');
    await arrived;
    await enter();
    await harness.sync('vip');
    await leaving;
    expect(sent().slice(-2)).toEqual([
      ['old@x.de', { vip: false }],
      ['u1 old@x.de', { vip: true }],
    ]);
    expect(userOf('u1')).toMatchObject({ fields: { vip: 'true' } });
  });
});

it('two audiences that follow a person from one key to the other and back do not wait on each other', async () => {
  await begin();
  await harness.state(`update destination set state = 'paused'`);
  await harness.sql(`update people set user_id = 'u1'`);
  await harness.sync();
  // `large` sees the person go back before `vip` does, and `vip` sees them come again before `big` does.
  await harness.sql('update people set user_id = null');
  await harness.sync('large');
  await harness.state(`update destination set state = 'active'`);
  await harness.sync();
  await harness.sync();
  expect(await waiting()).toEqual([]);
  expect(userOf('u1')).toMatchObject({ email: 'old@x.de', fields: { vip: 'true', large: 'true' } });
});

it('marks that waited for each other before the upgrade do so after it', async () => {
  harness = await createHarness({ tables: TABLES, audiences: [VIP] });
  const { pool } = harness.database;
  const folder = new URL('../migrations/', import.meta.url);
  const apply = async (from: number, to: number): Promise<void> => {
    for (const file of (await readdir(folder)).sort().slice(from, to)) {
      const text = await readFile(new URL(file, folder), 'utf8');
      await pool.query(`begin; set local search_path = older; ${text}; commit`);
    }
  };
  await pool.query('create schema older');
  await apply(0, 2);
  await pool.query(
    `set search_path = older;
     insert into definition (key, kind, name, computation_id) values ('vip', 'audience', 'VIP', 'c');
     insert into destination (name, host, type) values ('iterable', 'host', 'iterable');
     create table snapshot_1 partition of snapshot for values in (1);
     insert into snapshot (entered_at, definition_id, recipient, profile_id) values (now(), 1, 'u:u1', '7'), (now(), 1, 'u:u2', '8');
     insert into outbox (id, kind, destination_id, definition_id, priority, recipient, columns, after, successors) values
       (100, 'm', 1, 1, 1, 'e:a@x.de', '{vip}', null, '{u:u1}'), (101, 'm', 1, 1, 1, 'u:u1', '{vip}', '{100}', null),
       (102, 'm', 1, 1, 1, 'u:u2', '{vip}', '{99}', null), (103, 'm', 1, 1, 1, 'e:c@x.de', '{vip}', null, null);
     insert into dead_call (kind, destination_id, definition_id, recipient, reason, answer, field, successors)
       values ('m', 1, 1, 'e:b@x.de', 'Some', '', 'vip', '{u:u2}');
     reset search_path`,
  );
  await apply(2, 3);
  const read = async (table: string): Promise<unknown> => (await pool.query(table)).rows;
  expect(await read('select id::int, exit_of, follows from older.outbox order by id')).toEqual([
    { id: 100, exit_of: '7', follows: null },
    { id: 101, exit_of: null, follows: '7' },
    { id: 102, exit_of: null, follows: null },
    { id: 103, exit_of: null, follows: null },
  ]);
  expect(await read('select recipient, exit_of from older.dead_call')).toEqual([
    { recipient: 'e:b@x.de', exit_of: '8' },
  ]);
});
