import { afterEach, describe, expect, it } from 'vitest';
import { createDatabase, type TestDatabase } from './support/database.js';
import { createHarness, type Harness } from './support/harness.js';

const TABLES = `
  create table people (id bigint primary key, user_id text, email text);
  insert into people select n, 'u' || n, null from generate_series(1, 5) as n`;
const ALL = { name: 'All', sql: 'SELECT id AS profile_id FROM people' };

let harness: Harness | undefined;
const made: { database: TestDatabase; role: string }[] = [];
afterEach(async () => {
  await harness?.close();
  harness = undefined;
  for (const { database, role } of made.splice(0)) {
    await database.pool.query(`drop owned by ${role}; drop role ${role}`);
    await database.drop();
  }
});

/** A database and a role with a password that may do nothing in it but what `grants` say. */
async function withRole(tables: string, grants: (role: string, database: string) => string): Promise<string> {
  const database = await createDatabase();
  const url = new URL(database.url);
  const name = url.pathname.slice(1);
  const role = `role_${name}`;
  await database.pool.query(`${tables};
    revoke all on database ${name} from public; revoke all on schema public from public;
    create role ${role} login password 'pa55word'; grant connect on database ${name} to ${role};
    grant usage on schema public to ${role}; ${grants(role, name)}`);
  made.push({ database, role });
  url.username = role;
  url.password = 'pa55word';
  return url.toString();
}

describe('a role', () => {
  it('that may only SELECT is enough for a source beside a state database', async () => {
    const source = await withRole(TABLES, (role) => `grant select on people to ${role}`);
    const state = await withRole(
      'select',
      (role, database) => `grant create, temporary on database ${database} to ${role}`,
    );
    harness = await createHarness({
      tables: 'select',
      source: { url: source },
      state: { url: state },
      audiences: [ALL],
    });
    const { progress, delivery } = await harness.sync();
    expect(progress.runs).toMatchObject([{ outcome: 'succeeded', members: 5 }]);
    expect(delivery).toMatchObject({ waiting: 0, refused: 0 });
  });

  it('that may make a schema and temporary tables is enough where both are one database', async () => {
    const url = await withRole(
      TABLES,
      (role, database) =>
        `grant select on people to ${role}; grant create, temporary on database ${database} to ${role}`,
    );
    harness = await createHarness({ tables: 'select', source: { url }, audiences: [ALL] });
    expect((await harness.sync()).progress.runs).toMatchObject([{ outcome: 'succeeded', members: 5 }]);
  });

  it('without SELECT on a table fails that definition alone, with a word on why', async () => {
    const url = await withRole(
      `${TABLES}; create table secrets (id bigint)`,
      (role, database) =>
        `grant select on people to ${role}; grant create, temporary on database ${database} to ${role}`,
    );
    harness = await createHarness({
      tables: 'select',
      source: { url },
      audiences: [ALL, { name: 'Hidden', sql: 'SELECT id AS profile_id FROM secrets' }],
    });
    const { progress } = await harness.sync();
    expect(progress.runs.find(({ definition }) => definition === 'all')).toMatchObject({ outcome: 'succeeded' });
    const hidden = progress.runs.find(({ definition }) => definition === 'hidden');
    expect(hidden).toMatchObject({ outcome: 'failed' });
    expect(hidden?.error).toMatch(
      /personas\.yaml:\d+:\d+: The SQL of "hidden" needs a privilege .*GRANT SELECT ON public\.secrets TO "\w+"\.$/,
    );
  });
});
