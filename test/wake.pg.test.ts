import { afterEach, beforeEach, expect, it } from 'vitest';
import { openPool, type Pool } from '../src/db/connect.js';
import { hearWakes, wakeLeader, type Wakes } from '../src/db/wake.js';
import { createLogger } from '../src/lib/logger.js';
import { Secret } from '../src/lib/secret.js';
import { createDatabase, type TestDatabase } from './support/database.js';

const SOON = { timeout: 15_000, interval: 5 };
/** No time that is waited while commands are heard. */
const DEAF_MS = 123_456;

let database: TestDatabase;
let pool: Pool;
let wakes: Wakes;
let woken: number;
const isHeard = (): boolean => wakes.lookMs(DEAF_MS) < DEAF_MS;

beforeEach(async () => {
  database = await createDatabase();
  pool = openPool({ url: new Secret(database.url), purpose: 'wakes', max: 2 });
  woken = 0;
  wakes = hearWakes(pool, createLogger({ level: 'error', format: 'json', secrets: [] }), () => (woken += 1));
  await expect.poll(isHeard, SOON).toBe(true);
});
afterEach(async () => {
  await wakes.stop();
  await pool.end();
  await database.drop();
});

it('wakes whoever leads when a command says that there is something', async () => {
  const before = woken;
  await wakeLeader(database.pool);
  await expect.poll(() => woken, SOON).toBe(before + 1);
});

it('has one look at least each second while commands are heard', () => {
  expect(wakes.lookMs(DEAF_MS)).toBeLessThanOrEqual(1_005);
});

it('has one look as often as without while nothing is heard, and at once when that is over', async () => {
  const before = woken;
  const ended = await database.pool.query(
    `select pg_terminate_backend(pid) from pg_stat_activity
     where datname = current_database() and application_name = 'personas-sync wakes'`,
  );
  expect(ended.rowCount).toBe(1);
  await expect.poll(isHeard, SOON).toBe(false);
  expect(wakes.lookMs(DEAF_MS)).toBe(DEAF_MS);
  await expect.poll(() => woken, SOON).toBeGreaterThan(before);
  expect(isHeard()).toBe(true);
});
