import fc from 'fast-check';
import { afterEach, expect, it } from 'vitest';
import type { ProjectKey } from '../src/core/definition.js';
import { tidyUp } from '../src/sync/housekeeping.js';
import { runDefinition, type RunResult } from '../src/sync/run.js';
import { applyConfig } from './support/apply.js';
import { createHarness, type Harness } from './support/harness.js';
import {
  BEGINNING,
  change,
  COMMON,
  edit,
  FILLERS,
  TABLES,
  TRAIT_SQL,
  type Edit,
  type Result,
  type Row,
  type World,
} from './support/people.js';

/**
 * The comparison against a model: whatever happens to a few people, each run leaves the snapshot, the marks, the events
 * and the history that the model says, and a second run at once leaves everything as it is.
 */
const HISTORIES = Number(process.env['PROPERTY_RUNS'] ?? 8);

interface Step {
  edits: Edit[];
  /** Whether all that waited was delivered before. */
  delivered: boolean;
}
const history: fc.Arbitrary<Step[]> = fc.array(
  fc.record({ edits: fc.array(edit, { minLength: 1, maxLength: 5 }), delivered: fc.boolean() }),
  {
    minLength: 2,
    maxLength: 6,
  },
);

// The model.

type Values = Partial<Record<string, number | string>>;
interface Computed {
  profile: string;
  beside: string | null;
  value: Values;
  /** Fields whose value can't be sent. */
  unsendable: string[];
  disagree: boolean;
}
interface Held {
  profile: string;
  beside: string | null;
  value: Values;
  kept: boolean;
  besideChanged: boolean;
}
interface Mark {
  columns: string[];
  withBeside: boolean;
  confirm: boolean;
  exitOf: string | null;
  follows: string | null;
}
type Kind = 'audience' | 'null' | 'keep';

const FIELDS = ['level', 'score', 'total'];
const hasField = (value: Values): boolean => FIELDS.some((field) => value[field] !== undefined);
const isClose = (a?: number | string, b?: number | string): boolean =>
  typeof a === 'number' && typeof b === 'number' && Math.abs(a - b) <= 1e-9 * Math.max(Math.abs(a), Math.abs(b));
const isSame = (a: Values, b: Values): boolean => isClose(a['score'], b['score']) || a['score'] === b['score'];
const least = (texts: (string | null)[]): string | null => texts.filter((text) => text !== null).sort()[0] ?? null;

/** Which recipients each profile has, with the identifier beside. */
function recipientsOf(
  people: readonly Row[],
  key: ProjectKey,
): { profile: number; recipient: string; beside: string | null }[] {
  const rows = people.map((row) => ({
    profile: row.profile,
    user: row.user_id || null,
    email: row.email?.trim().toLowerCase() || null,
  }));
  return rows.flatMap(({ profile: id, user, email: address }) => {
    const own = rows.filter((row) => row.profile === id);
    const byUser =
      user === null ? [] : [{ profile: id, recipient: `u:${user}`, beside: key === 'email' ? null : address }];
    if (key === 'user_id') return byUser;
    if (key === 'email' && address === null) return own.some((row) => row.email !== null) ? [] : byUser;
    if (key === 'email') return [{ profile: id, recipient: `e:${address}`, beside: user }];
    if (user !== null || address === null) return byUser;
    if (own.some((row) => row.user !== null)) return [];
    const owner = least(rows.filter((row) => row.email === address).map((row) => row.user));
    return [
      owner === null
        ? { profile: id, recipient: `e:${address}`, beside: null }
        : { profile: id, recipient: `u:${owner}`, beside: address },
    ];
  });
}

function valueOf(row: Result): { value: Values; unsendable: string[] } {
  const value: Values = row.note === null ? {} : { note: row.note };
  const unsendable: string[] = [];
  for (const field of FIELDS as ('level' | 'score' | 'total')[]) {
    const number = row[field] === undefined || row[field] === null ? null : Number(Number(row[field]).toPrecision(15));
    if (number !== null && Number.isFinite(number)) value[field] = number;
    else if (number !== null) unsendable.push(field);
  }
  return { value, unsendable };
}

