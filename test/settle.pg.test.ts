import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from 'vitest';
import { inTransaction, openPool, type Pool } from '../src/db/connect.js';
import { Secret } from '../src/lib/secret.js';
import { retryDead } from '../src/outbox/dead.js';
import { createSettler, holdBack, type Settlement, type Settler } from '../src/outbox/settle.js';
import { tidyUp } from '../src/sync/housekeeping.js';
import { applyConfig } from './support/apply.js';
import { createHarness, type Harness } from './support/harness.js';

const LEADER = '00000000-0000-0000-0000-000000000001';
const OTHER = '00000000-0000-0000-0000-000000000002';
const MANY = 20_000;
const SOON = { timeout: 20_000 };

let harness: Harness;
let pool: Pool;
let settler: Settler;
beforeAll(async () => {
  harness = await createHarness({
    tables: 'create table people (id bigint primary key, user_id text, email text)',
    audiences: [{ key: 'vip', sql: 'SELECT id AS profile_id FROM people', guard: 'off' }],
  });
  const { state } = harness.opened.databases;
  await applyConfig(harness.opened);
  await tidyUp(state);
  const { schema } = state;
  pool = openPool({ url: new Secret(harness.database.url), purpose: 'settling', max: 1, schema });
});
afterAll(async () => {
  await pool.end();
  await harness.close();
});
beforeEach(async () => {
  settler = createSettler({ pool }, LEADER, { isHybrid: false });
  await harness.state(`update leader set holder = '${LEADER}', expires_at = 'infinity'`);
  await harness.state('truncate outbox, dead_call, snapshot, transition');
});
afterEach(() => settler.close());

interface Mark {
  id: number;
  version: number;
}

/** Marks of the definition for users with these ids; `exitOf` and `follows` are SQL over `n`, the id. */
async function mark(
  from: number,
  to: number,
  { exitOf = 'null', follows = 'null' }: { exitOf?: string; follows?: string } = {},
): Promise<readonly Mark[]> {
  const rows = await harness.state(
    `insert into outbox (kind, destination_id, definition_id, priority, recipient, columns, exit_of, follows)
     select 'm', t.id, d.id, 0, 'u:' || n, array['vip'], (${exitOf})::text, (${follows})::text
     from destination as t, definition as d, generate_series(${from}, ${to}) as n returning id, version`,
  );
  return rows as unknown as Mark[];
}

const acknowledged = ({ id, version }: Mark): Settlement => ({ kind: 'acknowledged', id, version, columns: null });
const refused = ({ id, version }: Mark): Settlement => ({
  kind: 'refused',
  id,
  version,
  columns: null,
  reason: 'Some',
  answer: '',
  retryAfterMs: null,
  forgotten: null,
});
const count = async (text: string): Promise<number> => Number((await harness.state(text))[0]?.['n']);
const waiting = (): Promise<number> => count('select count(*) as n from outbox');

/** Rows of the queue, of dead calls and of snapshots that were read so far by sessions that have ended. */
const rowsRead = (): Promise<number> =>
  count(
    `select sum(seq_tup_read + idx_tup_fetch) as n from pg_stat_user_tables where relname ~ '^(outbox|dead_call|snapshot_.*)$'`,
  );
const SESSIONS = `from pg_stat_activity where datname = current_database() and application_name = 'personas-sync settling'`;
/** Resolves when the settler's session has ended, and what it has read is known. */
async function ended(): Promise<void> {
  settler.close();
  await expect.poll(() => count(`select count(*) as n ${SESSIONS}`), SOON).toBe(0);
}

