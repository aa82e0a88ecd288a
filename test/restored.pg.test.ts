import { afterEach, expect, it } from 'vitest';
import pg from 'pg';
import { openLive, SPENDERS, type Live } from './support/live.js';
import { until } from './support/until.js';

/**
 * Source and state are two databases, and one of them goes back to what it was a while ago, as after a backup has been
 * restored: what was moved from the one to the other is in neither.
 */
let live: Live;
afterEach(() => live.close());

const PROFILES = { sql: 'SELECT id AS profile_id, user_id, email FROM people', changes: { people: 'id' } };

async function onServer(url: string, ...statements: string[]): Promise<void> {
  const client = new pg.Client({ connectionString: new URL('/postgres', url).toString() });
  await client.connect();
  try {
    for (const statement of statements) await client.query(statement);
  } finally {
    await client.end();
  }
}

const nameOf = (url: string): string => new URL(url).pathname.slice(1);
const isQuiet = (name: string): string =>
  `select pg_terminate_backend(pid) from pg_stat_activity where datname = '${name}' and backend_type = 'client backend'`;

/** The members, as the snapshot has them, when they are these. */
const membersAre = (...ids: readonly string[]): Promise<unknown> =>
  until(async () => {
    const rows = await live.harness.state('select profile_id from snapshot order by profile_id::int');
    return rows.map((row) => row['profile_id']).join() === ids.join();
  });

/** Ends the daemon and all connections, does something to the databases, and starts it again. */
async function meanwhile(url: string, ...statements: string[]): Promise<void> {
  await live.stop();
  await live.harness.opened.close();
  await onServer(url, isQuiet(nameOf(url)), ...statements);
  await live.harness.reconfigure({ profiles: PROFILES, audiences: [SPENDERS] });
  live.start();
}

it.each(['state', 'source'] as const)(
  'a %s that is restored has everybody compared, and nothing is blamed',
  async (which) => {
    live = await openLive({ separate: true });
    live.start();
    await live.isLive();
    const { url } = which === 'state' ? live.harness.stateDatabase : live.harness.database;
    const name = nameOf(url);
    await meanwhile(url, `create database ${name}_backup template ${name}`);
    await live.harness.sql('insert into orders (customer_id, total) values (9, 150)');
    await live.harness.sql('delete from orders where customer_id = 1');
    await membersAre('2', '3', '4', '5', '9');

    await meanwhile(url, `drop database ${name} with (force)`, `alter database ${name}_backup rename to ${name}`);
    await membersAre(...(which === 'state' ? ['2', '3', '4', '5', '9'] : ['1', '2', '3', '4', '5']));
    await live.isLive();
    expect(await live.harness.state('select distinct tracking, distrusted_at from definition')).toEqual([
      { tracking: 'live', distrusted_at: null },
    ]);
    expect(await live.harness.state('select id from run where corrections > 0')).toEqual([]);
  },
);
