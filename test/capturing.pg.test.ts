import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { LeaseLostError } from '../src/db/lease.js';
import type { Session } from '../src/db/session.js';
import { openSource } from '../src/realtime/capture.js';
import { createCaptured, WATCH, type Captured } from './support/captured.js';

/** One take at a time, of what triggers captured; how takes follow each other is in mover.pg.test.ts. */
let captured: Captured;
let session: Session;

beforeEach(async () => {
  captured = await createCaptured();
  session = await openSource(captured.source);
});
afterEach(async () => {
  session.close();
  await captured.close();
});

const sql = (text: string, values?: unknown[]): Promise<unknown> => captured.database.pool.query(text, values);
const order = (...customers: number[]): Promise<unknown> =>
  sql('insert into orders (customer_id, total) select unnest($1::int[]), 1', [customers]);
const put = (keys: readonly string[] | null, watch = WATCH): Promise<unknown> =>
  sql('insert into personas_capture.capture (watch, keys) values ($1, $2)', [watch, keys]);

describe('a take', () => {
  it('moves what is captured to those that follow it, and deletes it at the next', async () => {
    const capture = captured.capture();
    await order(3, 1, 3);
    expect(await capture.take(session.client, false)).toEqual({ found: 1, isFull: false });
    expect(await captured.due('vip')).toEqual(['1', '3']);
    expect(await captured.due('slow')).toEqual([]);
    expect(captured.signalled).toEqual([1]);
    expect(await captured.left()).toBe(1);
    await order(2);
    expect(await capture.take(session.client, false)).toMatchObject({ found: 1 });
    expect(await captured.left()).toBe(1);
    expect(await capture.take(session.client, false)).toMatchObject({ found: 0 });
    expect(await captured.left()).toBe(0);
    expect(await captured.due('vip')).toEqual(['1', '2', '3']);
  });

  it('finds what took its number before others and was committed after them', async () => {
    const capture = captured.capture();
    const early = await captured.database.pool.connect();
    await early.query('begin');
    await early.query('insert into orders (customer_id) values (1)');
    await order(2);
    expect(await capture.take(session.client, false)).toMatchObject({ found: 1 });
    await early.query('commit');
    early.release();
    expect(await capture.take(session.client, false)).toMatchObject({ found: 1 });
    expect(await captured.due()).toEqual(['1', '2']);
  });

  it('finds what was committed long after others when it looks at the whole, and goes on from there', async () => {
    const capture = captured.capture();
    const early = await captured.database.pool.connect();
    await early.query('begin');
    await early.query('insert into orders (customer_id) values (1)');
    await order(2);
    // The position is where things stood a second or two ago.
    let found = 0;
    const isPast = async (): Promise<number> => (found += (await capture.take(session.client, false)).found);
    await expect.poll(isPast).toBe(1);
    const began = performance.now();
    await expect.poll(async () => (await isPast(), performance.now() - began > 2_200), { timeout: 10_000 }).toBe(true);
    await early.query('insert into orders (customer_id) values (3)');
    await early.query('commit');
    early.release();
    expect(await capture.take(session.client, false)).toMatchObject({ found: 1 });
    expect(await captured.due()).toEqual(['2', '3']);
    expect(await capture.take(session.client, true)).toMatchObject({ found: 1 });
    expect(await captured.due()).toEqual(['1', '2', '3']);
  });

  it('goes on when the table was made anew and its numbers begin with 1 again', async () => {
    const capture = captured.capture();
    await sql('alter sequence personas_capture.capture_id_seq restart 1000');
    await order(1);
    await capture.take(session.client, true);
    await capture.take(session.client, true);
    await sql('truncate personas_capture.capture restart identity');
    await order(2);
    await capture.take(session.client, true);
    await order(3);
    expect(await capture.take(session.client, false)).toMatchObject({ found: 1 });
    expect(await captured.due()).toEqual(['1', '2', '3']);
  });

  it('moves again what was moved when it cannot know whether it was deleted, and deletes nothing else', async () => {
    const capture = captured.capture();
    await order(1);
    await capture.take(session.client, false);
    capture.forget();
    expect(await capture.take(session.client, true)).toMatchObject({ found: 1 });
    await capture.sweep(session.client);
    expect(await captured.left()).toBe(0);
    expect(await captured.due()).toEqual(['1']);
  });

  it('takes 500 rows, or half a megabyte of keys, and says that there may be more', async () => {
    const capture = captured.capture();
    await sql(
      `insert into personas_capture.capture (watch, keys) select $1, array[n::text] from generate_series(1, 501) as n`,
      [WATCH],
    );
    expect(await capture.take(session.client, false)).toEqual({ found: 500, isFull: true });
    expect(await capture.take(session.client, false)).toEqual({ found: 1, isFull: false });
    await capture.sweep(session.client);
    await sql(
      `insert into personas_capture.capture (watch, keys)
       select $1, (select array_agg(gen_random_uuid()::text) from generate_series(1, 10000) where b = b) from generate_series(1, 9) as b`,
      [WATCH],
    );
    const taken = await capture.take(session.client, false);
    expect(taken.isFull).toBe(true);
    expect(taken.found).toBeLessThan(9);
  });

  it('takes nothing that was captured for another installation', async () => {
    const capture = captured.capture({ installation: '00000000-0000-0000-0000-000000000000' });
    await order(1);
    expect(await capture.take(session.client, true)).toEqual({ found: 0, isFull: false });
    expect(await captured.left()).toBe(1);
  });

  it('deletes what no definition depends on any more', async () => {
    const capture = captured.capture();
    captured.ways.clear();
    await order(1);
    expect(await capture.take(session.client, false)).toMatchObject({ found: 1 });
    await capture.sweep(session.client);
    expect(await captured.left()).toBe(0);
    expect(captured.signalled).toEqual([]);
  });

  it('moves nothing for one that leads no more, whatever its mapping says', async () => {
    const capture = captured.capture();
    await order(1);
    await captured.state.query('update leader set holder = gen_random_uuid()');
    await expect(capture.take(session.client, true)).rejects.toThrow(LeaseLostError);
    await capture.sweep(session.client);
    expect(await captured.due()).toEqual([]);
    expect(await captured.left()).toBe(1);
  });

  it('asks for the mapping after it has read: what is followed by then is not lost', async () => {
    await order(1);
    let asked = 0;
    const capture = captured.capture({
      mapping: () => {
        asked += 1;
        return new Map([[WATCH, [{ keys: ['big'], resolve: null }]]]);
      },
    });
    await capture.take(session.client, true);
    expect(asked).toBe(1);
    expect(await captured.due('big')).toEqual(['1']);
    expect(await captured.due('vip')).toEqual([]);
  });
});

