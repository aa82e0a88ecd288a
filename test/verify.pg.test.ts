import { afterAll, beforeAll, beforeEach, describe, expect, it } from 'vitest';
import { z } from 'zod';
import type { ExpectedValue } from '../src/core/call.js';
import { compareUser } from '../src/destinations/iterable/compare.js';
import { createSite, type Site } from './support/cli.js';
import { until } from './support/until.js';

/** `verify` reads users back and says what is not as it was sent. */
const PEOPLE = `
  create table people (id bigint primary key, user_id text, email text, vip boolean not null default true,
    spent numeric not null default 10, seen timestamptz default '2026-01-02T03:04:05Z');
  insert into people (id, user_id) select n, 'u' || n from generate_series(1, 40) as n`;
const AUDIENCE = { name: 'VIP', sql: 'SELECT id AS profile_id FROM people WHERE vip', send: ['identify', 'list'] };
const TRAIT = { name: 'Stats', sql: 'SELECT id AS profile_id, spent, seen FROM people' };
/** A trait that most people don't have. */
const FEW = { name: 'Few', sql: 'SELECT id AS profile_id, spent AS value FROM people WHERE id <= 5' };
const GUARD = { guard: 'off' };

const verifyJson = z.strictObject({
  version: z.literal(1),
  verified: z.array(
    z.strictObject({
      definition: z.string(),
      destination: z.string(),
      checked: z.int(),
      unjudged: z.int(),
      differing: z.int(),
      repaired: z.int(),
    }),
  ),
  differences: z.array(
    z.strictObject({
      definition: z.string(),
      destination: z.string(),
      recipient: z.string(),
      field: z.string(),
      expected: z.string(),
      found: z.string().nullable(),
    }),
  ),
});

let site: Site;
beforeAll(async () => {
  site = await createSite(PEOPLE, {
    audiences: [{ ...AUDIENCE, ...GUARD }],
    traits: [TRAIT, FEW].map((trait) => ({ ...trait, ...GUARD })),
  });
  expect((await site.run('sync')).code).toBe(0);
  await site.sql('update people set vip = false where id > 30');
  expect((await site.run('sync')).code).toBe(0);
});
afterAll(() => site.close());
/** As if what has changed had done so an hour ago. */
beforeEach(() => site.sql(`update personas.transition set at = at - interval '1 hour'`));

/** Rows about people that `verify` has left. */
async function keptOf({ sql }: Site): Promise<number> {
  const [row] = await sql(
    'select (select count(*) from personas.sample)::int4 + (select count(*) from personas.difference)::int4 as n',
  );
  return Number(row?.['n']);
}

const overwrite = async (userId: string, dataFields: object): Promise<void> => {
  const answer = await fetch(`${site.simulator.url}/api/users/update`, {
    method: 'POST',
    headers: { 'Api-Key': 'k', 'Content-Type': 'application/json' },
    body: JSON.stringify({ userId, dataFields }),
  });
  expect(answer.status).toBe(200);
};

