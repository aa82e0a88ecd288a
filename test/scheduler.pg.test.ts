import { afterEach, describe, expect, it } from 'vitest';
import { runDaemon } from '../src/daemon.js';
import { hourlyExpression, nextDueMs } from '../src/sync/scheduler.js';
import { createHarness, type Harness, type HarnessOptions } from './support/harness.js';
import { until } from './support/until.js';

const TABLES = `
  create table people (id bigint primary key, user_id text, email text, vip boolean not null default false);
  insert into people select n, 'u' || n, null, n % 2 = 0 from generate_series(1, 20) as n`;
const VIP = { name: 'VIP', sql: 'SELECT id AS profile_id FROM people WHERE vip', poll: '1 hour' };
const BROKEN = { name: 'Broken', sql: 'SELECT id AS profile_id FROM people WHERE 1 / (id - id) > 0', poll: '1 hour' };

let harness: Harness;
const stops: (() => Promise<void>)[] = [];

const setUp = async (options: Partial<HarnessOptions> = {}): Promise<void> => {
  harness = await createHarness({ tables: TABLES, audiences: [VIP], ...options });
};

/** A daemon in this process; the returned function stops it. */
function startDaemon(): () => Promise<void> {
  const controller = new AbortController();
  const ended = runDaemon(harness.opened, controller.signal, () => undefined);
  let stopped = false;
  const stop = async (): Promise<void> => {
    if (stopped) return;
    stopped = true;
    controller.abort();
    await ended;
  };
  stops.push(stop);
  return stop;
}

const runs = (key = 'vip') =>
  harness.state(
    `select r.id, r.trigger, r.outcome, r.scheduled_for from run as r join definition as d on d.id = r.definition_id where d.key = $1 order by r.id`,
    [key],
  );
const outcomes = async (key?: string): Promise<unknown[]> => (await runs(key)).map(({ outcome }) => outcome);

