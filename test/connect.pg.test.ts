import { expect, inject, it } from 'vitest';
import { openPool, quoteIdentifier, quoteLiteral } from '../src/db/connect.js';
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