describe('verify', () => {
  it('says that all is as it was sent, members and those who left', async () => {
    // A value that nobody was sent from here is none of ours.
    await overwrite('u20', { few: 45 });
    const { code, json, stdout } = await site.run('verify', '--json');
    expect(code, stdout).toBe(0);
    const { verified, differences } = verifyJson.parse(json);
    expect(differences).toEqual([]);
    expect(verified.map(({ definition, checked, unjudged }) => ({ definition, checked, unjudged }))).toEqual([
      { definition: 'few', checked: 5, unjudged: 0 },
      { definition: 'stats', checked: 40, unjudged: 0 },
      { definition: 'vip', checked: 40, unjudged: 0 },
    ]);
  });

  it('leaves out what has calls waiting or refused, and what has just changed', async () => {
    await site.sql(`update personas.transition set at = now() where recipient = 'u:u31'`);
    await site.sql(
      `insert into personas.outbox (kind, destination_id, definition_id, priority, recipient, columns, due_at)
       select 'm', 1, id, 1, 'u:u1', array['vip'], now() + interval '1 hour' from personas.definition where key = 'vip'`,
    );
    const { json } = await site.run('verify', 'vip', '--json');
    expect(verifyJson.parse(json).verified).toMatchObject([
      { definition: 'vip', checked: 38, unjudged: 2, differing: 0 },
    ]);
    await site.sql('delete from personas.outbox');
  });

  it('finds what differs after a minute, says so with 2, and sends it again where that is asked for', async () => {
    await overwrite('u1', { vip: false, spent: 11.5 });
    await overwrite('u35', { vip: true });
    site.simulator.deleteUser('u2');
    const { code, stdout, json } = await site.run('verify', '--repair', '--json');
    expect(code, stdout).toBe(0);
    const { verified, differences } = verifyJson.parse(json);
    expect(verified.map(({ definition, differing, repaired }) => ({ definition, differing, repaired }))).toEqual([
      { definition: 'few', differing: 1, repaired: 1 },
      { definition: 'stats', differing: 2, repaired: 2 },
      { definition: 'vip', differing: 3, repaired: 3 },
    ]);
    const of = (recipient: string) =>
      differences
        .filter((each) => each.recipient === recipient)
        .map(({ field, expected, found }) => ({ field, expected, found }));
    expect(of('u:u1')).toEqual([
      { field: 'spent', expected: '10.0', found: '11.5' },
      { field: 'vip', expected: 'true', found: 'false' },
    ]);
    expect(of('u:u35')).toEqual([{ field: 'vip', expected: 'false', found: 'true' }]);
    expect(
      of('u:u2')
        .map(({ field }) => field)
        .sort(),
    ).toEqual(['.list', 'few', 'seen', 'spent', 'vip']);
    expect(site.simulator.user('u1')?.fields).toMatchObject({ vip: 'true', spent: '10.0' });
    expect(site.simulator.user('u2')?.fields).toMatchObject({ vip: 'true', spent: '10.0' });
    expect(site.simulator.lists()[0]?.members()).toContain('u2');
    expect(site.simulator.user('u20')?.fields).toMatchObject({ few: '45' });
    // What was read of people is not kept.
    expect(await keptOf(site)).toBe(0);
  }, 180_000);

  it('does not take who is now known by another key for somebody who has left', async () => {
    await site.sql(`insert into people (id, email) values (51, 'guest@example.com')`);
    await site.sql(`insert into people (id, user_id, email) values (52, 'u52', 'known@example.com')`);
    expect((await site.run('sync')).code).toBe(0);
    await site.sql(`update people set user_id = 'u51' where id = 51`);
    await site.sql('update people set user_id = null where id = 52');
    expect((await site.run('sync')).code).toBe(0);
    await site.sql(`update personas.transition set at = at - interval '1 hour'`);
    const { code, stdout, json } = await site.run('verify', '--repair', '--json');
    expect(code, stdout).toBe(0);
    expect(verifyJson.parse(json).differences).toEqual([]);
    expect(site.simulator.user('u51')?.fields).toMatchObject({ vip: 'true', spent: '10.0' });
    expect(site.simulator.user('known@example.com')?.fields).toMatchObject({ vip: 'true', spent: '10.0' });
    await site.sql('delete from people where id > 50');
    expect((await site.run('sync')).code).toBe(0);
  });

  it('says what it is asked for where there is no such definition', async () => {
    const { code, stderr } = await site.run('verify', 'vipp');
    expect(code).toBe(2);
    expect(stderr).toContain('did you mean `vip`?');
  });
});

describe('verify of many', () => {
  const PEOPLE_COUNT = 620;
  const WIDE = 30;
  let many: Site;
  beforeAll(async () => {
    const values = Array.from({ length: WIDE }, (_, n) => `id + ${n} AS wide_${n}`).join(', ');
    many = await createSite(
      `create table people (id bigint primary key, user_id text, email text);
       insert into people (id, user_id) select n, 'u' || n from generate_series(1, ${PEOPLE_COUNT}) as n`,
      {
        traits: [
          { name: 'Rank', sql: 'SELECT id AS profile_id, id AS value FROM people', ...GUARD },
          { name: 'Wide', sql: `SELECT id AS profile_id, ${values} FROM people WHERE id <= 40`, ...GUARD },
        ],
      },
    );
    expect((await many.run('sync')).code).toBe(0);
    await many.sql(`update personas.transition set at = at - interval '1 hour'`);
  }, 60_000);
  afterAll(() => many.close());

  it('reads a hundred users a second at most', async () => {
    const { code, json, stdout } = await many.run('verify', '--sample', '1000', '--json');
    expect(code, stdout).toBe(0);
    expect(verifyJson.parse(json)).toMatchObject({
      verified: [
        { definition: 'rank', checked: PEOPLE_COUNT, unjudged: 0, differing: 0 },
        { definition: 'wide', checked: 40, unjudged: 0, differing: 0 },
      ],
      differences: [],
    });
    expect(many.simulator.stats.arrivals('users/get')).toHaveLength(PEOPLE_COUNT);
    // Fifty are read at once: so many may have been on their way when a second begins, beside those that are sent in it.
    const { mostWithin } = many.simulator.stats;
    expect(mostWithin('users/get', 1_000)).toBeLessThanOrEqual(100 + 50);
    expect(mostWithin('users/get', 5_000)).toBeLessThanOrEqual(500 + 50);
    expect(await keptOf(many)).toBe(0);
  }, 60_000);

  it('has each difference in JSON, and says how many more there are than it shows', async () => {
    for (let id = 1; id <= 40; id += 1) many.simulator.deleteUser(`u${id}`);
    const others = Array.from({ length: PEOPLE_COUNT - 40 }, (_, n) => {
      return { userId: `u${n + 41}`, dataFields: { rank: -1 } };
    });
    const overwritten = await fetch(`${many.simulator.url}/api/users/bulkUpdate`, {
      method: 'POST',
      headers: { 'Api-Key': 'k', 'Content-Type': 'application/json' },
      body: JSON.stringify({ users: others }),
    });
    expect(overwritten.status).toBe(200);
    const daemon = many.start('start');
    try {
      await daemon.said(/Leading/);
      const [all, wide, shown] = await Promise.all([
        many.run('verify', 'rank', '--sample', '1000', '--repair', '--json'),
        many.run('verify', 'wide', '--json'),
        many.run('verify', 'wide'),
      ]);
      expect([all.code, wide.code, shown.code]).toEqual([0, 2, 2]);

      const ranks = verifyJson.parse(all.json);
      expect(ranks.verified).toMatchObject([
        { definition: 'rank', checked: PEOPLE_COUNT, differing: PEOPLE_COUNT, repaired: PEOPLE_COUNT },
      ]);
      const byRecipient = new Map(ranks.differences.map((each) => [each.recipient, each]));
      expect([ranks.differences.length, byRecipient.size]).toEqual([PEOPLE_COUNT, PEOPLE_COUNT]);
      expect(byRecipient.get('u:u7')).toMatchObject({ field: 'rank', expected: '7', found: null });
      expect(byRecipient.get('u:u600')).toMatchObject({ field: 'rank', expected: '600', found: '-1' });
      for (const id of [7, 600, PEOPLE_COUNT])
        expect(many.simulator.user(`u${id}`)?.fields).toMatchObject({ rank: String(id) });

      const { verified, differences } = verifyJson.parse(wide.json);
      expect(verified).toMatchObject([{ definition: 'wide', checked: 40, differing: 40, repaired: 0 }]);
      expect(new Set(differences.map(({ recipient, field }) => `${recipient} ${field}`)).size).toBe(40 * WIDE);
      expect(differences).toHaveLength(40 * WIDE);
      expect(shown.stdout.match(/should be \d+, and is missing/g)).toHaveLength(20);
      expect(shown.stdout).toContain(`… and 1,180 more (--json has them).`);
      expect(await keptOf(many)).toBe(0);
    } finally {
      daemon.process.kill('SIGTERM');
      await daemon.ended;
    }
  }, 240_000);

  it('keeps nothing of what it has read where it is stopped', async () => {
    const verifying = many.start('verify', 'wide');
    await until(async () => (await keptOf(many)) >= 40 * WIDE);
    verifying.process.kill('SIGINT');
    const { code } = await verifying.ended;
    expect(code).toBe(75);
    expect(await keptOf(many)).toBe(0);
  }, 60_000);
});

