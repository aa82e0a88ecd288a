import { stripVTControlCharacters } from 'node:util';
import { afterAll, beforeAll, beforeEach, expect, it } from 'vitest';
import { describeDestinations, readDestinations, type DestinationStatus } from '../src/cli/status-destinations.js';
import { createHarness, type Harness } from './support/harness.js';

/** How long `status` says that it takes until nothing waits any more. */
let harness: Harness;
beforeAll(async () => {
  harness = await createHarness({
    tables: `create table people (id bigint primary key, user_id text, email text);
      insert into people (id, user_id) values (1, 'u1')`,
    audiences: [{ name: 'VIP', sql: 'SELECT id AS profile_id FROM people' }],
    traits: [{ name: 'Stats', sql: 'SELECT id AS profile_id, id AS orders FROM people' }],
  });
  await harness.sync();
  await harness.state(`update destination set delivery = '{"acknowledgedPerSecond": 4, "lanes": []}'`);
});
afterAll(() => harness.close());
beforeEach(async () => {
  await harness.state('delete from outbox');
  await harness.state(`update definition set state = 'active'`);
  await harness.state('update definition_destination set backfill = null, backfill_until = null');
});

const wait = (definition: string, calls: number): Promise<unknown> =>
  harness.state(
    `insert into outbox (kind, destination_id, definition_id, priority, recipient, columns)
     select 'm', t.id, d.id, 1, 'u:w' || n, array['x'] from destination as t, definition as d, generate_series(1, $2::int) as n
     where d.key = $1`,
    [definition, calls],
  );
async function look(key: string | null, isLed = true): Promise<DestinationStatus & { drains: string }> {
  const [status] = await readDestinations(harness.opened, key, isLed);
  if (status === undefined) throw new Error('There is no destination.');
  const [title = '', ...rows] = stripVTControlCharacters(describeDestinations([status], key))
    .trimEnd()
    .split('\n');
  expect(title).toMatch(key === null ? / drains in/ : / all drain in/);
  return { ...status, drains: rows.at(-1)?.split(/ {2,}/).at(-1)?.trim() ?? '' };
}

it('is what waits by the rate at which it goes', async () => {
  await wait('vip', 40);
  expect(await look(null)).toMatchObject({ waiting: 40, drainsInSeconds: 10, drains: '10 s' });
});

it('is of one definition what it takes for all, since they share the rate', async () => {
  await wait('vip', 4);
  await wait('stats', 36);
  expect(await look('vip')).toMatchObject({ waiting: 4, drainsInSeconds: 10 });
  expect(await look('stats')).toMatchObject({ waiting: 36, drainsInSeconds: 10 });
  expect(await look(null)).toMatchObject({ waiting: 40, drainsInSeconds: 10 });
});

it('counts what backfills have yet to feed, of all definitions, too', async () => {
  await wait('vip', 4);
  await harness.state(
    `update definition_destination as dd set backfill = 'initial', backfill_until = now(), backfill_total = 100, backfill_done = 64, backfill_identify = true,
       backfill_events = false from definition as d where d.id = dd.definition_id and d.key = 'stats'`,
  );
  expect(await look('vip')).toMatchObject({ waiting: 4, drainsInSeconds: 10 });
  expect(await look('stats')).toMatchObject({ waiting: 0, drainsInSeconds: 10 });
});

it('is nothing where nothing of it waits, or what waits does for a person', async () => {
  await wait('stats', 40);
  expect(await look('vip')).toMatchObject({ waiting: 0, drainsInSeconds: 0, drains: '–' });
  await harness.state(`update definition set state = 'paused' where key = 'stats'`);
  expect(await look('stats')).toMatchObject({ waiting: 40, drainsInSeconds: 0, drains: '–' });
  expect(await look(null)).toMatchObject({ waiting: 40, drainsInSeconds: 0, drains: '–' });
});

it('is unknown where something waits and nothing moves, or nobody leads', async () => {
  await wait('vip', 40);
  expect(await look(null, false)).toMatchObject({ drainsInSeconds: null, drains: 'unknown' });
  expect(await look('vip', false)).toMatchObject({ drainsInSeconds: null, drains: 'unknown' });
  expect(await look('stats', false)).toMatchObject({ drainsInSeconds: 0, drains: '–' });
});
