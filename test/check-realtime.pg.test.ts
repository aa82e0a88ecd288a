import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { z } from 'zod';
import { createSite, type Site } from './support/cli.js';

/** What `check` says of real time, by the program as it is built. */
const TABLES = `
  create table people (id bigint primary key, user_id text, email text);
  create table orders (id bigint primary key, person bigint not null, total numeric not null);
  create table order_lines (id bigint primary key, order_id bigint not null);
  create index on orders (person); create index on order_lines (order_id);
  insert into people select n, 'u' || n, 'p' || n || '@example.com' from generate_series(1, 100) as n;
  insert into orders select n, n, n from generate_series(1, 100) as n;
  insert into order_lines select n, n from generate_series(1, 100) as n;
  create table many (id bigint primary key, email text);
  insert into many select n, 'p' || n || '@example.com' from generate_series(1, 20000) as n;
  analyze people, orders, order_lines, many`;
const PEOPLE = { sql: 'SELECT id AS profile_id, user_id, email FROM people', key: 'hybrid', changes: { people: 'id' } };
const BUYERS = {
  key: 'buyers',
  sql: 'SELECT DISTINCT person AS profile_id FROM orders',
  changes: { orders: 'person' },
};
const TOP = {
  key: 'top',
  sql: 'SELECT person AS profile_id FROM orders ORDER BY total DESC LIMIT 3',
  changes: { orders: 'person' },
};
const NOT_INSTALLED = 'Nothing captures changes in the source: run `personas-sync realtime install`.';

const found = z.object({
  definitions: z.array(
    z.object({
      key: z.string(),
      ok: z.boolean(),
      problems: z.array(z.object({ message: z.string(), place: z.object({ line: z.number() }).optional() })),
      realtime: z.strictObject({ possible: z.boolean(), because: z.string().nullable() }).nullable(),
    }),
  ),
  triggers: z.array(z.string()).nullable(),
});

let site: Site;
beforeAll(async () => {
  site = await createSite(TABLES, { audiences: [BUYERS] });
  expect((await site.run('migrate')).code).toBe(0);
});
afterAll(() => site.close());

async function check(sections: Readonly<Record<string, unknown>>, code: number) {
  await site.configure({ profiles: PEOPLE, ...sections });
  const ended = await site.run('check', '--json');
  expect([ended.code, ended.stderr]).toEqual([code, '']);
  return found.parse(ended.json);
}

