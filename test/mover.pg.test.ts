import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { openPool } from '../src/db/connect.js';
import { LeaseLostError } from '../src/db/lease.js';
import { UnavailableError } from '../src/lib/errors.js';
import { Secret } from '../src/lib/secret.js';
import { createCaptured, WATCH, type Captured } from './support/captured.js';
import { startTunnel } from './support/tunnel.js';
import { until } from './support/until.js';

/** How takes follow each other: awake, asleep and deaf. That nothing is lost is in capturing.pg.test.ts, too. */
const SOON = { timeout: 20_000, interval: 5 };

let captured: Captured;
afterEach(async () => {
  await captured.close();
});

const sql = (text: string, values?: unknown[]): Promise<{ rows: Record<string, unknown>[]; rowCount: number | null }> =>
  captured.database.pool.query<Record<string, unknown>>(text, values);
const order = (...customers: number[]): Promise<unknown> =>
  sql('insert into orders (customer_id, total) select unnest($1::int[]), 1', [customers]);
/** Whether the triggers notify at present. */
const isAsleep = async (): Promise<boolean> =>
  (
    await sql(
      `select where pg_sequence_last_value('personas_capture.asleep_until') > extract(epoch from clock_timestamp())`,
    )
  ).rowCount === 1;
const sleeps = (): Promise<void> => expect.poll(isAsleep, SOON).toBe(true);
const arrives = (...ids: string[]): Promise<void> =>
  expect.poll(async () => (await captured.due()).filter((id) => ids.includes(id)), SOON).toEqual(ids);
/** Ends sessions of the source by what they last did. */
const terminate = async (statement: string): Promise<void> => {
  const ended = await sql(
    `select pg_terminate_backend(pid) from pg_stat_activity
     where datname = current_database() and application_name = 'personas-sync source' and query ilike $1`,
    [statement],
  );
  expect(ended.rowCount).toBe(1);
};
/** How often the channel is notified, as another listener hears it. */
async function countNotifications(): Promise<{ count: () => number; stop: () => void }> {
  const client = await captured.database.pool.connect();
  let count = 0;
  client.on('notification', () => (count += 1));
  await client.query('listen personas_capture');
  return { count: () => count, stop: () => client.release(true) };
}

describe.each([{ separate: false }, { separate: true }])('a mover, state apart: $separate', ({ separate }) => {
  beforeEach(async () => {
    captured = await createCaptured({ separate });
  });

  it('falls asleep after an idle second, is woken by a commit, and falls asleep again', async () => {
    captured.move();
    const other = await countNotifications();
    await sleeps();
    const began = performance.now();
    await order(1);
    await arrives('1');
    // Far less than the look of every second.
    expect(performance.now() - began).toBeLessThan(500);
    await expect.poll(isAsleep, SOON).toBe(false);
    await expect.poll(captured.left, SOON).toBe(0);
    expect(other.count()).toBe(1);
    await sleeps();
    await order(2);
    await arrives('2');
    await expect.poll(other.count, SOON).toBe(2);
    other.stop();
  });

  it('has nobody notified while it is awake', async () => {
    captured.move();
    const other = await countNotifications();
    await sleeps();
    await order(1);
    await expect.poll(isAsleep, SOON).toBe(false);
    for (let customer = 2; customer <= 100; customer += 1) await order(customer);
    await arrives('100');
    expect(await captured.due()).toHaveLength(100);
    // A notification comes with the answer to whatever is asked next.
    await sql('select');
    expect(other.count()).toBe(1);
    other.stop();
  });

  it('looks once more when it has fallen asleep: what came in that moment did not notify', async () => {
    const other = await countNotifications();
    const capture = captured.capture();
    let [idleSince, written] = [performance.now(), 0];
    captured.move({
      capture: {
        ...capture,
        take: async (client, whole) => {
          const taken = await capture.take(client, whole);
          // Nothing has been found for a second, and the next step is to fall asleep.
          if (written === 0 && !(await isAsleep())) {
            await expect.poll(() => performance.now() - idleSince, SOON).toBeGreaterThan(1_000);
            await order(2);
            written = performance.now();
          }
          if (taken.found > 0) idleSince = performance.now();
          return taken;
        },
      },
    });
    await arrives('2');
    expect(performance.now() - written).toBeLessThan(500);
    expect(other.count()).toBe(0);
    other.stop();
  });

  it('finds within a second what was committed without a notification while it slept', async () => {
    captured.move();
    const late = await captured.database.pool.connect();
    await late.query('begin');
    await late.query('insert into orders (customer_id) values (1)');
    await sleeps();
    const other = await countNotifications();
    await late.query('commit');
    late.release();
    const began = performance.now();
    await arrives('1');
    expect(performance.now() - began).toBeLessThan(1_500);
    expect(other.count()).toBe(0);
    other.stop();
  });

  it('moves what was captured while there was no daemon', async () => {
    await order(1);
    await order(2, 3);
    captured.move();
    await arrives('1', '2', '3');
    await expect.poll(captured.left, SOON).toBe(0);
  });

  it('loses nothing of a transaction that holds its number for seconds while others commit', async () => {
    captured.move();
    const slow = await captured.database.pool.connect();
    await slow.query('begin');
    await slow.query('insert into orders (customer_id) values (1)');
    const began = performance.now();
    let customer = 2;
    while (performance.now() - began < 3_000) await order(customer++);
    await slow.query('commit');
    slow.release();
    await arrives('1');
    await expect.poll(captured.due, SOON).toHaveLength(customer - 1);
    await expect.poll(captured.left, SOON).toBe(0);
  });
});

