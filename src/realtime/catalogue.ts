import { createHash } from 'node:crypto';
import { quoteIdentifier, withClient, type Client, type Pool } from '../db/connect.js';
import {
  ASLEEP_UNTIL,
  CAPTURE_SCHEMA,
  functionBody,
  functionName,
  functionSettings,
  STATEMENT_KINDS,
  tableName,
  triggerName,
  type StatementKind,
} from './trigger-sql.js';
import type { WatchedTable, WatchPlan } from './watches.js';

/** What is there of real time in the source, against what should be: read from the catalogue, whoever has made it. */

/** The watched table or what belongs to it: each can be written to directly, and has triggers of its own. */
export interface Node {
  /** Its number in the source: another one that comes by the same name has another. */
  id: string;
  schema: string;
  name: string;
  /** Whether its four triggers are there and fire. */
  state: 'fine' | 'missing' | 'disabled';
  /** Whether the role may make triggers on it. */
  mayTrigger: boolean;
}

export interface TableState {
  watched: WatchedTable;
  nodes: readonly Node[];
  /** The function that the triggers call; `outdated`: with another text, or other settings. */
  function: 'fine' | 'missing' | 'outdated';
  /** Whether the role may make it, or replace the one that is there. */
  mayMake: boolean;
  /** Whether the role may make triggers that call it. */
  mayCall: boolean;
  /** Whether its function notifies. */
  notifies: boolean;
  /** What is wrong, as what follows the table's name; null: each change is captured. */
  because: string | null;
  /**
   * Another one: changes may have been missed, or have happened without a trigger. It covers what is installed, repaired,
   * switched off and on, attached, detached and written anew.
   */
  signature: string;
}

export type CaptureState =
  | { kind: 'fine' }
  /** Nothing is installed. */
  | { kind: 'missing' }
  /** Another state consumes what is captured. */
  | { kind: 'foreign' }
  /** The role may not read and delete what is captured; `grants` would let it. */
  | { kind: 'denied'; grants: readonly string[] };

export interface Inspection {
  role: string;
  database: string;
  capture: CaptureState;
  mayMakeSchema: boolean;
  tables: readonly TableState[];
  /** Functions in the schema that no watched table has. */
  stale: readonly string[];
}

interface NodeRow {
  /** Which of the watched tables it belongs to, from 1. */
  root: number;
  schema: string;
  name: string;
  node: string;
  file: string;
  may_trigger: boolean;
  triggers: string;
}

interface TriggerRow {
  oid: string;
  version: string;
  name: string;
  type: number;
  enabled: string;
  old: string | null;
  new: string | null;
  function: string;
}

interface FunctionRow {
  name: string;
  body: string;
  definer: boolean;
  own: boolean;
  may_call: boolean;
  settings: readonly string[] | null;
}

/** `version` is the row's: a trigger that was switched off and on has another. */
const NODES = `
  with recursive node as (
    select w.root, c.oid from unnest($1::text[], $2::text[]) with ordinality as w (schema, name, root)
      join pg_namespace as n on n.nspname = w.schema join pg_class as c on c.relnamespace = n.oid and c.relname = w.name
    union select node.root, i.inhrelid from node join pg_inherits as i on i.inhparent = node.oid
  )
  select node.root::int4 as root, n.nspname as schema, c.relname as name, c.oid::text as node,
    coalesce(pg_relation_filenode(c.oid), 0)::text as file, has_table_privilege(c.oid, 'TRIGGER') as may_trigger,
    coalesce((select json_agg(json_build_object('oid', t.oid::text, 'version', t.xmin::text, 'name', t.tgname, 'type', t.tgtype,
        'enabled', t.tgenabled::text, 'old', t.tgoldtable, 'new', t.tgnewtable, 'function', p.proname) order by t.tgname)
      from pg_trigger as t join pg_proc as p on p.oid = t.tgfoid join pg_namespace as s on s.oid = p.pronamespace
      where t.tgrelid = c.oid and not t.tgisinternal and s.nspname = '${CAPTURE_SCHEMA}'), '[]')::text as triggers
  from node join pg_class as c on c.oid = node.oid join pg_namespace as n on n.oid = c.relnamespace
  order by node.root, c.oid`;

const FUNCTIONS = `
  select p.proname as name, p.prosrc as body, p.prosecdef as definer, pg_has_role(p.proowner, 'USAGE') as own, has_function_privilege(p.oid, 'EXECUTE') as may_call,
    array_to_json(p.proconfig)::text as settings
  from pg_proc as p join pg_namespace as n on n.oid = p.pronamespace where n.nspname = '${CAPTURE_SCHEMA}' and p.prosrc ~ '-- personas-sync capture \\d' order by 1`;

