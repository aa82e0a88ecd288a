import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import {
  createFunction,
  createSchema,
  createTriggers,
  functionBody,
  functionName,
  functionSettings,
  transaction,
  triggerName,
  watchName,
  type SourceColumn,
  type SourceTable,
  type Watch,
} from '../src/realtime/trigger-sql.js';

const COLUMNS: readonly SourceColumn[] = [
  { name: 'id', type: 'bigint' },
  { name: 'customer_id', type: 'uuid' },
  { name: 'at', type: 'timestamp with time zone' },
];
const ORDERS: SourceTable = { schema: 'public', name: 'orders', columns: COLUMNS };
const watch = (...names: string[]): Watch => ({
  table: ORDERS,
  columns: COLUMNS.filter(({ name }) => names.includes(name)),
});

describe('a function', () => {
  it('writes a row for each kind of statement, and notifies while the daemon sleeps', () => {
    expect(createFunction(ORDERS, [watch('id')], { notify: true }).join(';\n')).toBe(
      `create or replace function personas_capture."orders_${functionName(ORDERS).slice(-8)}"() returns trigger
language plpgsql security definer as $personas$
-- personas-sync capture 2
#variable_conflict use_column
declare one pg_catalog.text[];
begin
  if tg_op operator(pg_catalog.=) 'INSERT' then
    one := array(select r."id"::pg_catalog.text collate pg_catalog."C" from new_rows as r where r."id" is not null limit 2);
    if pg_catalog.cardinality(one) operator(pg_catalog.=) 1 then
      insert into personas_capture.capture (watch, keys) values ('public.orders(id)', one);
    elsif pg_catalog.cardinality(one) operator(pg_catalog.=) 2 then
      insert into personas_capture.capture (watch, keys)
      select 'public.orders(id)', case when pg_catalog.cardinality(c.keys) operator(pg_catalog.<=) 50000 then c.keys::pg_catalog.text[] end
      from (select pg_catalog.array_agg(d.key) as keys from (select distinct r."id" as key from new_rows as r where r."id" is not null limit 50001) as d) as c
      where c.keys is not null;
    end if;
  elsif tg_op operator(pg_catalog.=) 'UPDATE' then
    insert into personas_capture.capture (watch, keys)
    select 'public.orders(id)', case when pg_catalog.cardinality(c.keys) operator(pg_catalog.<=) 50000 then c.keys::pg_catalog.text[] end
    from (select pg_catalog.array_agg(d.key) as keys from (select distinct r."id" as key from (select "id" from new_rows union all select "id" from old_rows) as r where r."id" is not null limit 50001) as d) as c
    where c.keys is not null;
  elsif tg_op operator(pg_catalog.=) 'DELETE' then
    one := array(select r."id"::pg_catalog.text collate pg_catalog."C" from old_rows as r where r."id" is not null limit 2);
    if pg_catalog.cardinality(one) operator(pg_catalog.=) 1 then
      insert into personas_capture.capture (watch, keys) values ('public.orders(id)', one);
    elsif pg_catalog.cardinality(one) operator(pg_catalog.=) 2 then
      insert into personas_capture.capture (watch, keys)
      select 'public.orders(id)', case when pg_catalog.cardinality(c.keys) operator(pg_catalog.<=) 50000 then c.keys::pg_catalog.text[] end
      from (select pg_catalog.array_agg(d.key) as keys from (select distinct r."id" as key from old_rows as r where r."id" is not null limit 50001) as d) as c
      where c.keys is not null;
    end if;
  elsif tg_op operator(pg_catalog.=) 'TRUNCATE' then
    insert into personas_capture.capture (watch, keys)
    select 'public.orders(id)', null::pg_catalog.text[];
  end if;
  if found and pg_catalog.pg_sequence_last_value('personas_capture.asleep_until') operator(pg_catalog.>) pg_catalog.date_part('epoch', pg_catalog.clock_timestamp()) then
    perform pg_catalog.pg_notify('personas_capture', '');
  end if;
  return null;
end $personas$;
revoke all on function personas_capture."orders_${functionName(ORDERS).slice(-8)}"() from public`,
    );
  });

  it('never notifies where that is left out', () => {
    const body = functionBody([watch('id')], { notify: false });
    expect(body).not.toMatch(/notify|asleep_until/);
    expect(body).toContain('insert into personas_capture.capture');
  });

  it('takes keys of one column as their text, of several or none as JSON', () => {
    const body = (...names: string[]): string => functionBody([watch(...names)], { notify: false });
    expect(body('customer_id')).toContain(
      'select distinct r."customer_id"::pg_catalog.text collate pg_catalog."C" as key from new_rows',
    );
    expect(body('id', 'customer_id')).toContain(
      'select distinct pg_catalog.jsonb_build_array(r."id", r."customer_id")::pg_catalog.text collate pg_catalog."C" as key',
    );
    expect(body()).toContain(
      'pg_catalog.jsonb_build_array()::pg_catalog.text collate pg_catalog."C" as key from new_rows',
    );
  });

  it('writes for all watches of its table at once', () => {
    const body = functionBody([watch('id'), watch('customer_id')], { notify: true });
    expect(body.match(/'public\.orders\(customer_id\)'/g)).toHaveLength(6);
    expect(body.match(/union all\n {4}select 'public\.orders\(customer_id\)'/g)).toHaveLength(2);
  });

  it('fixes the settings that the text of a key depends on, where it does', () => {
    expect(functionSettings([watch('id', 'customer_id')])).toEqual([]);
    expect(functionSettings([watch('id'), watch('at')])).toContain(`set timezone = 'UTC'`);
  });

  it('has a body that none of its names can end', () => {
    const table = { ...ORDERS, columns: [{ name: 'a $personas$ b', type: 'text' }] };
    const [create = ''] = createFunction(table, [{ table, columns: table.columns }], { notify: true });
    expect(create).toMatch(/as (\$personas_\d+\$)\n[\s\S]*\$personas\$[\s\S]* \1$/);
  });
});

