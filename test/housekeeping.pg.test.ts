import { afterAll, beforeAll, expect, it } from 'vitest';
import { tidyUp } from '../src/sync/housekeeping.js';
import { createHarness, type Harness } from './support/harness.js';

let harness: Harness;
beforeAll(async () => {
  harness = await createHarness({
    tables: `create table people (id bigint primary key, user_id text, email text); insert into people values (1, 'u1', null)`,
    audiences: [{ name: 'All', sql: 'SELECT id AS profile_id FROM people' }],
  });
  await harness.sync();
});
afterAll(() => harness.close());

const partitions = async (): Promise<unknown[]> =>
  (
    await harness.state(
      `select inhrelid::regclass::text as name from pg_inherits where inhparent = 'transition'::regclass order by 1`,
    )
  ).map(({ name }) => name);

it('keeps the history of ninety days, with a partition ready for the next month', async () => {
  const [month] = await harness.state(
    `select to_char(now(), 'YYYY_MM') as this, to_char(now() + interval '1 month', 'YYYY_MM') as next`,
  );
  await harness.state(
    `create table transition_2020_01 partition of transition for values from ('2020-01-01') to ('2020-02-01')`,
  );
  await tidyUp(harness.opened.databases.state);
  expect(await partitions()).toEqual([`transition_${String(month?.this)}`, `transition_${String(month?.next)}`]);
});

it('drops dead calls, runs and requests of long ago, and nothing that a person has yet to decide', async () => {
  await harness.state(
    `insert into run (definition_id, trigger, leader, finished_at, outcome, error)
     select id, 'sync', gen_random_uuid(), now() - interval '100 days', o, 'x' from definition, unnest(array['failed', 'held']) as o`,
  );
  await harness.state(`update request set finished_at = now() - interval '8 days' where outcome is not null`);
  await harness.state(
    `insert into dead_call (kind, destination_id, definition_id, recipient, field, reason, answer, died_at)
     select 'm', 1, id, 'u:' || n, 'all', 'BadParams', '', now() - n * interval '60 days' from definition, generate_series(1, 2) as n`,
  );
  await tidyUp(harness.opened.databases.state);
  expect((await harness.state(`select outcome from run order by id`)).map(({ outcome }) => outcome)).toEqual([
    'succeeded',
    'held',
  ]);
  expect(await harness.state('select from request')).toEqual([]);
  expect((await harness.state('select recipient from dead_call')).map(({ recipient }) => recipient)).toEqual(['u:1']);
});

it('drops what nobody has read, and all that is old, also where the history is being read', async () => {
  const { state } = harness.opened.databases;
  await harness.state(
    `create table transition_2020_01 partition of transition for values from ('2020-01-01') to ('2020-02-01');
     insert into request (kind, arguments, finished_at, outcome)
       select 'verify', '{}', now() - ago::interval, 'done' from unnest(array['11 minutes', '8 days']) as ago;
     insert into difference (request_id, destination_id, definition_id, recipient, field, expected)
       select max(id), 1, 1, 'u:u1', 'all', 'true' from request where finished_at > now() - interval '1 hour'`,
  );
  const reader = await state.pool.connect();
  await reader.query('begin; select from transition');
  const tidied = await tidyUp(state).catch((error: unknown) => error);
  await reader.query('commit');
  reader.release();
  expect(tidied).toMatchObject({ code: '55P03' });
  expect(await harness.state('select recipient from difference')).toEqual([]);
  expect(await harness.state(`select from request where finished_at < now() - interval '7 days'`)).toEqual([]);
  await tidyUp(state);
  expect(await partitions()).not.toContain('transition_2020_01');
});

it('tries again by itself what may pass, once its day has come, and five times at most', async () => {
  await harness.state(`update dead_call set retry_at = now(), retries = 4`);
  await tidyUp(harness.opened.databases.state);
  expect(await harness.state(`select columns, revived from outbox`)).toEqual([{ columns: ['all'], revived: 5 }]);
  expect(await harness.state('select from dead_call')).toEqual([]);
});
