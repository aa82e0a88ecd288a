import { afterEach, expect, it } from 'vitest';
import type { Endpoint } from '../src/demo/simulator/endpoints.js';
import { createHarness, type Harness } from './support/harness.js';
import { expectTruth } from './support/truth.js';

/** A key that others use, too: `quota: 50%` of the destination. Iterable's quotas are those of its documentation. */
const TABLES = `
  create table people (id bigint primary key, user_id text, email text, vip boolean not null, spent int not null);`;
const FREELY = { guard: 'off', schedule: 'manual' };
const DEFINITIONS = {
  audiences: [{ name: 'VIP', sql: 'SELECT id AS profile_id FROM people WHERE vip', send: 'both', ...FREELY }],
  traits: [{ name: 'Spent', sql: 'SELECT id AS profile_id, spent AS value FROM people', ...FREELY }],
};
/** What is sent a second apart may come together by as much, where a machine is busy. */
const ALMOST = 0.9;

let harness: Harness;
afterEach(() => harness.close());

async function sendTo(people: number): Promise<void> {
  harness = await createHarness({
    tables: `${TABLES} insert into people select n, 'u' || n, null, true, n from generate_series(1, ${people}) as n`,
    ...DEFINITIONS,
    simulator: { keepRequests: 100_000 },
  });
  const destinations = {
    iterable: { type: 'iterable', api_key: 'test-key', region: harness.simulator.url, quota: '50%' },
  };
  await harness.reconfigure({ ...DEFINITIONS, destinations });
  const { delivery } = await harness.sync();
  expect(delivery).toMatchObject({ waiting: 0, refused: 0 });
}

/** The most requests that came within almost so many seconds, and how many came a second from the first to the last. */
function rateOf(endpoint: Endpoint, seconds: number): { most: number; mean: number } {
  const { stats } = harness.simulator;
  const times = stats.arrivals(endpoint);
  const lasted = ((times.at(-1) ?? NaN) - (times[0] ?? NaN)) / 1000;
  return { most: stats.mostWithin(endpoint, ALMOST * 1000 * seconds), mean: (times.length - 1) / lasted };
}

it('half of the quota is what calls are sent at singly', async () => {
  await sendTo(1_500);
  const update = rateOf('users/update', 1);
  expect(update.most).toBeLessThanOrEqual(250);
  expect(update.mean).toBeLessThanOrEqual(250);
  expect(update.mean).toBeGreaterThan(100);
  expect(rateOf('events/track', 1).most).toBeLessThanOrEqual(1_000);
  expect(harness.simulator.stats.count('users/bulkUpdate')).toBe(0);
  await expectTruth(harness);
});

it('half of the quota is what calls are sent at in bulk, where it is no whole number, too', async () => {
  await sendTo(25_000);
  // Where so few are sent, a stall of this process, in which Iterable is simulated, too, can hide the second.
  const update = rateOf('users/bulkUpdate', 4);
  expect(update.most).toBeLessThanOrEqual(10);
  expect(update.mean).toBeLessThanOrEqual(2.5);
  expect(update.mean).toBeGreaterThan(1.5);
  expect(rateOf('events/trackBulk', 1).most).toBeLessThanOrEqual(5);
  await expectTruth(harness);
});
