import { afterEach, expect, it } from 'vitest';
import { createHarness, type Harness } from './support/harness.js';
import { endBackoffs, endWaits } from './support/waits.js';

/** Iterable on a bad day, while the shop goes on: nothing is lost, and sending again does no harm. */
const PEOPLE = 150;
const TABLES = `
  create table people (id bigint primary key, user_id text, email text, vip boolean not null, spent numeric, city text);
  insert into people select n, 'u' || n, 'p' || n || '@example.com', n % 3 = 0, n, 'Bonn' from generate_series(1, ${PEOPLE}) as n`;
const VIP = { name: 'VIP', sql: 'SELECT id AS profile_id FROM people WHERE vip', send: 'both', guard: 'off' };
const BIG = { name: 'Big', sql: 'SELECT id AS profile_id FROM people WHERE spent > 75', send: 'both', guard: 'off' };
const STATS = {
  name: 'Stats',
  sql: 'SELECT id AS profile_id, spent, city FROM people WHERE spent IS NOT NULL',
  send: 'both',
  guard: 'off',
};

let harness: Harness;
afterEach(() => harness.close());

/** Runs and delivers until nothing waits: back-offs pass at once, and what may be applied late is sent by another leader. */
async function syncToTheEnd(): Promise<void> {
  for (let syncs = 0; syncs < 20; syncs += 1) {
    const over = new AbortController();
    const moving = (async () => {
      while (!over.signal.aborted) await endBackoffs(harness.state);
    })();
    const { delivery, progress } = await harness.sync();
    over.abort();
    await moving;
    for (const run of progress.runs) expect(run).toMatchObject({ outcome: 'succeeded' });
    expect(delivery).toMatchObject({ waiting: 0, refused: 0, stopped: 0, stalled: false });
    if ((await harness.state('select from outbox')).length === 0) return;
    await endWaits(harness.state);
  }
  throw new Error('Something waits for ever.');
}

/** Who should have what, by the shop's own tables: JSON text as Iterable keeps it, nothing where there is nothing. */
async function truth(): Promise<Record<string, Record<string, string>>> {
  const rows = await harness.sql(
    `select user_id, vip::text, (coalesce(spent, 0) > 75)::text as big, spent::text, to_jsonb(city)::text as city from people`,
  );
  return Object.fromEntries(
    rows.map(({ user_id, vip, big, spent, city }) => [
      user_id,
      { vip, big, ...(spent === null ? {} : { spent: `${spent as number}.0`, ...(city === null ? {} : { city }) }) },
    ]),
  ) as Record<string, Record<string, string>>;
}

it('loses nothing to failures, cut connections and late answers, and repeats nothing with another content', async () => {
  harness = await createHarness({
    tables: TABLES,
    audiences: [VIP, BIG],
    traits: [STATS],
    simulator: { keepRequests: 100_000 },
  });
  const { faults, stats } = harness.simulator;
  faults.failRandomly({ share: 0.05, seed: 2, reset: true, afterApplying: true });
  faults.failRandomly({ share: 0.15, seed: 3, status: 503, body: '<html>', afterApplying: true });
  faults.failRandomly({ share: 0.15, seed: 1, status: 500 });
  faults.failRandomly({ share: 0.5, seed: 4, delayMs: 40 });

  await syncToTheEnd();
  const changes = [
    'update people set vip = not vip where id % 2 = 0; update people set spent = spent + 20 where id % 5 = 0',
    `update people set vip = not vip where id % 3 = 0; update people set city = 'Kiel' where id % 4 = 0; update people set spent = null where id % 7 = 0`,
    'update people set vip = not vip where id % 2 = 1; update people set city = null, spent = 100 - id where id % 3 = 1',
  ];
  for (const change of changes) {
    await harness.sql(change);
    await syncToTheEnd();
  }

  const expected = await truth();
  const held = Object.fromEntries([...harness.simulator.users()].map(({ key, fields }) => [key, fields]));
  for (const [person, { vip, big, ...values }] of Object.entries(expected)) {
    const { vip: heldVip = 'false', big: heldBig = 'false', ...heldValues } = held[person] ?? {};
    expect({ person, vip: heldVip, big: heldBig, ...heldValues }).toEqual({ person, vip, big, ...values });
  }
  const snapshot = await harness.state(
    `select d.key || ' ' || substr(s.recipient, 3) as name, coalesce(s.value ->> 'spent', '') as spent,
       coalesce(s.value ->> 'city', '') as city
     from snapshot as s join definition as d on d.id = s.definition_id order by 1`,
  );
  const whole = (number: string): string => number.replace(/\.0$/, '');
  const kept = Object.entries(expected).flatMap(([person, { vip, big, spent, city = '""' }]) => [
    ...(vip === 'true' ? [{ name: `vip ${person}`, spent: '', city: '' }] : []),
    ...(big === 'true' ? [{ name: `big ${person}`, spent: '', city: '' }] : []),
    ...(spent === undefined
      ? []
      : [{ name: `stats ${person}`, spent: whole(spent), city: JSON.parse(city) as string }]),
  ]);
  const inOrder = (rows: { name: string }[]): unknown[] => rows.sort((a, b) => (a.name < b.name ? -1 : 1));
  const found = snapshot.map(({ name, spent, city }) => ({
    name: name as string,
    spent: whole(spent as string),
    city: city as string,
  }));
  expect(inOrder(found)).toEqual(inOrder(kept));

  // Each change of a membership is one event, in its order, however often it was sent.
  const contents = new Map<unknown, Set<string>>();
  for (const { endpoint, body } of harness.simulator.requests()) {
    if (endpoint !== 'events/track') continue;
    const { id } = JSON.parse(body) as { id: string };
    contents.set(id, (contents.get(id) ?? new Set()).add(body));
  }
  expect([...contents.values()].filter(({ size }) => size > 1)).toEqual([]);
  const transitions = await harness.state(
    `select count(*)::int4 as n from transition as t join definition as d on d.id = t.definition_id where d.key = 'vip'`,
  );
  const firstMembers = Math.floor(PEOPLE / 3);
  const vipEvents = harness.simulator.events().filter(({ fields }) => fields['audience_key'] === '"vip"');
  expect(vipEvents).toHaveLength(firstMembers + Number(transitions[0]?.['n']));
  for (const person of Object.keys(expected)) {
    const names = vipEvents.filter(({ identifier }) => identifier === person).map(({ name }) => name);
    names.forEach((name, index) => expect(name).toBe(index % 2 === 0 ? 'Audience Entered' : 'Audience Exited'));
  }

  const repeated = harness.simulator.events().filter(({ applications }) => applications > 1);
  expect(repeated.length).toBeGreaterThan(20);
  expect(stats.count(undefined, 'reset')).toBeGreaterThan(20);
  expect(stats.count(undefined, 500) + stats.count(undefined, 503)).toBeGreaterThan(200);
  expect(await harness.state('select count(*)::int4 as dead from dead_call')).toEqual([{ dead: 0 }]);
}, 90_000);
