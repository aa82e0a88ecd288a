import fc from 'fast-check';
import { afterEach, describe, expect, it } from 'vitest';
import type { Client } from '../src/db/connect.js';
import { evaluateBatch, type BatchResult } from '../src/sync/batch.js';
import { wantFull } from '../src/sync/due.js';
import { openBatchSession, type BatchSession } from '../src/sync/evaluation.js';
import { tidyUp } from '../src/sync/housekeeping.js';
import { runDefinition, type RunContext, type RunResult } from '../src/sync/run.js';
import { abandonRuns } from '../src/sync/scheduler.js';
import { markStuck } from '../src/sync/waiting.js';
import { applyConfig } from './support/apply.js';
import { addDue } from './support/due.js';
import { createHarness, type Harness, type HarnessOptions } from './support/harness.js';
import {
  BEGINNING,
  change,
  changedProfiles,
  COMMON,
  edit,
  FILLERS,
  TABLES,
  TRAIT_SQL,
  type World,
} from './support/people.js';
import { until } from './support/until.js';

/**
 * Batches beside a run in full of the same definition. The definitions call `gate()`, which waits while a test holds the
 * gate for a run, or for a batch: by then the statement sees what had been committed before, and nothing that comes.
 */
const HISTORIES = Number(process.env['PROPERTY_RUNS'] ?? 6);
const LEADER = '00000000-0000-0000-0000-000000000001';
const NEXT_LEADER = '00000000-0000-0000-0000-000000000002';
/** The keys of the gates. Batches are told from runs by what their sessions are set to. */
const GATES = { run: 101, batch: 102 } as const;
const GATE = `
  create function gate() returns boolean language plpgsql as $$
  declare key int := case current_setting('plan_cache_mode') when 'auto' then ${GATES.run} else ${GATES.batch} end;
  begin
    perform pg_advisory_lock_shared(key);
    perform pg_advisory_unlock_shared(key);
    return true;
  end $$`;
const SHOP = `
  create table people (id int primary key, user_id text, email text, good bool not null);
  create index on people (user_id); create index on people (lower(btrim(email)));
  insert into people select n, null, 'p' || n || '@x.de', n <= 1000 from generate_series(1, 1100) as n;
  ${GATE}`;
const GOOD = { key: 'good', sql: 'SELECT id AS profile_id FROM people WHERE good AND (SELECT gate())', send: 'both' };

interface Site {
  harness: Harness;
  session: BatchSession;
  close: () => Promise<void>;
}

let site: Site | null = null;
afterEach(async () => {
  await site?.close();
  site = null;
});

async function openSite(options: HarnessOptions): Promise<Site> {
  const harness = await createHarness(options);
  const { databases, config } = harness.opened;
  await tidyUp(databases.state);
  await applyConfig(harness.opened);
  const client = await (databases.same ? databases.source : databases.state.pool).connect();
  const source = databases.same ? null : await databases.source.connect();
  const opened: Site = {
    harness,
    session: await openBatchSession({ databases, config }, client, source),
    close: async () => {
      client.release(true);
      source?.release(true);
      await harness.close();
    },
  };
  site = opened;
  return opened;
}

/** A thousand people are in the audience, and a hundred aren't; `ran`: it has run, and nothing waits to be sent. */
async function open(
  separate: boolean,
  { ran = true, ...more }: { ran?: boolean; [setting: string]: unknown } = {},
): Promise<Site> {
  const opened = await openSite({ tables: SHOP, separate, audiences: [{ ...GOOD, guard: 'off', ...more }] });
  const { harness } = opened;
  if (ran) await runInFull(opened);
  await harness.state(
    `update definition set tracking = 'live'; update definition_destination set backfill = null, backfill_until = null`,
  );
  return opened;
}

async function runInFull(
  { harness }: Site,
  { key = 'good', approves = null, moveCaptured }: RunOptions = {},
): Promise<RunResult> {
  const { databases, config } = harness.opened;
  const context: RunContext = { databases, config, leader: LEADER, ...(moveCaptured && { moveCaptured }) };
  const request = { trigger: approves === null ? 'schedule' : 'approve', approves, nextDueMs: () => null } as const;
  const result = await runDefinition(
    context,
    config.definitions.find((each) => each.key === key)!,
    request,
  );
  if (result === null) throw new Error('Another run is open.');
  return result;
}

