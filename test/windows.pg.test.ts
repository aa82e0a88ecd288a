import { afterEach, describe, expect, it } from 'vitest';
import { evaluateBatch, type BatchResult } from '../src/sync/batch.js';
import { wantFull } from '../src/sync/due.js';
import { openBatchSession } from '../src/sync/evaluation.js';
import { runDefinition, type RunResult } from '../src/sync/run.js';
import { addDue } from './support/due.js';
import { createHarness, type Harness } from './support/harness.js';
import { until } from './support/until.js';

/**
 * Windows that close to the moment: a definition says until when what it says of a profile holds. The tables have the names
 * that the comparison gives to its own parts, which must not stand in their way.
 */
const LEADER = '00000000-0000-0000-0000-000000000001';
const TABLES = `
  create table holders (id int primary key, user_id text, email text);
  create index on holders (user_id); create index on holders (lower(btrim(email)));
  create table wanted (customer_id int, placed_at timestamptz);
  create index on wanted (customer_id);
  insert into holders select n, 'u' || n, 'u' || n || '@x.de' from generate_series(1, 300) as n;
  insert into wanted select n, now() - interval '1 minute' from generate_series(1, 200) as n;`;
/** Bought within two seconds; who buys in the future becomes one then. */
const RECENT = {
  key: 'recent',
  sql: `SELECT customer_id AS profile_id, max(placed_at) FILTER (WHERE placed_at <= :now) > :now - :lookback AS member,
      min(CASE WHEN placed_at > :now THEN placed_at ELSE placed_at + :lookback END)
        FILTER (WHERE placed_at + :lookback > :now) AS valid_until
    FROM wanted GROUP BY 1`,
  lookback: '2 seconds',
  changes: { wanted: 'customer_id' },
  guard: 'off',
};

let harness: Harness;
const closers: (() => void)[] = [];
afterEach(async () => {
  for (const close of closers.splice(0)) close();
  await harness.close();
});

async function open(
  separate: boolean,
  { tables = TABLES, ...settings }: { tables?: string; lookback?: string; schedule?: string } = {},
): Promise<(limit?: number) => Promise<BatchResult>> {
  harness = await createHarness({
    tables,
    separate,
    profiles: { sql: 'SELECT id AS profile_id, user_id, email FROM holders', changes: { holders: 'id' } },
    audiences: [{ ...RECENT, ...settings }],
  });
  await harness.sync();
  await harness.state(`update definition set tracking = 'live', polled_because = null`);
  await run();
  const { databases, config } = harness.opened;
  const client = await (databases.same ? databases.source : databases.state.pool).connect();
  const source = databases.same ? null : await databases.source.connect();
  closers.push(() => {
    client.release(true);
    source?.release(true);
  });
  const session = await openBatchSession({ databases, config }, client, source);
  return (limit = 100) => evaluateBatch(session, config.definitions[0]!, 1, { limit });
}

async function run(trigger: 'schedule' | 'sync' = 'schedule'): Promise<RunResult> {
  const { databases, config } = harness.opened;
  const request = { trigger, approves: null, nextDueMs: () => null } as const;
  const result = await runDefinition({ databases, config, leader: LEADER }, config.definitions[0]!, request);
  expect(result).toMatchObject({ outcome: 'succeeded' });
  return result!;
}

async function buy(customer: number | string, when: string): Promise<void> {
  await harness.sql(`insert into wanted values ($1, clock_timestamp() + $2::interval)`, [customer, when]);
  await addDue(harness.opened.databases.state.pool, ['recent'], [String(customer)]);
}
const members = async (): Promise<unknown[]> =>
  (await harness.state('select profile_id from snapshot order by 1')).map((row) => row['profile_id']);
const windows = async (): Promise<unknown[]> =>
  (await harness.state('select profile_id from validity order by 1')).map((row) => row['profile_id']);
const reached = async (): Promise<unknown[]> =>
  (await harness.state('select profile_id from validity where until <= clock_timestamp() order by 1')).map(
    (row) => row['profile_id'],
  );
const isReached = (): Promise<unknown> => until(async () => (await reached()).length > 0);

