import { afterAll, beforeAll, beforeEach, expect, it } from 'vitest';
import { lockDefinition } from '../src/db/locks.js';
import { openFindings, readDifferences, type Findings, type Found } from '../src/sync/findings.js';
import { forget } from '../src/sync/forget.js';
import { tidyUp } from '../src/sync/housekeeping.js';
import { verify, type CompareUser } from '../src/sync/verify.js';
import { createHarness, type Harness } from './support/harness.js';
import { until } from './support/until.js';

/** What `verify` has read of people: whose it is, how long it stays, and that those who are to be forgotten aren't in it. */
const LEADER = '00000000-0000-0000-0000-000000000001';
const ANOTHER = '00000000-0000-0000-0000-000000000002';

let harness: Harness;
let definition: number;
let destination: number;
let request: number;
let findings: Findings;
const stopping = new AbortController();

beforeAll(async () => {
  harness = await createHarness({
    tables: `create table people (id bigint primary key, user_id text, email text);
      insert into people select n, 'u' || n, null from generate_series(1, 30) as n`,
    audiences: [{ name: 'All', sql: 'SELECT id AS profile_id FROM people' }],
  });
  await harness.sync();
  await harness.state(`update transition set at = at - interval '1 hour'`);
  const [row] = await harness.state('select definition_id, destination_id from definition_destination');
  [definition, destination] = [Number(row?.definition_id), Number(row?.destination_id)];
});
afterAll(() => harness.close());

const open = (leader: string): Findings =>
  openFindings(harness.opened.databases.state.pool, { request, leader, signal: stopping.signal });
beforeEach(async () => {
  const [row] = await harness.state(
    `insert into request (kind, arguments, taken_by) values ('verify', '{}', $1) returning id`,
    [LEADER],
  );
  request = Number(row?.id);
  findings = open(LEADER);
});

const missing = (recipient: string): Found => {
  return { definitionId: definition, recipient, field: 'all', expected: 'true', found: null };
};
const kept = async (table: string): Promise<unknown[]> =>
  (await harness.state(`select recipient from ${table} where request_id = $1 order by recipient`, [request])).map(
    ({ recipient }) => recipient,
  );
const finish = (ago: string): Promise<unknown> =>
  harness.state(`update request set finished_at = now() - $2::interval, outcome = 'done' where id = $1`, [
    request,
    ago,
  ]);

it('is there until it has been read, or nobody has read on for ten minutes', async () => {
  const { state } = harness.opened.databases;
  await findings.draw(definition, destination, { sample: 5, seed: '' });
  await findings.note(destination, ['u:u1', 'u:u2'], [missing('u:u1'), missing('u:u2')]);
  await tidyUp(state);
  await finish('11 minutes');
  await harness.state(`update request set read_at = now() - interval '9 minutes' where id = $1`, [request]);
  await tidyUp(state);
  expect(await readDifferences(state.pool, request, { after: 0 })).toMatchObject([
    { definition: 'all', destination: 'iterable', recipient: 'u:u1', field: 'all', expected: 'true', found: null },
    { recipient: 'u:u2' },
  ]);
  await harness.state(`update request set read_at = now() - interval '11 minutes' where id = $1`, [request]);
  await tidyUp(state);
  expect([await kept('sample'), await kept('difference')]).toEqual([[], []]);
  await expect(readDifferences(state.pool, request, { after: 0 })).rejects.toThrow('verify again');
});

it('goes with its request', async () => {
  await findings.draw(definition, destination, { sample: 5, seed: '' });
  await findings.note(destination, ['u:u1'], [missing('u:u1')]);
  await harness.state('delete from request where id = $1', [request]);
  expect([await kept('sample'), await kept('difference')]).toEqual([[], []]);
});

it('is written by the leader alone whose request it is', async () => {
  await findings.note(destination, ['u:u1'], [missing('u:u1')]);
  const late = open(ANOTHER);
  await expect(late.note(destination, ['u:u1', 'u:u2'], [missing('u:u2')])).rejects.toThrow('Another instance');
  await expect(late.draw(definition, destination, { sample: 5, seed: '' })).rejects.toThrow('Another instance');
  await late.clear();
  expect([await kept('sample'), await kept('difference')]).toEqual([[], ['u:u1']]);
});

