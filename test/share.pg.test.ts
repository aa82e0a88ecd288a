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
/** What is sent evenly may come closer together by so much, where this process, in which Iterable is simulated, too, is busy. */
const COMES_TOGETHER_S = 0.5;
/** The same as a share of how long all of it takes. */
const SHORTER = 1.1;

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

/** No more came within so many seconds than so many a second; how many came a second from the first to the last. */
function expectAtMost(endpoint: Endpoint, perSecond: number, windows: readonly number[]): number {
  const { stats } = harness.simulator;
  for (const seconds of windows) {
    expect(stats.mostWithin(endpoint, 1000 * (seconds - COMES_TOGETHER_S))).toBeLessThanOrEqual(seconds * perSecond);
  }
  const times = stats.arrivals(endpoint);
  const mean = (1000 * (times.length - 1)) / ((times.at(-1) ?? NaN) - (times[0] ?? NaN));
  expect(mean).toBeLessThanOrEqual(SHORTER * perSecond);
  return mean;
}

it('half of the quota is what calls are sent at singly', async () => {
  await sendTo(1_500);
  expect(expectAtMost('users/update', 250, [1, 4])).toBeGreaterThan(100);
  expectAtMost('events/track', 1_000, [1, 4]);
  expect(harness.simulator.stats.count('users/bulkUpdate')).toBe(0);
  await expectTruth(harness);
});

it('half of the quota is what calls are sent at in bulk, where it is no whole number, too', async () => {
  await sendTo(25_000);
  expect(expectAtMost('users/bulkUpdate', 2.5, [4])).toBeGreaterThan(1.5);
  expectAtMost('events/trackBulk', 5, [4]);
  await expectTruth(harness);
});
