import fc from 'fast-check';

/**
 * A shop whose customers buy, move and merge at random, in transactions that may be rolled back, and what is to be known of
 * them, computed by another way than the program's: by the shop's tables as they are.
 */

/** Have a userId for ever, and may go and come back. */
const REGULARS = 120;
/** Get a userId and lose it, and have addresses that nobody else has: Iterable takes an address for whom it was once of. */
const GUESTS = 20;
/** Are known by their address alone. */
const STRANGERS = 20;
const NOBODIES = 10;
const ADDRESSED = REGULARS + GUESTS + STRANGERS;
const EVERYBODY = ADDRESSED + NOBODIES;

/** Is written to at all times, and belongs to `orders` from time to time. */
export const NEW_REGION = `create table orders_2 (like orders including defaults); create index on orders_2 (id); create index on orders_2 (customer_id);`;

/** How long an order is recent: longer than any test, so that windows close and open by the times that are written alone. */
const LOOKBACK = '1 day';

export const TABLES = `
  create sequence order_ids;
  create table customers (id int primary key, user_id text, email text, home int not null default 0,
    unique (email) deferrable initially deferred);
  create index on customers (user_id); create index on customers (lower(btrim(email)));
  create table orders (id bigint not null default nextval('order_ids'), region int not null, customer_id int, total int not null,
    placed_at timestamptz not null default now() - interval '12 hours') partition by list (region);
  create table orders_0 partition of orders for values in (0);
  create table orders_1 partition of orders for values in (1);
  ${NEW_REGION}
  create index on orders (id); create index on orders (customer_id);
  create table order_lines (order_id bigint not null, product text not null, quantity int not null);
  create index on order_lines (order_id);
  create table visits (customer_id int primary key references customers on delete cascade, times int not null);
  insert into customers select n, case when n <= ${REGULARS} then 'r' || n end, case when n <= ${ADDRESSED} then 'c' || n || '@x.de' end
    from generate_series(1, ${EVERYBODY}) as n;
  insert into orders (region, customer_id, total, placed_at)
    select n % 2, n % ${EVERYBODY} + 1, n % 90, now() + (n % 3 - 1) * interval '18 hours' - interval '12 hours' from generate_series(1, 400) as n;
  insert into order_lines select id, case id % 3 when 0 then 'red' else 'blue' end, id % 5 from orders;
  insert into visits select n, n from generate_series(1, ${EVERYBODY}, 3) as n`;

export const PROFILES = { sql: 'SELECT id AS profile_id, user_id, email FROM customers', changes: { customers: 'id' } };
const FREELY = { guard: 'off' };
const RECENTLY = 'placed_at > :now - :lookback AND placed_at <= :now';
/** When an order comes to be recent, or is it no more. */
const VALID_UNTIL = `min(CASE WHEN placed_at > :now THEN placed_at ELSE placed_at + :lookback END)
              FILTER (WHERE placed_at + :lookback > :now)`;