/** What a definition gives for each recipient, and its rows that have none. */
function computedOf(
  world: World,
  key: ProjectKey,
  kind: Kind,
): { computed: Map<string, Computed>; unknown: { unsendable: string[] }[] } {
  const recipients = recipientsOf(world.people, key);
  const members = world.members.map(({ profile, note }) => ({ profile, note }));
  const rows = (kind === 'audience' ? members : world.scores)
    .map((row) => ({ profile: row.profile, ...valueOf(row) }))
    .filter(({ value, unsendable }) => kind === 'audience' || hasField(value) || unsendable.length > 0);
  const joined = rows.flatMap((row) =>
    recipients
      .filter((each) => each.profile === row.profile)
      .map(({ recipient, beside }) => ({ ...row, recipient, beside })),
  );
  const computed = new Map<string, Computed>();
  for (const recipient of new Set(joined.map((row) => row.recipient))) {
    const same = joined.filter((row) => row.recipient === recipient);
    const order = (row: (typeof same)[number]): string =>
      `${hasField(row.value) ? 0 : 1}${Object.keys(row.value).length === 0 ? 1 : 0}${row.profile}${row.value['note'] ?? ''}`;
    const [first] = same.sort((a, b) => (order(a) < order(b) ? -1 : 1));
    const valued = same.filter(({ value }) => hasField(value));
    const owners = valued.length > 0 ? valued : same;
    computed.set(recipient, {
      profile: String(Math.min(...owners.map((row) => row.profile))),
      beside: least(owners.map(({ beside }) => beside)),
      value: first!.value,
      unsendable: same.flatMap(({ unsendable }) => unsendable),
      disagree: valued.some(
        ({ value }) =>
          !isSame(value, first!.value) ||
          value['total'] !== first!.value['total'] ||
          value['level'] !== first!.value['level'],
      ),
    });
  }
  return { computed, unknown: rows.filter((row) => !recipients.some((each) => each.profile === row.profile)) };
}

interface Outcome {
  snapshot: Map<string, Held>;
  marks: Map<string, Mark>;
  events: string[];
  history: string[];
  counts: {
    entered: number;
    exited: number;
    changed: number;
    members: number;
    withoutIdentifier: number;
    conflicting: number;
    skippedValues?: number;
  };
}