interface RunOptions {
  key?: string;
  approves?: number | null;
  /** What happens between computing and applying. */
  moveCaptured?: () => Promise<boolean>;
}

async function evaluate({ harness, session }: Site, key = 'good'): Promise<BatchResult> {
  const [row] = await harness.state('select id from definition where key = $1', [key]);
  const definition = harness.opened.config.definitions.find((each) => each.key === key)!;
  return evaluateBatch(session, definition, row!['id'] as number, { limit: 1_000 });
}

const becomesDue = ({ harness }: Site, ...ids: readonly number[]): Promise<unknown> =>
  addDue(
    harness.opened.databases.state.pool,
    harness.opened.config.definitions.map(({ key }) => key),
    ids.map(String),
  );

/** Holds the gate until it is released. */
async function closeGate({ harness }: Site, gate: keyof typeof GATES): Promise<() => Promise<void>> {
  const client: Client = await harness.database.pool.connect();
  await client.query('select pg_advisory_lock($1)', [GATES[gate]]);
  return async () => {
    await client.query('select pg_advisory_unlock($1)', [GATES[gate]]);
    client.release();
  };
}

const isAtGate = ({ harness }: Site, gate: keyof typeof GATES): Promise<unknown> =>
  until(async () => {
    const rows = await harness.sql(
      `select from pg_locks where locktype = 'advisory' and not granted and classid = 0 and objid = $1
       and database = (select oid from pg_database where datname = current_database())`,
      [GATES[gate]],
    );
    return rows.length > 0;
  });

/** Waits until a run waits for the lock of the definition. */
const waitsForLock = ({ harness }: Site): Promise<unknown> =>
  until(async () => {
    const rows = await harness.state(
      `select from pg_locks where locktype = 'advisory' and not granted and classid <> 0
       and database = (select oid from pg_database where datname = current_database())`,
    );
    return rows.length > 0;
  });

/** Runs in full, has something happen while it computes, and lets it go on. */
async function runAround(each: Site, happens: () => Promise<void>, options: RunOptions = {}): Promise<RunResult> {
  const release = await closeGate(each, 'run');
  const running = runInFull(each, options);
  try {
    await isAtGate(each, 'run');
    await happens();
  } finally {
    await release();
  }
  return running;
}

/** The first leaves, and one who wasn't in the audience enters. */
async function changeTwo(each: Site): Promise<void> {
  await each.harness.sql('update people set good = not good where id in (1, 1001)');
  await becomesDue(each, 1, 1001);
}

const recipientsOf = async ({ harness }: Site): Promise<readonly unknown[]> =>
  (await harness.state('select recipient from snapshot order by profile_id::int')).map(({ recipient }) => recipient);

/** What is to be told of, each person's in order. */
const told = async ({ harness }: Site): Promise<Record<string, unknown>[]> =>
  harness.state(
    `select recipient, string_agg(coalesce(event, 'mark'), ', ' order by id) as what from outbox group by 1 order by 1`,
  );

/** The two changes were told of once each, and nothing is left to be found or evaluated. */
async function expectToldOnce(each: Site): Promise<void> {
  expect(await told(each)).toEqual([
    { recipient: 'e:p1001@x.de', what: 'mark, Audience Entered' },
    { recipient: 'e:p1@x.de', what: 'mark, Audience Exited' },
  ]);
  expect(await recipientsOf(each)).toEqual(Array.from({ length: 1_000 }, (_, index) => `e:p${index + 2}@x.de`));
  await expectSettled(each);
  expect(await told(each)).toHaveLength(2);
}

