import type { Config } from '../config/types.js';
import { nearest } from '../config/wording.js';
import type { Change } from '../core/definition.js';
import { withClient, type Client, type Pool } from '../db/connect.js';
import { OperatorError, type Problem } from '../lib/errors.js';
import { canBeCast, castStatement, findKeyColumns, lookUpStatement } from './key-columns.js';
import { nameOf, tableName, type SourceColumn, type SourceTable } from './trigger-sql.js';
import { followedChanges, planWatches, type ResolvedChange, type WatchPlan } from './watches.js';

/** The tables that `changes` names, as the source has them, and whether triggers can tell of all that changes in them. */
type Found = { kind: 'table'; table: SourceTable } | { kind: 'refused'; because: string; isMistake: boolean };

interface TableRow {
  written: string;
  schema: string | null;
  name: string | null;
  kind: string;
  persistence: string;
  subscribed: boolean;
  foreign: boolean;
  columns: readonly { name: string; type: string; virtual: boolean }[] | null;
}

/**
 * A name without a schema is looked for as a statement would. Of a virtual column, which is computed when it is read, a
 * trigger sees nothing.
 */
const TABLES = `
  with recursive wanted as (
    select * from unnest($1::text[], $2::text[], $3::text[]) as w (written, schema, name)
  ), found as (
    select w.written, f.* from wanted as w left join lateral (
      select c.oid, n.nspname, c.relname, c.relkind, c.relpersistence
      from pg_class as c join pg_namespace as n on n.oid = c.relnamespace
      where c.relname = w.name and c.relkind in ('r', 'p', 'v', 'm', 'f')
        and (n.nspname = w.schema or w.schema is null and n.nspname = any(current_schemas(false)))
      order by array_position(current_schemas(false), n.nspname) limit 1
    ) as f on true
  ), node as (
    select oid as root, oid from found where oid is not null
    union select node.root, i.inhrelid from node join pg_inherits as i on i.inhparent = node.oid
  )
  select f.written, f.nspname as schema, f.relname as name, coalesce(f.relkind::text, '') as kind, coalesce(f.relpersistence::text, '') as persistence,
    exists (select from node join pg_subscription_rel as s on s.srrelid = node.oid where node.root = f.oid) as subscribed,
    exists (select from node join pg_class as c on c.oid = node.oid where node.root = f.oid and c.relkind = 'f') as foreign,
    (select json_agg(json_build_object('name', a.attname, 'type', format_type(coalesce(nullif(t.typbasetype, 0), t.oid), -1),
         'virtual', a.attgenerated::text = 'v') order by a.attnum)
       from pg_attribute as a join pg_type as t on t.oid = a.atttypid
       where a.attrelid = f.oid and a.attnum > 0 and not a.attisdropped)::text as columns
  from found as f`;

const PART = /"(?:[^"]|"")+"|[^".]+/g;

const withoutQuotes = (written: string): string =>
  written.startsWith('"') ? written.slice(1, -1).replaceAll('""', '"') : written;

/** The parts of a table's name as SQL, without their quotes. */
function partsOf(table: string): { schema: string | null; name: string } {
  const parts = (table.match(PART) ?? []).map(withoutQuotes);
  const name = parts.at(-1) ?? table;
  return { schema: parts.length > 1 ? (parts[0] ?? null) : null, name };
}

function judge({ written, schema, name, kind, persistence, subscribed, foreign, columns }: TableRow): Found {
  const refused = (because: string): Found => ({ kind: 'refused', because, isMistake: false });
  if (schema === null || name === null) {
    const because =
      partsOf(written).schema === null
        ? 'is not in the source, or in a schema that is not looked in: write it with its schema'
        : 'is not in the source';
    return { kind: 'refused', because, isMistake: true };
  }
  if (kind === 'v') return refused('is a view, which has no triggers of that kind: name the tables that it reads');
  if (kind === 'm')
    return refused('is a materialised view, which has no triggers: name the tables that it is made from');
  if (kind === 'f') return refused('is a foreign table, whose changes happen elsewhere');
  if (foreign) return refused('has a foreign table as a part, whose changes happen elsewhere');
  if (subscribed) return refused('is filled by a logical subscription, for whose changes no such trigger fires');
  if (persistence === 'u') return refused('is unlogged: a crash empties it, and no trigger fires');
  const seen = (columns ?? []).filter(({ virtual }) => !virtual);
  return {
    kind: 'table',
    table: { schema, name, columns: seen.map((column) => ({ name: column.name, type: column.type })) },
  };
}

