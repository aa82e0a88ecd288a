import { randomUUID } from 'node:crypto';
import { readFile, writeFile } from 'node:fs/promises';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { parse, stringify } from 'yaml';
import type { Opened } from '../src/cli/open.js';
import { runDaemon } from '../src/daemon.js';
import { createDeliveries } from '../src/delivery/deliveries.js';
import { createIterablePort } from '../src/destinations/iterable/port.js';
import { Secret } from '../src/lib/secret.js';
import { createHarness, type Harness } from './support/harness.js';
import { until } from './support/until.js';

const TABLES = `
  create table people (id bigint primary key, user_id text, email text);
  insert into people select n, 'u' || n, null from generate_series(1, 20) as n`;
const upTo = (name: string, most: number) => ({
  name,
  sql: `SELECT id AS profile_id FROM people WHERE id <= ${most}`,
  poll: '1 hour',
});

let harness: Harness;
let stop: () => Promise<void>;
beforeEach(async () => {
  harness = await createHarness({ tables: TABLES, audiences: [upTo('One', 1), upTo('Two', 2), upTo('Three', 3)] });
  const controller = new AbortController();
  const ended = runDaemon(harness.opened, controller.signal, () => undefined);
  stop = async () => {
    controller.abort();
    await ended;
  };
  await until(
    async () =>
      (await states()).length === 3 &&
      (await harness.state(`select from run where outcome = 'succeeded'`)).length === 3,
  );
  await until(
    async () =>
      (
        await harness.state(
          'select from outbox union all select from definition_destination where backfill is not null',
        )
      ).length === 0,
  );
});
afterEach(async () => {
  await stop();
  await harness.close();
});

const states = () => harness.state('select key, state, members from definition order by id');
const problem = async (): Promise<unknown> =>
  (await harness.state(`select value #>> '{}' as problem from setting where name = 'configuration_problem'`))[0]
    ?.problem;

const never = (): boolean => false;

async function edit(
  change: (content: {
    audiences: Record<string, unknown>[];
    destinations: Record<string, Record<string, unknown>>;
  }) => void,
): Promise<void> {
  const content = parse(await readFile(harness.configFile, 'utf8')) as {
    audiences: Record<string, unknown>[];
    destinations: Record<string, Record<string, unknown>>;
  };
  change(content);
  await writeFile(harness.configFile, stringify(content));
}

describe('a change of the configuration while the daemon runs', () => {
  it('is applied: new ones are synced, those that are gone are archived and nothing is sent for them', async () => {
    const requests = harness.simulator.requests().length;
    await edit(({ audiences }) => audiences.splice(2, 1, upTo('Four', 4)));
    await until(async () => (await states()).some(({ key, members }) => key === 'four' && members === 4));
    expect(await states()).toMatchObject([
      { state: 'active' },
      { state: 'active' },
      { key: 'three', state: 'archived', members: 3 },
      { key: 'four' },
    ]);
    await until(() => Promise.resolve(harness.simulator.user('u4')?.fields.four === 'true'));
    expect(harness.simulator.user('u3')?.fields).toMatchObject({ three: 'true' });
    expect(harness.simulator.requests().length).toBe(requests + 4);
  });

  it('leaves the old set running where it is bad, and says why', async () => {
    await writeFile(harness.configFile, `${await readFile(harness.configFile, 'utf8')}\nsurprise: true\n`);
    await until(async () => String(await problem()).includes('surprise'));
    await harness.state(`update definition set due_at = now()`);
    await until(async () => (await harness.state(`select from run where outcome = 'succeeded'`)).length === 6);
    expect((await states()).map(({ state }) => state)).toEqual(['active', 'active', 'active']);
  });

  it('is refused where a third of the definitions vanishes, until somebody confirms it', async () => {
    await edit(({ audiences }) => audiences.splice(1, 2));
    await until(async () => String(await problem()).includes('--confirm-removals'));
    expect((await states()).map(({ state }) => state)).toEqual(['active', 'active', 'active']);
    const confirmed = await harness.request('sync', { keys: [], confirmRemovals: true });
    expect(confirmed.outcome).toBe('done');
    expect((await states()).map(({ state }) => state)).toEqual(['active', 'archived', 'archived']);
    expect(await problem()).toBe('');
  });

  it('is seen at once by `sync`, which does not wait for stillness', async () => {
    await edit(({ audiences }) => audiences.push(upTo('Five', 5)));
    const { progress } = await harness.request('sync', { keys: ['five'], confirmRemovals: false });
    expect(progress.runs).toMatchObject([{ definition: 'five', members: 5, outcome: 'succeeded' }]);
  });

  it('twice at once leaves one sender, and none of its calls is made twice', async () => {
    await edit(({ destinations }) => Object.assign(destinations['iterable'] ?? {}, { quota: '50%' }));
    const syncs = [0, 1].map(() => harness.request('sync', { keys: ['three'], confirmRemovals: false }));
    for (const { outcome } of await Promise.all(syncs)) expect(outcome).toBe('done');
    const before = harness.simulator.requests().length;
    await harness.sql(`insert into people select -n, 'new' || n from generate_series(1, 60) as n`);
    await harness.request('sync', { keys: ['three'], confirmRemovals: false });
    expect(harness.simulator.requests().length - before).toBe(60);
    const quota = `select from destination, jsonb_array_elements(delivery -> 'lanes') as l
      where l ->> 'name' = 'users_update' and l ->> 'quota' = '250'`;
    await until(async () => (await harness.state(quota)).length === 1);
  });
});