/** Nothing waits, nothing is claimed, and a run in full finds nothing. */
async function expectSettled(each: Site): Promise<void> {
  const { harness } = each;
  expect(await harness.state('select profile_id, claimed_by from due')).toEqual([]);
  expect(await harness.state('select key from definition where full_run is not null')).toEqual([]);
  for (const { key } of harness.opened.config.definitions) {
    expect(await runInFull(each, { key })).toMatchObject({
      outcome: 'succeeded',
      counts: { entered: 0, exited: 0, changed: 0 },
      corrections: 0,
    });
  }
  expect(await harness.state('select from noted')).toEqual([]);
  expect(await harness.state(`select key, polled_because from definition where tracking <> 'live'`)).toEqual([]);
}

const NOTHING_FOUND = { outcome: 'succeeded', corrections: 0, counts: { entered: 0, exited: 0, changed: 0 } };

describe.each([
  ['one database', false],
  ['two databases', true],
])('beside a run in full in %s', (_, separate) => {
  it('a batch that has begun before is waited for, and the run finds what it wrote', async () => {
    const each = await open(separate);
    await changeTwo(each);
    const release = await closeGate(each, 'batch');
    const evaluating = evaluate(each);
    await isAtGate(each, 'batch');
    const running = runInFull(each);
    await waitsForLock(each);
    await release();
    expect(await evaluating).toMatchObject({ kind: 'written', changed: 2 });
    expect(await running).toMatchObject(NOTHING_FOUND);
    await expectToldOnce(each);
  });

  it('a batch is written while the run computes what was before, which the run then leaves out', async () => {
    const each = await open(separate);
    const ran = await runAround(each, async () => {
      await changeTwo(each);
      expect(await evaluate(each)).toMatchObject({ kind: 'written', changed: 2 });
    });
    expect(ran).toMatchObject(NOTHING_FOUND);
    await expectToldOnce(each);
  });

  it('a batch is written between computing and applying', async () => {
    const each = await open(separate);
    const ran = await runInFull(each, {
      moveCaptured: async () => {
        await changeTwo(each);
        expect(await evaluate(each)).toMatchObject({ kind: 'written', changed: 2 });
        return true;
      },
    });
    expect(ran).toMatchObject(NOTHING_FOUND);
    await expectToldOnce(each);
  });

  it('what has become due is left to its batch, whether the run has computed it or not', async () => {
    const each = await open(separate);
    // The run sees it, and learns that it is due only after that.
    await each.harness.sql('update people set good = not good where id in (1, 1001)');
    const ran = await runInFull(each, {
      moveCaptured: async () => {
        await each.harness.sql('update people set good = false where id = 2');
        await becomesDue(each, 1, 2, 1001);
        return true;
      },
    });
    expect(ran).toMatchObject(NOTHING_FOUND);
    await each.harness.sql('update people set good = true where id = 2');
    await becomesDue(each, 2);
    expect(await evaluate(each)).toMatchObject({ kind: 'written', changed: 2 });
    await expectToldOnce(each);
  });

  it('a change is told of once that was undone while the run computed', async () => {
    const each = await open(separate);
    await changeTwo(each);
    await each.harness.sql('update people set good = true where id = 500');
    const ran = await runAround(each, async () => {
      await evaluate(each);
      await each.harness.sql('update people set good = not good where id in (1, 1001)');
      await becomesDue(each, 1, 1001);
      await evaluate(each);
    });
    expect(ran).toMatchObject(NOTHING_FOUND);
    expect(await told(each)).toEqual([
      { recipient: 'e:p1001@x.de', what: 'mark, Audience Entered, Audience Exited' },
      { recipient: 'e:p1@x.de', what: 'mark, Audience Exited, Audience Entered' },
    ]);
    await expectSettled(each);
  });

  it('somebody who moves on while the run computes is not left where they were in between', async () => {
    const each = await open(separate);
    const move = async (to: string): Promise<void> => {
      await each.harness.sql('update people set email = $1 where id = 1', [to]);
      await becomesDue(each, 1);
    };
    await move('second@x.de');
    const ran = await runAround(each, async () => {
      await move('third@x.de');
      expect(await evaluate(each)).toMatchObject({ kind: 'written' });
    });
    expect(ran).toMatchObject(NOTHING_FOUND);
    expect((await recipientsOf(each)).slice(0, 2)).toEqual(['e:third@x.de', 'e:p2@x.de']);
    expect(await told(each)).toEqual([
      { recipient: 'e:p1@x.de', what: 'mark' },
      { recipient: 'e:third@x.de', what: 'mark' },
    ]);
    await expectSettled(each);
  });

  it('somebody who enters and moves on while the run computes is entered where they are now', async () => {
    const each = await open(separate);
    await each.harness.sql('update people set good = true where id = 1001');
    await becomesDue(each, 1001);
    const ran = await runAround(each, async () => {
      await each.harness.sql(`update people set email = 'second@x.de' where id = 1001`);
      await becomesDue(each, 1001);
      expect(await evaluate(each)).toMatchObject({ kind: 'written', changed: 1 });
    });
    expect(ran).toMatchObject(NOTHING_FOUND);
    expect(await told(each)).toEqual([{ recipient: 'e:second@x.de', what: 'mark, Audience Entered' }]);
    await expectSettled(each);
  });

  it('an address that was given on while the run computed is whose it is now', async () => {
    const each = await open(separate);
    await each.harness.sql(`update people set email = 'second@x.de' where id = 1`);
    await becomesDue(each, 1);
    const ran = await runAround(each, async () => {
      await each.harness.sql(`update people set email = 'p1@x.de' where id = 2`);
      await becomesDue(each, 2);
      expect(await evaluate(each)).toMatchObject({ kind: 'written' });
    });
    expect(ran).toMatchObject(NOTHING_FOUND);
    expect(
      await each.harness.state(`select recipient from snapshot where profile_id in ('1', '2') order by profile_id`),
    ).toEqual([{ recipient: 'e:second@x.de' }, { recipient: 'e:p1@x.de' }]);
    await expectSettled(each);
  });

  it('what is due during a first run waits for it, and those who were members before are not told of', async () => {
    const each = await open(separate, { ran: false, initial: 'skip' });
    // By its start: the run settles it.
    await becomesDue(each, 3);
    const ran = await runAround(each, async () => {
      await changeTwo(each);
      expect(await evaluate(each)).toEqual({ kind: 'waits', because: 'its first run has not ended' });
    });
    expect(ran).toMatchObject({ outcome: 'succeeded', counts: { entered: 1_000 }, corrections: null });
    expect(await told(each)).toEqual([]);
    expect(await each.harness.state('select profile_id from due order by id')).toEqual([
      { profile_id: '1' },
      { profile_id: '1001' },
    ]);
    expect(await evaluate(each)).toMatchObject({ kind: 'written', changed: 2 });
    await expectToldOnce(each);
  });

  it('a run that a person has approved settles what was due at its start, and leaves what comes', async () => {
    const each = await open(separate, { guard: { exits: '30%' } });
    await each.harness.sql('update people set good = false where id between 1 and 400');
    const held = await runInFull(each);
    expect(held).toMatchObject({ outcome: 'held', counts: { exited: 400 } });
    await becomesDue(each, ...Array.from({ length: 400 }, (_, index) => index + 1));
    expect(await evaluate(each)).toEqual({ kind: 'waits', because: 'a held run waits for a person' });
    const approved = await runAround(
      each,
      async () => {
        await each.harness.sql('update people set good = not good where id in (2, 1001)');
        await becomesDue(each, 2, 1001);
        expect(await evaluate(each)).toMatchObject({ kind: 'waits' });
      },
      { approves: held.id },
    );
    expect(approved).toMatchObject({ outcome: 'succeeded', counts: { exited: 399 }, corrections: null });
    expect(await each.harness.state('select profile_id from due order by id')).toEqual([
      { profile_id: '2' },
      { profile_id: '1001' },
    ]);
    expect(await evaluate(each)).toMatchObject({ kind: 'written', changed: 1 });
    const events = await each.harness.state(
      `select event, count(*)::int as n from outbox where kind = 'e' group by 1 order by 1`,
    );
    expect(events).toEqual([
      { event: 'Audience Entered', n: 1 },
      { event: 'Audience Exited', n: 399 },
    ]);
    await expectSettled(each);
  });

  it('everybody who comes to be wanted meanwhile is compared by another run, and nothing counts as missed', async () => {
    const each = await open(separate);
    // As by a TRUNCATE: nobody is due, everybody may be meant.
    await each.harness.sql('update people set good = false where id <= 10');
    const ran = await runInFull(each, {
      moveCaptured: async () => {
        await each.harness.sql('update people set good = false where id = 11');
        await wantFull(each.harness.opened.databases.state.pool, ['good'], { dropDue: false });
        return true;
      },
    });
    expect(ran).toMatchObject({ outcome: 'succeeded', counts: { exited: 10 }, corrections: null });
    expect(
      await each.harness.state(
        'select tracking, full_wanted > full_done as wanted, due_at <= now() as due from definition',
      ),
    ).toEqual([{ tracking: 'live', wanted: true, due: true }]);
    expect(await runInFull(each)).toMatchObject({ outcome: 'succeeded', counts: { exited: 1 }, corrections: null });
    await expectSettled(each);
  });

  it('nothing counts as missed where it is not known what was captured', async () => {
    const each = await open(separate);
    await each.harness.sql('update people set good = false where id <= 10');
    const ran = await runInFull(each, { moveCaptured: () => Promise.resolve(false) });
    expect(ran).toMatchObject({ outcome: 'succeeded', counts: { exited: 10 }, corrections: null });
    await expectSettled(each);
  });

  it('what changed without being followed is corrected, counted, and polled from then on', async () => {
    const each = await open(separate);
    await each.harness.sql('update people set good = false where id <= 10');
    expect(await runInFull(each, { moveCaptured: () => Promise.resolve(true) })).toMatchObject({ corrections: 10 });
    expect(await each.harness.state('select tracking from definition')).toEqual([{ tracking: 'polled' }]);
  });

  it.each(['while it computes', 'between computing and applying'])(
    'a run whose leader is gone %s writes nothing, and neither claims nor has noted anything any more',
    async (moment) => {
      const each = await open(separate);
      const { config, databases } = each.harness.opened;
      await each.harness.sql('update people set good = false where id = 3');
      await becomesDue(each, 3);
      await markStuck(databases.state.pool, 1, 'It could not be evaluated.');
      const takeOver = async (): Promise<void> => {
        // It claims what was due, since that couldn't be evaluated; what comes is evaluated and noted.
        expect(await each.harness.state('select profile_id, claimed_by is not null as claimed from due')).toEqual([
          { profile_id: '3', claimed: true },
        ]);
        await changeTwo(each);
        expect(await evaluate(each)).toMatchObject({ kind: 'written', changed: 2 });
        expect((await each.harness.state('select from noted')).length).toBeGreaterThan(0);
        expect(await abandonRuns({ databases, config, leader: NEXT_LEADER })).toBe(1);
        expect(await each.harness.state('select profile_id, claimed_by from due')).toEqual([
          { profile_id: '3', claimed_by: null },
        ]);
        await each.harness.sql('update people set good = true where id = 3');
      };
      // What was captured is moved before a run marks its start, so as to be claimed, and once more before it applies.
      let moves = 0;
      const moveCaptured = async (): Promise<boolean> => {
        moves += 1;
        if (moves === 2) await takeOver();
        return true;
      };
      const ran =
        moment === 'while it computes' ? await runAround(each, takeOver) : await runInFull(each, { moveCaptured });
      expect(ran).toMatchObject({ outcome: 'abandoned' });
      expect(await evaluate(each)).toMatchObject({ kind: 'written', changed: 0 });
      await markStuck(databases.state.pool, 1, null);
      await expectToldOnce(each);
    },
  );

  it('a run that breaks off gives back what it had claimed', async () => {
    const each = await open(separate);
    await changeTwo(each);
    await markStuck(each.harness.opened.databases.state.pool, 1, 'It could not be evaluated.');
    const ran = await runAround(each, async () => {
      expect(await evaluate(each)).toEqual({ kind: 'nothing' });
      await each.harness.sql(
        `select pg_terminate_backend(pid) from pg_locks where locktype = 'advisory' and not granted and objid = ${GATES.run}`,
      );
    });
    expect(ran).toMatchObject({ outcome: 'failed' });
    expect(await evaluate(each)).toMatchObject({ kind: 'written', changed: 2 });
    await markStuck(each.harness.opened.databases.state.pool, 1, null);
    await expectToldOnce(each);
  });
});

