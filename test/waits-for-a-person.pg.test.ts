import { afterEach, describe, expect, it } from 'vitest';
import { createHarness, type Harness, type HarnessOptions } from './support/harness.js';
import { startSimulator } from '../src/demo/simulator/server.js';

/** What can't go on by itself is never taken for done: it is counted, with the reason, until a person sees to it. */
const TABLES = `
  create table people (id bigint primary key, user_id text, email text, vip boolean not null default true);
  insert into people (id, user_id) select n, 'u' || n from generate_series(1, 60) as n`;
const VIP = { name: 'VIP', sql: 'SELECT id AS profile_id FROM people WHERE vip', poll: '1 hour' };

let harness: Harness;
afterEach(() => harness.close());
const begin = async (options: Partial<HarnessOptions> = {}): Promise<void> => {
  harness = await createHarness({ tables: TABLES, audiences: [VIP], ...options });
};

describe('a destination that is paused', () => {
  it('is not said to have got a first sync or a backfill', async () => {
    await begin();
    await harness.sync();
    await harness.state(`update destination set state = 'paused'`);
    const requests = harness.simulator.stats.count();
    const { delivery } = await harness.request('backfill', { key: 'vip', events: false, resumes: false });
    expect(delivery).toMatchObject({ waiting: 0, ahead: 0, stopped: 60, reason: 'Destination "iterable" is paused.' });
    expect(harness.simulator.stats.count()).toBe(requests);
    await harness.state(`update destination set state = 'active'`);
    expect((await harness.sync()).delivery).toMatchObject({ waiting: 0, ahead: 0, stopped: 0 });
    expect(harness.simulator.stats.count('users/update')).toBe(120);
  });
});

describe('a definition that is paused', () => {
  it('has its calls counted as waiting for that, also where refused ones are tried again', async () => {
    await begin();
    harness.simulator.faults.failNext(1, { status: 400, body: { code: 'BadParams', msg: '', params: null } });
    expect((await harness.sync()).delivery).toMatchObject({ refused: 1 });
    await harness.state(`update definition set state = 'paused'`);
    const filter = { keys: ['vip'], reason: null, destination: null, olderThan: null };
    const { delivery } = await harness.request('retry', filter);
    expect(delivery).toMatchObject({ waiting: 0, stopped: 1, reason: '"vip" is paused.' });
  });

  it.each(['paused', 'disabled'])('keeps a held run from being approved (%s)', async (state) => {
    await begin();
    await harness.sync();
    await harness.sql('update people set vip = false');
    const [run] = (await harness.sync()).progress.runs;
    expect(run).toMatchObject({ outcome: 'held' });
    if (state === 'paused') await harness.state(`update definition set state = 'paused'`);
    else await harness.reconfigure({ audiences: [{ ...VIP, enabled: false }] });
    const approved = await harness.request('approve', { run: run?.run ?? 0 });
    expect(approved).toMatchObject({ outcome: 'refused', answer: expect.stringContaining(state) as string });
    expect(await harness.state('select count(*) as n from snapshot')).toEqual([{ n: 60 }]);
  });
});

describe('a destination at another host', () => {
  it('is another one: what waits for the first is not waited for, and stays', async () => {
    await begin();
    harness.simulator.faults.failRandomly({ share: 1, seed: 1, status: 401 });
    expect((await harness.sync()).delivery).toMatchObject({ stopped: 60 });
    const other = await startSimulator({ projectType: 'hybrid', quotas: 'off' });
    try {
      const elsewhere = { iterable: { type: 'iterable', api_key: 'test-key', region: other.url } };
      await harness.reconfigure({ audiences: [VIP], destinations: elsewhere });
      const { delivery } = await harness.sync();
      expect(delivery).toMatchObject({ waiting: 0, later: 0, stopped: 0, ahead: 0, refused: 0 });
      expect(other.userCount).toBe(60);
      expect(await harness.state('select count(*) as n from outbox')).toEqual([{ n: 60 }]);
    } finally {
      await other.close();
    }
  });
});