describe('a name', () => {
  it('is one of PostgreSQL, and that of no other table', () => {
    const identifier = fc.string({ minLength: 1, maxLength: 63, unit: 'grapheme' });
    fc.assert(
      fc.property(identifier, identifier, identifier, identifier, (schema, name, otherSchema, otherName) => {
        const made = functionName({ schema, name });
        expect(made).toMatch(/^\w{1,40}_[0-9a-f]{8}$/);
        expect(Buffer.byteLength(triggerName({ schema, name }, 'truncate'))).toBeLessThan(64);
        const same = schema === otherSchema && name === otherName;
        expect(made === functionName({ schema: otherSchema, name: otherName })).toBe(same);
      }),
    );
    expect(functionName({ schema: 'a.b', name: 'c' })).not.toBe(functionName({ schema: 'a', name: 'b.c' }));
  });

  it('of a watch is quoted where it has to be', () => {
    const table = { schema: 'public', name: 'Order Lines', columns: [] };
    const columns = [
      { name: 'id', type: 'bigint' },
      { name: 'a"b', type: 'text' },
    ];
    expect(watchName({ table, columns })).toBe('public."Order Lines"(id, "a""b")');
  });
});

it('gives each relation a trigger for each kind of statement, with the tables that this kind may have', () => {
  const name = functionName(ORDERS);
  const hash = name.slice(-8);
  const leaf = { schema: 'archive', name: 'orders_2020' };
  expect(createTriggers(ORDERS, leaf)).toEqual([
    `create or replace trigger personas_${hash}_insert after insert on "archive"."orders_2020"
  referencing new table as new_rows for each statement execute function personas_capture."${name}"()`,
    `create or replace trigger personas_${hash}_update after update on "archive"."orders_2020"
  referencing old table as old_rows new table as new_rows for each statement execute function personas_capture."${name}"()`,
    `create or replace trigger personas_${hash}_delete after delete on "archive"."orders_2020"
  referencing old table as old_rows for each statement execute function personas_capture."${name}"()`,
    `create or replace trigger personas_${hash}_truncate after truncate on "archive"."orders_2020"
  for each statement execute function personas_capture."${name}"()`,
  ]);
});

it('grants the role of the daemon what it does, and nobody else anything', () => {
  const statements = createSchema({ installation: '6b1f6a8e-7a2b-4d7e-9a6b-0e0f6c5d4c3b', role: 'a "daemon"' });
  expect(statements.filter((statement) => /^(grant|revoke)/.test(statement))).toEqual([
    'revoke all on schema personas_capture from public',
    'grant usage on schema personas_capture to "a ""daemon"""',
    'grant select, delete on personas_capture.capture to "a ""daemon"""',
    'grant select on personas_capture.listener to "a ""daemon"""',
    'grant select, update on sequence personas_capture.asleep_until to "a ""daemon"""',
  ]);
});

it('puts statements into a script as one transaction', () => {
  expect(transaction(['select 1', 'select 2'])).toBe('begin;\nselect 1;\nselect 2;\ncommit;\n');
});
