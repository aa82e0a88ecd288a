import { expect, inject, it } from 'vitest';
import { openPool, quoteIdentifier, quoteLiteral, withClient } from '../src/db/connect.js';
import { describeStatement } from '../src/db/describe.js';
import { Secret } from '../src/lib/secret.js';

it('keeps the options of a connection string, and pins what values look like all the same', async () => {
  const address = new URL(inject('postgresUrl'));
  address.searchParams.set('options', '-c work_mem=7MB -c timezone=Asia/Tokyo');
  const pool = openPool({ url: new Secret(address.toString()), purpose: 'test', max: 1, schema: 'a "strange" schema' });
  const { rows } = await pool.query<Record<string, string>>(
    `select current_setting('work_mem') as memory, current_setting('timezone') as zone, current_setting('search_path') as path,
       current_setting('application_name') as name`,
  );
  expect(rows).toEqual([{ memory: '7MB', zone: 'UTC', path: '"a ""strange"" schema"', name: 'personas-sync test' }]);
  await pool.end();
});

it('writes any text as a literal or a name that PostgreSQL reads back', async () => {
  const pool = openPool({ url: new Secret(inject('postgresUrl')), purpose: 'test', max: 1 });
  for (const text of ["it's", 'back\\slash', '"quoted"', "E'\\'", '--', '😀']) {
    const { rows } = await pool.query<{ text: string }>(
      `select ${quoteLiteral(text)} as text, 1 as ${quoteIdentifier(text)}`,
    );
    expect(rows).toEqual([{ text, [text]: 1 }]);
  }
  await pool.end();
});

it('describes a statement without running it', async () => {
  const pool = openPool({ url: new Secret(inject('postgresUrl')), purpose: 'test', max: 1 });
  const client = await pool.connect();
  const { columns } = await describeStatement(client, 'select 1 / 0 as never, now() as moment');
  expect(columns).toEqual([
    { name: 'never', typeOid: 23 },
    { name: 'moment', typeOid: 1184 },
  ]);
  await expect(describeStatement(client, 'select 1; select 2')).rejects.toMatchObject({ code: '42601' });
  await expect(describeStatement(client, 'select 1) as x')).rejects.toMatchObject({ code: '42601', position: '9' });
  expect((await client.query<{ one: number }>('select 1 as one')).rows).toEqual([{ one: 1 }]);
  client.release();
  await pool.end();
});

it('outlives a connection that is cut between two statements, and says so at the next', async () => {
  const pool = openPool({ url: new Secret(inject('postgresUrl')), purpose: 'test', max: 2 });
  const cut = withClient(pool, async (client) => {
    await client.query('begin');
    const { rows } = await client.query<{ pid: number }>('select pg_backend_pid() as pid');
    const isGone = async (): Promise<boolean> =>
      (await pool.query('select pg_terminate_backend(pid) from pg_stat_activity where pid = $1', [rows[0]?.pid]))
        .rowCount === 0;
    await expect.poll(isGone).toBe(true);
    await client.query('select');
  });
  await expect(cut).rejects.toThrow();
  expect((await pool.query<{ one: number }>('select 1 as one')).rows).toEqual([{ one: 1 }]);
  await pool.end();
});
