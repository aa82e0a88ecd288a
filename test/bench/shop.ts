import type pg from 'pg';

/**
 * What is measured on: customers, and for each of them a row of statistics that says who is in the audience. Four of
 * five are members. The tables are as wide as a small shop's; people are known by `id` and by an email, of which one in
 * ten has capitals.
 */
export const PROFILES = 'SELECT id AS profile_id, id::text AS user_id, email FROM customers';
export const AUDIENCE = 'SELECT customer_id AS profile_id FROM account_stats WHERE spend > 100';
export const TRAIT = 'SELECT customer_id AS profile_id, spend AS value FROM account_stats WHERE spend > 100';

/** Makes the shop of an empty database, with exactly `members` people in the audience. */
export async function fillShop(client: pg.Client, members: number): Promise<void> {
  const customers = Math.floor(members * 1.25);
  await client.query(`
    create table customers (
      id bigint primary key, email text not null, name text not null, city text not null, created_at timestamptz not null
    );
    create table account_stats (
      customer_id bigint primary key, orders integer not null, spend numeric(12, 2) not null, last_order_at timestamptz
    );
    insert into customers
    select n, case when n % 10 = 0 then 'Person.' else 'person.' end || n || '@example.com', 'Person ' || n, 'City ' || n % 977, now() - n % 1000 * interval '1 hour'
    from generate_series(1, ${customers}) as n;
    insert into account_stats
    select n, n % 23 + 1, case when n % 5 = 0 then n % 100 else 101 + n % 5000 end, now() - n % 500 * interval '1 hour'
    from generate_series(1, ${customers}) as n`);
  await settle(client);
}

/** One member in a hundred changes: half of them leave, and as many come. Another `turn` moves others. */
export async function moveMembers(client: pg.Client, turn: number): Promise<void> {
  await client.query(
    `update account_stats set spend = case when spend > 100 then 7 else 250 end
     where ${drawn(turn)} < case when spend > 100 then 0.005 else 0.02 end`,
  );
}

/** One member in a hundred spends more. Another `turn` draws others. */
export async function moveValues(client: pg.Client, turn: number): Promise<void> {
  await client.query(`update account_stats set spend = spend + 1 where spend > 100 and ${drawn(turn)} < 0.01`);
}

/** A number from 0 to 1 for each customer, the same in every run of the benchmark. */
function drawn(turn: number): string {
  return `(hashint8extended(customer_id, ${turn}) & 1048575) / 1048576.0`;
}

/** Leaves nothing behind that a later measurement would have to do: dead rows, hint bits, dirty pages. */
export async function settle(client: pg.Client): Promise<void> {
  await client.query('vacuum (analyze)');
  await client.query('checkpoint');
}
