import type pg from 'pg';
import { until } from './daemon.js';
import { limit, ratio, type Report } from './figures.js';
import { count, withFollowed, type Bench, type Shop } from './realtime.js';
import type { BenchServer } from './server.js';
import { settle } from './shop.js';

/**
 * An hourly run of a definition with a window whose ends it gives (`valid_until`) and whose tables are captured: it costs
 * what has changed. In turns: the daemon's hourly run after one profile in a hundred has changed, and its run in full,
 * which has nothing left to write then.
 */
const TURNS = 3;
const MOST = 0.1;

/** Who has ordered within thirty days. */
const RECENT = {
  key: 'recent',
  sql: `SELECT customer_id AS profile_id, max(placed_at) > :now - :lookback AS member,
      min(placed_at + :lookback) FILTER (WHERE placed_at + :lookback > :now) AS valid_until
    FROM orders GROUP BY 1`,
  lookback: '30 days',
  changes: { orders: 'customer_id' },
  initial: 'skip',
  guard: 'off',
};
const TRUE_MEMBERS = `select customer_id::text as profile_id from orders group by 1 having max(placed_at) > now() - interval '30 days'`;

/** A shop with exactly `members` people in the audience, of whom none leaves within a day by time alone. */
const recentOrders = (members: number): Shop => ({
  fill: async (client) => {
    await client.query(`
      create table customers (id bigint primary key, email text not null);
      create table orders (
        id bigint generated always as identity primary key, customer_id bigint not null, total numeric(12, 2) not null,
        placed_at timestamptz not null default now()
      );
      insert into customers select n, 'person.' || n || '@example.com' from generate_series(1, ${Math.floor(members * 1.25)}) as n;
      create index on customers (lower(btrim(email)));
      insert into orders (customer_id, total, placed_at)
      select id, 10, now() - case when id <= ${members} then id % 28 * interval '1 day' else interval '60 days' end from customers;
      create index on orders (customer_id)`);
    await settle(client);
  },
  sections: {
    profiles: {
      sql: 'SELECT id AS profile_id, id::text AS user_id, email FROM customers',
      key: 'hybrid',
      changes: { customers: 'id' },
    },
    audiences: [RECENT],
  },
});

/** One in a hundred of the members changes: half of them leave, and as many come. Another `turn` moves others. */
async function moveMembers(client: pg.Client, members: number, turn: number): Promise<void> {
  const moved = Math.floor(members / 200);
  await client.query(
    `update orders set placed_at = now() - interval '60 days' where customer_id between $1::int + 1 and $1::int + $2::int`,
    [turn * moved, moved],
  );
  await client.query(
    `insert into orders (customer_id, total) select $1::int + n, 10 from generate_series(1, $2::int) as n`,
    [members + turn * moved, moved],
  );
}

/** Has the daemon run the definition, as its hour does or in full; how long that took, by the run's own record. */
async function run(
  { database, daemon }: Bench,
  kind: 'hourly' | 'full',
): Promise<{ ms: number; evaluated: number | null }> {
  const { client } = database;
  const before = await count(database, 'select max(id) from personas.run');
  await client.query(
    `update personas.definition set due_at = now() ${kind === 'full' ? `, full_wanted = nextval('personas.version')` : ''}`,
  );
  return until(daemon, async () => {
    const { rows } = await client.query<{ outcome: string; ms: number; evaluated: number | null }>(
      `select outcome, (extract(epoch from finished_at - started_at) * 1000)::float8 as ms, evaluated::float8 as evaluated
       from personas.run where id > $1 and outcome is not null`,
      [before],
    );
    const [ended] = rows;
    if (ended === undefined) return null;
    if (ended.outcome !== 'succeeded') throw new Error(`The run ended as ${ended.outcome}.`);
    return ended;
  });
}

export async function measureWindowed(server: BenchServer, members: number, report: Report): Promise<void> {
  report.say(`An hourly run of what has changed, beside ${members} members`);
  await withFollowed(server, recentOrders(members), async (bench) => {
    const { database, daemon } = bench;
    // What is sent meanwhile would not be counted.
    await database.client.query(`update personas.destination set state = 'paused'`);
    const hourly: number[] = [];
    const full: number[] = [];
    for (let turn = 0; turn < TURNS; turn += 1) {
      await moveMembers(database.client, members, turn);
      await until(daemon, async () =>
        (await count(database, 'select count(*) from personas_capture.capture')) === 0 ? true : null,
      );
      await settle(database.client);
      const ofChanges = await run(bench, 'hourly');
      if (ofChanges.evaluated === null) throw new Error('The hourly run has compared everybody.');
      hourly.push(ofChanges.ms);
      await settle(database.client);
      const ofAll = await run(bench, 'full');
      if (ofAll.evaluated !== null) throw new Error('The run in full has compared what had changed alone.');
      full.push(ofAll.ms);
    }
    report.add(ratio(`hourly run of a window, 1 % of ${members} changed / run in full`, hourly, full, MOST));
    const untrue = `select count(*) from (${TRUE_MEMBERS}) as t full join personas.snapshot as s on s.profile_id = t.profile_id
      where s.profile_id is null or t.profile_id is null`;
    report.add(limit('… what is not true then', await count(database, untrue), 0, String));
  });
}
