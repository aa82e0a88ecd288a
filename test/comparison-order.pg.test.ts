import fc from 'fast-check';
import { afterEach, expect, it } from 'vitest';
import type { ProjectKey } from '../src/core/definition.js';
import { retryDead } from '../src/outbox/dead.js';
import { loadWaiting, type WaitingRow } from '../src/outbox/queue.js';
import { createSettler, type Settlement } from '../src/outbox/settle.js';
import { tidyUp } from '../src/sync/housekeeping.js';
import { runDefinition } from '../src/sync/run.js';
import { applyConfig } from './support/apply.js';
import { createHarness, type Harness } from './support/harness.js';

/**
 * A person whose key changes is an exit of the old key and an entry of the new one. Iterable may hold both keys as one
 * user or as two, and calls are delivered in any order that the outbox allows, or refused and tried again much later: in
 * the end Iterable is right either way.
 */
const HISTORIES = Number(process.env['PROPERTY_RUNS'] ?? 20);
const LEADER = '00000000-0000-0000-0000-000000000001';

/** A member, known by one key at a time. */
interface Person {
  id: number;
  user_id: string | null;
  email: string | null;
}

interface Delivery {
  /** Which of the marks that may go now. */
  pick: number;
  refused: boolean;
}

/** Nobody ever has what was another's: so the keys of one person can be one user. */
const person = (key: ProjectKey): fc.Arbitrary<Person> =>
  fc
    .record({
      id: fc.integer({ min: 1, max: 2 }),
      by: fc.constantFrom('email', 'user_id', 'both'),
      which: fc.constantFrom('a', 'b'),
    })
    .map(({ id, by, which }) => ({
      id,
      user_id: by === 'email' && key !== 'user_id' ? null : `u${id}${which}`,
      email: by === 'user_id' ? null : `p${id}${which}@x.de`,
    }));
const delivery: fc.Arbitrary<Delivery> = fc.record({
  pick: fc.nat(20),
  refused: fc.constantFrom(false, false, false, true),
});
const steps = (key: ProjectKey): fc.Arbitrary<{ people: Person[]; deliveries: Delivery[] }[]> =>
  fc.array(
    fc.record({
      people: fc.array(person(key), { minLength: 1, maxLength: 2 }),
      deliveries: fc.array(delivery, { maxLength: 3 }),
    }),
    {
      minLength: 2,
      maxLength: 7,
    },
  );

const ownerOf = (recipient: string): string => /[up](\d)/.exec(recipient.slice(2))?.[1] ?? '';

let harness: Harness;
afterEach(() => harness.close());

async function run(): Promise<void> {
  const { databases, config } = harness.opened;
  const request = { trigger: 'sync', approves: null, nextDueMs: () => null } as const;
  const result = await runDefinition({ databases, config, leader: LEADER }, config.definitions[0]!, request);
  expect(result).toMatchObject({ outcome: 'succeeded', error: null });
}

/** Iterable as it would be if each key were a user, and if all keys of a person were one. */
interface Told {
  apart: Map<string, string>;
  together: Map<string, string>;
}

async function readyMarks(destination: number): Promise<(WaitingRow & { kind: 'm'; recipient: string })[]> {
  const { pool } = harness.opened.databases.state;
  const rows = await harness.state(`select distinct recipient from outbox where destination_id = $1`, [destination]);
  const waiting = await loadWaiting(
    pool,
    destination,
    rows.map((row) => row['recipient'] as string),
  );
  return [...waiting].flatMap(([recipient, marks]) =>
    marks.flatMap((mark) => (mark.kind === 'm' && mark.due && !mark.blocked ? [{ ...mark, recipient }] : [])),
  );
}

async function settle(settlements: readonly Settlement[]): Promise<void> {
  const { databases, config } = harness.opened;
  const settler = createSettler(databases.state, LEADER, { isHybrid: config.profiles.key === 'hybrid' });
  await settler.settle(settlements);
  settler.close();
}

async function deliver(told: Told, destination: number, { pick, refused }: Delivery): Promise<boolean> {
  const ready = await readyMarks(destination);
  const mark = ready[pick % Math.max(1, ready.length)];
  if (mark === undefined) return false;
  const { id, version, recipient } = mark;
  if (refused) {
    await settle([
      { kind: 'refused', id, version, columns: null, reason: 'Some', answer: '', retryAfterMs: null, forgotten: null },
    ]);
    return true;
  }
  const value = mark.values[0]!.json;
  told.apart.set(recipient, value);
  told.together.set(ownerOf(recipient), value);
  await settle([{ kind: 'acknowledged', id, version, columns: null }]);
  return true;
}

for (const key of ['hybrid', 'email', 'user_id'] as const) {
  it(`leaves Iterable right, in whatever order the calls of changed keys are delivered (${key})`, async () => {
    harness = await createHarness({
      tables: 'create table people (id int primary key, user_id text, email text)',
      key,
      audiences: [{ key: 'member', sql: 'SELECT id AS profile_id FROM people', guard: 'off', initial: 'skip' }],
    });
    const { databases } = harness.opened;
    await tidyUp(databases.state);
    const [destination] = await applyConfig(harness.opened);
    await harness.state(`update leader set holder = $1, expires_at = 'infinity'`, [LEADER]);

    const last = fc.record({
      leaves: fc.constantFrom(null, 1, 2),
      picks: fc.array(fc.nat(20), { minLength: 1, maxLength: 10 }),
    });
    const property = fc.asyncProperty(steps(key), last, async (history, { leaves, picks }) => {
      for (const table of ['snapshot', 'outbox', 'dead_call', 'transition', 'run'])
        await harness.state(`delete from ${table}`);
      await harness.state(`update definition set first_run_at = null, members = 0`);
      await harness.sql('delete from people');
      await run();
      const told: Told = { apart: new Map(), together: new Map() };
      for (const { people, deliveries } of history) {
        for (const { id, user_id, email } of people) {
          await harness.sql(
            'insert into people values ($1, $2, $3) on conflict (id) do update set user_id = $2, email = $3',
            [id, user_id, email],
          );
        }
        await run();
        for (const each of deliveries) await deliver(told, destination!.id, each);
      }
      await harness.sql('delete from people where id = $1', [leaves]);
      await run();
      await retryDead(databases.state.pool, { keys: [], reason: null, destination: null, olderThan: null });
      let turn = 0;
      while (await deliver(told, destination!.id, { pick: picks[turn % picks.length]!, refused: false })) turn += 1;

      expect(await harness.state('select from outbox')).toHaveLength(0);
      const members = (await harness.state('select recipient from snapshot order by 1')).map(
        (row) => row['recipient'] as string,
      );
      const apart = [...told.apart].filter(([, value]) => value === 'true').map(([recipient]) => recipient);
      expect(apart.sort()).toEqual(members);
      const together = [...told.together].filter(([, value]) => value === 'true').map(([id]) => id);
      expect(together.sort()).toEqual([...new Set(members.map(ownerOf))].sort());
    });
    await fc.assert(property, { numRuns: HISTORIES });
  }, 600_000);
}