describe('what became of calls', () => {
  it('is written only for the version that was sent', async () => {
    const [first, second] = await mark(1, 2);
    await harness.state(`update outbox set version = nextval('version') where id = $1`, [first?.id]);
    const { left } = await settler.settle([first!, second!].map(acknowledged));
    expect(left.size).toBe(0);
    expect(await harness.state('select id from outbox')).toEqual([{ id: first?.id }]);
  });

  it('is given back where somebody else is writing to the row; the rest is written', async () => {
    const marks = await mark(1, 3);
    const settlements = marks.map(acknowledged);
    const client = await harness.opened.databases.state.pool.connect();
    await client.query('begin');
    await client.query('update outbox set attempts = 1 where id = $1', [marks[1]?.id]);
    expect([...(await settler.settle(settlements)).left]).toEqual([settlements[1]]);
    await client.query('commit');
    client.release();
    expect(await waiting()).toBe(1);
    expect((await settler.settle(settlements)).left.size).toBe(0);
    expect(await waiting()).toBe(0);
  });

  it('is given back of an exit where somebody else is writing to another key of the person; the rest is written', async () => {
    await harness.state(
      `insert into snapshot (definition_id, recipient, profile_id, entered_at) select id, 'u:2', '1', now() from definition`,
    );
    await harness.state(
      `insert into transition (at, definition_id, kind, recipient) select now() - interval '1 minute', id, 'x', 'u:1' from definition`,
    );
    const [exit] = await mark(1, 1, { exitOf: 'n' });
    const [other, unrelated] = await mark(2, 3);
    const settlements = [exit!, unrelated!].map(acknowledged);
    const client = await harness.opened.databases.state.pool.connect();
    await client.query('begin');
    await client.query('update outbox set attempts = 1 where id = $1', [other?.id]);
    expect([...(await settler.settle(settlements)).left]).toEqual([settlements[0]]);
    await client.query('commit');
    client.release();
    expect(await harness.state('select id from outbox order by id')).toEqual([{ id: exit?.id }, { id: other?.id }]);
    expect(await settler.settle(settlements)).toMatchObject({ released: true });
    expect(await harness.state('select recipient from outbox')).toEqual([{ recipient: 'u:2' }]);
  });

  it('is not written where another leads, and is by the same settler when it leads again', async () => {
    const settlements = (await mark(1, 1)).map(acknowledged);
    await harness.state(`update leader set holder = '${OTHER}'`);
    await expect(settler.settle(settlements)).rejects.toThrow('no longer leads');
    expect(await waiting()).toBe(1);
    await harness.state(`update leader set holder = '${LEADER}'`);
    await settler.settle(settlements);
    expect(await waiting()).toBe(0);
  });

  it('is written by another session when the one that was kept is cut', async () => {
    const [first, second] = (await mark(1, 2)).map(acknowledged);
    await settler.settle([first!]);
    expect(await count(`select count(pg_terminate_backend(pid)) as n ${SESSIONS}`)).toBe(1);
    const write = (): Promise<number> => settler.settle([second!]).then(waiting, () => -1);
    await expect.poll(write, SOON).toBe(0);
  });

  it('ends what was refused before: an acknowledged column is dead no more, those of others stay so', async () => {
    const marks = await mark(1, 2);
    await settler.settle(marks.map(refused));
    expect(await count('select count(*) as n from dead_call')).toBe(2);
    await settler.settle((await mark(2, 2)).map(acknowledged));
    expect(await harness.state('select recipient from dead_call')).toEqual([{ recipient: 'u:1' }]);
  });

  it('marks the new key of a person anew, though what was sent for it is acknowledged together with the exit of the old', async () => {
    await harness.state(
      `insert into snapshot (definition_id, recipient, profile_id, entered_at) select id, 'u:2', '1', now() from definition`,
    );
    await harness.state(
      `insert into transition (at, definition_id, kind, recipient) select now() - interval '1 minute', id, 'x', 'u:1' from definition`,
    );
    const old = await mark(1, 1, { exitOf: 'n' });
    const [current] = await mark(2, 2, { follows: '1' });
    const { released } = await settler.settle([...old, current!].map(acknowledged));
    expect(released).toBe(true);
    const rows = await harness.state('select recipient, id > $1 as newer from outbox', [current?.id]);
    expect(rows).toEqual([{ recipient: 'u:2', newer: true }]);
  });

  it.each([
    ['acknowledged', acknowledged],
    ['refused', refused],
  ])('says that what has waited for an exit may be ready when that is %s, and of nothing else', async (_, become) => {
    const [exit, other] = await mark(1, 2, { exitOf: 'n' });
    const [follower, entry] = await mark(3, 4, { follows: 'case n when 3 then 1 end' });
    expect(await settler.settle([become(other!)])).toMatchObject({ released: false });
    expect(await settler.settle([become(entry!)])).toMatchObject({ released: false });
    expect(await settler.settle([become(exit!)])).toMatchObject({ released: true });
    expect(await harness.state('select id from outbox')).toEqual([{ id: follower?.id }]);
  });

  it('reads no more than the rows it is about, though nothing waited when its statements were planned', async () => {
    const [only, exit] = [...(await mark(1, 1)), ...(await mark(2, 2, { exitOf: 'n' }))];
    await settler.settle([acknowledged(only!), acknowledged(exit!)]);
    const marks = await mark(1, MANY, {
      exitOf: 'case n % 4 when 1 then n end',
      follows: `case n % 4 when 2 then 'x' || n end`,
    });
    await harness.state(
      `insert into snapshot (definition_id, recipient, profile_id, others, entered_at)
       select d.id, 'u:new.' || n, 'new.' || n, array['other.' || n], now() from definition as d, generate_series(1, ${MANY}) as n`,
    );
    await harness.state(
      `insert into dead_call (kind, destination_id, definition_id, recipient, reason, answer, field)
       select 'm', t.id, d.id, 'u:dead.' || n, 'Some', '', 'vip'
       from destination as t, definition as d, generate_series(1, ${MANY}) as n`,
    );
    const before = await rowsRead();
    for (const each of marks.slice(0, 10)) await settler.settle([acknowledged(each)]);
    await ended();
    expect(await rowsRead()).toBeLessThan(before + MANY);
    expect(await waiting()).toBe(MANY - 10);
  });
});

