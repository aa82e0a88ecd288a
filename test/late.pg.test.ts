import { afterEach, expect, it } from 'vitest';
import { act } from '../src/cli/act.js';
import { startDaemon } from './support/daemon.js';
import { startGate, type Gate } from './support/gate.js';
import { createHarness, type Harness } from './support/harness.js';
import { expectTruth } from './support/truth.js';

/** Requests of which nobody knows whether they are applied yet, with the minute for which that is waited as it is. */
const PEOPLE = 60;
const TABLES = `
  create table people (id bigint primary key, user_id text, email text, vip boolean not null, spent int not null);
  insert into people select n, 'u' || n, 'p' || n || '@example.com', n % 2 = 0, n from generate_series(1, ${PEOPLE}) as n`;
const FREELY = { guard: 'off', schedule: 'manual' };
const DEFINITIONS = {
  audiences: [{ name: 'VIP', sql: 'SELECT id AS profile_id FROM people WHERE vip', send: 'both', ...FREELY }],
  traits: [{ name: 'Spent', sql: 'SELECT id AS profile_id, spent AS value FROM people', ...FREELY }],
};
/** A request that is sent singly is waited for so long, and may be applied within so long after that. */
const ANSWERED_WITHIN_MS = 10_000;
const APPLIED_WITHIN_MS = 60_000;
/** Until long after the sender has given up. */
const HELD_MS = 30_000;
/** What a timer may be early, and the one that counts started late. */
const PRECISION_MS = 100;

let harness: Harness;
let gate: Gate;
let stopDaemon: () => Promise<void> = () => Promise.resolve();
afterEach(async () => {
  await stopDaemon();
  await gate.close();
  await harness.close();
});

async function begin(): Promise<void> {
  harness = await createHarness({ tables: TABLES, ...DEFINITIONS, simulator: { keepRequests: 100_000 } });
  gate = await startGate(harness.simulator.url);
  const destinations = { iterable: { type: 'iterable', api_key: 'test-key', region: gate.url } };
  await harness.reconfigure({ ...DEFINITIONS, destinations });
  stopDaemon = (await startDaemon(harness.opened)).stop;
}

const personOf = (body: string): number => Number((JSON.parse(body) as { userId: string }).userId.slice(1));
const count = async (query: string): Promise<unknown> => (await harness.state(query))[0]?.['n'];

/** Changes everybody and runs the definitions, without waiting for what is sent. */
async function changeAll(): Promise<void> {
  await harness.sql('update people set vip = not vip, spent = spent + 1000');
  const args = { keys: [], confirmRemovals: true };
  const { outcome, progress } = await act(harness.opened, { kind: 'sync', args, signal: new AbortController().signal });
  expect(outcome).toBe('done');
  for (const each of progress.runs) expect(each).toMatchObject({ outcome: 'succeeded' });
}

it('a request without an answer has its person wait for a minute, and what was applied late or unseen is put right', async () => {
  await begin();
  await harness.sync();
  const { simulator } = harness;
  const endpoints = [
    { path: '/api/users/update', endpoint: 'users/update' },
    { path: '/api/events/track', endpoint: 'events/track' },
  ] as const;
  /** The first update or the first event of ten people each comes late; that of ten more is applied and then cut off. */
  const touched = new Set<number>();
  const isFirstOfTen = (body: string, from: number): boolean => {
    const person = personOf(body);
    if (person <= from || person > from + 10 || touched.has(person)) return false;
    touched.add(person);
    return true;
  };
  gate.hold(({ path, body }) => {
    const index = endpoints.findIndex((each) => each.path === path);
    return isFirstOfTen(body, 10 * index) ? HELD_MS : undefined;
  });
  endpoints.forEach(({ endpoint }, index) => {
    const match = ({ body }: { body: string }): boolean => isFirstOfTen(body, 20 + 10 * index);
    simulator.faults.failNext(10, { endpoint, reset: true, afterApplying: true, match });
  });

  await changeAll();
  const waitingForMinute = async (): Promise<unknown> =>
    count(`select count(distinct recipient)::int4 as n from outbox where not_before > now()`);
  await expect.poll(waitingForMinute, { timeout: APPLIED_WITHIN_MS, interval: 100 }).toBe(40);
  await changeAll();
  expect(gate.passages().filter(({ end }) => end === undefined)).toHaveLength(20);
  expect(gate.passages().filter(({ end }) => end?.isCut === true)).toHaveLength(20);

  // Nobody moves the time: the waits end by themselves, and with them all is sent.
  const waiting = (): Promise<unknown> => count('select count(*)::int4 as n from outbox');
  await expect.poll(waiting, { timeout: 2 * APPLIED_WITHIN_MS, interval: 250 }).toBe(0);

  const unanswered = gate
    .passages()
    .filter(({ at, end }) => end?.isCut === true || (end?.at ?? Infinity) - at > ANSWERED_WITHIN_MS);
  expect(unanswered).toHaveLength(40);
  for (const { at, body, end } of unanswered) {
    const next = gate.passages().find((each) => each.at > at && personOf(each.body) === personOf(body));
    const applied = end?.at ?? Infinity;
    const isLate = end?.isCut === false;
    const gaveUp = isLate ? at + ANSWERED_WITHIN_MS : applied;
    expect(next?.at).toBeGreaterThan(Math.max(applied, gaveUp + APPLIED_WITHIN_MS - PRECISION_MS));
  }
  const repeated = simulator.events().filter(({ applications }) => applications > 1);
  expect(repeated.map(({ applications }) => applications)).toEqual(Array(20).fill(2));
  expect(simulator.violations).toEqual({ duplicateInBatch: 0, mixedPipelines: 0 });
  await expectTruth(harness);
}, 180_000);
