import { afterEach, describe, expect, it } from 'vitest';
import { act } from '../src/cli/act.js';
import type { Leadership } from '../src/daemon.js';
import { listDead } from '../src/outbox/dead.js';
import { tidyUp } from '../src/sync/housekeeping.js';
import { startDaemon } from './support/daemon.js';
import { createHarness, type Harness, type HarnessOptions } from './support/harness.js';
import { until } from './support/until.js';

/** Calls that fail whenever they are sent while others get through come to an end; an outage brings none to its end. */
const TABLES = `
  create table people (id bigint primary key, user_id text, email text, vip boolean not null default true,
    good boolean not null default true, orders int not null default 1, city text not null default 'Bonn');
  insert into people (id, user_id) select n, 'u' || n from generate_series(1, 3) as n`;
const VIP = {
  name: 'VIP',
  sql: 'SELECT id AS profile_id FROM people WHERE vip',
  send: 'both',
  guard: 'off',
  schedule: 'manual',
};
const GOOD = {
  name: 'Good',
  sql: 'SELECT id AS profile_id FROM people WHERE good',
  send: 'list',
  guard: 'off',
  schedule: 'manual',
};
const STATS = {
  name: 'Stats',
  sql: 'SELECT id AS profile_id, orders, city FROM people',
  guard: 'off',
  schedule: 'manual',
};
const NEVER = new AbortController().signal;
const ALL = { keys: [], reason: null, destination: null, olderThan: null };

let harness: Harness;
let stopDaemon: () => Promise<void> = () => Promise.resolve();
afterEach(async () => {
  await stopDaemon();
  stopDaemon = () => Promise.resolve();
  await harness.close();
});

async function lead(): Promise<Leadership> {
  const { leadership, stop } = await startDaemon(harness.opened);
  stopDaemon = stop;
  return leadership;
}

/** All is delivered, and a daemon leads. */
async function begin(options: Partial<HarnessOptions> = {}): Promise<void> {
  harness = await createHarness({
    tables: TABLES,
    audiences: [VIP],
    traits: [STATS],
    simulator: { keepRequests: 10_000 },
    ...options,
  });
  await lead();
  await harness.sync();
}

/** Has the leader run all definitions, and waits for no delivery. */
async function run(): Promise<void> {
  const { outcome } = await act(harness.opened, {
    kind: 'sync',
    args: { keys: [], confirmRemovals: true },
    signal: NEVER,
  });
  expect(outcome).toBe('done');
}

const fails = (status: number, match: (body: string) => boolean): void =>
  harness.simulator.faults.failRandomly({ share: 1, seed: 1, status, match: ({ body }) => match(body) });
/** Lets all waits pass. Whoever settles or raises calls at this moment is left alone. */
const hurry = (): Promise<unknown> =>
  harness.state(
    `with waiting as (select id from outbox where due_at > now() order by recipient, id for update skip locked)
     update outbox as o set due_at = now() from waiting where o.id = waiting.id`,
  );
const field = (person: string, name: string): string | undefined => harness.simulator.user(person)?.fields[name];
const events = (person: string): string[] => harness.simulator.events(person).map(({ name }) => name);

/** Time goes by, in which something of everybody else gets through. */
async function passTime(): Promise<void> {
  await harness.sql('update people set orders = orders + 1, good = not good where id = 2');
  await run();
  const [person] = await harness.sql('select orders from people where id = 2');
  await until(() => Promise.resolve(field('u2', 'orders') === String(person?.['orders'])));
  await hurry();
}

async function dead(): Promise<string[]> {
  const rows = await harness.state(
    `select concat_ws(' ', recipient, coalesce(field, event), reason) as dead from dead_call order by 1`,
  );
  return rows.map((row) => String(row['dead']));
}
const waiting = (condition = 'true'): Promise<Record<string, unknown>[]> =>
  harness.state(
    `select kind, recipient, attempts, columns, extract(epoch from due_at - now())::int4 as seconds from outbox where ${condition} order by id`,
  );
/** As if it had failed so often; it is tried at once. */
const age = (attempts: number): Promise<unknown> =>
  harness.state('update outbox set attempts = $1, due_at = now()', [attempts]);