/** What one run leaves, from the snapshot before it and the marks that wait. */
function runModel(
  before: Map<string, Held>,
  waiting: Map<string, Mark>,
  world: World,
  key: ProjectKey,
  kind: Kind,
  first: boolean,
): Outcome {
  const { computed, unknown } = computedOf(world, key, kind);
  const snapshot = new Map<string, Held>();
  const marks = new Map<string, Mark>();
  const [entered, exited, changed]: [string[], string[], string[]] = [[], [], []];
  let conflicting = 0;
  for (const [recipient, { disagree, unsendable, ...now }] of computed) {
    const old = before.get(recipient);
    if (disagree) {
      conflicting += 1;
      if (old !== undefined) snapshot.set(recipient, old);
      continue;
    }
    const value = { ...now.value };
    for (const field of unsendable) value[field] ??= old?.value[field];
    if (isClose(value['score'], old?.value['score'])) value['score'] = old?.value['score'];
    if (kind !== 'audience' && !hasField(value)) continue;
    const columns = FIELDS.filter((field) => value[field] !== old?.value[field]);
    const besideChanged = old !== undefined && (old.besideChanged || old.beside !== now.beside);
    snapshot.set(recipient, { ...now, value, kept: false, besideChanged: besideChanged && columns.length === 0 });
    if (old === undefined) entered.push(recipient);
    else if (columns.length > 0) changed.push(recipient);
    if (old === undefined || columns.length > 0) {
      marks.set(recipient, {
        columns: kind === 'audience' ? ['people'] : columns,
        withBeside: old === undefined || besideChanged,
        confirm: false,
        exitOf: null,
        follows: null,
      });
    }
  }
  for (const [recipient, old] of before) {
    if (snapshot.has(recipient)) continue;
    if (kind === 'keep') snapshot.set(recipient, { ...old, kept: true });
    else {
      exited.push(recipient);
      const columns = kind === 'audience' ? ['people'] : FIELDS.filter((field) => old.value[field] !== undefined);
      marks.set(recipient, {
        columns,
        withBeside: false,
        confirm: !world.people.some((row) => String(row.profile) === old.profile),
        exitOf: old.profile,
        follows: null,
      });
    }
  }
  const leaving = new Set([...waiting.values(), ...marks.values()].map(({ exitOf }) => exitOf));
  for (const recipient of entered) {
    const { profile } = snapshot.get(recipient)!;
    if (leaving.has(profile)) marks.get(recipient)!.follows = profile;
  }
  const has = (held: Map<string, Held>, of?: Held): boolean =>
    [...held.values()].some((each) => each.profile === of?.profile);
  const came = entered.filter((recipient) => !has(before, snapshot.get(recipient)));
  const left = exited.filter((recipient) => !has(snapshot, before.get(recipient)));
  const named = (name: string, recipients: string[]): string[] => recipients.map((recipient) => `${name} ${recipient}`);
  const events =
    kind === 'audience'
      ? [...named('Audience Entered', came), ...named('Audience Exited', left)]
      : named('Trait Computed', [...came, ...changed, ...left]);
  const members = [...snapshot.values()].filter(({ kept }) => !kept).length;
  const skippedValues = [...computed.values()].filter(({ unsendable }) => unsendable.length > 0).length;
  return {
    snapshot,
    marks: first ? new Map<string, Mark>() : marks,
    events: first ? [] : events,
    history: first ? [] : [...named('e', entered), ...named('x', exited), ...named('c', changed)],
    counts: {
      entered: entered.length,
      exited: exited.length,
      changed: changed.length,
      members,
      withoutIdentifier: unknown.length,
      conflicting,
      // Nobody asks for the values of somebody who is sent nothing.
      ...(unknown.some(({ unsendable }) => unsendable.length > 0) ? {} : { skippedValues }),
    },
  };
}

/** A later mark joins the one that waits; what follows an exit goes on doing so, until it is an exit itself. */
function joinMarks(waiting: Map<string, Mark>, raised: Map<string, Mark>): Map<string, Mark> {
  const joined = new Map(waiting);
  for (const [recipient, mark] of raised) {
    const old = waiting.get(recipient);
    if (old === undefined) joined.set(recipient, mark);
    else {
      const columns = [...new Set([...old.columns, ...mark.columns])].sort();
      joined.set(recipient, {
        ...mark,
        columns,
        withBeside: old.withBeside || mark.withBeside,
        follows: mark.exitOf === null ? (mark.follows ?? old.follows) : null,
      });
    }
  }
  return joined;
}

// The real thing.

const LEADER = '00000000-0000-0000-0000-000000000001';

let harness: Harness;
afterEach(() => harness.close());