describe('everybody', () => {
  it('is asked for where the keys were too many, without making the single changes of others wait', async () => {
    const capture = captured.capture();
    await order(1);
    await put(null);
    await order(2);
    expect(await capture.take(session.client, false)).toEqual({ found: 3, isFull: false });
    expect(await captured.wantsFull()).toEqual(['vip']);
    expect(await captured.due()).toEqual(['1', '2']);
    const { rows } = await captured.state.query<{ due: boolean }>(
      `select due_at <= clock_timestamp() as due from definition where key = 'vip'`,
    );
    expect(rows).toEqual([{ due: true }]);
  });

  it('is asked for where one take leads to more than 50,000 profiles', async () => {
    const capture = captured.capture();
    for (const from of [1, 30_001]) {
      await sql(
        `insert into personas_capture.capture (watch, keys)
         select $1, array_agg(n::text) from generate_series($2::int, $2::int + 29999) as n`,
        [WATCH, from],
      );
    }
    await capture.take(session.client, false);
    expect(await captured.wantsFull()).toEqual(['vip']);
    expect(await captured.due()).toEqual([]);
  });

  it('is compared instead of those who wait where that is cheaper, which then wait no more', async () => {
    await captured.state.query(
      `insert into run (definition_id, trigger, leader, started_at, finished_at, outcome)
       select id, 'schedule', gen_random_uuid(), now() - interval '400 milliseconds', now(), 'succeeded' from definition where key = 'vip'`,
    );
    const capture = captured.capture();
    await sql('insert into orders (customer_id) select generate_series(1, 2000)');
    await capture.take(session.client, false);
    expect(await captured.wantsFull()).toEqual([]);
    expect(await captured.due()).toHaveLength(2000);
    await captured.state.query(`update due set parked_at = now(), reason = 'divides by zero' where profile_id = '7'`);
    await sql('insert into orders (customer_id) select generate_series(2001, 4000)');
    await capture.take(session.client, false);
    expect(await captured.wantsFull()).toEqual(['vip']);
    expect(await captured.due()).toEqual(['7']);
  });

  it('does not wait for a batch that is deleting what it has evaluated', async () => {
    const capture = captured.capture();
    await order(1);
    await capture.take(session.client, false);
    const batch = await captured.state.connect();
    await batch.query('begin');
    await batch.query(`delete from due where profile_id = '1'`);
    await captured.state.query(
      `insert into due (definition_id, profile_id) select id, n::text from definition, generate_series(1, 100001) as n where key = 'vip'`,
    );
    await sql('insert into orders (customer_id) select generate_series(1, 1000)');
    await capture.take(session.client, false);
    expect(await captured.wantsFull()).toEqual(['vip']);
    expect(await captured.due()).toEqual(['1']);
    // The batch goes on to what the other had locked.
    await batch.query(`update definition set members = members + 1 where key = 'vip'`);
    await batch.query('commit');
    batch.release();
    expect(await captured.due()).toEqual([]);
  });
});

