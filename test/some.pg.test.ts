import fc from 'fast-check';
import { afterEach, describe, expect, it } from 'vitest';
import type { ProjectKey } from '../src/core/definition.js';
import { evaluateBatch, type BatchResult } from '../src/sync/batch.js';
import { openBatchSession, type BatchSession } from '../src/sync/evaluation.js';
import { tidyUp } from '../src/sync/housekeeping.js';
import { runDefinition, type RunResult } from '../src/sync/run.js';
import { applyConfig } from './support/apply.js';
import { addDue } from './support/due.js';
import { createHarness, type Harness } from './support/harness.js';
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

/**
 * Evaluating some profiles against a run in full: two databases live through the same history; in one everything is
 * compared after each step, in the other only whose rows have changed. Both must come to the same, whatever happens.
 */
const HISTORIES = Number(process.env['PROPERTY_RUNS'] ?? 6);
const LEADER = '00000000-0000-0000-0000-000000000001';
const KEYS = ['people', 'null', 'keep'];

interface Site {
  harness: Harness;
  session: BatchSession;
  close: () => Promise<void>;
}

const sites: Site[] = [];
afterEach(async () => {
  for (const site of sites.splice(0)) await site.close();
});

/** How profiles are known: by what their rows say, or by a userId that is nothing but their id. */
type Users = 'of their own' | 'their ids';
const PEOPLE: Record<Users, { tables: string; sql: string }> = {
  'of their own': {
    tables: '',
    sql: `SELECT profile AS profile_id, user_id, email FROM people UNION ALL SELECT n, 'f' || n, 'f' || n || '@x.de' FROM ${FILLERS}`,
  },
  'their ids': {
    tables: `; insert into people select n, null, 'f' || n || '@x.de' from ${FILLERS}`,
    sql: 'SELECT profile AS profile_id, profile::text AS user_id, email FROM people',
  },
};

async function open(key: ProjectKey, users: Users, separate: boolean): Promise<Site> {
  const people = PEOPLE[users];
  const harness = await createHarness({
    tables: `${TABLES}; create index on people (profile); create index on people (user_id); create index on people (lower(btrim(email)));
      create index on members (profile); create index on scores (profile)${people.tables}`,
    key,
    separate,
    profiles: { sql: people.sql },
    audiences: [
      {
        key: 'people',
        sql: `SELECT profile AS profile_id, note FROM members UNION ALL SELECT n, null FROM ${FILLERS}`,
        ...COMMON,
      },
    ],
    traits: [
      { key: 'null', sql: TRAIT_SQL, ...COMMON },
      { key: 'keep', sql: TRAIT_SQL, on_missing: 'keep', prefix: 'kept_', ...COMMON },
    ],
  });
  const { databases, config } = harness.opened;
  await tidyUp(databases.state);
  await applyConfig(harness.opened);
  const client = await (databases.same ? databases.source : databases.state.pool).connect();
  const source = databases.same ? null : await databases.source.connect();
  const site: Site = {
    harness,
    session: await openBatchSession({ databases, config }, client, source),
    close: async () => {
      client.release(true);
      source?.release(true);
      await harness.close();
    },
  };
  sites.push(site);
  return site;
}

async function runInFull({ harness }: Site, key: string): Promise<RunResult> {
  const { databases, config } = harness.opened;
  const definition = config.definitions.find((each) => each.key === key)!;
  const result = await runDefinition({ databases, config, leader: LEADER }, definition, {
    trigger: 'sync',
    approves: null,
    nextDueMs: () => null,
  });
  expect(result).toMatchObject({ outcome: 'succeeded', error: null });
  return result!;
}

async function evaluate({ harness, session }: Site, key: string, limit: number): Promise<BatchResult> {
  const definition = harness.opened.config.definitions.find((each) => each.key === key)!;
  const [row] = await harness.state('select id from definition where key = $1', [key]);
  return evaluateBatch(session, definition, row!['id'] as number, { limit });
}

/** The version that was given last; `lowest` the lowest id of what has a later one than `version`. */
async function readRaised({ harness }: Site, version = 0): Promise<{ version: number; lowest: number | null }> {
  const [raised] = await harness.state(
    `select (select last_value from version)::int as version, (select min(id)::int from outbox where version > $1) as lowest`,
    [version],
  );
  return raised as { version: number; lowest: number | null };
}