describe('whatever happens', () => {
  beforeEach(async () => {
    captured = await createCaptured();
  });

  it('all that is committed arrives, and nothing that was rolled back, while sessions are ended again and again', async () => {
    captured.move();
    const began = performance.now();
    const goesOn = (): boolean => performance.now() - began < 6_000;
    const committed = new Set<string>();
    const rolledBack = new Set<string>();
    let customer = 0;
    const write = async (): Promise<void> => {
      const client = await captured.database.pool.connect();
      while (goesOn()) {
        const mine: string[] = [];
        await client.query('begin');
        for (let count = Math.ceil(Math.random() * 3); count > 0; count -= 1) {
          mine.push(String((customer += 1)));
          await client.query('insert into orders (customer_id) values ($1)', [customer]);
          // Holds its numbers for a moment, now and then for longer than the position is kept.
          const heldFor = Math.random() < 0.05 ? 2.5 : Math.random() * 0.02;
          if (goesOn()) await client.query('select pg_sleep($1)', [heldFor]);
        }
        const isKept = Math.random() < 0.9;
        await client.query(isKept ? 'commit' : 'rollback');
        for (const id of mine) (isKept ? committed : rolledBack).add(id);
      }
      client.release();
    };
    const disturb = async (): Promise<void> => {
      while (goesOn()) {
        await sql(
          `select pg_terminate_backend(pid) from pg_stat_activity
           where datname = current_database() and application_name like 'personas-sync %' order by random() limit 1`,
        );
        await sql('select pg_sleep(0.3)');
      }
    };
    await Promise.all([...Array.from({ length: 6 }, write), disturb()]);
    await expect.poll(captured.left, SOON).toBe(0);
    expect(rolledBack.size).toBeGreaterThan(0);
    expect(new Set(await captured.due())).toEqual(committed);
  });
});

