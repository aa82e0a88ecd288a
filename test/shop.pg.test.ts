import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { loadConfig } from '../src/config/load.js';
import { isSampleShop, seedShop, trade } from '../src/demo/shop.js';
import { createDatabase, type TestDatabase } from './support/database.js';

let database: TestDatabase;

beforeEach(async () => {
  database = await createDatabase();
});

afterEach(() => database.drop());

async function value(sql: string): Promise<unknown> {
  const { rows } = await database.pool.query<{ value: unknown }>(`select (${sql})::text as value`);
  return rows[0]?.value;
}

const TABLES = ['customers', 'customer_emails', 'orders', 'events', 'churn_scores'];

/** Of all that doesn't depend on the moment of the creation. */
const contents = `
  select md5(string_agg(c::text || o::text, '' order by o.id))
  from (select id, account_id, email, name, country from customers) c
  join (select id, customer_id, total, status from orders) o on o.customer_id = c.id`;

async function hashes(): Promise<unknown[]> {
  return Promise.all(
    TABLES.map((table) => value(`select '${table} ' || md5(string_agg(t::text, '' order by t::text)) from ${table} t`)),
  );
}

describe('the sample shop', () => {
  it('has customers with no address, with one and with several, with and without an account', async () => {
    expect(await isSampleShop(database.pool)).toBe(false);
    expect(await seedShop(database.pool, { customers: 1_000 })).toEqual({ created: true });
    expect(await isSampleShop(database.pool)).toBe(true);

    for (const table of TABLES) expect(Number(await value(`select count(*) from ${table}`))).toBeGreaterThan(50);
    expect(await value('select count(*) from customers')).toBe('1000');
    const share = async (condition: string) =>
      Number(await value(`select count(*) from customers c where ${condition}`)) / 1_000;
    expect(await share('email is null')).toBeCloseTo(0.08, 1);
    expect(await share('account_id is null')).toBeCloseTo(0.33, 1);
    expect(await share('exists (select from customer_emails e where e.customer_id = c.id)')).toBeCloseTo(0.14, 1);
    expect(await share('email is null and account_id is null')).toBeGreaterThan(0);
    expect(await value('select count(*) from orders where placed_at > now()')).toBe('0');
  });

  it('is created once, and left alone from then on', async () => {
    await seedShop(database.pool, { customers: 100 });
    await database.pool.query('delete from orders');
    expect(await seedShop(database.pool, { customers: 100 })).toEqual({ created: false });
    expect(await value('select count(*) from orders')).toBe('0');
  });

  it('is created once by two who do so at the same moment', async () => {
    const both = await Promise.all([1, 2].map(() => seedShop(database.pool, { customers: 100 })));
    expect(both.filter(({ created }) => created)).toHaveLength(1);
    expect(await value('select count(*) from customers')).toBe('100');
  });

  it('is the same for the same seed, and another for another', async () => {
    const other = await createDatabase();
    try {
      await seedShop(database.pool, { customers: 200, seed: 0.1 });
      await seedShop(other.pool, { customers: 200, seed: 0.1 });
      const { rows } = await other.pool.query<{ md5: string }>(contents);
      expect(rows[0]?.md5).toBe(await value(contents));
    } finally {
      await other.drop();
    }
    const third = await createDatabase();
    try {
      await seedShop(third.pool, { customers: 200, seed: 0.2 });
      const { rows } = await third.pool.query<{ md5: string }>(contents);
      expect(rows[0]?.md5).not.toBe(await value(contents));
    } finally {
      await third.drop();
    }
  });

  it("isn't created beside the customers of somebody else", async () => {
    await database.pool.query('create table customers (id int)');
    await expect(seedShop(database.pool)).rejects.toThrow(/without a table `customers`/);
    expect(await isSampleShop(database.pool)).toBe(false);
    expect(await value(`select to_regclass('orders')`)).toBeNull();
  });
});

describe('the sample configuration', () => {
  it('finds somebody in the shop by each of its definitions, and everybody once', async () => {
    await seedShop(database.pool, { customers: 1_000 });
    const { definitions, profiles } = loadConfig('config/personas.yaml', {});
    expect(await value(`select count(distinct profile_id) from (${profiles.text.sql}) p`)).toBe('1000');
    for (const { key, text, lookback } of definitions) {
      const sql = text.sql.replaceAll(':now', 'now()').replaceAll(':lookback', `interval '${lookback ?? ''}'`);
      const { rows } = await database.pool.query<{ members: number; people: number }>(
        `select count(*)::int as members, count(distinct profile_id)::int as people from (${sql}\n) d`,
      );
      const { members = 0, people = 0 } = rows[0] ?? {};
      expect([key, members > 0 && members < 1_000, members - people]).toEqual([key, true, 0]);
    }
  });
});

describe('trade', () => {
  it('makes new customers, orders and events, changes addresses and cancels orders', async () => {
    await seedShop(database.pool, { customers: 200 });
    const before = await hashes();
    const cancelled = `select count(*) from orders where status = 'cancelled'`;
    const cancelledBefore = Number(await value(cancelled));

    const made = await trade(database.pool, { signal: new AbortController().signal, pauseMs: 0, deals: 500 });
    expect(made).toBe(500);
    for (const after of await hashes()) expect(before).not.toContain(after);
    expect(Number(await value(cancelled))).toBeGreaterThan(cancelledBefore);
    expect(Number(await value(`select count(*) from customers where email like '%@example.org'`))).toBeGreaterThan(0);
    expect(await value(`select max(id) > 200 from customers`)).toBe('true');
  });

  it('stops when it is told to, at once, however long its pause', async () => {
    await seedShop(database.pool, { customers: 10 });
    const controller = new AbortController();
    const trading = trade(database.pool, { signal: controller.signal, pauseMs: 3_600_000 });
    controller.abort();
    expect(await trading).toBeLessThanOrEqual(1);
  });

  it('goes on when all customers have left', async () => {
    await seedShop(database.pool, { customers: 10 });
    await database.pool.query('delete from customers');
    expect(await trade(database.pool, { signal: new AbortController().signal, pauseMs: 0, deals: 50 })).toBe(50);
  });
});