it('what is sent again of what one destination had refused lets nothing go that waits at another', async () => {
  const [exit] = await mark(1, 1, { exitOf: `'p'` });
  await mark(2, 2, { follows: `'p'` });
  await harness.state(`insert into destination (name, host, type) values ('other', 'host', 'file')`);
  await harness.state(
    `insert into outbox (kind, destination_id, definition_id, priority, recipient, columns, exit_of, follows)
     select 'm', t.id, o.definition_id, o.priority, o.recipient, o.columns, o.exit_of, o.follows
     from outbox as o, destination as t where t.name = 'other'`,
  );
  await settler.settle([refused(exit!)]);
  expect(
    await retryDead(harness.opened.databases.state.pool, {
      keys: [],
      reason: null,
      destination: null,
      olderThan: null,
    }),
  ).toMatchObject({
    count: 1,
  });
  expect(
    await harness.state(
      `select t.name, o.follows from outbox as o join destination as t on t.id = o.destination_id
       where o.recipient = 'u:2' order by t.name`,
    ),
  ).toEqual([
    { name: 'iterable', follows: null },
    { name: 'other', follows: 'p' },
  ]);
  await harness.state(`delete from outbox; delete from destination where name = 'other'`);
});

it('who rests is put off without waiting for what somebody else is writing to', async () => {
  const { state } = harness.opened.databases;
  const [first, second] = await mark(1, 2);
  const [there] = await harness.state('select destination_id as id from outbox limit 1');
  await inTransaction(state.pool, async (client) => {
    await client.query('select from outbox where id = $1 for update', [first?.id]);
    const resting = ['u:1', 'u:2'].map((recipient) => ({ recipient, forMs: 60_000 }));
    await holdBack(state.pool, Number(there?.['id']), resting);
  });
  expect(await harness.state('select id from outbox where due_at > now()')).toEqual([{ id: second?.id }]);
});