it('is written in transactions that the server cuts off where their instance stands still', async () => {
  const tables = ['sample', 'difference', 'outbox'];
  await harness.state(
    `create table seen (name text, setting text);
     create function see() returns trigger language plpgsql as
       $$ begin insert into seen values (tg_table_name, current_setting('idle_in_transaction_session_timeout')); return null; end $$;
     ${tables.map((name) => `create trigger seen after insert or delete on ${name} execute function see();`).join('')}`,
  );
  const seen = async (work: () => Promise<void>): Promise<unknown> => {
    await harness.state('truncate seen');
    await work();
    return harness.state('select distinct name, setting from seen order by name');
  };
  const all = (...names: string[]): unknown => names.map((name) => ({ name, setting: '10s' }));
  const drawn = await seen(() => findings.draw(definition, destination, { sample: 5, seed: '' }));
  const noted = await seen(() => findings.note(destination, ['u:u1'], [missing('u:u1')]));
  const repaired = await seen(() => findings.repair(destination));
  const cleared = await seen(findings.clear);
  await harness.state('drop function see cascade; drop table seen; delete from outbox');
  expect([drawn, noted, repaired, cleared]).toEqual([
    all('sample'),
    all('difference', 'sample'),
    all('outbox'),
    all('difference', 'sample'),
  ]);
});

it('is marked in one order, whoever repairs at the same time', async () => {
  const others = await harness.state(
    `insert into definition (key, kind, name, computation_id, on_delete, cadence)
     select 'd' || n, 'audience', 'd' || n, 'c' || n, on_delete, cadence from definition, generate_series(1, 5) as n returning id`,
  );
  const ids = [definition, ...others.map(({ id }) => Number(id))];
  const recipients = Array.from({ length: 100 }, (_, n) => `u:p${100 + n}`);
  const found = recipients.flatMap((recipient) =>
    ids.toReversed().map((definitionId) => ({ ...missing(recipient), definitionId })),
  );
  await findings.note(destination, recipients, found);
  await findings.repair(destination);
  const marks = await harness.state('delete from outbox returning id, recipient, definition_id');
  const order = marks
    .sort((a, b) => Number(a['id']) - Number(b['id']))
    .map((mark) => [mark['recipient'], mark['definition_id']]);
  await harness.state('delete from difference; delete from definition where key <> $$all$$');
  expect(order).toEqual(recipients.flatMap((recipient) => ids.map((id) => [recipient, id])));
});

it('holds who is forgotten meanwhile no more', async () => {
  await findings.draw(definition, destination, { sample: 40, seed: '' });
  await findings.note(destination, ['u:u1', 'u:u2'], [missing('u:u1'), missing('u:u2')]);
  await forget(harness.opened.databases.state, 'u1');
  await forget(harness.opened.databases.state, 'u3');
  expect(await kept('difference')).toEqual(['u:u2']);
  const left = await kept('sample');
  expect(left).toHaveLength(27);
  expect(left).not.toContain('u:u3');
  // Who was being read.
  await findings.note(destination, ['u:u3', 'u:u4'], [missing('u:u3'), missing('u:u4')]);
  expect(await kept('difference')).toEqual(['u:u2', 'u:u4']);
});

it('lets nobody slip in who is forgotten while it is written', async () => {
  const client = await harness.opened.databases.state.pool.connect();
  await client.query('begin');
  await client.query('select from request where id = $1 for share', [request]);
  await client.query(
    `insert into difference (request_id, destination_id, definition_id, recipient, field, expected)
     values ($1, $2, $3, 'u:u5', 'all', 'true')`,
    [request, destination, definition],
  );
  const forgetting = forget(harness.opened.databases.state, 'u5');
  await until(async () => (await harness.state(`select from pg_locks where not granted`)).length > 0);
  await client.query('commit');
  client.release();
  await forgetting;
  expect(await kept('difference')).toEqual([]);
});

it('is waited for by who forgets without keeping runs waiting', async () => {
  const { pool } = harness.opened.databases.state;
  const client = await pool.connect();
  await client.query('begin');
  await client.query('select from request where id = $1 for share', [request]);
  const forgetting = forget(harness.opened.databases.state, 'u6');
  await until(async () => (await harness.state(`select from pg_locks where not granted`)).length > 0);
  // As a run does. Had `forget` it already, each would wait for the other.
  await lockDefinition(client, definition);
  await client.query('commit');
  client.release();
  await forgetting;
});

it('is dropped where verifying is stopped, and begins anew where it was left', async () => {
  await findings.note(destination, ['u:u1'], [missing('u:u1')]);
  const stopped = new AbortController();
  const seen: unknown[][] = [];
  const compare: CompareUser = async () => {
    seen.push(await kept('difference'));
    stopped.abort();
    return { names: [], differing: [{ field: 'all', found: null }] };
  };
  const deps = {
    state: harness.opened.databases.state,
    findings,
    destinations: [{ id: destination, name: 'iterable', compare }],
    signal: stopped.signal,
    onProgress: () => Promise.resolve(),
  };
  await expect(verify(deps, { keys: [], sample: 10, repair: true })).rejects.toThrow('Stopped.');
  expect(seen[0]).toEqual([]);
  expect([await kept('sample'), await kept('difference')]).toEqual([[], []]);
  expect(await harness.state('select from outbox')).toEqual([]);
});
