import { afterEach, expect, it } from 'vitest';
import { evaluateBatch, type BatchResult } from '../src/sync/batch.js';
import { openBatchSession, type BatchSession } from '../src/sync/evaluation.js';
import { runDefinition, type RunResult } from '../src/sync/run.js';
import { addDue } from './support/due.js';
import { createHarness, type Harness } from './support/harness.js';
import { until } from './support/until.js';

/** A large change of a definition that is followed is written in parts, between which single changes of others go. */
const LEADER = '00000000-0000-0000-0000-000000000001';
const MANY = 30_000;

let harness: Harness;
let session: BatchSession;
afterEach(async () => {
  session.client.release(true);
  await harness.close();
});

async function open(): Promise<void> {
  harness = await createHarness({
    tables: `create table people (id int primary key, user_id text, email text, good bool not null);
      insert into people select n, 'u' || n, null, n % 2 = 0 from generate_series(1, ${2 * MANY}) as n;
      create index on people (user_id); create index on people (lower(btrim(email)))`,
    audiences: [{ key: 'good', sql: 'SELECT id AS profile_id FROM people WHERE good', initial: 'skip', guard: 'off' }],
  });
  await harness.sync();
  await harness.state(`update definition set tracking = 'live', full_wanted = full_done; delete from outbox`);
  const { databases, config } = harness.opened;
  session = await openBatchSession({ databases, config }, await databases.source.connect(), null);
}

function run(): Promise<RunResult> {
  const { databases, config } = harness.opened;
  const request = { trigger: 'schedule', approves: null, nextDueMs: () => null } as const;
  return runDefinition({ databases, config, leader: LEADER }, config.definitions[0]!, request) as Promise<RunResult>;
}

async function change(id: number, good: boolean): Promise<BatchResult> {
  await harness.sql('update people set good = $1 where id = $2', [good, id]);
  await addDue(harness.opened.databases.state.pool, ['good'], [String(id)]);
  return evaluateBatch(session, harness.opened.config.definitions[0]!, 1, { limit: 100 });
}

const one = async (text: string): Promise<unknown> => Object.values((await harness.state(text))[0] ?? {})[0];
const isRight = (): Promise<unknown> =>
  one(`select not exists (select from public.people as p full join snapshot as s on s.profile_id = p.id::text and p.good
    where (p.good or s.profile_id is not null) and (p.id is null or s.profile_id is null))
    and (select members from definition) = (select count(*) from public.people where good)`);

it('a single change goes between two parts, and neither undoes the other', async () => {
  await open();
  await harness.sql('update people set good = true');
  await harness.state(`update definition set full_wanted = nextval('version')`);
  const running = run();
  const marks = 'select count(*)::int from outbox';
  await until(async () => ((await one(marks)) as number) > 0);
  // One whom a part may have written by now, and one of the last.
  expect(await change(3, false)).toMatchObject({ kind: 'written' });
  expect(await change(59_999, false)).toMatchObject({ kind: 'written' });
  expect(await one('select outcome from run order by id desc limit 1')).toBeNull();
  expect(await running).toMatchObject({ outcome: 'succeeded', counts: { entered: MANY } });
  expect(await isRight()).toBe(true);
  expect(await one(`select count(*)::int from outbox where recipient not in ('u:3', 'u:59999')`)).toBe(MANY - 2);
});

it('a run that is given up between two parts is made again, and writes the rest', async () => {
  await open();
  await harness.sql('update people set good = true');
  const running = run();
  await until(async () => ((await one('select count(*)::int from outbox')) as number) > 0);
  await harness.state(`update run set outcome = 'abandoned', finished_at = now() where outcome is null`);
  expect(await running).toMatchObject({ outcome: 'abandoned' });
  const written = (await one('select count(*)::int from outbox')) as number;
  expect(written).toBeLessThan(MANY);
  expect(await run()).toMatchObject({ outcome: 'succeeded', counts: { entered: MANY - written } });
  expect(await isRight()).toBe(true);
});
