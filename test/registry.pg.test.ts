import { mkdir, rm, writeFile } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import { afterEach, describe, expect, it } from 'vitest';
import { LeaseLostError, tryLead } from '../src/db/lease.js';
import { lockRegistry } from '../src/db/locks.js';
import { register } from '../src/sync/registry.js';
import { applyConfig } from './support/apply.js';
import { createHarness, type Harness, type HarnessOptions } from './support/harness.js';
import { holdDefinition } from './support/lock.js';

/** What a changed configuration does to what was synced under the one before. */
const TABLES = `
  create table people (id bigint primary key, user_id text, email text, vip boolean not null default true, spent bigint);
  insert into people (id, user_id, spent) select n, 'u' || n, n from generate_series(1, 3) as n`;
const VIP = { name: 'VIP', sql: 'SELECT id AS profile_id FROM people WHERE vip', poll: '1 hour' };
const SPENT = { key: 'spent', sql: 'SELECT id AS profile_id, spent AS value FROM people', poll: '1 hour' };

let harness: Harness;
afterEach(() => harness.close());
const begin = async (options: Partial<HarnessOptions> = {}): Promise<void> => {
  harness = await createHarness({ tables: TABLES, audiences: [VIP], ...options });
};
const fields = (user: string) => harness.simulator.user(user)?.fields;

const isWaiting = async (): Promise<unknown> =>
  (await harness.state('select count(*)::int4 as n from pg_locks where not granted'))[0]?.['n'];

/** Somebody leaves while nothing is identified; then everything is again. */
const leaveUntold = async (): Promise<void> => {
  await begin();
  await harness.sync();
  await harness.reconfigure({ audiences: [{ ...VIP, send: 'track' }] });
  await harness.sync();
  await harness.sql('update people set vip = false where id = 1');
};

describe('a destination that is identified to again', () => {
  it('is told who has left and changed while it was not', async () => {
    await begin({ traits: [SPENT] });
    await harness.sync();
    expect(fields('u1')).toEqual({ vip: 'true', spent: '1' });
    await harness.reconfigure({ audiences: [{ ...VIP, send: 'track' }], traits: [{ ...SPENT, send: 'track' }] });
    await harness.sync();
    await harness.sql(
      'update people set vip = false, spent = null where id = 1; update people set spent = 20 where id = 2',
    );
    await harness.sync();
    expect(fields('u1')).toEqual({ vip: 'true', spent: '1' });

    await harness.reconfigure({ audiences: [VIP], traits: [SPENT] });
    expect((await harness.sync()).delivery).toMatchObject({ waiting: 0, ahead: 0, refused: 0 });
    expect(fields('u1')).toEqual({ vip: 'false' });
    expect(fields('u2')).toEqual({ vip: 'true', spent: '20' });
    expect(fields('u3')).toEqual({ vip: 'true', spent: '3' });
  });

  it.each([
    ['a moment before it ended', 'update definition_destination set identified_until = clock_timestamp()'],
    [
      'hours before it ended, by a run that took longer',
      `update definition_destination set identified_until = now() + interval '4 hours';
       update run set finished_at = now() + interval '5 hours' where id = (select max(id) from run)`,
    ],
  ])('is told who has left %s', async (_, sql) => {
    await leaveUntold();
    await harness.sync();
    await harness.state(sql);
    await harness.reconfigure({ audiences: [VIP] });
    await harness.sync();
    expect(fields('u1')).toEqual({ vip: 'false' });
  });

  it('is told of what is being applied meanwhile', async () => {
    await leaveUntold();
    await harness.reconfigure({ audiences: [VIP] });
    const { client, release } = await holdDefinition(harness.opened.databases.state.pool);
    // As a run does that has seen that nothing is identified.
    await client.query(`delete from snapshot where recipient = 'u:u1'`);
    await client.query(
      `insert into transition (at, definition_id, kind, recipient) select clock_timestamp(), id, 'x', 'u:u1' from definition`,
    );
    const syncing = harness.sync();
    await expect.poll(isWaiting, { interval: 5 }).toBeGreaterThan(0);
    await release();
    await syncing;
    expect(fields('u1')).toEqual({ vip: 'false' });
  });
});

describe('two definitions that are new and fill one field', () => {
  it('never both succeed, also where they run at the same time', async () => {
    const shared = (key: string, value: number) => ({
      key,
      sql: `SELECT id AS profile_id, ${value} AS shared, 1 AS own_${key} FROM people, (SELECT pg_sleep(0.3)) AS nap`,
    });
    await begin({ audiences: [], traits: [shared('a', 1), shared('b', 2)] });
    const { progress } = await harness.sync();
    expect(progress.runs.map(({ outcome }) => outcome).sort()).toEqual(['failed', 'succeeded']);
    expect(progress.runs.find(({ outcome }) => outcome === 'failed')?.error).toContain('The field `shared`');
    const first = progress.runs.find(({ outcome }) => outcome === 'succeeded')?.definition ?? '';
    expect((await harness.sync(first)).progress.runs).toMatchObject([{ outcome: 'succeeded' }]);
  });
});

