import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { startEvaluator, type Evaluator } from '../src/realtime/evaluator.js';
import { openWorker } from '../src/realtime/worker.js';
import { runDefinition } from '../src/sync/run.js';
import { addDue } from './support/due.js';
import { createHarness, type Harness } from './support/harness.js';
import { holdDefinition } from './support/lock.js';

/** What is due of real definitions, evaluated by workers: the snapshot follows. */
const SOON = { timeout: 30_000, interval: 10 };
const TABLES = `
  create table people (id bigint primary key, user_id text, email text, share int not null);
  insert into people select n, 'u' || n, 'p' || n || '@x.de', 1 from generate_series(1, 200) as n`;
const above = (least: number): Record<string, unknown> => ({
  audiences: [{ key: 'above', sql: `SELECT id AS profile_id FROM people WHERE 100 / share > ${least}`, guard: 'off' }],
});

let harness: Harness;
let evaluator: Evaluator | null;
let tooSlow: string[];
beforeEach(() => {
  [evaluator, tooSlow] = [null, []];
});
afterEach(async () => {
  await evaluator?.stop();
  await harness.close();
});

async function open({ separate = false } = {}): Promise<void> {
  harness = await createHarness({ tables: TABLES, separate, ...above(10) });
  await harness.sync();
  await harness.state(`update definition set tracking = 'live'`);
  follow();
}

function follow(): void {
  let context = { databases: harness.opened.databases, config: harness.opened.config };
  evaluator = startEvaluator({
    state: harness.opened.databases.state.pool,
    definitions: () => harness.opened.config.definitions,
    openWorker: () =>
      openWorker(() => {
        const { config, databases } = harness.opened;
        if (context.config !== config) context = { databases, config };
        return context;
      }),
    follows: true,
    onRaised: () => undefined,
    onTooSlow: (_, sentence) => {
      tooSlow.push(sentence);
      return Promise.resolve();
    },
    log: harness.opened.log,
  });
}

async function runInFull(): Promise<void> {
  const { databases, config } = harness.opened;
  const leader = '00000000-0000-0000-0000-000000000001';
  const request = { trigger: 'sync', approves: null, nextDueMs: () => null } as const;
  const result = await runDefinition({ databases, config, leader }, config.definitions[0]!, request);
  expect(result).toMatchObject({ outcome: 'succeeded' });
}

/** Gives people a share and has them evaluated. */
async function share(amount: number, ...ids: readonly number[]): Promise<void> {
  await harness.sql('update people set share = $1 where id = any($2)', [amount, ids]);
  evaluator?.notify(await addDue(harness.opened.databases.state.pool, ['above'], ids.map(String)));
}
async function members(): Promise<number> {
  const [row] = await harness.state('select count(*)::int as members from snapshot where not kept');
  return Number(row?.['members']);
}
const waits = async (): Promise<number> => (await harness.state('select from due where parked_at is null')).length;

describe.each([{ separate: false }, { separate: true }])('a definition, state apart: $separate', ({ separate }) => {
  beforeEach(() => open({ separate }));

  it('follows what has changed', async () => {
    await share(50, 1, 2, 3);
    await expect.poll(members, SOON).toBe(197);
    await share(2, 3);
    await share(60, 4);
    await expect.poll(waits, SOON).toBe(0);
    expect(await members()).toBe(197);
    const [row] = await harness.state('select members from definition');
    expect(row).toEqual({ members: 197 });
  });

  it('follows everybody but those whose rows make it fail, and them too once that is mended', async () => {
    await share(0, 7);
    await share(50, 1, 2, 3, 4);
    await expect.poll(members, SOON).toBe(196);
    expect(await harness.state('select profile_id, reason from due')).toEqual([
      { profile_id: '7', reason: 'Evaluating what has changed divides by zero [SQLSTATE 22012].' },
    ]);
    await share(50, 7);
    await expect.poll(members, SOON).toBe(195);
    expect(await harness.state('select from due')).toEqual([]);
  });
});

describe('a definition that is followed', () => {
  beforeEach(() => open());

  it('waits while somebody else writes it, and is not taken for slow', async () => {
    const held = await holdDefinition(harness.opened.databases.state.pool);
    await share(50, 1);
    // Longer than a batch waits for the lock, and than its statements may take.
    // One that stands still with the lock is cut off.
    await held.client.query('select pg_sleep(6)');
    await held.client.query('select pg_sleep(6)');
    expect(await members()).toBe(200);
    await held.release();
    await expect.poll(members, SOON).toBe(199);
    expect(tooSlow).toEqual([]);
    expect(await harness.state('select stuck_because from definition')).toEqual([{ stuck_because: null }]);
  });

  it('goes on where a table that it reads was altered', async () => {
    await share(50, 1);
    await expect.poll(members, SOON).toBe(199);
    await harness.sql('alter table people alter column share type bigint, add column note text');
    await share(50, 2);
    await expect.poll(members, SOON).toBe(198);
    await expect
      .poll(() => harness.state('select stuck_because from definition'), SOON)
      .toEqual([{ stuck_because: null }]);
  });

  it('is evaluated by its new text once that has run, and not before', async () => {
    await evaluator?.stop();
    await harness.reconfigure(above(40));
    follow();
    await share(2, 1);
    await share(5, 2);
    const began = performance.now();
    await expect.poll(() => performance.now() - began, { timeout: 5_000 }).toBeGreaterThan(1_500);
    expect(await waits()).toBe(2);
    expect(await members()).toBe(200);
    await runInFull();
    await expect.poll(waits, SOON).toBe(0);
    expect(await members()).toBe(199);
    await share(5, 3);
    await expect.poll(members, SOON).toBe(198);
  });
});
