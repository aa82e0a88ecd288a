import { createHash } from 'node:crypto';
import { quoteIdentifier, quoteLiteral } from '../db/connect.js';

/**
 * The text of everything that real time puts into the source, pure. What must hold:
 *
 * - A statement without rows writes nothing; one with rows writes one row for each watch of its table, in the writer's
 *   own transaction, and takes no lock that another writer could wait for.
 * - The writer needs no right on `personas_capture`: the functions run as their owner, and name everything by its schema,
 *   operators and types too, so that a writer's search_path changes nothing. (Setting it in the function would cost a
 *   ninth of what the capture of a row costs.) The only names without a schema are the transition tables, which come
 *   before any table.
 * - The text of a key doesn't depend on the writer's settings.
 * - A NOTIFY makes all commits of the cluster queue, so one is sent only while the daemon sleeps.
 *
 * No exception is caught here: a sub-transaction for each statement would cost a writer of many statements in one
 * transaction far more than the capture.
 */

/** A column of the source; `type` as PostgreSQL writes it, without a length; of a domain, what is below it. */
export interface SourceColumn {
  name: string;
  type: string;
}

export interface SourceTable {
  schema: string;
  name: string;
  columns: readonly SourceColumn[];
}

/** A table and the columns whose values are kept when its rows change. */
export interface Watch {
  table: SourceTable;
  columns: readonly SourceColumn[];
}

export const CAPTURE_SCHEMA = 'personas_capture';
export const CHANNEL = 'personas_capture';
/**
 * The second of 1970 up to which a writer notifies, as the value of a sequence: reading it costs a writer a quarter of what
 * a look at a row would, and shows what is true now to a transaction that began long ago, too.
 */
export const ASLEEP_UNTIL = `${CAPTURE_SCHEMA}.asleep_until`;
/** Statements that touch more keys than this, or longer ones in all, ask for a full run. */
export const MOST_KEYS = 50_000;
const MOST_BYTES = 16_000_000;

export const STATEMENT_KINDS = ['insert', 'update', 'delete', 'truncate'] as const;
export type StatementKind = (typeof STATEMENT_KINDS)[number];

/** Written into the functions: another number is another text, which `install` brings up to date. */
const VERSION = 2;
const LOCK_TIMEOUT = '500ms';

/** Sorted in their own order, which is quicker than that of their text. */
const WHOLE_NUMBERS = new Set(['smallint', 'integer', 'bigint']);
/** Written the same whatever the settings of the session. */
const SETTLED = new Set([
  ...WHOLE_NUMBERS,
  'numeric',
  'text',
  'character varying',
  'bpchar',
  'uuid',
  'boolean',
  'oid',
  'name',
]);
const SETTINGS_OF_VALUES = [
  `set datestyle = 'ISO, YMD'`,
  `set timezone = 'UTC'`,
  `set intervalstyle = 'postgres'`,
  `set extra_float_digits = '1'`,
  `set bytea_output = 'hex'`,
];

const PLAIN = /^[a-z_][a-z0-9_]*$/;

/** A name as a person would write it: quoted only where it has to be. */
export function nameOf(identifier: string): string {
  return PLAIN.test(identifier) ? identifier : quoteIdentifier(identifier);
}

/** `public.orders`. */
export function tableName({ schema, name }: Pick<SourceTable, 'schema' | 'name'>): string {
  return `${nameOf(schema)}.${nameOf(name)}`;
}

/** `public.orders(customer_id)`: how `capture` calls a watch. */
export function watchName({ table, columns }: Watch): string {
  return `${tableName(table)}(${columns.map(({ name }) => nameOf(name)).join(', ')})`;
}

/** A table as SQL. */
export function tableSql({ schema, name }: Pick<SourceTable, 'schema' | 'name'>): string {
  return `${quoteIdentifier(schema)}.${quoteIdentifier(name)}`;
}

function hashOf(table: Pick<SourceTable, 'schema' | 'name'>): string {
  return createHash('sha256').update(tableSql(table)).digest('hex').slice(0, 8);
}

/** The name of the function of a table, without its schema: unique, and at most 63 bytes. */
export function functionName(table: Pick<SourceTable, 'schema' | 'name'>): string {
  const readable = table.name.replaceAll(/[^A-Za-z0-9_]/g, '_').slice(0, 40);
  return `${readable}_${hashOf(table)}`;
}

/** A partition may have its own triggers beside those of the table that it belongs to. */
export function triggerName(table: Pick<SourceTable, 'schema' | 'name'>, kind: StatementKind): string {
  return `personas_${hashOf(table)}_${kind}`;
}

const functionSql = (name: string): string => `${CAPTURE_SCHEMA}.${quoteIdentifier(name)}()`;

interface Key {
  /** The key of a row `r`, as keys are told apart. */
  value: string;
  /** Whether as many as are kept can't be too long. */
  isShort: boolean;
  /** As it is kept. */
  text: string;
  /** Which rows have one. */
  where: string;
}

