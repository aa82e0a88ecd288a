import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest';
import { startDebianPostgres } from './support/database.js';
import { createHarness, type Harness } from './support/harness.js';

const TABLES = `
  create table people (id bigint primary key, user_id text, email text, vip boolean not null default false, spent numeric(10, 2));
  insert into people select n, 'u' || n, 'p' || n || '@example.com', n % 2 = 0, n * 1.5 from generate_series(1, 20) as n`;
const VIP = { name: 'VIP', sql: 'SELECT id AS profile_id FROM people WHERE vip', send: 'both' };
const SPENT = { name: 'Spent', sql: 'SELECT id AS profile_id, spent AS value FROM people WHERE vip' };

const debian = await startDebianPostgres();
afterAll(() => debian?.stop());

describe.each([
  { server: 'the embedded PostgreSQL', url: undefined, there: true },
  { server: "Debian's PostgreSQL 15", url: debian?.url, there: debian !== null },
])('with $server', ({ url, there }) => {
  for (const separate of [false, true]) {
    describe.skipIf(!there)(separate ? 'and a state database of its own' : 'and one database', () => {
      let harness: Harness;
      beforeAll(async () => {
        harness = await createHarness({
          tables: TABLES,
          separate,
          audiences: [VIP],
          traits: [SPENT],
          ...(url === undefined ? {} : { serverUrl: url }),
        });
      });
      afterAll(() => harness.close());
      let requests = 0;
      afterEach(() => {
        requests = harness.simulator.requests().length;
      });

      it('a first sync tells Iterable everybody', async () => {
        const { progress, delivery } = await harness.sync();
        expect([...progress.runs].sort((a, b) => (a.definition < b.definition ? -1 : 1))).toMatchObject([
          { definition: 'spent', outcome: 'succeeded', members: 10, entered: 10 },
          { definition: 'vip', outcome: 'succeeded', members: 10, entered: 10 },
        ]);
        expect(delivery).toMatchObject({ waiting: 0, ahead: 0, refused: 0 });
        expect(harness.simulator.userCount).toBe(10);
        expect(harness.simulator.user('u2')?.fields).toMatchObject({ vip: 'true', spent: '3.00' });
        expect(harness.simulator.events('u2').map(({ name }) => name)).toEqual(['Audience Entered']);
      });

      it('the next one tells who entered, who exited and whose value changed, and nobody else', async () => {
        await harness.sql('update people set vip = not vip where id <= 2');
        await harness.sql('update people set spent = spent + 1 where id = 4');
        const { progress } = await harness.sync();
        expect(
          progress.runs.map(({ definition, members, entered, exited, changed }) => ({
            definition,
            members,
            entered,
            exited,
            changed,
          })),
        ).toEqual(
          expect.arrayContaining([
            { definition: 'vip', members: 10, entered: 1, exited: 1, changed: 0 },
            { definition: 'spent', members: 10, entered: 1, exited: 1, changed: 1 },
          ]),
        );
        expect(harness.simulator.user('u2')?.fields.vip).toBe('false');
        expect(harness.simulator.user('u2')?.fields.spent).toBeUndefined();
        expect(harness.simulator.user('u1')?.fields).toMatchObject({ vip: 'true', spent: '1.50' });
        expect(harness.simulator.user('u4')?.fields.spent).toBe('7.00');
        expect(
          harness.simulator
            .events('u2')
            .map(({ name }) => name)
            .sort(),
        ).toEqual(['Audience Entered', 'Audience Exited']);
        expect(harness.simulator.requests().length).toBeLessThanOrEqual(requests + 7);
      });

      it('a sync without a change sends nothing', async () => {
        const { progress } = await harness.sync();
        expect(progress.runs).toMatchObject([
          { entered: 0, exited: 0, changed: 0 },
          { entered: 0, exited: 0, changed: 0 },
        ]);
        expect(harness.simulator.requests().length).toBe(requests);
      });
    });
  }
});