/** Has the leader hold back what is raised, so that it can be made older before it is sent. */
async function whilePaused(change: () => Promise<unknown>): Promise<void> {
  await harness.state(`update destination set state = 'paused'`);
  await change();
  await harness.state(`update destination set state = 'active'`);
}

describe('somebody whose update fails whenever it is sent', () => {
  it('is refused in the end, and shown; what waits behind goes on, as do all others, and it is tried again after a day', async () => {
    await begin();
    fails(500, (body) => body.includes('"u1"') && !body.includes('eventName'));
    const before = harness.simulator.stats.count('users/update', 500);
    await harness.sql('update people set vip = false where id = 1');
    await until(async () => {
      await passTime();
      return (await dead()).length > 0;
    });
    expect(harness.simulator.stats.count('users/update', 500) - before).toBeGreaterThanOrEqual(24);
    expect(await dead()).toEqual(['u:u1 vip HTTP 500']);
    await until(() => Promise.resolve(events('u1').includes('Audience Exited')));
    const { pool } = harness.opened.databases.state;
    expect(await listDead(pool, ALL)).toMatchObject([
      {
        definition: 'vip',
        reason: 'HTTP 500',
        count: 1,
        samples: [{ recipient: 'u:u1', field: 'vip', answer: expect.stringContaining('GenericError') as string }],
      },
    ]);

    harness.simulator.faults.clear();
    const tomorrow = await harness.state(
      `update dead_call set retry_at = now() where retry_at between now() + interval '23 hours' and now() + interval '1 day' returning id`,
    );
    expect(tomorrow).toHaveLength(1);
    await tidyUp(harness.opened.databases.state);
    await until(() => Promise.resolve(field('u1', 'vip') === 'false'));
    await until(async () => (await dead()).length === 0);
  });

  it('for one field alone has all others soon, and only that field is refused', async () => {
    await begin();
    fails(500, (body) => body.includes('"u1"') && body.includes('Kiel'));
    await harness.sql(`update people set vip = false, orders = 7, city = 'Kiel' where id = 1`);
    await until(async () => {
      await passTime();
      return field('u1', 'vip') === 'false' && field('u1', 'orders') === '7';
    });
    const left = await until(async () => {
      const marks = await waiting(`recipient = 'u:u1' and kind = 'm'`);
      return marks.length === 1 && marks;
    });
    expect(left).toMatchObject([{ columns: ['city'] }]);
    expect(left[0]?.['attempts']).toBeLessThan(12);
    expect(await dead()).toEqual([]);
    await age(22);
    await until(async () => {
      await passTime();
      return (await dead()).length > 0;
    });
    expect(await dead()).toEqual(['u:u1 city HTTP 500']);
    expect(await waiting(`recipient = 'u:u1'`)).toEqual([]);

    // A newer value begins anew.
    await harness.sql(`update people set city = 'Trier' where id = 1`);
    await passTime();
    await until(() => Promise.resolve(field('u1', 'city') === '"Trier"'));
    expect(await dead()).toEqual([]);
  });

  it('for one field alone by Iterable’s own word has only that field refused, too', async () => {
    await begin();
    harness.simulator.faults.failRandomly({
      share: 1,
      seed: 1,
      status: 400,
      body: { code: 'GenericError', msg: 'no', params: null },
      match: ({ body }) => body.includes('"u1"') && body.includes('Kiel'),
    });
    await whilePaused(async () => {
      await harness.sql(`update people set vip = false, orders = 7, city = 'Kiel' where id = 1`);
      await run();
      await age(300);
    });
    await until(async () => (await dead()).length > 0);
    await until(async () => (await waiting()).length === 0);
    expect(await dead()).toEqual(['u:u1 city GenericError']);
    expect([field('u1', 'vip'), field('u1', 'orders'), field('u1', 'city')]).toEqual(['false', '7', '"Bonn"']);
  });

  it('has nothing that is sent after it meanwhile, not even once', async () => {
    await begin();
    fails(500, (body) => body.includes('"u1"') && !body.includes('eventName'));
    await harness.sql(`update people set vip = false, orders = 7 where id = 1`);
    for (let n = 0; n < 3; n += 1) await passTime();
    await age(15);
    for (let n = 0; n < 3; n += 1) await passTime();
    expect(events('u1')).toEqual(['Audience Entered']);
    expect(await dead()).toEqual([]);
    expect((await waiting(`recipient = 'u:u1'`)).map(({ kind }) => kind).sort()).toEqual(['e', 'm', 'm']);
  });

  it('by never being answered is refused as well, after waits of a minute and more', async () => {
    await begin();
    harness.simulator.faults.failRandomly({ share: 1, seed: 1, reset: true, match: ({ body }) => /u[13]"/.test(body) });
    await whilePaused(async () => {
      await harness.sql('update people set vip = not vip where id in (1, 3)');
      await run();
      await age(9);
      await harness.state(`update outbox set attempts = 23 where recipient = 'u:u1' and kind = 'm'`);
    });
    await until(async () => (await dead()).length > 0);
    expect(await dead()).toEqual(['u:u1 vip NoAnswer']);
    const [third] = await until(async () => {
      const marks = await waiting(`recipient = 'u:u3' and kind = 'm' and attempts = 10`);
      return marks.length > 0 && marks;
    });
    expect(third?.['seconds']).toBeGreaterThan(240);
    // Nothing follows as long as the request may still be applied.
    expect(events('u1')).toEqual(['Audience Entered']);
  });
});

describe('an event that fails whenever it is sent', () => {
  it('is refused alone, and those after it and of others go on', async () => {
    await begin();
    fails(500, (body) => body.includes('"u1"') && body.includes('Audience Exited'));
    await whilePaused(async () => {
      for (const vip of [false, true]) {
        await harness.sql('update people set vip = $1', [vip]);
        await run();
      }
      await harness.state(`update outbox set attempts = 20 where kind = 'e' and recipient = 'u:u1'`);
    });
    await until(async () => {
      await hurry();
      await harness.sql('update people set vip = not vip where id = 2');
      await run();
      return (await dead()).length > 0;
    });
    expect(await dead()).toEqual(['u:u1 Audience Exited HTTP 500']);
    await until(() => Promise.resolve(events('u1').length === 2 && events('u3').length === 3));
    expect(events('u1')).toEqual(['Audience Entered', 'Audience Entered']);
  });
});

describe('a place on a list that can’t be taken', () => {
  it('because the list can’t be made, for hours, is refused, and the definition goes on', async () => {
    const options = { audiences: [GOOD, { ...VIP, send: 'list' }] };
    await begin({ ...options, tables: TABLES.replace('vip boolean not null default true', 'vip boolean') });
    harness.simulator.faults.failRandomly({
      share: 1,
      seed: 1,
      endpoint: 'lists/create',
      status: 500,
    });
    await whilePaused(async () => {
      await harness.sql('update people set vip = true where id = 1');
      await run();
      await age(22);
    });
    await until(async () => {
      await passTime();
      return (await dead()).length > 0;
    });
    expect(await dead()).toEqual(['u:u1 .list HTTP 500']);
    expect(await harness.state('select stopped from definition_destination where stopped is not null')).toEqual([]);
  });
});

describe('an outage', () => {
  it('uses up few attempts of who finds out that it goes on, and none after a start, so that it brings nothing to its end', async () => {
    await begin();
    fails(503, () => true);
    const failed = (): number => harness.simulator.stats.count(undefined, 503);
    const attempts = async (): Promise<unknown> => (await waiting())[0]?.['attempts'];
    const haveFailed = (requests: number): Promise<boolean> =>
      until(async () => {
        await hurry();
        return failed() >= requests;
      });
    await harness.sql('update people set orders = 7 where id = 1');
    await run();
    await haveFailed(14);
    const used = await attempts();
    expect(used).toBeLessThanOrEqual(9);
    for (let starts = 0; starts < 2; starts += 1) {
      await stopDaemon();
      const before = failed();
      await lead();
      await haveFailed(before + 11);
    }
    expect(await attempts()).toBe(used);
    expect(await dead()).toEqual([]);
    harness.simulator.faults.clear();
    await until(async () => {
      await hurry();
      return field('u1', 'orders') === '7';
    });
    await until(async () => (await waiting()).length === 0);
  });
});