/** What there is of the schema, and what the role may do with it. */
interface CaptureRow {
  role: string;
  database: string;
  may_make: boolean;
  schema: boolean;
  may_add: boolean;
  usage: boolean;
  tables: boolean;
  capture: boolean;
  listener: boolean;
  asleep_until: boolean;
}

const CAPTURE = `
  select current_user as role, current_database() as database, has_database_privilege(current_database(), 'CREATE') as may_make,
    s.oid is not null as schema, coalesce(has_schema_privilege(s.oid, 'CREATE'), true) as may_add,
    coalesce(has_schema_privilege(s.oid, 'USAGE'), false) as usage,
    exists (select from pg_class where relnamespace = s.oid and relname = 'capture')
      and exists (select from pg_class where relnamespace = s.oid and relname = 'listener')
      and exists (select from pg_class where relnamespace = s.oid and relname = 'asleep_until') as tables,
    coalesce((select has_table_privilege(oid, 'SELECT') and has_table_privilege(oid, 'DELETE')
      from pg_class where relnamespace = s.oid and relname = 'capture'), false) as capture,
    coalesce((select has_table_privilege(oid, 'SELECT')
      from pg_class where relnamespace = s.oid and relname = 'listener'), false) as listener,
    coalesce((select has_sequence_privilege(oid, 'SELECT') and has_sequence_privilege(oid, 'UPDATE')
      from pg_class where relnamespace = s.oid and relname = 'asleep_until'), false) as asleep_until
  from (select (select oid from pg_namespace where nspname = '${CAPTURE_SCHEMA}') as oid) as s`;

/** The bits of pg_trigger.tgtype: https://github.com/postgres/postgres/blob/master/src/include/catalog/pg_trigger.h */
const TYPES: Readonly<Record<StatementKind, number>> = { insert: 4, delete: 8, update: 16, truncate: 32 };
const REFERENCES: Readonly<Record<StatementKind, readonly [string | null, string | null]>> = {
  insert: [null, 'new_rows'],
  update: ['old_rows', 'new_rows'],
  delete: ['old_rows', null],
  truncate: [null, null],
};
/** Fires in ordinary sessions, or always. */
const FIRES = new Set(['O', 'A']);

function stateOf({ table }: WatchedTable, triggers: readonly TriggerRow[]): Node['state'] {
  const right = STATEMENT_KINDS.map((kind) => {
    const [oldTable, newTable] = REFERENCES[kind];
    return triggers.find(
      (trigger) =>
        trigger.name === triggerName(table, kind) &&
        trigger.function === functionName(table) &&
        trigger.type === TYPES[kind] &&
        trigger.old === oldTable &&
        trigger.new === newTable,
    );
  });
  if (right.some((trigger) => trigger === undefined)) return 'missing';
  return right.every((trigger) => trigger !== undefined && FIRES.has(trigger.enabled)) ? 'fine' : 'disabled';
}

/** As pg_proc has them: `search_path=pg_catalog, pg_temp`. */
function storedSettings(settings: readonly string[]): string {
  const stored = settings.map((setting) => setting.replace(/^set /, '').replace(' = ', '='));
  return JSON.stringify(stored.map((setting) => setting.replaceAll("'", '').toLowerCase()).sort());
}

