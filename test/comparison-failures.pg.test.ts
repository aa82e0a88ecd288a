import { writeFile } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import { afterEach, describe, expect, it } from 'vitest';
import { createHarness, type Harness } from './support/harness.js';

/** SQL that is wrong fails the runs of its own definition, with a sentence and a place, and changes nothing. */
const TABLES = `
  create table people (id bigint primary key, user_id text, email text);
  insert into people select n, 'u' || n, 'p' || n || '@x.de' from generate_series(1, 5) as n;
  create table log (at timestamptz);
  create function touch() returns bigint language plpgsql as $$ begin insert into log values (now()); return 1; end $$;`;
const FINE = 'SELECT id AS profile_id FROM people';

interface Wrong {
  what: string;
  sql: string;
  /** Line and column, and what is said after the place. */
  place: string;
  says: RegExp;
  trait?: boolean;
  properties?: string[];
}

const WRONG: Wrong[] = [
  {
    what: 'a syntax error',
    sql: `${FINE}\nWHERE (id > 1\n  ORR id < 5)`,
    place: '3:3',
    says: /^The SQL of "a_syntax_error" has a syntax error \[SQLSTATE 42601\]\.$/,
  },
  {
    what: 'a syntax error behind a moment',
    sql: `${FINE} WHERE :now > '2000-01-01' ANDD true`,
    place: '1:63',
    says: /has a syntax error/,
  },
  {
    what: 'an unknown column',
    sql: `${FINE}\nWHERE '😀' <> '' AND nam = 'x'`,
    place: '2:22',
    says: /names a column that does not exist \[SQLSTATE 42703\]\.$/,
  },
  {
    what: 'an unknown table',
    sql: 'SELECT id AS profile_id FROM peoples',
    place: '1:30',
    says: /names a table that does not exist/,
  },
  {
    what: 'two statements',
    sql: `${FINE};\nDELETE FROM people;`,
    place: '2:1',
    says: /has more than one statement; write one SELECT\.$/,
  },
  {
    what: 'a parenthesis that closes ours',
    sql: `${FINE}) UNION ALL (SELECT 1`,
    place: '1:36',
    says: /has a syntax error/,
  },
  {
    what: 'a way out of the parenthesis',
    sql: `${FINE}) AS m; DELETE FROM people; --`,
    place: '1:44',
    says: /more than one statement/,
  },
  {
    what: 'a writing CTE',
    sql: 'WITH gone AS (DELETE FROM people RETURNING id) SELECT id AS profile_id FROM gone',
    place: '1:1',
    says: /is not a query that only reads; write a SELECT\.$/,
  },
  {
    what: 'a DELETE',
    sql: 'DELETE FROM people RETURNING id AS profile_id',
    place: '1:1',
    says: /is not a query that only reads/,
  },
  { what: 'an INSERT', sql: 'INSERT INTO log VALUES (now())', place: '1:1', says: /gives no rows; write a SELECT\.$/ },
  {
    what: 'a function that writes',
    sql: 'SELECT touch() AS profile_id',
    place: '1:1',
    says: /tries to write; a definition may only read \[SQLSTATE 25006\]\.$/,
  },
  {
    what: 'no profile',
    sql: 'SELECT id FROM people',
    place: '1:1',
    says: /gives no column `profile_id` \(nor `email` or `user_id`\)/,
  },
  { what: 'no value', sql: FINE, trait: true, place: '1:1', says: /gives no column `value` \(nor any other to send\)/ },
  {
    what: 'a column twice',
    sql: 'SELECT id AS profile_id, 1 AS value, 2 AS value FROM people',
    trait: true,
    place: '1:1',
    says: /gives the column `value` twice\./,
  },
  {
    what: 'a reserved field',
    sql: 'SELECT id AS profile_id, email FROM people',
    trait: true,
    place: '1:1',
    says: /The field `email` of "a_reserved_field" is reserved by Iterable/,
  },
  {
    what: 'a rider',
    sql: 'SELECT id AS profile_id, 1 AS value, 2 AS a_rider FROM people',
    trait: true,
    properties: ['a_rider'],
    place: '1:1',
    says: /The column `a_rider` of "a_rider" rides along under the name of a field; give it another name\.$/,
  },
  {
    what: 'another type of profile',
    sql: 'SELECT id::text AS profile_id FROM people',
    place: '1:1',
    says: /`profile_id` of "another_type_of_profile" is text, that of `profiles` is bigint: they can't be compared\. Cast one of them, such as profile_id::bigint\.$/,
  },
  {
    what: 'a division by zero',
    sql: 'SELECT id / (id - id) AS profile_id FROM people',
    place: '1:1',
    says: /divides by zero/,
  },
  {
    what: 'a text that is no number',
    sql: 'SELECT user_id::bigint AS profile_id FROM people',
    place: '1:1',
    says: /casts a text to a type that it cannot be read as|22P02/,
  },
  {
    what: 'too long a run',
    sql: 'SELECT id AS profile_id FROM people, pg_sleep(10)',
    place: '1:1',
    says: /took longer than the time allowed, or was cancelled \[SQLSTATE 57014\]\.$/,
  },
];