const LINES = 'SELECT o.customer_id FROM changed AS c JOIN orders AS o ON o.id = c.order_id';
export const DEFINITIONS = {
  audiences: [
    {
      key: 'spenders',
      sql: 'SELECT customer_id AS profile_id FROM orders GROUP BY 1 HAVING sum(total) >= 100',
      changes: { orders: 'customer_id' },
      send: 'both',
      ...FREELY,
    },
    {
      key: 'red',
      sql: `SELECT DISTINCT o.customer_id AS profile_id FROM orders AS o JOIN order_lines AS l ON l.order_id = o.id WHERE l.product = 'red'`,
      changes: { orders: 'customer_id', order_lines: LINES },
      send: 'both',
      ...FREELY,
    },
    {
      key: 'visitors',
      sql: 'SELECT customer_id AS profile_id FROM visits WHERE times > 1',
      changes: { visits: 'customer_id' },
      send: 'both',
      ...FREELY,
    },
    {
      key: 'recent',
      schedule: 'realtime',
      lookback: LOOKBACK,
      sql: `SELECT customer_id AS profile_id, bool_or(${RECENTLY}) AS member, ${VALID_UNTIL} AS valid_until FROM orders GROUP BY 1`,
      changes: { orders: 'customer_id' },
      send: 'both',
      ...FREELY,
    },
  ],
  traits: [
    // Everybody is known in Iterable by this one, whatever they buy.
    {
      key: 'home',
      sql: 'SELECT id AS profile_id, home AS value FROM customers',
      changes: { customers: 'id' },
      ...FREELY,
    },
    {
      key: 'stats',
      sql: `SELECT o.customer_id AS profile_id, count(*) AS items, sum(l.quantity) AS pieces FROM orders AS o
            JOIN order_lines AS l ON l.order_id = o.id GROUP BY 1`,
      changes: { orders: 'customer_id', order_lines: LINES },
      ...FREELY,
    },
    {
      key: 'lately',
      lookback: LOOKBACK,
      sql: `SELECT customer_id AS profile_id, nullif(count(*) FILTER (WHERE ${RECENTLY}), 0) AS value, ${VALID_UNTIL} AS valid_until
            FROM orders GROUP BY 1`,
      changes: { orders: 'customer_id' },
      ...FREELY,
    },
  ],
};
export const AUDIENCES = ['spenders', 'red', 'visitors', 'recent'];
export const HOURLY = ['lately'];
/** Whose userId is theirs for ever, so that their events are a history of them. */
export const REGULAR_IDS: readonly string[] = Array.from({ length: REGULARS }, (_, index) => `r${index + 1}`);

/** A key that a guest has or had. */
export const GUEST = /^(u:g|e:g|e:c1(2[1-9]|3\d|40)@)/;

/** What each recipient is to have at this moment, by field: the values of numbers as JavaScript writes them. */
export const TRUTH = `
  with keyed as (
    select id, coalesce('u:' || user_id, 'e:' || lower(btrim(email))) as recipient from customers where user_id is not null or email is not null),
  facts (id, field, value) as (
    select customer_id, 'spenders', 'true' from orders group by 1 having sum(total) >= 100
    union all select distinct o.customer_id, 'red', 'true' from orders as o, order_lines as l where l.order_id = o.id and l.product = 'red'
    union all select customer_id, 'visitors', 'true' from visits where times > 1
    union all select distinct customer_id, 'recent', 'true' from orders where now() - placed_at >= '0' and now() - placed_at < '${LOOKBACK}'
    union all select customer_id, 'lately', count(*)::text from orders where now() - placed_at >= '0' and now() - placed_at < '${LOOKBACK}' group by 1
    union all select id, 'home', home::text from customers
    union all select o.customer_id, f.field, case f.field when 'items' then count(*) else sum(l.quantity) end::text
      from orders as o join order_lines as l on l.order_id = o.id, (values ('items'), ('pieces')) as f (field) group by 1, 2)
  select k.recipient, f.field, f.value from facts as f join keyed as k on k.id = f.id order by 1, 2`;

/** How many windows open or close within the time that a look at everything may take. */
export const WINDOWS_MOVING = `
  select count(*)::int as count from orders, (values (interval '0'), (interval '${LOOKBACK}')) as b (after)
  where placed_at + after between now() and now() + interval '1 minute'`;

export interface Transaction {
  /** Statements, each list of them to be undone by itself or not. */
  steps: readonly { statements: readonly string[]; isUndone: boolean }[];
  isRolledBack: boolean;
}

const customer = fc.integer({ min: 1, max: EVERYBODY });
const regular = fc.integer({ min: 1, max: REGULARS });
const guest = fc.integer({ min: REGULARS + 1, max: REGULARS + GUESTS });
const stranger = fc.integer({ min: REGULARS + GUESTS + 1, max: ADDRESSED });
const addressed = fc.integer({ min: 1, max: ADDRESSED });
/** An address that this one may come to have. */
const addressOf = (of: number, number: number): string =>
  of <= REGULARS ? `N${number}` : of <= REGULARS + GUESTS ? `G${of}_${number % 5}` : `S${number % 40}`;