async function findTables(client: Client, changes: readonly Change[]): Promise<ReadonlyMap<string, Found>> {
  const written = [...new Set(changes.map(({ table }) => table))];
  const parts = written.map(partsOf);
  const { rows } = await client.query<Omit<TableRow, 'columns'> & { columns: string | null }>(TABLES, [
    written,
    parts.map(({ schema }) => schema),
    parts.map(({ name }) => name),
  ]);
  return new Map(
    rows.map(({ columns, ...row }) => [
      row.written,
      judge({ ...row, columns: columns === null ? null : (JSON.parse(columns) as TableRow['columns']) }),
    ]),
  );
}

/** The column that a person means: as it is written, or in lower case where they didn't quote it. */
function findColumn(written: string, columns: readonly SourceColumn[]): SourceColumn | undefined {
  const quoted = written.startsWith('"');
  const name = withoutQuotes(written);
  const exact = columns.find((column) => column.name === name);
  return exact ?? (quoted ? undefined : columns.find((column) => column.name === name.toLowerCase()));
}

const mistake = (problem: Problem): ResolvedChange => ({ kind: 'refused', problem, isMistake: true });

async function resolveColumn(
  client: Client,
  change: Change,
  written: string,
  table: SourceTable,
  profileType: string,
): Promise<ResolvedChange> {
  const refused = (message: string): ResolvedChange => mistake({ place: change.place, message });
  const column = findColumn(written, table.columns);
  const shown = nameOf(withoutQuotes(written));
  if (column === undefined) {
    const near = nearest(
      withoutQuotes(written),
      table.columns.map(({ name }) => name),
    );
    const hint = near === undefined ? '' : `: did you mean \`${near}\`?`;
    return refused(`The table ${tableName(table)} has no column \`${shown}\` that a trigger sees${hint || '.'}`);
  }
  const isProfile = column.type === profileType;
  if (!isProfile && !(await canBeCast(client, column.type, profileType))) {
    return refused(
      `The column \`${shown}\` of ${tableName(table)} is ${column.type}, which can't be a profile_id (${profileType}): name the column that holds it, or write a SELECT.`,
    );
  }
  const statement = isProfile ? null : castStatement(column, profileType);
  return { kind: 'known', watch: { table, columns: [column] }, statement };
}

async function typeName(client: Client, oid: number): Promise<string> {
  const { rows } = await client.query<{ name: string }>('select format_type($1::oid, -1) as name', [oid]);
  return rows[0]?.name ?? 'text';
}

async function resolveOne(
  client: Client,
  change: Change,
  found: Found | undefined,
  profileType: string,
): Promise<ResolvedChange> {
  const { place, written, way } = change;
  if (found === undefined || found.kind === 'refused') {
    const { because, isMistake } = found ?? { because: 'is not in the source', isMistake: true };
    const message = `The table \`${written}\` of \`changes\` ${because}.`;
    return { kind: 'refused', problem: { place, message }, isMistake };
  }
  const { table } = found;
  if (way.kind === 'column') return resolveColumn(client, change, way.column, table, profileType);
  const subject = `The SQL of \`changes.${written}\``;
  try {
    const { used, typeOid } = await findKeyColumns(client, subject, way.text, table.columns);
    const type = await typeName(client, typeOid);
    if (!(await canBeCast(client, type, profileType))) {
      const message = `${subject} gives ${type}, which can't be a profile_id (${profileType}).`;
      return mistake({ place: way.text.placeOf(0), message });
    }
    const statement = lookUpStatement(way.text.sql, used, profileType);
    return { kind: 'known', watch: { table, columns: used }, statement };
  } catch (error) {
    const [problem] = error instanceof OperatorError ? error.problems : [];
    if (problem === undefined) throw error;
    return mistake(problem);
  }
}

/**
 * What the configuration's `changes` come to in this source. `profileType` is that of `profile_id`. Nothing is written,
 * and no table is read; what is wrong with a change is in the plan, not thrown.
 */
export async function readWatchPlan(
  source: Pool,
  config: Pick<Config, 'definitions' | 'profiles'>,
  profileType: string,
): Promise<WatchPlan> {
  // What `character` casts to is one character long.
  const profile = profileType === 'character' ? 'bpchar' : profileType;
  const changes = followedChanges(config);
  if (changes.length === 0) return planWatches(config, new Map());
  return withClient(source, async (client) => {
    const { rows } = await client.query<{ follows: boolean }>('select pg_is_in_recovery() as follows');
    const standby: Problem = { message: 'The source is a standby, which has no triggers of its own.' };
    const tables = await findTables(client, changes);
    const resolved = new Map<Change, ResolvedChange>();
    for (const change of changes) {
      const found: ResolvedChange =
        rows[0]?.follows === true
          ? { kind: 'refused', problem: { ...standby, place: change.place }, isMistake: false }
          : await resolveOne(client, change, tables.get(change.table), profile);
      resolved.set(change, found);
    }
    return planWatches(config, resolved);
  });
}