describe('a way by SQL', () => {
  const LINES = 'public.lines(order_id)';
  const FIND = `with changed as (select k::bigint as order_id from unnest($1::text[]) as k)
    select distinct o.customer_id::text from orders as o join changed as c on c.order_id = o.id -- whose`;

  beforeEach(async () => {
    captured.ways.set(LINES, [{ keys: ['big'], resolve: { sql: FIND } }]);
    await sql('alter table orders disable trigger all');
    await order(11, 12, 11);
    await sql('alter table orders enable trigger all');
  });

  it('finds the profiles when it is moved', async () => {
    const capture = captured.capture();
    await put(['1', '3']);
    await put(['1', '3'], LINES);
    await put(['2'], LINES);
    await put(['99'], LINES);
    await capture.take(session.client, false);
    expect(await captured.due('big')).toEqual(['11', '12']);
    expect(await captured.due('vip')).toEqual(['1', '3']);
  });

  it('that fails concerns nobody else: its definitions want everybody, and the reason is told', async () => {
    captured.ways.set(LINES, [
      { keys: ['big'], resolve: { sql: 'select (1 / 0)::text from unnest($1::text[]) as k' } },
      { keys: ['vip'], resolve: { sql: FIND } },
    ]);
    const capture = captured.capture();
    await put(['1'], LINES);
    await order(5);
    await capture.take(session.client, false);
    expect(await captured.wantsFull()).toEqual(['big']);
    expect(await captured.due('vip')).toEqual(['11', '5']);
    expect(captured.unresolved).toEqual([
      {
        keys: ['big'],
        sentence: 'The SQL in `changes` that finds whose rows have changed divides by zero [SQLSTATE 22012].',
      },
    ]);
    await capture.sweep(session.client);
    expect(await captured.left()).toBe(0);
  });

  it('that writes is refused', async () => {
    await sql(`create function sneak() returns text language sql as $$ delete from orders returning 'x' $$`);
    captured.ways.set(LINES, [{ keys: ['big'], resolve: { sql: 'select sneak() from unnest($1::text[]) as k' } }]);
    const capture = captured.capture();
    await put(['1'], LINES);
    await capture.take(session.client, false);
    expect(captured.unresolved).toMatchObject([{ keys: ['big'] }]);
    expect((await captured.database.pool.query('select from orders')).rowCount).toBe(3);
  });

  it('goes on where a table that it reads was altered since it was prepared', async () => {
    captured.ways.set(LINES, [
      { keys: ['big'], resolve: { sql: `select id::text, * from orders where id = any($1::bigint[])` } },
    ]);
    const capture = captured.capture();
    await put(['1'], LINES);
    await capture.take(session.client, false);
    await sql('alter table orders add column note text');
    await put(['2'], LINES);
    await capture.take(session.client, false);
    expect(captured.unresolved).toEqual([]);
    expect(await captured.due('big')).toEqual(['1', '2']);
  });
});