async function open(key: ProjectKey, separate: boolean): Promise<void> {
  harness = await createHarness({
    tables: TABLES,
    key,
    separate,
    profiles: {
      sql: `SELECT profile AS profile_id, user_id, email FROM people UNION ALL SELECT n, 'f' || n, 'f' || n || '@x.de' FROM ${FILLERS}`,
    },
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
  await tidyUp(harness.opened.databases.state);
  await applyConfig(harness.opened);
}

async function run(key: string): Promise<RunResult> {
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

const bare = (field: string): string => field.replace(/^kept_/, '');

async function readAll(): Promise<{
  snapshot: Map<string, Held>;
  marks: Map<string, Mark>;
  events: string[];
  history: string[];
  members: number;
}> {
  const real = `recipient !~ '^.:f'`;
  const held = await harness.state(`select * from snapshot where ${real}`);
  const waiting = await harness.state(`select * from outbox where ${real} order by id`);
  const transitions = await harness.state(
    `select kind::text || ' ' || recipient as line from transition where ${real}`,
  );
  const members = await harness.state(
    `select sum(members)::int8 - 600 as members from definition where first_run_at is not null`,
  );
  const valueOfRow = (value: Values | null): Values =>
    Object.fromEntries(Object.entries(value ?? {}).map(([field, each]) => [bare(field), each]));
  return {
    snapshot: new Map(
      held.map((row) => [
        row['recipient'] as string,
        {
          profile: row['profile_id'] as string,
          beside: row['beside'] as string | null,
          value: valueOfRow(row['value'] as Values | null),
          kept: row['kept'] as boolean,
          besideChanged: row['beside_changed'] as boolean,
        },
      ]),
    ),
    marks: new Map(
      waiting
        .filter((row) => row['kind'] === 'm')
        .map((row) => [
          row['recipient'] as string,
          {
            columns: (row['columns'] as string[]).map(bare).sort(),
            withBeside: row['with_beside'] as boolean,
            confirm: row['confirm'] === 1,
            exitOf: row['exit_of'] as string | null,
            follows: row['follows'] as string | null,
          },
        ]),
    ),
    events: waiting
      .filter((row) => row['kind'] === 'e')
      .map((row) => `${row['event'] as string} ${row['recipient'] as string}`),
    history: transitions.map((row) => row['line'] as string),
    members: Number(members[0]?.['members']),
  };
}

/** What must hold of the outbox whatever is in it. */
async function expectSoundOutbox(): Promise<void> {
  const orphans = await harness.state(
    `select from outbox as o where not exists (select from definition_destination as d where d.definition_id = o.definition_id and d.destination_id = o.destination_id)`,
  );
  expect(orphans).toHaveLength(0);
  const circles = await harness.state(
    `with recursive behind as (
       select o.id, b.id as next from outbox as o join outbox as b
         on b.exit_of = o.follows and b.destination_id = o.destination_id and b.recipient <> o.recipient),
     chain as (
       select id, next from behind
       union select chain.id, behind.next from chain join behind on behind.id = chain.next)
     select from chain where id = next`,
  );
  expect(circles).toHaveLength(0);
}

async function begin(): Promise<void> {
  await harness.state('delete from snapshot');
  await harness.state('delete from outbox');
  await harness.state('delete from transition');
  await harness.state(`delete from run`);
  await harness.state(`update definition set first_run_at = null, members = 0, fields = '{}', text_hash = null`);
}

for (const key of ['email', 'user_id', 'hybrid'] as const) {
  for (const separate of [false, true]) {
    it(`leaves what the model says, whatever happens to people (${key}, ${separate ? 'two databases' : 'one database'})`, async () => {
      await open(key, separate);
      const property = fc.asyncProperty(
        fc.constantFrom<Kind>('audience', 'null', 'keep'),
        history,
        async (kind, steps) => {
          await begin();
          const definition = kind === 'audience' ? 'people' : kind;
          let world = BEGINNING;
          let held = new Map<string, Held>();
          let waiting = new Map<string, Mark>();
          let events: string[] = [];
          let lines: string[] = [];
          for (const [index, { edits, delivered }] of steps.entries()) {
            if (delivered) {
              await harness.state('delete from outbox');
              waiting = new Map();
              events = [];
            }
            for (const each of edits) world = change(world, each);
            await harness.sql('select become($1)', [JSON.stringify(world)]);
            const expected = runModel(held, waiting, world, key, kind, index === 0);
            waiting = joinMarks(waiting, expected.marks);
            events = [...events, ...expected.events];
            lines = [...lines, ...expected.history];

            const { counts } = await run(definition);
            const fillers = index === 0 ? 600 : 0;
            expect(counts).toMatchObject({
              ...expected.counts,
              entered: expected.counts.entered + fillers,
              members: expected.counts.members + 600,
            });
            const all = await readAll();
            expect(all.snapshot).toEqual(expected.snapshot);
            expect(all.marks).toEqual(waiting);
            expect([...all.events].sort()).toEqual([...events].sort());
            expect([...all.history].sort()).toEqual([...lines].sort());
            expect(all.members).toBe(expected.counts.members);
            await expectSoundOutbox();

            const again = await run(definition);
            expect(again.counts).toMatchObject({ entered: 0, exited: 0, changed: 0 });
            expect(await readAll()).toEqual(all);
            held = expected.snapshot;
          }
        },
      );
      await fc.assert(property, { numRuns: HISTORIES });
    }, 600_000);
  }
}
