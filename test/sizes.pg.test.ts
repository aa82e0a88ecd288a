import { afterEach, describe, expect, it } from 'vitest';
import { createHarness, type Harness } from './support/harness.js';

/** No request is over 4,000,000 bytes, be it of one call alone: what is larger is never sent as it is. */
const MOST_BYTES = 4_000_000;
const TABLES = `
  create table people (id bigint primary key, user_id text, email text);
  insert into people (id, user_id) select n, 'u' || n from generate_series(1, 3) as n`;
/** An array of so many texts of 25,000 characters, for the second person alone. */
const large = (texts: number): string =>
  `case id when 2 then to_jsonb(array_fill(repeat('x', 25000), array[${texts}])) else '["x"]' end`;

let harness: Harness;
afterEach(() => harness.close());

const bytesOf = (body: string): number => Buffer.byteLength(body);
const dead = (): Promise<unknown> =>
  harness.state('select recipient, coalesce(field, event) as what, reason, retry_at from dead_call');

describe('an update that would be over the limit', () => {
  const begin = async (...traits: { name: string; sql: string }[]): Promise<void> => {
    harness = await createHarness({
      tables: TABLES,
      traits: traits.map((each) => ({ ...each, guard: 'off' })),
      simulator: { keepRequests: 100 },
    });
    expect((await harness.sync()).delivery).toMatchObject({ waiting: 0, later: 0 });
    expect(harness.simulator.stats.count('users/update', 413)).toBe(0);
    for (const { body } of harness.simulator.requests()) expect(bytesOf(body)).toBeLessThanOrEqual(MOST_BYTES);
  };
  const fieldsOf = (person: string): string[] => Object.keys(harness.simulator.user(person)?.fields ?? {}).sort();

  it('goes definition by definition', async () => {
    await begin(
      { name: 'One', sql: `SELECT id AS profile_id, ${large(100)} AS one, id AS small FROM people` },
      { name: 'Two', sql: `SELECT id AS profile_id, ${large(100)} AS two, id AS tiny FROM people` },
    );
    expect(await dead()).toEqual([]);
    for (const person of ['u1', 'u2', 'u3']) expect(fieldsOf(person)).toEqual(['one', 'small', 'tiny', 'two']);
    const large2 = harness.simulator.requests().filter(({ body }) => bytesOf(body) > MOST_BYTES / 2);
    expect(large2.map(({ body }) => Object.keys((JSON.parse(body) as { dataFields: object }).dataFields))).toEqual(
      expect.arrayContaining([
        ['one', 'small'],
        ['two', 'tiny'],
      ]),
    );
  });

  it('goes column by column, and a column that alone is over it is refused', async () => {
    await begin({
      name: 'All',
      sql: `SELECT id AS profile_id, ${large(100)} AS one, ${large(200)} AS two, id AS small FROM people`,
    });
    expect(await dead()).toEqual([{ recipient: 'u:u2', what: 'two', reason: 'TooLarge', retry_at: null }]);
    expect(fieldsOf('u2')).toEqual(['one', 'small']);
    expect(fieldsOf('u3')).toEqual(['one', 'small', 'two']);
  });
});

describe('an event that would be over the limit', () => {
  it('is refused, and those of others go', async () => {
    harness = await createHarness({
      tables: TABLES,
      audiences: [
        {
          name: 'VIP',
          sql: `SELECT id AS profile_id, ${large(200)} AS what FROM people`,
          send: 'track',
          properties: ['what'],
          guard: 'off',
        },
      ],
    });
    expect((await harness.sync()).delivery).toMatchObject({ waiting: 0, later: 0, refused: 1 });
    expect(await dead()).toEqual([{ recipient: 'u:u2', what: 'Audience Entered', reason: 'TooLarge', retry_at: null }]);
    const entered = harness.simulator.events().map(({ identifier }) => identifier);
    expect(entered.sort()).toEqual(['u1', 'u3']);
    expect(harness.simulator.stats.count('events/track')).toBe(2);
  });
});