function keyOf(columns: readonly SourceColumn[]): Key {
  const [first, ...more] = columns.map(({ name, type }) => ({ sql: `r.${quoteIdentifier(name)}`, type }));
  if (first === undefined || more.length > 0) {
    const values = columns.map(({ name }) => `r.${quoteIdentifier(name)}`).join(', ');
    const value = asText(`pg_catalog.jsonb_build_array(${values})`);
    return { value, isShort: false, text: value, where: '' };
  }
  const text = asText(first.sql);
  const isShort = WHOLE_NUMBERS.has(first.type);
  return { value: isShort ? first.sql : text, isShort, text, where: ` where ${first.sql} is not null` };
}

const asText = (value: string): string => `${value}::pg_catalog.text collate pg_catalog."C"`;

function rowsOf(kind: StatementKind, columns: readonly SourceColumn[]): string {
  if (kind === 'insert') return 'new_rows as r';
  if (kind === 'delete') return 'old_rows as r';
  const list = columns.map(({ name }) => ` ${quoteIdentifier(name)}`).join(',');
  return `(select${list} from new_rows union all select${list} from old_rows) as r`;
}

const CAPTURE = `insert into ${CAPTURE_SCHEMA}.capture (watch, keys)`;
const literalOf = (watch: Watch): string => quoteLiteral(watchName(watch)).trim();

/** The distinct keys of however many rows: no more of them are in memory than are kept. */
function selectKeys(kind: StatementKind, watch: Watch, indent: string): string {
  if (kind === 'truncate') return `${indent}select ${literalOf(watch)}, null::pg_catalog.text[]`;
  const { value, isShort, where } = keyOf(watch.columns);
  const distinct = `(select distinct ${value} as key from ${rowsOf(kind, watch.columns)}${where} limit ${MOST_KEYS + 1}) as d`;
  const fitting = `pg_catalog.cardinality(c.keys) operator(pg_catalog.<=) ${MOST_KEYS}`;
  if (isShort) {
    return `${indent}select ${literalOf(watch)}, case when ${fitting} then c.keys::pg_catalog.text[] end
${indent}from (select pg_catalog.array_agg(d.key) as keys from ${distinct}) as c
${indent}where c.keys is not null`;
  }
  const short = (bytes: string): string => `${bytes} operator(pg_catalog.<=) ${MOST_BYTES}`;
  return `${indent}select ${literalOf(watch)}, case when ${short('c.bytes')} and ${fitting} then c.keys end
${indent}from (
${indent}  select pg_catalog.array_agg(m.key) filter (where ${short('m.bytes')}) as keys, pg_catalog.max(m.bytes) as bytes
${indent}  from (select d.key, pg_catalog.sum(pg_catalog.octet_length(d.key)) over (rows unbounded preceding) as bytes from ${distinct}) as m
${indent}) as c
${indent}where c.bytes is not null`;
}

/** Most statements write one row, which costs them a fifth less where it isn't sorted and aggregated. */
function captureOneOrMore(kind: StatementKind, watch: Watch): string {
  const { text, where } = keyOf(watch.columns);
  return `    one := array(select ${text} from ${rowsOf(kind, watch.columns)}${where} limit 2);
    if pg_catalog.cardinality(one) operator(pg_catalog.=) 1 then
      ${CAPTURE} values (${literalOf(watch)}, one);
    elsif pg_catalog.cardinality(one) operator(pg_catalog.=) 2 then
      ${CAPTURE}
${selectKeys(kind, watch, '      ')};
    end if;`;
}

/** An update has an old row for each new one, and a truncation none. */
function capture(kind: StatementKind, watches: readonly Watch[]): string {
  if (kind === 'insert' || kind === 'delete') return watches.map((watch) => captureOneOrMore(kind, watch)).join('\n');
  const selects = watches.map((watch) => selectKeys(kind, watch, '    '));
  return `    ${CAPTURE}\n${selects.join('\n    union all\n')};`;
}

/**
 * The body of the function of a table, which all its triggers share: a branch is planned only when it is reached. The
 * watches are those of one table. Without `notify` no transaction of a writer ever notifies, which a prepared one may not.
 */
export function functionBody(watches: readonly Watch[], { notify }: { notify: boolean }): string {
  const branches = STATEMENT_KINDS.map((kind, index) => {
    const condition = `${index === 0 ? 'if' : 'elsif'} tg_op operator(pg_catalog.=) '${kind.toUpperCase()}' then`;
    return `  ${condition}\n${capture(kind, watches)}`;
  });
  const wake = `  if found and pg_catalog.pg_sequence_last_value('${ASLEEP_UNTIL}') operator(pg_catalog.>) pg_catalog.date_part('epoch', pg_catalog.clock_timestamp()) then
    perform pg_catalog.pg_notify('${CHANNEL}', '');
  end if;
`;
  return `
-- personas-sync capture ${VERSION}
#variable_conflict use_column
declare one pg_catalog.text[];
begin
${branches.join('\n')}
  end if;
${notify ? wake : ''}  return null;
end `;
}