/** What ends a text may stand there. */
const RIGHT: Record<string, string> = {
  plain: FINE,
  semicolon: `${FINE};`,
  semicolons: `${FINE} ;\n; `,
  comment: `${FINE} -- all of them`,
  commented: `-- all of them\n${FINE} -- all of them; and more\n;-- the end`,
  block: `${FINE} /* all /* of */ them; */; /* the end */`,
  cte: `WITH every AS (${FINE}) SELECT * FROM every`,
  values: `VALUES (1), (2)`,
  table: 'TABLE chosen',
  moments: `${FINE} WHERE :now - :lookback < :now -- :now`,
};

let harness: Harness;
afterEach(() => harness.close());

const keyOf = (what: string): string => what.toLowerCase().replaceAll(' ', '_');

describe.each([false, true])('with a state database of its own: %s', (separate) => {
  it('wrong SQL fails a run with its place, writes nothing, and holds nobody up', async () => {
    harness = await createHarness({ tables: TABLES, separate });
    const folder = dirname(harness.configFile);
    const define = async ({ what, sql, properties = [] }: Wrong): Promise<Record<string, unknown>> => {
      await writeFile(join(folder, `${keyOf(what)}.sql`), sql);
      return { key: keyOf(what), sql_file: `${keyOf(what)}.sql`, properties };
    };
    await harness.reconfigure({
      runs: { timeout: '1 second', parallel: 3 },
      audiences: [
        ...(await Promise.all(WRONG.filter(({ trait }) => trait !== true).map(define))),
        { key: 'fine', sql: FINE },
      ],
      traits: await Promise.all(WRONG.filter(({ trait }) => trait === true).map(define)),
    });
    const { progress, delivery } = await harness.sync();
    expect(progress.runs.find(({ definition }) => definition === 'fine')).toMatchObject({
      outcome: 'succeeded',
      members: 5,
    });
    for (const { what, place, says } of WRONG) {
      const run = progress.runs.find(({ definition }) => definition === keyOf(what));
      expect({ what, outcome: run?.outcome, unavailable: run?.unavailable }).toEqual({
        what,
        outcome: 'failed',
        unavailable: false,
      });
      const file = `${join(folder, keyOf(what))}.sql:`;
      expect(run?.error?.slice(0, file.length + place.length + 2)).toBe(`${file}${place}: `);
      expect(run?.error?.slice(file.length + place.length + 2)).toMatch(says);
    }
    expect(delivery).toMatchObject({ waiting: 0, refused: 0 });
    expect(harness.simulator.userCount).toBe(5);
    expect(
      await harness.sql('select (select count(*) from people) as people, (select count(*) from log) as log'),
    ).toEqual([{ people: '5', log: '0' }]);
    expect(
      await harness.state(`select distinct d.key from snapshot as s join definition as d on d.id = s.definition_id`),
    ).toEqual([{ key: 'fine' }]);
    expect(
      await harness.state(`select key from definition where first_run_at is not null or text_hash is not null`),
    ).toEqual([{ key: 'fine' }]);
    // No run is left open, so each definition runs again when its SQL has been mended.
    expect(await harness.state('select from run where outcome is null')).toEqual([]);
  });

  it('a text may end in semicolons and comments', async () => {
    const profiles = { sql: 'SELECT id AS profile_id, user_id, email FROM people; -- everybody' };
    harness = await createHarness({
      tables: `${TABLES} create table chosen (profile_id bigint); insert into chosen values (3)`,
      separate,
      profiles,
      audiences: Object.entries(RIGHT)
        .filter(([key]) => key !== 'values')
        .map(([key, sql]) => ({ key, sql, initial: 'skip', ...(key === 'moments' ? { lookback: '30 days' } : {}) })),
    });
    const { progress } = await harness.sync();
    const errors = progress.runs
      .filter(({ outcome }) => outcome !== 'succeeded')
      .map(({ definition, error }) => `${definition}: ${error ?? ''}`);
    expect(errors).toEqual([]);
    expect(progress.runs.filter(({ definition }) => definition !== 'table').every(({ members }) => members === 5)).toBe(
      true,
    );
  });

  it('a wrong `profiles` fails every run, and is named', async () => {
    harness = await createHarness({
      tables: TABLES,
      separate,
      audiences: [
        { key: 'one', sql: FINE },
        { key: 'two', sql: FINE },
      ],
      profiles: { sql: 'SELECT id AS profile_id, user_id, emai AS email FROM people' },
    });
    const { progress } = await harness.sync();
    expect(progress.runs).toHaveLength(2);
    for (const { outcome, error } of progress.runs) {
      expect(outcome).toBe('failed');
      expect(error).toMatch(/personas\.yaml:\d+:\d+: `profiles` names a column that does not exist/);
    }
    await harness.reconfigure({
      audiences: [{ key: 'one', sql: FINE }],
      profiles: { sql: 'SELECT id, user_id FROM people' },
    });
    expect((await harness.sync('one')).progress.runs[0]?.error).toMatch(/`profiles` gives no column `profile_id`/);
  });
});
