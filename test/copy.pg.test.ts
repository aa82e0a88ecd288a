import { text } from 'node:stream/consumers';
import { afterAll, beforeAll, expect, it } from 'vitest';
import { openPool, withClient, type Pool } from '../src/db/connect.js';
import { copyInto, copyRows } from '../src/db/copy.js';
import { Secret } from '../src/lib/secret.js';
import { createDatabase, type TestDatabase } from './support/database.js';
import { startPooler, type Pooler } from './support/pooler.js';

const ROWS = `select n, case n % 3 when 0 then null when 1 then E'tab\\there, line\\nthere, \\\\N, back\\\\slash\\r' else 'plain' end,
  jsonb_build_object('n', n * 1.10), array['a', null, 'b c'] from generate_series(1, 12000) as n`;

let database: TestDatabase;
let pooler: Pooler;
let pools: Pool[];
beforeAll(async () => {
  database = await createDatabase();
  pooler = await startPooler(database.url);
  pools = [database.url, pooler.url].map((url) => openPool({ url: new Secret(url), purpose: 'test', max: 2 }));
});
afterAll(async () => {
  await Promise.all(pools.map((pool) => pool.end()));
  await pooler.close();
  await database.drop();
});

const read = (pool: Pool): Promise<string> =>
  withClient(pool, async (client) => {
    await client.query('begin transaction read only');
    const rows = await text(await copyRows(client, ROWS));
    await client.query('commit');
    return rows;
  });

it('gives the same bytes by a cursor where COPY is refused', async () => {
  const [straight, pooled] = pools;
  const byCopy = await read(straight as Pool);
  expect(byCopy.split('\n').length).toBe(12_001);
  expect(await read(pooled as Pool)).toBe(byCopy);
  expect(pooler.refused()).toBe(1);
});

it('outlives a connection that is cut before the rows come', async () => {
  const [pool] = pools as [Pool];
  const cut = withClient(pool, async (client) => {
    await client.query('create temporary table target (n int)');
    const { rows } = await client.query<{ pid: number }>('select pg_backend_pid() as pid');
    const target = copyInto(client, 'target (n)');
    const isGone = async (): Promise<boolean> =>
      (await pool.query('select pg_terminate_backend(pid) from pg_stat_activity where pid = $1', [rows[0]?.pid]))
        .rowCount === 0;
    await expect.poll(isGone).toBe(true);
    target.destroy();
    await client.query('select');
  });
  await expect(cut).rejects.toThrow();
});