function judgeFunction(
  { watches }: WatchedTable,
  found: FunctionRow | undefined,
  mayAdd: boolean,
): Pick<TableState, 'function' | 'mayMake' | 'mayCall' | 'notifies'> {
  if (found === undefined) return { function: 'missing', mayMake: mayAdd, mayCall: mayAdd, notifies: false };
  const silent = found.body === functionBody(watches, { notify: false });
  const notifies = found.body === functionBody(watches, { notify: true });
  const settings = (found.settings ?? []).map((setting) => setting.replaceAll(/['"]/g, '').toLowerCase()).sort();
  const isFine =
    (silent || notifies) && found.definer && JSON.stringify(settings) === storedSettings(functionSettings(watches));
  return { function: isFine ? 'fine' : 'outdated', mayMake: mayAdd && found.own, mayCall: found.may_call, notifies };
}

function explain(nodes: readonly Node[], state: TableState['function']): string | null {
  const named = (wrong: Node['state']): string =>
    nodes
      .filter((node) => node.state === wrong)
      .slice(0, 3)
      .map(tableName)
      .join(', ');
  const missing = named('missing');
  const disabled = named('disabled');
  if (nodes.length === 0) return 'is gone';
  if (state === 'missing' || nodes.every((node) => node.state === 'missing'))
    return 'has no triggers: run `personas-sync realtime install`';
  if (missing !== '') return `lacks triggers on ${missing}: run \`personas-sync realtime install\``;
  if (state === 'outdated') return 'has triggers that are out of date: run `personas-sync realtime install`';
  if (disabled !== '')
    return `has triggers that are switched off on ${disabled}: run \`personas-sync realtime install\``;
  return null;
}

function judgeTable(
  watched: WatchedTable,
  rows: readonly NodeRow[],
  functions: readonly FunctionRow[],
  mayAdd: boolean,
): TableState {
  const found = functions.find(({ name }) => name === functionName(watched.table));
  const judged = judgeFunction(watched, found, mayAdd);
  const parsed = rows.map((row) => ({ row, triggers: JSON.parse(row.triggers) as TriggerRow[] }));
  const nodes = parsed.map(({ row: { node, schema, name, may_trigger }, triggers }) => ({
    id: node,
    schema,
    name,
    state: stateOf(watched, triggers),
    mayTrigger: may_trigger,
  }));
  // Those of another watched table on the same relation have no part in it.
  const own = (trigger: TriggerRow): boolean => trigger.function === functionName(watched.table);
  const facts = parsed.map(({ row, triggers }) => [
    row.node,
    row.file,
    triggers.filter(own).map(({ oid, version, enabled }) => [oid, version, enabled]),
  ]);
  const signature = createHash('md5')
    .update(JSON.stringify([facts, found?.body, found?.settings]))
    .digest('hex');
  return { watched, nodes, ...judged, because: explain(nodes, judged.function), signature };
}

async function readCapture(
  client: Client,
  installation: string,
): Promise<Pick<Inspection, 'role' | 'database' | 'capture' | 'mayMakeSchema'> & { mayAdd: boolean }> {
  const { rows } = await client.query<CaptureRow>(CAPTURE);
  const [row] = rows;
  if (row === undefined) throw new Error('PostgreSQL tells nothing of itself.');
  const { role, database, may_make: mayMakeSchema, may_add: mayAdd } = row;
  return { role, database, mayMakeSchema, mayAdd, capture: await judgeCapture(client, row, installation) };
}

async function judgeCapture(client: Client, there: CaptureRow, installation: string): Promise<CaptureState> {
  if (!there.schema || !there.tables) return { kind: 'missing' };
  const to = `TO ${quoteIdentifier(there.role)}`;
  const grants = [
    ...(there.usage ? [] : [`GRANT USAGE ON SCHEMA ${CAPTURE_SCHEMA} ${to}`]),
    ...(there.capture ? [] : [`GRANT SELECT, DELETE ON ${CAPTURE_SCHEMA}.capture ${to}`]),
    ...(there.listener ? [] : [`GRANT SELECT ON ${CAPTURE_SCHEMA}.listener ${to}`]),
    ...(there.asleep_until ? [] : [`GRANT SELECT, UPDATE ON SEQUENCE ${ASLEEP_UNTIL} ${to}`]),
  ];
  if (grants.length > 0) return { kind: 'denied', grants };
  const { rows } = await client.query<{ installation: string }>(
    `select installation::text as installation from ${CAPTURE_SCHEMA}.listener`,
  );
  if (rows.length === 0) return { kind: 'missing' };
  return rows.every((row) => row.installation === installation) ? { kind: 'fine' } : { kind: 'foreign' };
}

/** Reads it all in one look. `installation` is the id of the state that wants to consume what is captured. */
export async function inspect(source: Pool, plan: WatchPlan, installation: string): Promise<Inspection> {
  return withClient(source, async (client) => {
    const { mayAdd, ...about } = await readCapture(client, installation);
    const { rows: functionRows } = await client.query<Omit<FunctionRow, 'settings'> & { settings: string | null }>(
      FUNCTIONS,
    );
    const functions = functionRows.map(({ settings, ...row }) => ({
      ...row,
      settings: settings === null ? null : (JSON.parse(settings) as string[]),
    }));
    const tables = plan.tables.map(({ table }) => table);
    const { rows } = await client.query<NodeRow>(NODES, [
      tables.map(({ schema }) => schema),
      tables.map(({ name }) => name),
    ]);
    const wanted = new Set(tables.map(functionName));
    return {
      ...about,
      tables: plan.tables.map((watched, index) =>
        judgeTable(
          watched,
          rows.filter(({ root }) => root === index + 1),
          functions,
          mayAdd,
        ),
      ),
      stale: functions.map(({ name }) => name).filter((name) => !wanted.has(name)),
    };
  });
}