describe.each([{ separate: false }, { separate: true }])('a window, state apart: $separate', ({ separate }) => {
  it('opens with a change, and is reached when it closes', async () => {
    const evaluate = await open(separate);
    expect(await members()).toEqual([]);
    await buy(7, '0 seconds');
    expect(await evaluate()).toMatchObject({ kind: 'written', changed: 1 });
    expect([await members(), await windows()]).toEqual([['7'], ['7']]);
    expect(await evaluate()).toEqual({ kind: 'nothing' });
    await isReached();
    expect(await evaluate()).toMatchObject({ kind: 'written', changed: 1 });
    expect([await members(), await windows()]).toEqual([[], []]);
  });

  it('has somebody enter by time alone', async () => {
    const evaluate = await open(separate);
    await buy(9, '1 second');
    expect(await evaluate()).toMatchObject({ kind: 'written', changed: 0 });
    expect([await members(), await windows()]).toEqual([[], ['9']]);
    await isReached();
    expect(await evaluate()).toMatchObject({ kind: 'written', changed: 1 });
    expect(await members()).toEqual(['9']);
  });

  it('is known by a run in full, too, which leaves what was evaluated meanwhile', async () => {
    const evaluate = await open(separate);
    await harness.sql(`insert into wanted values (11, now() + interval '1 hour'), (12, now() + interval '1 hour')`);
    await run('sync');
    expect(await windows()).toEqual(['11', '12']);
    await harness.sql('delete from wanted where customer_id = 11');
    await addDue(harness.opened.databases.state.pool, ['recent'], ['11']);
    await evaluate();
    expect(await windows()).toEqual(['12']);
    await run('sync');
    expect(await windows()).toEqual(['12']);
  });

  it('that was reached is left by a run in full to whoever evaluates it, closed or opened', async () => {
    const evaluate = await open(separate, { schedule: 'realtime', lookback: '30 seconds' });
    await buy(7, '-28 seconds');
    await evaluate();
    await buy(9, '2 seconds');
    await evaluate();
    await until(async () => (await reached()).length === 2);
    await run();
    expect(await harness.state('select exited, corrections from run order by id desc limit 1')).toEqual([
      { exited: 0, corrections: 0 },
    ]);
    expect(await reached()).toEqual(['7', '9']);
    expect(await evaluate()).toMatchObject({ kind: 'written', changed: 2 });
    expect(await members()).toEqual(['9']);
  });

  it('that was reached is settled by a run that a person asks for', async () => {
    const evaluate = await open(separate);
    await buy(7, '0 seconds');
    await evaluate();
    await isReached();
    await run('sync');
    expect(await members()).toEqual([]);
  });
});

describe.each([{ separate: false }, { separate: true }])(
  'an id that can be written in several ways, state apart: $separate',
  ({ separate }) => {
    it('has one window, however it is written where it changes', async () => {
      const evaluate = await open(separate, { tables: TABLES.replaceAll(/\b(id|customer_id) int\b/g, '$1 numeric') });
      await buy('7', '0 seconds');
      expect(await evaluate()).toMatchObject({ kind: 'written', changed: 1 });
      await buy('7.0', '1 second');
      expect(await evaluate()).toMatchObject({ kind: 'written', changed: 0 });
      expect([await members(), await windows()]).toEqual([['7'], ['7']]);
    });
  },
);

it('goes by the clock of the source, whose rows hold its times, where the state has another', async () => {
  const ahead = `${TABLES}
    create schema ahead;
    create function ahead.now() returns timestamptz language sql stable return pg_catalog.now() + interval '1 hour';
    create function ahead.clock_timestamp() returns timestamptz language sql return pg_catalog.clock_timestamp() + interval '1 hour';
    do $$ begin execute format('alter database %I set search_path = ahead, pg_catalog, public', current_database()); end $$;`;
  const evaluate = await open(true, { tables: ahead, lookback: '30 minutes' });
  await buy(7, '1 hour');
  expect(await evaluate()).toMatchObject({ kind: 'written', changed: 1 });
  expect(await members()).toEqual(['7']);
  await run('sync');
  expect(await members()).toEqual(['7']);
});

describe('an hourly run of a definition that says until when it holds', () => {
  it('evaluates those alone whose rows have changed or whose window was reached', async () => {
    await open(false);
    await buy(1, '0 seconds');
    await buy(2, '1 hour');
    await run();
    const runs = await harness.state('select evaluated, entered, members from run order by id desc limit 1');
    expect(runs).toEqual([{ evaluated: 2, entered: 1, members: 1 }]);
    await isReached();
    await run();
    expect(await harness.state('select evaluated, exited, members from run order by id desc limit 1')).toEqual([
      { evaluated: 1, exited: 1, members: 0 },
    ]);
    expect(await members()).toEqual([]);
  });

  it('compares everybody where a run in full is wanted, and settles what is due', async () => {
    await open(false);
    await buy(3, '0 seconds');
    await wantFull(harness.opened.databases.state.pool, ['recent'], { dropDue: false });
    await run();
    expect(await harness.state('select evaluated, corrections, entered from run order by id desc limit 1')).toEqual([
      { evaluated: null, corrections: null, entered: 0 },
    ]);
    expect([await members(), await harness.state('select from due')]).toEqual([['3'], []]);
  });

  it('proves once a day that nothing was missed', async () => {
    await open(false);
    await buy(4, '0 seconds');
    await harness.state(`update definition set reconcile_at = now()`);
    await run();
    expect(await harness.state('select evaluated, corrections from run order by id desc limit 1')).toEqual([
      { evaluated: null, corrections: 0 },
    ]);
    expect(await members()).toEqual(['4']);
    await harness.sql(`insert into wanted values (5, clock_timestamp())`);
    await harness.state(`update definition set reconcile_at = now()`);
    await run();
    expect(await harness.state('select corrections from run order by id desc limit 1')).toEqual([{ corrections: 1 }]);
    expect(await harness.state('select tracking from definition')).toEqual([{ tracking: 'polled' }]);
  });
});