/** When people change: before a run computes, while it does, before it applies, after it; and are evaluated then or not. */
const happening = fc.record({ edits: fc.array(edit, { maxLength: 3 }), isEvaluated: fc.boolean() });
const history = fc.array(
  fc.record({
    before: happening,
    computing: happening,
    applying: happening,
    key: fc.constantFrom('people', 'null', 'keep'),
  }),
  { minLength: 1, maxLength: 4 },
);

async function openPeople(separate: boolean): Promise<Site> {
  const gated = (sql: string): string => `SELECT * FROM (${sql}) AS all_rows WHERE (SELECT gate())`;
  return openSite({
    tables: `${TABLES}; create index on people (profile); create index on people (user_id); create index on people (lower(btrim(email)));
      create index on members (profile); create index on scores (profile); ${GATE}`,
    separate,
    profiles: {
      sql: `SELECT profile AS profile_id, user_id, email FROM people UNION ALL SELECT n, 'f' || n, 'f' || n || '@x.de' FROM ${FILLERS}`,
    },
    audiences: [
      {
        key: 'people',
        sql: gated(`SELECT profile AS profile_id, note FROM members UNION ALL SELECT n, null FROM ${FILLERS}`),
        ...COMMON,
      },
    ],
    traits: [
      { key: 'null', sql: gated(TRAIT_SQL), ...COMMON },
      { key: 'keep', sql: gated(TRAIT_SQL), on_missing: 'keep', prefix: 'kept_', ...COMMON },
    ],
  });
}