describe('check, of real time', () => {
  it('says nothing where no definition asks for it', async () => {
    const { definitions, triggers } = await check({ audiences: [{ ...BUYERS, changes: undefined }] }, 0);
    expect(triggers).toBeNull();
    expect(definitions.map(({ realtime }) => realtime)).toEqual([null]);
  });

  it('names the command that makes the triggers, and what would be polled all the same', async () => {
    const { definitions, triggers } = await check({ audiences: [BUYERS, TOP] }, 0);
    expect(triggers).toEqual([NOT_INSTALLED]);
    expect(definitions.map(({ ok, realtime }) => ({ ok, realtime }))).toEqual([
      { ok: true, realtime: { possible: false, because: NOT_INSTALLED } },
      {
        ok: true,
        realtime: {
          possible: false,
          because: expect.stringMatching(
            /^"top" one person's rows decide about another's: a LIMIT at line \d+\.$/,
          ) as unknown,
        },
      },
    ]);
  });

  it('takes it for a mistake where `schedule: realtime` asks for it and it is not to be had', async () => {
    const { definitions } = await check({ audiences: [{ ...BUYERS, schedule: 'realtime' }] }, 2);
    expect(definitions[0]?.problems).toEqual([
      {
        place: expect.objectContaining({ line: expect.any(Number) as number }) as unknown,
        message: `"buyers" asks for \`schedule: realtime\` and would be polled. ${NOT_INSTALLED}`,
      },
    ]);
  });

  it('says real time where the triggers are there, and which table lacks them', async () => {
    await site.configure({ profiles: PEOPLE, audiences: [BUYERS] });
    expect((await site.run('realtime', 'install')).code).toBe(0);
    const fine = await check({ audiences: [{ ...BUYERS, schedule: 'realtime' }] }, 0);
    expect(fine.triggers).toEqual([]);
    expect(fine.definitions[0]?.realtime).toEqual({ possible: true, because: null });
    expect((await site.run('check')).stdout).toMatch(/✓ triggers changes are captured\n✓ buyers audience, real time\n/);

    await site.sql('alter table orders disable trigger user');
    const disabled = await check({ audiences: [BUYERS] }, 0);
    const sentence =
      'public.orders has triggers that are switched off on public.orders: run `personas-sync realtime install`.';
    expect(disabled.triggers).toEqual([sentence]);
    expect(disabled.definitions[0]?.realtime).toEqual({ possible: false, because: sentence });
    expect((await site.run('check')).stdout).toContain(`✓ buyers audience\n    polled: ${sentence}\n`);
    await site.sql('alter table orders enable trigger user');
  });

  it.each([
    ['a table', { ordres: 'person' }, 'The table `ordres` of `changes` is not in the source'],
    [
      'a table with its schema',
      { 'shop.orders': 'person' },
      'The table `shop.orders` of `changes` is not in the source.',
    ],
    [
      'a column',
      { orders: 'persn' },
      'The table public.orders has no column `persn` that a trigger sees: did you mean',
    ],
    ['a way', { orders: 'SELECT persn FROM changed' }, 'The SQL of `changes.orders`'],
  ])('takes what `changes` names and the source lacks for a mistake: %s', async (_, changes, message) => {
    const { definitions } = await check({ audiences: [{ ...BUYERS, changes }] }, 2);
    const [problem] = definitions[0]?.problems ?? [];
    expect(definitions[0]?.ok).toBe(false);
    expect(problem?.message).toContain(message);
    expect(problem?.place?.line).toBeGreaterThan(0);
  });

  it('takes a view in `changes` for none, though it is polled', async () => {
    await site.sql('create or replace view buying as select * from orders');
    const { definitions } = await check({ audiences: [{ ...BUYERS, changes: { buying: 'person' } }] }, 0);
    expect(definitions).toMatchObject([{ ok: true, realtime: { possible: false } }]);
  });

  it('takes a way whose tables nothing follows for a mistake', async () => {
    const lines = {
      key: 'lines',
      sql: 'SELECT DISTINCT o.person AS profile_id FROM order_lines AS l JOIN orders AS o ON o.id = l.order_id',
      changes: { order_lines: 'SELECT o.person FROM changed JOIN orders AS o ON o.id = changed.order_id' },
    };
    const { definitions } = await check({ audiences: [lines] }, 2);
    expect(definitions[0]?.problems.map(({ message }) => message)).toEqual([
      'The SQL of `changes.order_lines` reads `orders`, which is not in `changes` itself: a row there may move while this one is looked up. Add it, such as `orders: customer_id`.',
    ]);
    await site.configure({
      profiles: PEOPLE,
      audiences: [{ ...lines, changes: { ...lines.changes, orders: 'person' } }],
    });
    expect((await site.run('realtime', 'install')).code).toBe(0);
    expect((await site.run('check')).stdout).toContain('✓ lines audience, real time\n');
  });

  it('asks for the indexes by which people are found, and for none where their userId is their id', async () => {
    const byAddress = { sql: 'SELECT id AS profile_id, email FROM many', key: 'email', changes: { many: 'id' } };
    const lacking = await check({ profiles: byAddress, audiences: [BUYERS] }, 0);
    expect(lacking.definitions[0]?.realtime?.because).toContain(
      'reads all of `many` (Seq Scan): run `CREATE INDEX ON many (lower(btrim(email)))`, or leave it polled.',
    );
    const byId = { ...byAddress, sql: 'SELECT id AS profile_id, id::text AS user_id, email FROM many', key: 'hybrid' };
    const uninstalled = await check({ profiles: byId, audiences: [BUYERS] }, 0);
    expect(uninstalled.definitions[0]?.realtime?.because).not.toContain('CREATE INDEX');
    expect((await site.run('realtime', 'install')).code).toBe(0);
    const possible = { possible: true, because: null };
    expect((await check({ profiles: byId, audiences: [BUYERS] }, 0)).definitions[0]?.realtime).toEqual(possible);
    await site.sql('create index on many (lower(btrim(email)))');
    expect((await check({ profiles: byAddress, audiences: [BUYERS] }, 0)).definitions[0]?.realtime).toEqual(possible);
  });

  it('leaves a definition alone whose SQL is wrong', async () => {
    const { definitions } = await check(
      { audiences: [{ ...BUYERS, sql: 'SELECT nope AS profile_id FROM orders' }] },
      2,
    );
    expect(definitions.map(({ ok, realtime }) => [ok, realtime])).toEqual([[false, null]]);
  });
});