describe('what a user has', () => {
  const differs = (expected: Partial<ExpectedValue>, dataFields: Record<string, unknown>): boolean =>
    compareUser({ kind: 'read', body: JSON.stringify({ user: { email: '', dataFields } }) }, [
      { field: 'f', json: 'null', type: 'string', listId: null, existingOnly: false, ...expected },
    ]).differing.length > 0;
  const table: readonly [
    name: string,
    expected: Partial<ExpectedValue>,
    fields: Record<string, unknown>,
    differs: boolean,
  ][] = [
    ['a number is the same with and without a fraction', { json: '10.0', type: 'double' }, { f: 10 }, false],
    ['a number differs', { json: '10.0', type: 'double' }, { f: 10.01 }, true],
    ['a number that isn’t a text differs', { json: '10', type: 'long' }, { f: '10' }, true],
    [
      'a date comes back in Iterable’s form',
      { json: '"2026-01-02T03:04:05.678Z"', type: 'date' },
      { f: '2026-01-02 03:04:05 +00:00' },
      false,
    ],
    [
      'a text that looks like a date is a text',
      { json: '"2026-01-02T03:04:05Z"', type: 'string' },
      { f: '2026-01-02 03:04:05 +00:00' },
      true,
    ],
    ['a removed field isn’t there', { json: 'null' }, {}, false],
    ['a removed field is null', { json: 'null' }, { f: null }, false],
    ['a removed field is there', { json: 'null' }, { f: 'x' }, true],
    ['an exit is false', { json: 'false', type: 'boolean' }, { f: false }, false],
    ['an exit of whom nothing was told', { json: 'false', type: 'boolean' }, {}, false],
    ['a member isn’t there', { json: 'true', type: 'boolean' }, {}, true],
    ['"true" is no boolean', { json: 'true', type: 'boolean' }, { f: 'true' }, true],
    [
      'an object in another order is the same',
      { json: '{"a": 1, "b": [1.0, "x"]}', type: 'object' },
      { f: { b: [1, 'x'], a: 1 } },
      false,
    ],
    ['an object with more differs', { json: '{"a": 1}', type: 'object' }, { f: { a: 1, b: 2 } }, true],
    ['a list in another order differs', { json: '[1, 2]', type: 'object' }, { f: [2, 1] }, true],
    ['on the list', { json: 'true', listId: 7, type: 'boolean' }, { emailListIds: [3, 7] }, false],
    ['not on the list', { json: 'true', listId: 7, type: 'boolean' }, { emailListIds: [3] }, true],
    ['still on the list', { json: 'false', listId: 7, type: 'boolean' }, { emailListIds: [7] }, true],
    ['on no list', { json: 'false', listId: 7, type: 'boolean' }, {}, false],
  ];
  it.each(table)('%s', (_, expected, fields, isOther) => {
    expect(differs(expected, fields)).toBe(isOther);
  });
});