const region = fc.integer({ min: 0, max: 1 });
const soon = fc.integer({ min: -500, max: 1_500 }).map((ms) => `interval '${ms} ms'`);
/** When an order was placed: it is recent soon, or no more, or for the rest of the test it is recent, too old or to come. */
const placedAt = fc.oneof(
  soon.map((ms) => `now() + ${ms}`),
  soon.map((ms) => `now() - interval '${LOOKBACK}' + ${ms}`),
  fc.constantFrom('-12 hours', '-30 hours', '12 hours').map((ago) => `now() + interval '${ago}'`),
);
const total = fc.integer({ min: 0, max: 120 });
const product = fc.constantFrom('red', 'blue', 'green');
/** The table or, past it, one of its partitions. */
const orders = fc.constantFrom('orders', 'orders', 'orders_0', 'orders_1', 'orders_2');
const anyOrder = (of: number): string => `(select id from orders where customer_id = ${of} order by id limit 1)`;

const one = (...statements: string[]): readonly string[] => statements;
const MOVES: readonly fc.MaybeWeightedArbitrary<readonly string[]>[] = [
  {
    weight: 9,
    arbitrary: fc
      .tuple(customer, total, region, product, fc.boolean(), placedAt)
      .map(([of, price, where, what, isDirect, when]) => {
        const table = isDirect ? `orders_${where}` : 'orders';
        return one(
          `insert into ${table} (region, customer_id, total, placed_at) values (${where}, ${of}, ${price}, ${when})`,
          `insert into order_lines values (currval('order_ids'), '${what}', 1), (currval('order_ids'), 'blue', 2)`,
        );
      }),
  },
  {
    weight: 3,
    arbitrary: fc
      .tuple(customer, total, orders)
      .map(([of, price, table]) => one(`update ${table} set total = ${price} where customer_id = ${of}`)),
  },
  {
    weight: 3,
    arbitrary: fc
      .tuple(customer, total, placedAt)
      .map(([of, price, when]) =>
        one(
          `insert into orders_2 (region, customer_id, total, placed_at) values (2, ${of}, ${price}, ${when})`,
          `insert into order_lines values (currval('order_ids'), 'red', 1)`,
        ),
      ),
  },
  {
    weight: 4,
    arbitrary: fc
      .tuple(customer, placedAt, orders)
      .map(([of, when, table]) => one(`update ${table} set placed_at = ${when} where customer_id = ${of}`)),
  },
  {
    weight: 3,
    arbitrary: fc
      .tuple(customer, customer, orders)
      .map(([from, to, table]) => one(`update ${table} set customer_id = ${to} where customer_id = ${from}`)),
  },
  {
    weight: 1,
    arbitrary: customer.map((of) =>
      one(`update orders set region = 1 - region where customer_id = ${of} and region < 2`),
    ),
  },
  {
    weight: 5,
    arbitrary: fc.tuple(customer, orders).map(([of, table]) => one(`delete from ${table} where customer_id = ${of}`)),
  },
  {
    weight: 2,
    arbitrary: fc
      .tuple(customer, product)
      .map(([of, what]) => one(`insert into order_lines select id, '${what}', 3 from ${anyOrder(of)} as o`)),
  },
  {
    weight: 2,
    arbitrary: fc
      .tuple(customer, customer)
      .map(([from, to]) =>
        one(`update order_lines set order_id = coalesce(${anyOrder(to)}, order_id) where order_id = ${anyOrder(from)}`),
      ),
  },
  {
    weight: 2,
    arbitrary: fc
      .tuple(customer, product)
      .map(([of, what]) =>
        one(`update order_lines set product = '${what}', quantity = quantity + 1 where order_id = ${anyOrder(of)}`),
      ),
  },
  { weight: 2, arbitrary: customer.map((of) => one(`delete from order_lines where order_id = ${anyOrder(of)}`)) },
  {
    weight: 1,
    // The lines go with their order.
    arbitrary: customer.map((of) =>
      one(
        `delete from order_lines where order_id in (select id from orders where customer_id = ${of})`,
        `delete from orders where customer_id = ${of}`,
      ),
    ),
  },
  {
    weight: 3,
    arbitrary: customer.map((of) =>
      one(
        `insert into visits select id, 1 from customers where id = ${of} on conflict (customer_id) do update set times = visits.times + 1`,
      ),
    ),
  },
  {
    weight: 2,
    arbitrary: fc.tuple(customer, customer).map(([from, to]) =>
      one(
        `merge into visits as v using (select id from customers where id between ${Math.min(from, to)} and ${Math.min(from, to) + 5}) as c
           on v.customer_id = c.id when matched and v.times > 3 then delete when matched then update set times = v.times + 1
           when not matched then insert values (c.id, 2)`,
      ),
    ),
  },
  {
    weight: 2,
    arbitrary: customer.map((of) => one(`delete from visits where customer_id between ${of} and ${of + 3}`)),
  },
  {
    weight: 3,
    arbitrary: fc
      .tuple(addressed, fc.integer({ min: 1, max: 1_000 }))
      .map(([of, number]) => one(`update customers set email = ' ${addressOf(of, number)}@X.de' where id = ${of}`)),
  },
  {
    weight: 1,
    arbitrary: fc
      .oneof(fc.tuple(regular, regular), fc.tuple(stranger, stranger))
      .map(([a, b]) =>
        one(
          `update customers as c set email = o.email from customers as o where (c.id, o.id) in ((${a}, ${b}), (${b}, ${a}))`,
        ),
      ),
  },
  { weight: 1, arbitrary: regular.map((of) => one(`update customers set email = null where id = ${of}`)) },
  {
    weight: 2,
    arbitrary: guest.map((of) =>
      one(`update customers set user_id = case when user_id is null then 'g' || id end where id = ${of}`),
    ),
  },
  { weight: 2, arbitrary: customer.map((of) => one(`update customers set home = home + 1 where id = ${of}`)) },
  {
    weight: 2,
    // Two are found to be one person.
    arbitrary: fc
      .tuple(regular, addressed)
      .filter(([from, to]) => from !== to)
      .map(([from, to]) =>
        one(
          `update orders set customer_id = ${to} where customer_id = ${from} and exists (select from customers where id = ${to})`,
          `update customers set email = coalesce((select email from customers where id = ${from}), email) where id = ${to} and id <= ${REGULARS}`,
          `delete from customers where id = ${from} and exists (select from customers where id = ${to})`,
        ),
      ),
  },
  {
    weight: 1,
    arbitrary: regular.map((of) => one(`delete from customers where id = ${of}`)),
  },
  {
    weight: 2,
    arbitrary: fc
      .tuple(regular, fc.integer({ min: 1, max: 5 }))
      .map(([from, count]) =>
        one(
          `insert into customers (id, user_id, email) select n, 'r' || n, null from generate_series(${from}, least(${from + count}, ${REGULARS})) as n on conflict (id) do nothing`,
        ),
      ),
  },
];

const move = fc.oneof(...MOVES);
const emptying = fc
  .constantFrom('visits', 'orders_0', 'orders_1', 'orders_2', 'orders', 'order_lines')
  .map((table) => one(`truncate ${table}`));

export const transaction: fc.Arbitrary<Transaction> = fc.record({
  steps: fc.array(
    fc.record({
      statements: fc.oneof({ weight: 400, arbitrary: move }, { weight: 1, arbitrary: emptying }),
      isUndone: fc.oneof({ weight: 9, arbitrary: fc.constant(false) }, { weight: 1, arbitrary: fc.constant(true) }),
    }),
    { minLength: 1, maxLength: 3 },
  ),
  isRolledBack: fc.oneof({ weight: 9, arbitrary: fc.constant(false) }, { weight: 1, arbitrary: fc.constant(true) }),
});