/** All that a comparison leaves, but moments and numbers. */
async function readAll({ harness }: Site): Promise<Record<string, unknown>> {
  const real = `recipient !~ '^.:(f|1\\d\\d\\d$)'`;
  const key = '(select key from definition as d where d.id = definition_id) as key';
  return {
    snapshot: await harness.state(
      `select ${key}, recipient, profile_id, others, beside, value, kept, beside_changed from snapshot where ${real} order by 1, 2`,
    ),
    marks: await harness.state(
      `select ${key}, recipient, array(select unnest(columns) order by 1) as columns, with_beside, confirm, exit_of, follows
       from outbox where kind = 'm' and ${real} order by 1, 2`,
    ),
    events: await harness.state(
      `select ${key}, recipient, event, properties, beside, confirm from outbox where kind = 'e' and ${real} order by 1, 2, 3, properties::text`,
    ),
    history: await harness.state(`select ${key}, recipient, kind::text from transition where ${real} order by 1, 2, 3`),
    conflicts: await harness.state(
      `select ${key}, recipient, array(select unnest(others) order by 1) as others from conflict order by 1, 2`,
    ),
    members: await harness.state('select key, members from definition order by 1'),
  };
}

async function become({ harness }: Site, world: World): Promise<void> {
  await harness.sql('select become($1)', [JSON.stringify(world)]);
}

async function followChanges(site: Site, profiles: readonly string[]): Promise<void> {
  await addDue(site.harness.opened.databases.state.pool, KEYS, profiles);
}

/** A beginning that both know, followed from there on. */
async function begin(site: Site, { follows }: { follows: boolean }): Promise<void> {
  await site.harness.state('truncate due, noted, conflict, transition; delete from outbox; delete from dead_call');
  await become(site, BEGINNING);
  await site.harness.state(
    `update definition set first_run_at = null, members = 0, tracking = 'none', polled_because = null; delete from snapshot`,
  );
  for (const key of KEYS) await runInFull(site, key);
  if (follows) await site.harness.state(`update definition set tracking = 'live'`);
}

const history = fc.array(
  fc.record({ edits: fc.array(edit, { minLength: 1, maxLength: 4 }), delivered: fc.boolean() }),
  { minLength: 2, maxLength: 6 },
);

describe.each<[ProjectKey, Users, boolean]>([
  ['hybrid', 'of their own', false],
  ['email', 'of their own', false],
  ['user_id', 'of their own', false],
  ['hybrid', 'of their own', true],
  ['hybrid', 'their ids', false],
  ['user_id', 'their ids', true],
])('by %s, userIds %s, in two databases: %s', (key, users, separate) => {
  it('evaluating whose rows have changed comes to what a run in full comes to', async () => {
    const [full, some] = [await open(key, users, false), await open(key, users, separate)];
    await fc.assert(
      fc.asyncProperty(history, async (steps) => {
        await begin(full, { follows: false });
        await begin(some, { follows: true });
        let world = BEGINNING;
        for (const { edits, delivered } of steps) {
          const next = edits.reduce(change, world);
          if (delivered) for (const site of [full, some]) await site.harness.state('delete from outbox');
          for (const site of [full, some]) await become(site, next);
          await followChanges(some, changedProfiles(world, next));
          for (const each of KEYS) {
            await runInFull(full, each);
            const { version } = await readRaised(some);
            const result = await evaluate(some, each, 100);
            const { lowest } = await readRaised(some, version);
            expect(result.kind === 'written' ? result.raisedFrom : null).toBe(lowest);
          }
          expect(await readAll(some)).toEqual(await readAll(full));
          world = next;
        }
        expect(await some.harness.state('select * from due')).toEqual([]);
      }),
      { numRuns: HISTORIES },
    );
  });

  it('evaluating one after the other leaves nothing to be corrected', async () => {
    const site = await open(key, users, separate);
    await fc.assert(
      fc.asyncProperty(history, async (steps) => {
        await begin(site, { follows: true });
        let world = BEGINNING;
        for (const { edits } of steps) {
          const next = edits.reduce(change, world);
          await become(site, next);
          await followChanges(site, changedProfiles(world, next));
          for (const each of KEYS) {
            while ((await evaluate(site, each, 1)).kind === 'written');
          }
          const before = await readAll(site);
          for (const each of KEYS) await runInFull(site, each);
          expect(await readAll(site)).toEqual(before);
          expect(await site.harness.state('select sum(corrections)::int as corrections from run')).toEqual([
            { corrections: 0 },
          ]);
          world = next;
        }
      }),
      { numRuns: HISTORIES },
    );
  });
});
