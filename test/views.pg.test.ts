import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { openLive, SHOP, SPENDERS, type Live } from './support/live.js';
import { until } from './support/until.js';

/** A definition that is followed reads a view or a function of the shop's, which somebody replaces while no daemon looks. */
const TABLES = `${SHOP}
  create table bonus (customer_id int, total numeric); create index on bonus (customer_id);
  insert into bonus select n, 1 from generate_series(6, 20) as n;
  create function least_total() returns numeric immutable language sql as 'select 100';
  create view totals as select customer_id, sum(total) as total from orders group by 1;`;

let live: Live;
beforeEach(async () => {
  const sql = 'SELECT customer_id AS profile_id FROM totals WHERE total >= least_total()';
  live = await openLive({ tables: TABLES, audiences: [{ ...SPENDERS, sql }] });
  live.start();
  await live.isLive();
  await live.stop();
});
afterEach(() => live.close());

const members = async (): Promise<number> => (await live.harness.state('select from snapshot')).length;

describe('when a view that a definition reads is replaced', () => {
  it('by one that reads a table that nothing follows, the definition is polled', async () => {
    await live.harness.sql(`create or replace view totals as select customer_id, sum(total) as total
      from (select customer_id, total from orders union all select customer_id, total from bonus) as o group by 1`);
    live.start();
    const polled = await until(async () => {
      const [row] = await live.harness.state('select tracking, polled_because from definition');
      return row?.['tracking'] === 'polled' ? row['polled_because'] : null;
    });
    expect(polled).toBe('"spenders" reads `bonus`, which `changes` lacks.');
  });

  it.each([
    ['view', 'create or replace view totals as select customer_id, sum(total) * 10 as total from orders group by 1'],
    ['function', `create or replace function least_total() returns numeric immutable language sql as 'select 10'`],
  ])('by one that means something else, everybody is compared: a %s', async (_, replacing) => {
    await live.harness.sql('insert into orders (customer_id, total) values (9, 10)');
    live.start();
    await live.isLive();
    await live.harness.sync();
    await live.stop();
    expect(await members()).toBe(5);
    await live.harness.sql(replacing);
    live.start();
    await until(async () => (await members()) === 6);
    await live.isLive();
    expect(await live.harness.state('select id from run where corrections > 0')).toEqual([]);
  });
});
