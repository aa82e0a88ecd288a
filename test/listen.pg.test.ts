import { afterEach, beforeEach, expect, it } from 'vitest';
import { openPool, type Pool } from '../src/db/connect.js';
import { listen, type Listening } from '../src/db/listen.js';
import { openSession } from '../src/db/session.js';
import { createLogger } from '../src/lib/logger.js';
import { Secret } from '../src/lib/secret.js';
import { createDatabase, type TestDatabase } from './support/database.js';
import { startTunnel, type Tunnel } from './support/tunnel.js';

const SOON = { timeout: 15_000, interval: 5 };
const CHANNEL = 'a "channel"';

let database: TestDatabase;
let tunnel: Tunnel;
let pool: Pool;
let listening: Listening;
let heard: number;
let gaps: number;

beforeEach(async () => {
  database = await createDatabase();
  tunnel = await startTunnel(database.url);
  pool = openPool({ url: new Secret(tunnel.url), purpose: 'listen', max: 3 });
  [heard, gaps] = [0, 0];
  listening = listen({
    pool,
    channel: CHANNEL,
    onNotify: () => (heard += 1),
    onGap: () => (gaps += 1),
    log: createLogger({ level: 'error', format: 'json', secrets: [] }),
    heartbeat: { everyMs: 200, answerMs: 200 },
  });
  await expect.poll(listening.isUp, SOON).toBe(true);
});
afterEach(async () => {
  await listening.stop();
  await pool.end();
  await tunnel.close();
  await database.drop();
});

const notify = (): Promise<unknown> => database.pool.query('select pg_notify($1, $2)', [CHANNEL, '']);
/** Ends the backend that listens. */
async function terminate(): Promise<void> {
  const ended = await database.pool.query(
    `select pg_terminate_backend(pid) from pg_stat_activity
     where datname = current_database() and application_name = 'personas-sync listen'`,
  );
  expect(ended.rowCount).toBe(1);
}

it('hears what is notified, and says once for each connection that there may have been something before', async () => {
  expect(gaps).toBe(1);
  await notify();
  await expect.poll(() => heard, SOON).toBe(1);
  expect(gaps).toBe(1);
});

it('listens again when its backend is ended, and says that something may have been missed', async () => {
  await terminate();
  await notify();
  await expect.poll(() => gaps, SOON).toBe(2);
  expect(listening.isUp()).toBe(true);
  const before = heard;
  await notify();
  await expect.poll(() => heard, SOON).toBe(before + 1);
});

it('finds out by itself that a connection is dead on which nothing is ever said', async () => {
  tunnel.freeze();
  await notify();
  await expect.poll(() => gaps, SOON).toBe(2);
  expect(heard).toBe(0);
  await notify();
  await expect.poll(() => heard, SOON).toBe(1);
});

it('finds out that another backend, which listens to nothing, is behind its connection', async () => {
  await listening.stop();
  const shared = openPool({ url: new Secret(database.url), purpose: 'listen', max: 1 });
  const client = await shared.connect();
  client.release();
  listening = listen({
    pool: shared,
    channel: CHANNEL,
    onNotify: () => (heard += 1),
    onGap: () => (gaps += 1),
    log: createLogger({ level: 'error', format: 'json', secrets: [] }),
    heartbeat: { everyMs: 50, answerMs: 1_000 },
  });
  await expect.poll(() => gaps, SOON).toBe(2);
  await client.query('unlisten *');
  await expect.poll(() => gaps, SOON).toBe(3);
  await notify();
  await expect.poll(() => heard, SOON).toBe(1);
  await listening.stop();
  await shared.end();
});

it('gives up its connection when it is stopped', async () => {
  await listening.stop();
  expect(listening.isUp()).toBe(false);
  await expect
    .poll(
      async () =>
        (await database.pool.query(`select from pg_stat_activity where application_name = 'personas-sync listen'`))
          .rowCount,
      SOON,
    )
    .toBe(0);
});

it('keeps a session with what was prepared in it, and knows when it is broken', async () => {
  const session = await openSession(pool, (client) => client.query('create temporary table kept (n int)'));
  const { rows } = await session.client.query(
    `select current_setting('plan_cache_mode') as plans, (select count(*)::int from kept) as kept`,
  );
  expect(rows).toEqual([{ plans: 'force_generic_plan', kept: 0 }]);
  expect(session.isOpen()).toBe(true);
  const cut = session.client.query('select pg_terminate_backend(pg_backend_pid())');
  await expect(cut).rejects.toThrow();
  await expect.poll(session.isOpen, SOON).toBe(false);
  session.close();
  session.close();
  const busy = await openSession(pool);
  const slow = busy.client.query('select pg_sleep(60)');
  busy.close();
  await expect(slow).rejects.toThrow();
  expect(busy.isOpen()).toBe(false);
});

it('leaves no connection behind where a session cannot be prepared', async () => {
  const failing = openSession(pool, (client) => client.query('create temporary table kept (n nonsense)'));
  await expect(failing).rejects.toMatchObject({ code: '42704' });
  expect(pool.totalCount - pool.idleCount).toBe(1);
});