describe('a change of the configuration while an instance stands by', () => {
  let standby: { opened: Opened; end: () => Promise<void> };
  const standBy = async (): Promise<void> => {
    const opened = await harness.openAnother();
    const controller = new AbortController();
    const ended = runDaemon(opened, controller.signal, () => undefined);
    const end = async (): Promise<void> => {
      controller.abort();
      await ended;
      await opened.close();
    };
    standby = { opened, end };
  };
  afterEach(() => standby.end());
  const leader = async (): Promise<unknown> => (await harness.state('select holder from leader'))[0]?.['holder'];
  /** The one that leads has stopped, and the other has taken over. */
  const takeOver = async (): Promise<void> => {
    const first = await leader();
    await stop();
    stop = () => Promise.resolve();
    await until(async () => ![first, null, undefined].includes(await leader()));
    await harness.state('update definition set due_at = now()');
    await until(
      async () =>
        (await harness.state('select from run where leader <> $1 and finished_at is not null', [first])).length > 2,
    );
  };

  it('is what that leads by when it takes over', async () => {
    await standBy();
    await edit(({ audiences }) => audiences.push(upTo('Four', 4)));
    await until(async () => (await states()).some(({ key }) => key === 'four'));
    await takeOver();
    expect((await states()).map(({ key, state }) => [key, state])).toEqual([
      ['one', 'active'],
      ['two', 'active'],
      ['three', 'active'],
      ['four', 'active'],
    ]);
  });

  it('and is bad leaves the last one that was good to lead by, and is told of', async () => {
    await standBy();
    await edit(({ audiences }) => audiences.push(upTo('Four', 4)));
    await until(async () => (await states()).some(({ key }) => key === 'four'));
    await writeFile(harness.configFile, `${await readFile(harness.configFile, 'utf8')}\nsurprise: true\n`);
    await until(async () => String(await problem()).includes('surprise'));
    await takeOver();
    expect((await states()).map(({ state }) => state)).toEqual(Array(4).fill('active'));
    await until(async () => String(await problem()).includes('surprise'));
  });
});

describe('deliveries', () => {
  it('that are stopped while their destinations are replaced start none any more', async () => {
    const { state } = harness.opened.databases;
    const deliveries = createDeliveries({
      state,
      leader: randomUUID(),
      isHybrid: () => false,
      mayBegin: never,
      prepareBulk: never,
      bulkAgoMs: Infinity,
      lookMs: (ms) => ms,
      log: harness.opened.log,
    });
    const closed: string[] = [];
    const reachable = (name: string) => {
      const quotas = { usersUpdate: 1, usersBulkUpdate: 1, eventsTrack: 1, eventsTrackBulk: 1, lists: 1, reads: 1 };
      const apiKey = new Secret('test-key');
      const port = createIterablePort({ baseUrl: harness.simulator.url, apiKey, projectKey: 'hybrid', quotas });
      const close = (): void => {
        closed.push(name);
        port.close();
      };
      return [{ id: 1, name, connect: () => Promise.resolve({ ...port, close }) }];
    };
    await deliveries.replace(reachable('first'), 'first');
    expect(deliveries.all().map(({ name }) => name)).toEqual(['first']);
    const replacing = deliveries.replace(reachable('second'), 'second');
    await deliveries.stop();
    expect(deliveries.all()).toEqual([]);
    expect(closed.sort()).toEqual(['first', 'second']);
    await replacing;
    expect(deliveries.all()).toEqual([]);
  });
});
