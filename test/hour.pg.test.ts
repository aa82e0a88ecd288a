import { afterEach, describe, expect, it } from 'vitest';
import { evaluateBatch, type BatchResult } from '../src/sync/batch.js';
import { openBatchSession, type BatchSession } from '../src/sync/evaluation.js';
import { runDefinition, type RunResult } from '../src/sync/run.js';
import { markStuck } from '../src/sync/waiting.js';
import { addDue } from './support/due.js';
import { createHarness, type Harness } from './support/harness.js';

/** The guard of a definition that follows changes: any single one is small, so it judges what was written within the hour. */
const LEADER = '00000000-0000-0000-0000-000000000001';
const MEMBERS = 1_000;

let harness: Harness;
let session: BatchSession;
afterEach(async () => {
  session.client.release(true);
  await harness.close();
});

async function open(): Promise<void> {
  harness = await createHarness({
    tables: `create table people (id int primary key, user_id text, email text, good bool not null);
      insert into people select n, 'u' || n, 'u' || n || '@x.de', true from generate_series(1, ${MEMBERS}) as n`,
    audiences: [{ key: 'good', sql: 'SELECT id AS profile_id FROM people WHERE good', initial: 'skip' }],
  });
  await harness.sync();
  await harness.state(`update definition set tracking = 'live'`);
  const { databases, config } = harness.opened;
  session = await openBatchSession({ databases, config }, await databases.source.connect(), null);
}

async function become(good: boolean, from: number, to: number): Promise<BatchResult> {
  await harness.sql('update people set good = $1 where id between $2 and $3', [good, from, to]);
  const ids = Array.from({ length: to - from + 1 }, (_, index) => String(from + index));
  await addDue(harness.opened.databases.state.pool, ['good'], ids);
  return evaluate();
}

const evaluate = (): Promise<BatchResult> =>
  evaluateBatch(session, harness.opened.config.definitions[0]!, 1, { limit: 1_000 });

async function run(approves: number | null = null): Promise<RunResult> {
  const { databases, config } = harness.opened;
  const request = { trigger: approves === null ? 'schedule' : 'approve', approves, nextDueMs: () => null } as const;
  return (await runDefinition({ databases, config, leader: LEADER }, config.definitions[0]!, request))!;
}

const due = async (): Promise<number> => (await harness.state('select from due')).length;

describe('the guard of a definition that follows changes', () => {
  it('lets a few people leave, and holds when 30 % have left within the hour', async () => {
    await open();
    expect(await become(false, 1, 290)).toMatchObject({ kind: 'written', changed: 290 });
    expect(await become(false, 291, 310)).toEqual({
      kind: 'holds',
      because: '310 of 1000 members would exit (over 30 %)',
    });
    expect(await due()).toBe(20);
    expect(await harness.state('select members from definition')).toEqual([{ members: 710 }]);
  });

  it('counts nobody who has come back', async () => {
    await open();
    for (let round = 0; round < 4; round += 1) {
      expect(await become(false, 1, 100)).toMatchObject({ kind: 'written', changed: 100 });
      expect(await become(true, 1, 100)).toMatchObject({ kind: 'written', changed: 100 });
    }
  });

  it('forgets what is longer ago', async () => {
    await open();
    await become(false, 1, 290);
    await harness.state(`update tally set minute = minute - interval '61 minutes'`);
    expect(await become(false, 291, 310)).toMatchObject({ kind: 'written', changed: 20 });
  });

  it('is shown to a person by a run in full, whose approval writes it and begins the hour anew', async () => {
    await open();
    await become(false, 1, 290);
    await become(false, 291, 310);
    await markStuck(harness.opened.databases.state.pool, 1, 'Its guard holds what has changed.');
    const held = await run();
    expect(held).toMatchObject({ outcome: 'held', counts: { exited: 20 } });
    expect(await evaluate()).toMatchObject({ kind: 'waits', because: 'a held run waits for a person' });
    expect(await due()).toBe(20);
    expect(await run(held.id)).toMatchObject({ outcome: 'succeeded', counts: { exited: 20, members: 690 } });
    expect(await due()).toBe(0);
    expect(await become(false, 311, 500)).toMatchObject({ kind: 'written', changed: 190 });
  });
});