const PEOPLE_KEYS = ['people', 'null', 'keep'];

async function begin(each: Site): Promise<void> {
  const { harness } = each;
  await harness.state('truncate due, noted, conflict, transition; delete from outbox; delete from dead_call');
  await harness.sql('select become($1)', [JSON.stringify(BEGINNING)]);
  await harness.state(
    `update definition set first_run_at = null, members = 0, tracking = 'none', polled_because = null; delete from snapshot`,
  );
  for (const key of PEOPLE_KEYS) expect(await runInFull(each, { key })).toMatchObject({ outcome: 'succeeded' });
  await harness.state(`update definition set tracking = 'live'`);
}

describe.each([
  ['one database', false],
  ['two databases', true],
])('whatever happens beside runs in full in %s', (_, separate) => {
  it('they correct nothing, and nothing is left to be corrected', async () => {
    const each = await openPeople(separate);
    await fc.assert(
      fc.asyncProperty(history, async (runs) => {
        await begin(each);
        let world: World = BEGINNING;
        const happens = async ({
          edits,
          isEvaluated,
        }: {
          edits: Parameters<typeof change>[1][];
          isEvaluated: boolean;
        }): Promise<void> => {
          const next = edits.reduce(change, world);
          await each.harness.sql('select become($1)', [JSON.stringify(next)]);
          await becomesDue(each, ...changedProfiles(world, next).map(Number));
          world = next;
          if (isEvaluated) for (const key of PEOPLE_KEYS) await evaluate(each, key);
        };
        for (const { before, computing, applying, key } of runs) {
          await happens(before);
          const moveCaptured = async (): Promise<boolean> => (await happens(applying), true);
          const ran = await runAround(each, () => happens(computing), { key, moveCaptured });
          expect(ran).toMatchObject({ outcome: 'succeeded', corrections: 0 });
        }
        for (const key of PEOPLE_KEYS) await evaluate(each, key);
        await expectSettled(each);
      }),
      { numRuns: HISTORIES },
    );
  });
});