describe('a mover', () => {
  beforeEach(async () => {
    captured = await createCaptured();
  });

  it('finds what is committed while its LISTEN is cut off, and hears again', async () => {
    captured.move();
    await sleeps();
    await terminate('listen %');
    await order(1);
    await arrives('1');
    await sleeps();
    const began = performance.now();
    await order(2);
    await arrives('2');
    expect(performance.now() - began).toBeLessThan(500);
  });

  it('goes on when the session is ended in which it takes', async () => {
    captured.move();
    await sleeps();
    await terminate('%personas_capture.%');
    await order(1);
    await arrives('1');
    await expect.poll(captured.left, SOON).toBe(0);
    expect(captured.said().filter((line) => line.includes('cannot be taken'))).toHaveLength(1);
  });

  it('goes on when its way to the source has died without a word', async () => {
    const tunnel = await startTunnel(captured.database.url);
    const source = openPool({ url: new Secret(tunnel.url), purpose: 'source', max: 4 });
    const mover = captured.move({ source });
    await sleeps();
    tunnel.freeze();
    await order(1);
    // LISTEN is asked every 5 s and has 2 s, a take has 15 s.
    await expect.poll(captured.due, { timeout: 40_000, interval: 50 }).toEqual(['1']);
    await sleeps();
    const began = performance.now();
    await order(2);
    await arrives('2');
    expect(performance.now() - began).toBeLessThan(500);
    await mover.stop();
    await source.end();
    await tunnel.close();
  });

  it('looks ten times a second where the triggers never notify, and never has them do so', async () => {
    captured.move({ notifies: false });
    await order(1);
    await arrives('1');
    await expect.poll(captured.left, SOON).toBe(0);
    const began = performance.now();
    while (performance.now() - began < 1_500) {
      expect(await isAsleep()).toBe(false);
    }
    const before = performance.now();
    await order(2);
    await arrives('2');
    expect(performance.now() - before).toBeLessThan(500);
  });

  it('takes itself from the listener when it is stopped, so that a daemon that is down costs the source nothing', async () => {
    const mover = captured.move();
    await sleeps();
    await mover.stop();
    expect(await isAsleep()).toBe(false);
    const sessions = async (): Promise<number | null> =>
      (
        await sql(
          `select from pg_stat_activity
           where datname = current_database() and application_name = 'personas-sync source' and query ilike '%personas%'`,
        )
      ).rowCount;
    await expect.poll(sessions, SOON).toBe(0);
  });

  it('leaves alone what the next one has written for itself', async () => {
    const mover = captured.move();
    await sleeps();
    await sql(`select setval('personas_capture.asleep_until', extract(epoch from clock_timestamp())::bigint + 10)`);
    await mover.stop();
    expect(await isAsleep()).toBe(true);
  });

  it('says once whose captured changes these are where they are another installation’s', async () => {
    await sql('update personas_capture.listener set installation = gen_random_uuid()');
    captured.move();
    await expect.poll(() => captured.said().length, SOON).toBeGreaterThan(0);
    await order(1);
    expect(captured.said()).toHaveLength(1);
    expect(captured.said()[0]).toContain('captured for another personas-sync');
    expect(await captured.left()).toBe(1);
    expect(await isAsleep()).toBe(false);
  });

  it('says in one sentence that what captured is gone, and to whoever asks, and goes on when it is there again', async () => {
    const mover = captured.move();
    await sleeps();
    await sql('alter schema personas_capture rename to elsewhere');
    await expect.poll(() => mover.moveAll(), SOON).toBe(false);
    await expect.poll(() => mover.moveAll(), SOON).toBe(false);
    expect(captured.said().map((line) => JSON.parse(line) as unknown)).toEqual([
      {
        time: expect.any(String) as string,
        level: 'warn',
        message: 'Nothing captures changes in the source any more: definitions are polled.',
      },
    ]);
    await sql('alter schema elsewhere rename to personas_capture');
    await order(1);
    expect(await mover.moveAll()).toBe(true);
    await arrives('1');
  });

  it('ends where another leads, and says so to whoever asks', async () => {
    const mover = captured.move();
    await sleeps();
    await captured.state.query('update leader set holder = gen_random_uuid()');
    await order(1);
    await expect(until(async () => mover.moveAll().then(() => false))).rejects.toThrow(LeaseLostError);
    expect(await captured.due()).toEqual([]);
    expect(await captured.left()).toBe(1);
  });
});

describe('moveAll()', () => {
  beforeEach(async () => {
    captured = await createCaptured();
  });

  it('resolves when all is moved that had been committed before, the oldest numbers too', async () => {
    const mover = captured.move({ follows: false });
    const early = await captured.database.pool.connect();
    await early.query('begin');
    await early.query('insert into orders (customer_id) values (0)');
    await sql(
      `insert into personas_capture.capture (watch, keys) select $1, array[n::text] from generate_series(1, 1700) as n`,
      [WATCH],
    );
    await mover.moveAll();
    expect(await captured.due()).toHaveLength(1700);
    await early.query('commit');
    early.release();
    await mover.moveAll();
    expect(await captured.due()).toHaveLength(1701);
  });

  it('is the only thing that has a mover take that does not follow', async () => {
    const mover = captured.move({ follows: false });
    await order(1);
    await Promise.all([mover.moveAll(), mover.moveAll()]);
    expect(await captured.due()).toEqual(['1']);
    await order(2);
    expect(await isAsleep()).toBe(false);
    await mover.stop();
    expect(await captured.due()).toEqual(['1']);
    expect(await captured.left()).toBe(1);
    await expect(mover.moveAll()).rejects.toThrow(UnavailableError);
  });

  it('wakes one that sleeps', async () => {
    const mover = captured.move();
    await sleeps();
    const began = performance.now();
    await mover.moveAll();
    expect(performance.now() - began).toBeLessThan(500);
  });

  it('fails where the source cannot be read, and the next one does not', async () => {
    const mover = captured.move({ follows: false });
    await sql('alter table personas_capture.capture rename column keys to elsewhere');
    await expect(mover.moveAll()).rejects.toMatchObject({ code: '42703' });
    await sql('alter table personas_capture.capture rename column elsewhere to keys');
    await order(1);
    await mover.moveAll();
    expect(await captured.due()).toEqual(['1']);
  });
});
