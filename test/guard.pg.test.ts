import { afterEach, describe, expect, it } from 'vitest';
import { tidyUp } from '../src/sync/housekeeping.js';
import { runDefinition, type RunResult } from '../src/sync/run.js';
import { applyConfig } from './support/apply.js';
import { createHarness, type Definitions, type Harness, type HarnessOptions } from './support/harness.js';

/** A run that would change more than its guard allows, and what a person says of it. */
const TABLES = `
  create table people (id int primary key, vip boolean not null default true, spent int);
  insert into people select n, true, n from generate_series(1, 1200) as n`;
const PROFILES = { sql: `SELECT id AS profile_id, 'u' || id AS user_id FROM people` };
const VIP = { key: 'vip', sql: 'SELECT id AS profile_id FROM people WHERE vip', initial: 'skip' };
const LEADER = '00000000-0000-0000-0000-000000000001';

let harness: Harness;
afterEach(() => harness.close());

async function prepare(): Promise<void> {
  await tidyUp(harness.opened.databases.state);
  await applyConfig(harness.opened);
}

/** Everybody is a member, and nothing runs or is delivered by itself. */
async function begin(options: Partial<HarnessOptions> = {}): Promise<void> {
  harness = await createHarness({ tables: TABLES, key: 'user_id', profiles: PROFILES, audiences: [VIP], ...options });
  await prepare();
  for (const { key } of harness.opened.config.definitions)
    expect(await run(key)).toMatchObject({ outcome: 'succeeded' });
}

async function reconfigure(definitions: Definitions): Promise<void> {
  await harness.reconfigure({ profiles: PROFILES, ...definitions });
  await prepare();
}

/** Runs a definition by itself, or because a person has approved a held run. */
async function run(key = 'vip', approves: number | null = null): Promise<RunResult> {
  const { databases, config } = harness.opened;
  const definition = config.definitions.find((each) => each.key === key)!;
  const trigger = approves === null ? 'sync' : 'approve';
  const request = { trigger, approves, nextDueMs: () => null } as const;
  return (await runDefinition({ databases, config, leader: LEADER }, definition, request))!;
}

const runs = (): Promise<Record<string, unknown>[]> =>
  harness.state('select id, outcome, entered, exited, decision, error from run order by id');
const leave = (upTo: number): Promise<unknown> => harness.sql('update people set vip = id > $1', [upTo]);
const members = async (): Promise<unknown> => (await harness.state('select count(*) as n from snapshot'))[0]?.['n'];

/** Five hundred people have left, and the run that would say so is held. */
async function beginHeld(): Promise<number> {
  await begin();
  await leave(500);
  const held = await run();
  expect(held).toMatchObject({ outcome: 'held', counts: { exited: 500 } });
  return held.id;
}

describe('a run whose guard holds it', () => {
  it('writes nothing and sends nothing', async () => {
    await begin();
    await leave(361);
    expect(await run()).toMatchObject({
      outcome: 'held',
      error: 'Held: 361 of 1200 members would exit (over 30 %).',
      counts: { members: 839, exited: 361 },
    });
    expect(await members()).toBe(1200);
    expect(await harness.state('select from outbox union all select from transition')).toEqual([]);
    expect(await harness.state('select members from definition')).toEqual([{ members: 1200 }]);
  });

  it('goes on waiting where the next run finds little more, which is skipped', async () => {
    const held = await beginHeld();
    await leave(540);
    expect(await run()).toMatchObject({ id: held, outcome: 'held', counts: { exited: 540 } });
    expect(await runs()).toMatchObject([
      { outcome: 'succeeded' },
      { id: held, outcome: 'held', exited: 500, decision: null },
      { outcome: 'skipped', exited: 540, error: `Run ${held} is held: 540 of 1200 members would exit (over 30 %).` },
    ]);
  });

  it('gives way to a run that finds more, under another number: nobody approves what they have not seen', async () => {
    const held = await beginHeld();
    await leave(600);
    const next = await run();
    expect(next).toMatchObject({ outcome: 'held', counts: { exited: 600 } });
    expect(next.id).not.toBe(held);
    expect(await runs()).toMatchObject([
      { outcome: 'succeeded' },
      { id: held, outcome: 'cancelled', decision: null },
      { id: next.id, outcome: 'held', exited: 600, decision: null },
    ]);
    const late = await harness.request('approve', { run: held });
    expect(late).toMatchObject({ outcome: 'refused' });
    expect(late.answer).toContain(`Run ${next.id} has taken its place.`);
    expect(await members()).toBe(1200);
  });

  it('goes free by itself when its counts pass again', async () => {
    await beginHeld();
    await leave(10);
    expect(await run()).toMatchObject({ outcome: 'succeeded', counts: { exited: 10 } });
    expect(await runs()).toMatchObject([{ outcome: 'succeeded' }, { outcome: 'cancelled' }, { outcome: 'succeeded' }]);
    expect(await members()).toBe(1190);
  });

  it('goes free where its guard has been switched off', async () => {
    await beginHeld();
    await reconfigure({ audiences: [{ ...VIP, guard: 'off' }] });
    expect(await run()).toMatchObject({ outcome: 'succeeded', counts: { exited: 500 } });
  });
});

