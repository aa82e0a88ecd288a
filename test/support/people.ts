import fc from 'fast-check';

/**
 * A few people whose rows change at random: keys that are shared, swapped, taken over and given up, members who come and
 * go, values that can't be sent. `TABLES` holds such a world in a database, `become(world)` makes it so.
 */

export interface Row {
  profile: number;
  user_id: string | null;
  email: string | null;
}

/** What a definition gives for a profile; texts, since JSON has no NaN. */
export interface Result {
  profile: number;
  note: string | null;
  score?: string | null;
  total?: string | null;
  level?: string | null;
}

export interface World {
  people: Row[];
  members: Result[];
  scores: Result[];
}

export type Edit =
  /** A profile has this one row, or one row more. */
  | { do: 'row'; row: Row; more: boolean }
  | { do: 'swap' | 'merge'; one: number; other: number }
  | { do: 'vanish' | 'leave'; one: number }
  /** A profile joins the audience, once more if it is in it, and has these values of the trait. */
  | { do: 'join'; row: Result };

const one = fc.integer({ min: 1, max: 4 });
const SCORES = [
  null,
  '1',
  '1',
  '1.0000000008',
  '1.0000000016',
  '0.30000000000000004',
  'NaN',
  '1e308',
  '-1e308',
  '5e-324',
];

export const edit: fc.Arbitrary<Edit> = fc.oneof(
  {
    weight: 5,
    arbitrary: fc.record({
      do: fc.constant('row' as const),
      row: fc.record({
        profile: one,
        user_id: fc.constantFrom(null, null, '', 'u1', 'u2', 'u3'),
        email: fc.constantFrom(null, ' ', 'a@x.de', ' A@X.de ', 'b@x.de', 'c@x.de'),
      }),
      more: fc.boolean(),
    }),
  },
  { weight: 2, arbitrary: fc.record({ do: fc.constantFrom('swap' as const, 'merge' as const), one, other: one }) },
  {
    weight: 2,
    arbitrary: fc.record({ do: fc.constantFrom('vanish' as const, 'leave' as const, 'leave' as const), one }),
  },
  {
    weight: 5,
    arbitrary: fc.record({
      do: fc.constant('join' as const),
      row: fc.record({
        profile: one,
        note: fc.constantFrom(null, 'x', 'y'),
        score: fc.constantFrom(...SCORES),
        total: fc.constantFrom(null, null, '10', '10.00', '10.5', 'NaN'),
        level: fc.constantFrom(null, null, null, '1', '2'),
      }),
    }),
  },
);

const without = <T extends { profile: number }>(rows: readonly T[], gone: number): T[] =>
  rows.filter((row) => row.profile !== gone);

export function change(world: World, step: Edit): World {
  const { people, members, scores } = world;
  const move = (to: (of: number) => number): World => ({
    ...world,
    people: people.map((row) => ({ ...row, profile: to(row.profile) })),
  });
  switch (step.do) {
    case 'row':
      return { ...world, people: [...(step.more ? people : without(people, step.row.profile)), step.row] };
    case 'swap':
      return move((id) => (id === step.one ? step.other : id === step.other ? step.one : id));
    case 'merge':
      return move((id) => (id === step.one ? step.other : id));
    case 'vanish':
      return { ...world, people: without(people, step.one) };
    case 'join':
      return { ...world, members: [...members, step.row], scores: [...without(scores, step.row.profile), step.row] };
    case 'leave':
      return { ...world, members: without(members, step.one), scores: without(scores, step.one) };
  }
}

/** Whose rows are others than before. */
export function changedProfiles(before: World, after: World): string[] {
  const rowsOf = (world: World, profile: number): string =>
    JSON.stringify(
      [world.people, world.members, world.scores].map((rows) =>
        (rows as { profile: number }[])
          .filter((row) => row.profile === profile)
          .map((row) => JSON.stringify(row))
          .sort(),
      ),
    );
  return [1, 2, 3, 4].filter((profile) => rowsOf(before, profile) !== rowsOf(after, profile)).map(String);
}

/** What a history begins with: everybody has the definition, by one key or the other. */
export const BEGINNING: World = (() => {
  const rows = [1, 2, 3].map((profile) => ({ profile, note: null, score: '1', total: '10', level: null }));
  const people = [
    { profile: 1, user_id: 'u1', email: 'a@x.de' },
    { profile: 2, user_id: null, email: 'b@x.de' },
    { profile: 3, user_id: 'u3', email: null },
  ];
  return { people, members: rows, scores: rows };
})();

/** Enough people who never change that a few conflicts stay below one in a hundred. */
export const FILLERS = 'generate_series(1000, 1599) as n';
export const TABLES = `
  create table people (profile int, user_id text, email text);
  create table members (profile int, note text);
  create table scores (profile int, note text, score float8, total numeric, level int8);
  create function become(world jsonb) returns void language sql as $$
    delete from people where profile < 1000; delete from members; delete from scores;
    insert into people select * from jsonb_to_recordset(world -> 'people') as r(profile int, user_id text, email text);
    insert into members select * from jsonb_to_recordset(world -> 'members') as r(profile int, note text);
    insert into scores select profile, note, score::float8, total::numeric, level::int8
      from jsonb_to_recordset(world -> 'scores') as r(profile int, note text, score text, total text, level text);
  $$`;
export const TRAIT_SQL = `SELECT profile AS profile_id, note, score, total, level FROM scores UNION ALL SELECT n, null, n, null, null FROM ${FILLERS}`;
export const COMMON = { initial: 'skip', guard: 'off', send: 'both', properties: ['note'] };
