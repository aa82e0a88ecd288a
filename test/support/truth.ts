import { expect } from 'vitest';
import type { Simulator } from '../../src/demo/simulator/server.js';
import { ambiguousEvents } from './events.js';

type Rows = Record<string, unknown>[];

/** A source with `people (user_id, email, vip, spent)`, of whom an audience `vip` and a trait `spent` tell by their userIds. */
export interface Told {
  simulator: Simulator;
  /** Runs a statement where the source and the schema of the state are. */
  sql: (text: string) => Promise<Rows>;
}

interface Expected {
  /** Whether the first run told of everybody who was a member then; not so with `initial: skip`. */
  areFirstTold?: boolean;
}

/** The first few names that have something else in one than in the other. */
export function differences(expected: ReadonlyMap<string, string>, found: ReadonlyMap<string, string>): unknown[] {
  return [...new Set([...expected.keys(), ...found.keys()])]
    .filter((name) => expected.get(name) !== found.get(name))
    .slice(0, 5)
    .map((name) => ({ name, expected: expected.get(name), found: found.get(name) }));
}

/** A number that is whole stands with a digit behind its point. */
const plain = (value: string | undefined): string | undefined => value?.replace(/\.0$/, '');

/**
 * Iterable has what the snapshot has, which is what the tables say; each change of a membership was one event, in its
 * order and with one content however often it was sent; nothing waits and nothing is dead.
 */
export async function expectTruth({ simulator, sql }: Told, { areFirstTold = true }: Expected = {}): Promise<void> {
  const people = (await sql('select user_id, vip::text, spent::text from people order by id')) as unknown as Person[];
  const users = [...simulator.users()].map(({ key, fields }): [string, string] => {
    const { vip = 'false', spent, ...others } = fields;
    return [key, JSON.stringify({ vip, spent: plain(spent), ...others })];
  });
  const truth = people.map(({ user_id, vip, spent }): [string, string] => [user_id, JSON.stringify({ vip, spent })]);
  expect(differences(new Map(truth), new Map(users))).toEqual([]);
  expect(users).toHaveLength(people.length);

  const snapshot = await sql(
    `select d.key || ' ' || substr(s.recipient, 3) as name, coalesce(s.value ->> 'spent', '') as value
     from personas.snapshot as s join personas.definition as d on d.id = s.definition_id`,
  );
  const expected = people.flatMap(({ user_id, vip, spent }): [string, string][] => [
    ...(vip === 'true' ? [[`vip ${user_id}`, ''] satisfies [string, string]] : []),
    [`spent ${user_id}`, spent],
  ]);
  const found = snapshot.map(({ name, value }): [string, string] => [String(name), plain(String(value)) ?? '']);
  expect(differences(new Map(expected), new Map(found))).toEqual([]);

  expect(differences(await eventsOf(people, sql, areFirstTold), eventsIn(simulator))).toEqual([]);
  expect(ambiguousEvents(simulator.requests())).toEqual([]);
  expect(await sql('select count(*)::int4 as waiting from personas.outbox')).toEqual([{ waiting: 0 }]);
  expect(await sql('select count(*)::int4 as dead from personas.dead_call')).toEqual([{ dead: 0 }]);
}

interface Person {
  user_id: string;
  vip: string;
  spent: string;
}

/** Names of the events that each person has, in their order, repeats left out. */
function eventsIn(simulator: Simulator): Map<string, string> {
  const seen = new Set<string>();
  const names = new Map<string, string>();
  for (const { id, name, identifier } of simulator.eventHistory) {
    if (!seen.has(id)) names.set(identifier, [names.get(identifier), name].filter(Boolean).join());
    seen.add(id);
  }
  return names;
}

/** Those that each person is to have. The first run, which tells of its members, leaves no history: they are known by what follows. */
async function eventsOf(
  people: readonly Person[],
  sql: Told['sql'],
  areFirstTold: boolean,
): Promise<Map<string, string>> {
  const changes = await sql(
    `select substr(t.recipient, 3) as person, array_agg(case t.kind when 'e' then 'Audience Entered' else 'Audience Exited' end
       order by t.at) as names
     from personas.transition as t join personas.definition as d on d.id = t.definition_id
     where d.key = 'vip' and t.kind in ('e', 'x') group by 1`,
  );
  const later = new Map(changes.map(({ person, names }) => [person as string, names as string[]]));
  return new Map(
    people.flatMap(({ user_id, vip }): [string, string][] => {
      const after = later.get(user_id) ?? [];
      const wasFirst = areFirstTold && (vip === 'true') !== (after.length % 2 === 1);
      const names = [...(wasFirst ? ['Audience Entered'] : []), ...after];
      return names.length === 0 ? [] : [[user_id, names.join()]];
    }),
  );
}