describe('an approval', () => {
  it('carries the run out and delivers it, also where a little more has changed since', async () => {
    const held = await beginHeld();
    await leave(550);
    const { outcome, progress, delivery } = await harness.request('approve', { run: held });
    expect(outcome).toBe('done');
    expect(progress.runs).toMatchObject([{ outcome: 'succeeded', exited: 550 }]);
    expect(delivery).toMatchObject({ waiting: 0 });
    expect(await runs()).toMatchObject([
      {},
      { id: held, outcome: 'held', decision: 'approved' },
      { outcome: 'succeeded' },
    ]);
    expect(await members()).toBe(650);
    expect(harness.simulator.userCount).toBe(550);

    const again = await harness.request('approve', { run: held });
    expect(again).toMatchObject({ outcome: 'refused', answer: `Run ${held} is not held any more. It was approved.` });
  });

  it('does not cover much more than the person saw, but what they are shown then', async () => {
    const held = await beginHeld();
    await leave(551);
    const next = await run('vip', held);
    expect(next).toMatchObject({ outcome: 'held', counts: { exited: 551 } });
    expect(await members()).toBe(1200);
    expect(await run('vip', held)).toMatchObject({ outcome: 'held' });
    expect(await run('vip', next.id)).toMatchObject({ outcome: 'succeeded', counts: { exited: 551 } });
  });

  it('does not cover another text', async () => {
    const held = await beginHeld();
    await reconfigure({ audiences: [{ ...VIP, sql: `${VIP.sql} AND id > 0` }] });
    const next = await run('vip', held);
    expect(next).toMatchObject({ outcome: 'held', counts: { exited: 500 } });
    expect(await members()).toBe(1200);
    expect(await run('vip', next.id)).toMatchObject({ outcome: 'succeeded' });
  });

  it('does not cover another held run', async () => {
    const held = await beginHeld();
    await leave(0);
    expect(await run()).toMatchObject({ outcome: 'succeeded' });
    await leave(500);
    expect(await run('vip', held)).toMatchObject({ outcome: 'held' });
    expect(await members()).toBe(1200);
  });
});

it('a rejection pauses the definition, and no other', async () => {
  await begin({ audiences: [VIP, { ...VIP, key: 'others' }] });
  await leave(500);
  const { id } = await run();
  await leave(0);
  expect((await harness.request('reject', { run: id })).outcome).toBe('done');
  expect(await harness.state(`select key, state, paused_because from definition order by id`)).toEqual([
    { key: 'vip', state: 'paused', paused_because: `Run ${id} was rejected.` },
    { key: 'others', state: 'active', paused_because: null },
  ]);
  // The others go on; the paused one is neither run nor can it be asked to run.
  expect((await harness.sync()).progress.runs).toMatchObject([{ definition: 'others', outcome: 'succeeded' }]);
  const refused = await harness.sync('vip');
  expect(refused).toMatchObject({ outcome: 'refused', answer: expect.stringContaining('"vip" is paused') as string });
});

describe('what is held', () => {
  const says = async (...keys: string[]): Promise<unknown> =>
    Object.fromEntries(
      await Promise.all(
        keys.map(async (key) => {
          const { outcome, error } = await run(key);
          return [key, error ?? outcome] as const;
        }),
      ),
    );

  it('is what empties an audience of fifty, not one of forty-nine', async () => {
    const some = (key: string, sql: string) => ({ ...VIP, key, sql: `${VIP.sql} AND ${sql}` });
    await begin({ audiences: [some('fifty', 'id <= 50'), some('fewer', 'id < 50')] });
    await leave(1200);
    expect(await says('fifty', 'fewer')).toEqual({ fifty: 'Held: all 50 members would exit.', fewer: 'succeeded' });
  });

  it('is what more than doubles an audience, but not its first run', async () => {
    await begin();
    await harness.sql('insert into people select n, true, n from generate_series(2001, 3201) as n');
    expect(await says('vip')).toEqual({ vip: 'Held: 1200 members would become 2401 (over 100 % more).' });
  });

  it('is what turns a third of a trait to null', async () => {
    const sql = 'SELECT id AS profile_id, spent, vip FROM people';
    await begin({ audiences: [], traits: [{ key: 'facts', sql, initial: 'skip' }] });
    await harness.sql('update people set spent = null where id <= 361');
    expect(await says('facts')).toEqual({ facts: 'Held: 361 of 1200 values would become null (over 30 %).' });
  });

  it('is nothing where the guard is off, and what its own limits say', async () => {
    const audiences = [
      { ...VIP, key: 'off', guard: 'off' },
      { ...VIP, key: 'strict', guard: { exits: '1%' } },
    ];
    await begin({ audiences });
    await leave(20);
    expect(await says('off', 'strict')).toEqual({
      off: 'succeeded',
      strict: 'Held: 20 of 1200 members would exit (over 1 %).',
    });
  });
});