/** The settings that a function of these watches runs under, as \`create function\` takes them. */
export function functionSettings(watches: readonly Watch[]): readonly string[] {
  const isSettled = watches.every(({ columns }) => columns.every(({ type }) => SETTLED.has(type)));
  return isSettled ? [] : SETTINGS_OF_VALUES;
}

/** What makes the function of a table, or replaces it. */
export function createFunction(
  table: SourceTable,
  watches: readonly Watch[],
  options: { notify: boolean },
): readonly string[] {
  const name = functionSql(functionName(table));
  // A delimiter that no quoted name can hold: names of columns may hold anything.
  const body = functionBody(watches, options);
  let delimiter = '$personas$';
  while (body.includes(delimiter)) delimiter = `$personas_${delimiter.length}$`;
  return [
    `create or replace function ${name} returns trigger
language plpgsql ${['security definer', ...functionSettings(watches)].join(' ')} as ${delimiter}${body}${delimiter}`,
    `revoke all on function ${name} from public`,
  ];
}

const REFERENCING: Readonly<Record<StatementKind, string>> = {
  insert: 'referencing new table as new_rows ',
  update: 'referencing old table as old_rows new table as new_rows ',
  delete: 'referencing old table as old_rows ',
  truncate: '',
};

/** The four triggers on `relation`, the watched table or one of its partitions. */
export function createTriggers(
  table: Pick<SourceTable, 'schema' | 'name'>,
  relation: Pick<SourceTable, 'schema' | 'name'>,
): readonly string[] {
  return STATEMENT_KINDS.map(
    (kind) => `create or replace trigger ${triggerName(table, kind)} after ${kind} on ${tableSql(relation)}
  ${REFERENCING[kind]}for each statement execute function ${functionSql(functionName(table))}`,
  );
}

/** Drops a function with its triggers, for which the tables needn't be one's own. */
export function dropFunction(name: string): string {
  return `drop function if exists ${functionSql(name)} cascade`;
}

export function dropSchema(): string {
  return `drop schema if exists ${CAPTURE_SCHEMA} cascade`;
}

/** Drops the schema, where no function is left in it. */
export function dropEmptySchema(): readonly string[] {
  return [
    `drop table if exists ${CAPTURE_SCHEMA}.capture, ${CAPTURE_SCHEMA}.listener`,
    `drop sequence if exists ${ASLEEP_UNTIL}`,
    `drop schema if exists ${CAPTURE_SCHEMA}`,
  ];
}

/**
 * What makes the schema. `installation` is the id of the state that consumes what is captured, `role` the one that its
 * daemon connects as; both may be there already.
 */
export function createSchema({ installation, role }: { installation: string; role: string }): readonly string[] {
  const grantee = quoteIdentifier(role);
  return [
    `create schema if not exists ${CAPTURE_SCHEMA}`,
    `revoke all on schema ${CAPTURE_SCHEMA} from public`,
    // What is deleted all the time is vacuumed as soon as there is something to gain.
    `create table if not exists ${CAPTURE_SCHEMA}.capture (
  id bigint primary key generated always as identity,
  watch text not null, -- the table and the columns that are kept
  keys text[]          -- null: everybody
) with (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000, autovacuum_vacuum_cost_delay = 0)`,
    // Keys are read once and deleted: compressing them would only cost the writer.
    `alter table ${CAPTURE_SCHEMA}.capture alter column keys set storage external`,
    `create table if not exists ${CAPTURE_SCHEMA}.listener (
  only_row boolean primary key default true check (only_row),
  installation uuid not null -- of the state that consumes what is captured
)`,
    `create sequence if not exists ${ASLEEP_UNTIL} as bigint`,
    `insert into ${CAPTURE_SCHEMA}.listener (installation) values (${quoteLiteral(installation).trim()}) on conflict do nothing`,
    `grant usage on schema ${CAPTURE_SCHEMA} to ${grantee}`,
    `grant select, delete on ${CAPTURE_SCHEMA}.capture to ${grantee}`,
    `grant select on ${CAPTURE_SCHEMA}.listener to ${grantee}`,
    `grant select, update on sequence ${ASLEEP_UNTIL} to ${grantee}`,
  ];
}

/** What a transaction that makes triggers begins with: whoever waits for a lock keeps writers waiting behind it. */
export function withShortLocks(): string {
  return `set local lock_timeout = '${LOCK_TIMEOUT}'`;
}

/** Statements as a script, in one transaction. */
export function transaction(statements: readonly string[]): string {
  return ['begin', ...statements, 'commit'].map((statement) => `${statement};\n`).join('');
}