describe('the schedule', () => {
  afterEach(async () => {
    for (const stop of stops.splice(0)) await stop();
    await harness.close();
  });

  it('runs a new definition at once, and again only when it is due', async () => {
    await setUp();
    const stop = startDaemon();
    await until(async () => (await outcomes()).includes('succeeded'));
    await harness.state(`update definition set due_at = now()`);
    await until(async () => (await outcomes()).length === 2 && (await outcomes())[1] === 'succeeded');
    await stop();
    const [row] = await harness.state(`select due_at > now() + interval '50 minutes' as later from definition`);
    expect(row).toEqual({ later: true });
  });

  it('makes up once for moments that were missed while nothing ran', async () => {
    await setUp();
    await harness.sync();
    await harness.state(`update definition set due_at = now() - interval '5 hours'`);
    const stop = startDaemon();
    await until(async () => (await outcomes()).length === 2);
    await stop();
    expect((await runs()).map(({ trigger, outcome }) => [trigger, outcome])).toEqual([
      ['sync', 'succeeded'],
      ['schedule', 'succeeded'],
    ]);
  });

  it('runs a moment again whose run died with its leader, and gives it up after three', async () => {
    await setUp();
    await harness.sync();
    const die = async (times: number): Promise<void> => {
      await harness.state(`update definition set due_at = date_trunc('second', now())`);
      await harness.state(
        `insert into run (definition_id, trigger, scheduled_for, leader, outcome, finished_at)
         select id, 'schedule', due_at, gen_random_uuid(), 'abandoned', now() from definition, generate_series(1, $1)`,
        [times - 1],
      );
      await harness.state(
        `insert into run (definition_id, trigger, scheduled_for, leader) select id, 'schedule', due_at, gen_random_uuid() from definition`,
      );
    };
    await die(1);
    const stop = startDaemon();
    await until(async () => (await outcomes()).at(-1) === 'succeeded');
    await stop();
    expect(await outcomes()).toEqual(['succeeded', 'abandoned', 'succeeded']);

    await die(3);
    const second = startDaemon();
    await until(async () => (await outcomes()).filter((outcome) => outcome === 'abandoned').length === 4);
    await second();
    const [row] = await harness.state(`select due_at > now() + interval '50 minutes' as later from definition`);
    expect(row).toEqual({ later: true });
  });

  it('has a moment due that comes while another run is under way', async () => {
    await setUp({ audiences: [{ ...VIP, poll: '1 hour' }] });
    await harness.sync();
    await harness.state(`update definition set due_at = now() + interval '5 minutes'`);
    await harness.sync();
    const due = (): Promise<Record<string, unknown>[]> =>
      harness.state(
        `select due_at - now() between interval '4 minutes' and interval '5 minutes' as kept from definition`,
      );
    expect(await due()).toEqual([{ kept: true }]);
    // One that is due already is answered.
    await harness.state(`update definition set due_at = now() - interval '1 minute'`);
    await harness.sync();
    expect(await harness.state(`select due_at > now() + interval '50 minutes' as later from definition`)).toEqual([
      { later: true },
    ]);
  });

  it('stops though several wait for a place', async () => {
    const slow = (key: string) => ({
      key,
      sql: 'SELECT id AS profile_id FROM people, (SELECT pg_sleep(60)) AS nap',
      poll: '1 hour',
    });
    const keys = ['a', 'b', 'c', 'd', 'e'];
    await setUp({ audiences: keys.map(slow), runs: { parallel: 1 } });
    const stop = startDaemon();
    const asked = keys.map((key) => harness.sync(key).catch(() => null));
    await until(async () => (await harness.state(`select from request where taken_by is not null`)).length === 5);
    const began = performance.now();
    await stop();
    expect(performance.now() - began).toBeLessThan(9_000);
    await harness.state(
      `update request set outcome = 'failed', finished_at = now(), answer = 'ended by the test' where outcome is null`,
    );
    await Promise.all(asked);
  });

  it('never holds one definition up for another that is broken, and tries that one again at its next moment', async () => {
    await setUp({ audiences: [BROKEN, VIP] });
    const stop = startDaemon();
    await until(async () => (await outcomes()).includes('succeeded') && (await outcomes('broken')).includes('failed'));
    await harness.sql('create table unrelated ()');
    await harness.state(`update definition set due_at = now() where key = 'broken'`);
    await until(async () => (await outcomes('broken')).length === 2 && harness.simulator.userCount === 10);
    await stop();
    expect(await outcomes('broken')).toEqual(['failed', 'failed']);
    expect(harness.simulator.userCount).toBe(10);
  });

  it('never runs one definition twice at a time, nor more at once than it may', async () => {
    const slow = (name: string) => ({
      name,
      sql: `SELECT id AS profile_id FROM people, (SELECT pg_sleep(0.3)) AS nap`,
      poll: '1 hour',
    });
    await setUp({ audiences: ['a', 'b', 'c', 'd'].map(slow), runs: { parallel: 2 } });
    const stop = startDaemon();
    await Promise.all([harness.sync('a'), harness.sync('a'), harness.sync('b')]);
    await until(async () => (await outcomes('d')).includes('succeeded'));
    await stop();
    const [row] = await harness.state(
      `select max(open) as most from (select (select count(*) from run as o where o.started_at <= r.started_at and o.finished_at > r.started_at) as open from run as r) as o`,
    );
    expect(row).toEqual({ most: 2 });
    const twice = await harness.state(
      `select 1 from run as a join run as b on a.id < b.id and a.definition_id = b.definition_id and b.started_at < a.finished_at`,
    );
    expect(twice).toEqual([]);
  });

  it('ends a run that is under way when it is stopped, and has it due again', async () => {
    await setUp({
      audiences: [
        { name: 'Slow', sql: 'SELECT id AS profile_id FROM people, (SELECT pg_sleep(60)) AS nap', poll: '1 hour' },
      ],
    });
    const stop = startDaemon();
    await until(
      async () =>
        (
          await harness.sql(
            `select from pg_stat_activity where wait_event = 'PgSleep' and datname = current_database()`,
          )
        ).length > 0,
    );
    const began = performance.now();
    await stop();
    expect(performance.now() - began).toBeLessThan(9_000);
    expect(await outcomes('slow')).toEqual(['cancelled']);
    expect(await harness.state(`select due_at <= now() as due from definition`)).toEqual([{ due: true }]);
    expect(
      await harness.sql(`select from pg_stat_activity where wait_event = 'PgSleep' and datname = current_database()`),
    ).toEqual([]);
  });

  it('does not run what is disabled, paused or manual by itself', async () => {
    await setUp({
      audiences: [
        { ...VIP, enabled: false },
        { name: 'By hand', sql: 'SELECT id AS profile_id FROM people', schedule: 'manual' },
        { name: 'Each day', sql: 'SELECT id AS profile_id FROM people', schedule: '0 6 * * *' },
      ],
    });
    await harness.sync('each_day');
    await harness.state(`update definition set due_at = now(), state = 'paused' where key = 'each_day'`);
    await harness.state(`update definition set due_at = null where key = 'by_hand'`);
    const stop = startDaemon();
    await harness.request('sync', { keys: ['by_hand'], confirmRemovals: false });
    await stop();
    expect([await outcomes('vip'), await outcomes('each_day'), await outcomes('by_hand')]).toEqual([
      [],
      ['succeeded'],
      ['succeeded'],
    ]);
    const [row] = await harness.state(`select due_at from definition where key = 'by_hand'`);
    expect(row).toEqual({ due_at: null });
  });

  it('lets one of two daemons lead and the other stand by', async () => {
    await setUp();
    const both = [startDaemon(), startDaemon()];
    await until(async () => (await outcomes()).includes('succeeded'));
    for (const stop of both) await stop();
    expect(new Set((await harness.state('select leader from run')).map(({ leader }) => leader)).size).toBe(1);
    expect(await outcomes()).toEqual(['succeeded']);
  });
});

describe('the next moment', () => {
  it('of hourly definitions is spread over the hour by their keys, and always the same for one', () => {
    const places = Array.from({ length: 500 }, (_, index) => hourlyExpression(`audience_${index}`));
    expect(new Set(places.map((place) => place.split(' ')[1])).size).toBeGreaterThan(50);
    expect(hourlyExpression('vip')).toBe(hourlyExpression('vip'));
    const ms = nextDueMs({ kind: 'hourly' }, 'vip', 0);
    expect(ms).toBeGreaterThan(0);
    expect(ms).toBeLessThanOrEqual(3_600_000);
  });

  it('of polled ones leaves ten times as long a rest as the run took', () => {
    expect(nextDueMs({ kind: 'poll', everyMs: 60_000 }, 'vip', 100)).toBe(60_000);
    expect(nextDueMs({ kind: 'poll', everyMs: 60_000 }, 'vip', 9_000)).toBe(90_000);
    expect(nextDueMs({ kind: 'manual' }, 'vip', 100)).toBeNull();
    const fallback = { kind: 'poll', everyMs: 5_000 } as const;
    expect(nextDueMs({ kind: 'realtime', fallback, asked: true }, 'vip', 100)).toBe(5_000);
  });
});