describe('a field', () => {
  it('that a definition gives no more may be given by another', async () => {
    const giving = (key: string, columns: string) => ({ key, sql: `SELECT id AS profile_id, ${columns} FROM people` });
    await begin({ audiences: [], traits: [giving('b', '1 AS x, 2 AS y')] });
    await harness.sync();
    await harness.reconfigure({ audiences: [], traits: [giving('b', '1 AS x')] });
    await harness.sync();
    await harness.reconfigure({ audiences: [], traits: [giving('b', '1 AS x'), giving('c', '3 AS y')] });
    expect((await harness.sync()).progress.runs.map(({ outcome }) => outcome)).toEqual(['succeeded', 'succeeded']);
    expect(fields('u1')).toEqual({ x: '1', y: '3' });
  });

  it('has no type before it has had a value', async () => {
    const giving = (b: string) => ({
      traits: [{ key: 't', sql: `SELECT id AS profile_id, 1 AS a, ${b} AS b FROM people` }],
    });
    await begin({ audiences: [], ...giving('NULL') });
    await harness.sync();
    expect(await harness.state('select fields from definition')).toEqual([{ fields: { a: 'long' } }]);
    await harness.reconfigure({ audiences: [], ...giving(`timestamp '2026-01-02 03:04:05'`) });
    expect((await harness.sync()).progress.runs).toMatchObject([{ outcome: 'succeeded', changed: 3 }]);
    expect(fields('u1')).toEqual({ a: '1', b: '"2026-01-02 03:04:05 +00:00"' });
  });
});

describe('an include that matches nothing any more', () => {
  it('is refused where a definition has left with it, until somebody confirms that', async () => {
    await begin({ audiences: ['a', 'b', 'c'].map((key) => ({ ...VIP, name: key })), include: ['more/*.yaml'] });
    const folder = dirname(harness.configFile);
    await mkdir(join(folder, 'more'));
    const file = join(folder, 'more', 'd.yaml');
    await writeFile(file, `audiences:\n  - { name: d, sql: SELECT id AS profile_id FROM people }\n`);
    await harness.sync();
    expect(await harness.state(`select count(*) as n from definition where state = 'active'`)).toEqual([{ n: 4 }]);
    await rm(file);
    await expect(harness.request('sync', { keys: [], confirmRemovals: false })).rejects.toThrow(
      /1 of 4 definitions .*\(d\) while `include: more\/\*\.yaml` matches no file.*--confirm-removals/,
    );
    expect((await harness.request('sync', { keys: [], confirmRemovals: true })).outcome).toBe('done');
    expect(await harness.state(`select state from definition where key = 'd'`)).toEqual([{ state: 'archived' }]);
  });
});

describe('a configuration that is applied in the middle of a run', () => {
  /** A run that is about to end: it has written to what is sent, and not yet to the definition. */
  const runTo = async (): Promise<{ end: () => Promise<void> }> => {
    const client = await harness.opened.databases.state.pool.connect();
    await client.query('begin; update definition_destination set backfill_total = 1');
    return {
      end: async () => {
        await client.query('update definition set members = members; commit');
        client.release();
      },
    };
  };

  it('gives way to it, and is applied afterwards', async () => {
    await begin();
    await harness.sync();
    await harness.reconfigure({ audiences: [{ ...VIP, name: 'Very important', key: 'vip', send: 'both' }] });
    const run = await runTo();
    const syncing = harness.sync();
    await expect.poll(isWaiting, { interval: 5 }).toBeGreaterThan(0);
    await run.end();
    expect((await syncing).progress.runs).toMatchObject([{ definition: 'vip', outcome: 'succeeded' }]);
    expect(await harness.state('select d.name, dd.track from definition as d, definition_destination as dd')).toEqual([
      { name: 'Very important', track: true },
    ]);
  });

  it('is not applied any more once another leads', async () => {
    await begin();
    await harness.sync();
    await harness.reconfigure({ audiences: [{ ...VIP, name: 'Of old', key: 'vip' }] });
    const { databases, config } = harness.opened;
    const { pool } = databases.state;
    const [before, holder] = [await tryLead(pool), await pool.connect()];
    await holder.query('begin');
    await lockRegistry(holder);
    const registering = register(databases.state, config, () => new URL(harness.simulator.url).host, {
      confirmRemovals: true,
      leader: before?.holder ?? '',
    }).catch((error: unknown) => error);
    await expect.poll(isWaiting, { interval: 5 }).toBeGreaterThan(0);
    await harness.state(`update leader set expires_at = '-infinity'`);
    const next = await tryLead(pool);
    expect(next).not.toBeNull();
    await holder.query('commit');
    holder.release();
    expect(await registering).toBeInstanceOf(LeaseLostError);
    expect(await harness.state('select name from definition')).toEqual([{ name: 'VIP' }]);
    await next?.release();
    await before?.release();
  });

  it('does not wait for it where nothing has changed', async () => {
    await begin({ traits: [SPENT] });
    await harness.sync();
    const run = await runTo();
    const registered = await applyConfig(harness.opened);
    expect(registered).toMatchObject([{ name: 'iterable' }]);
    await run.end();
  });
});
