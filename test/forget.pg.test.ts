import { afterAll, beforeAll, expect, it } from 'vitest';
import { forget } from '../src/sync/forget.js';
import { runDefinition } from '../src/sync/run.js';
import { holdDefinition } from './support/lock.js';
import { createHarness, type Harness } from './support/harness.js';
import { until } from './support/until.js';

let harness: Harness;
beforeAll(async () => {
  harness = await createHarness({
    tables: `create table people (id bigint, user_id text, email text);
      insert into people values (1, null, 'ada@example.com'), (1, null, 'ada@work.example'), (2, 'u2', 'bob@example.com'), (3, 'u3', null)`,
    profiles: { sql: 'SELECT id AS profile_id, user_id, email FROM people' },
    audiences: [{ name: 'All', sql: 'SELECT DISTINCT id AS profile_id FROM people', send: 'both' }],
  });
  await harness.sync();
});
afterAll(() => harness.close());

/** Every table of the state that mentions `text` anywhere. */
async function mentions(text: string): Promise<string[]> {
  const tables = await harness.state(
    `select c.relname as name from pg_class as c where c.relnamespace = 'personas'::regnamespace and c.relkind in ('r', 'p') and not c.relispartition`,
  );
  const found: string[] = [];
  for (const { name } of tables) {
    const rows = await harness.state(`select from ${String(name)} as t where t::text like '%' || $1 || '%' limit 1`, [
      text,
    ]);
    if (rows.length > 0) found.push(String(name));
  }
  return found;
}

it('erases a person by any of their addresses from every table', async () => {
  // As `verify` leaves them, where nobody has read what it found.
  await harness.state(
    `insert into request (kind, arguments, finished_at, outcome) values ('verify', '{}', now(), 'done')`,
  );
  await harness.state(
    `with s as (
       insert into sample (request_id, destination_id, recipient)
       select max(r.id), 1, 'e:ada@example.com' from request as r returning *)
     insert into difference (request_id, destination_id, definition_id, recipient, field, expected)
     select s.request_id, s.destination_id, 1, 'e:ada@work.example', 'all', 'true' from s`,
  );
  const holding = ['snapshot', 'sample', 'difference'];
  expect([...(await mentions('ada@work.example')), ...(await mentions('ada@example.com'))]).toEqual(
    expect.arrayContaining(holding),
  );
  const { outcome, progress } = await harness.request('forget', { person: 'Ada@Example.com' });
  expect(outcome).toBe('done');
  expect(progress.count).toBeGreaterThan(0);
  expect([await mentions('ada@'), await mentions('Ada@')]).toEqual([[], []]);
});

it('erases a person by the address beside their userId', async () => {
  await harness.request('forget', { person: 'bob@example.com' });
  expect([await mentions('bob@'), await mentions('u:u2')]).toEqual([[], []]);
});

it('keeps them from being queued again, though the source still has them', async () => {
  const requests = harness.simulator.requests().length;
  await harness.sql(`insert into people values (4, 'u4', null)`);
  const { progress } = await harness.sync();
  expect(progress.runs).toMatchObject([{ members: 2, entered: 1, exited: 0 }]);
  expect(await mentions('ada@')).toEqual([]);
  expect(harness.simulator.requests().length).toBe(requests + 2);
  expect(await harness.state('select members from definition')).toEqual([{ members: 2 }]);
});

it('sends nothing, though calls are waiting and nobody else leads', async () => {
  await harness.sql(`insert into people values (5, 'u5', null), (6, 'u6', null)`);
  const { databases, config } = harness.opened;
  const [definition] = config.definitions;
  if (definition === undefined) throw new Error('There is no definition.');
  const request = { trigger: 'sync', approves: null, nextDueMs: () => null } as const;
  const leader = '00000000-0000-0000-0000-000000000001';
  expect(await runDefinition({ databases, config, leader }, definition, request)).toMatchObject({
    outcome: 'succeeded',
  });
  const requests = harness.simulator.requests().length;
  await harness.request('forget', { person: 'u5' });
  expect(await harness.state(`select distinct recipient from outbox`)).toEqual([{ recipient: 'u:u6' }]);
  expect(harness.simulator.requests()).toHaveLength(requests);
});

it('leaves nobody behind whose exit a run has found meanwhile', async () => {
  await harness.sql(`insert into people values (9, 'u9', null)`);
  await harness.sync();
  await harness.sql('delete from people where id = 9');
  const { databases, config } = harness.opened;
  const [definition] = config.definitions;
  if (definition === undefined) throw new Error('There is no definition.');
  const gate = await holdDefinition(databases.state.pool);
  const request = { trigger: 'sync', approves: null, nextDueMs: () => null } as const;
  const leader = '00000000-0000-0000-0000-000000000001';
  const running = runDefinition({ databases, config, leader }, definition, request);
  await until(
    async () => (await harness.state(`select from pg_locks where locktype = 'advisory' and not granted`)).length === 1,
  );
  // As `forget` does it, where it has the lock first.
  await gate.client.query(
    `insert into forgotten select sha256(convert_to((select value #>> '{}' from setting where name = 'forget_key') || 'u:u9', 'UTF8'))`,
  );
  for (const table of ['snapshot', 'outbox', 'transition'])
    await gate.client.query(`delete from ${table} where recipient = 'u:u9'`);
  await gate.client.query('update definition set members = members - 1');
  await gate.release();
  expect(await running).toMatchObject({ outcome: 'succeeded' });
  expect(await mentions('u:u9')).toEqual([]);
});

it('leaves nobody behind whom a run has taken up meanwhile', async () => {
  await harness.sql(`insert into people values (7, 'u7', null), (8, 'u8', null)`);
  const { databases, config } = harness.opened;
  const [definition] = config.definitions;
  if (definition === undefined) throw new Error('There is no definition.');
  const waitingLocks = async (): Promise<number> =>
    (await harness.state(`select from pg_locks where locktype = 'advisory' and not granted`)).length;
  const gate = await holdDefinition(databases.state.pool);
  const request = { trigger: 'sync', approves: null, nextDueMs: () => null } as const;
  const leader = '00000000-0000-0000-0000-000000000001';
  const running = runDefinition({ databases, config, leader }, definition, request);
  await until(async () => (await waitingLocks()) === 1);
  const forgetting = forget(databases.state, 'u7');
  await until(async () => (await waitingLocks()) === 2);
  await gate.release();
  expect(await running).toMatchObject({ outcome: 'succeeded' });
  await forgetting;
  expect([await mentions('u:u7'), (await mentions('u:u8')).length > 0]).toEqual([[], true]);
  const [counts] = await harness.state('select members, (select count(*) from snapshot) as there from definition');
  expect(counts?.['members']).toBe(counts?.['there']);
});

it('keeps no other command waiting while it holds the request of a `verify`', async () => {
  await harness.state(
    `insert into request (kind, arguments) values ('verify', '{"keys":[],"sample":1,"repair":false}')`,
  );
  const client = await harness.opened.databases.state.pool.connect();
  await client.query(`begin; select from request where outcome is null for update`);
  expect(await harness.sync()).toMatchObject({ outcome: 'done' });
  await client.query(`delete from request where kind = 'verify'; commit`);
  client.release();
});
