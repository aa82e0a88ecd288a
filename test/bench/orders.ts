import type pg from 'pg';
import { settle } from './shop.js';

/**
 * A shop whose orders are followed in real time by three audiences and two traits, each of which groups the orders of a
 * customer. What a customer's fields must be is known here as well, so that a request can be told to be that of a change.
 */
export const FOLLOWED = {
  profiles: {
    sql: 'SELECT id AS profile_id, id::text AS user_id, email FROM customers',
    key: 'hybrid',
    changes: { customers: 'id' },
  },
  audiences: [
    {
      key: 'spenders',
      sql: 'SELECT customer_id AS profile_id FROM orders GROUP BY 1 HAVING sum(total) >= 300',
    },
    { key: 'regulars', sql: 'SELECT customer_id AS profile_id FROM orders GROUP BY 1 HAVING count(*) >= 4' },
    {
      key: 'splurged',
      sql: 'SELECT customer_id AS profile_id FROM orders WHERE total > 150 GROUP BY 1 HAVING count(*) >= 2',
    },
  ].map((audience) => ({ ...audience, ...follow() })),
  traits: [
    { key: 'lifetime_value', sql: 'SELECT customer_id AS profile_id, sum(total) AS value FROM orders GROUP BY 1' },
    { key: 'orders_count', sql: 'SELECT customer_id AS profile_id, count(*) AS value FROM orders GROUP BY 1' },
  ].map((trait) => ({ ...trait, ...follow() })),
};

/** Nobody of the first run is told of, and nothing is held. */
function follow(): Record<string, unknown> {
  return { changes: { orders: 'customer_id' }, initial: 'skip', guard: 'off' };
}

/** Makes `customers` people, of whom each has one order. */
export async function fillOrders(client: pg.Client, customers: number): Promise<void> {
  await client.query(`
    create table customers (id bigint primary key, email text not null, name text not null, city text not null);
    create table orders (
      id bigint generated always as identity primary key, customer_id bigint not null, total numeric(12, 2) not null,
      state text not null default 'paid', note text, placed_at timestamptz not null default now()
    );
    insert into customers select n, 'person.' || n || '@example.com', 'Person ' || n, 'City ' || n % 977
    from generate_series(1, ${customers}) as n;
    create index on customers (lower(btrim(email)));
    insert into orders (customer_id, total) select n, 10 from generate_series(1, ${customers}) as n;
    create index on orders (customer_id)`);
  await settle(client);
}

/** An order that is to be added. */
export interface Change {
  customer: number;
  total: number;
  /** What the fields become that change. */
  fields: Readonly<Record<string, number | boolean>>;
}

/** Draws changes for the first `customers`, one after the other, and knows what they come to. */
export function createChanges(customers: number): () => Change {
  const known = new Map<number, { sum: number; count: number; large: number }>();
  const fieldsOf = ({ sum, count, large }: { sum: number; count: number; large: number }): Change['fields'] => ({
    spenders: sum >= 300,
    regulars: count >= 4,
    splurged: large >= 2,
    lifetime_value: sum,
    orders_count: count,
  });
  let turn = 0;
  return () => {
    const customer = (turn % customers) + 1;
    const total = 20 + ((turn * 37) % 200);
    turn += 1;
    const before = known.get(customer) ?? { sum: 10, count: 1, large: 0 };
    const after = {
      sum: before.sum + total,
      count: before.count + 1,
      large: before.large + (total > 150 ? 1 : 0),
    };
    known.set(customer, after);
    const old = fieldsOf(before);
    const fields = Object.entries(fieldsOf(after)).filter(([field, value]) => old[field] !== value);
    return { customer, total, fields: Object.fromEntries(fields) };
  };
}
