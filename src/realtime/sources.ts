import type { Client } from '../db/connect.js';
import { quoteIdentifier } from '../db/connect.js';
import { readsOf, type NamedFunction, type NamedTable, type Reads } from './reads.js';

/**
 * What a text of SQL depends on, down to tables: through the views that it names and the SQL functions that it calls, by
 * their texts in the catalogue. Names mean what they mean to the session. What operators, casts and aggregates of a
 * person's own call is taken on trust, as are functions that are declared IMMUTABLE.
 */
export interface Relation {
  oid: string;
  /** As SQL, with its schema. */
  name: string;
  /** As a person would write it in this session. */
  shown: string;
  isView: boolean;
  /** The columns by which rows can be told apart; and those of its primary key, if it has one. */
  columns: readonly string[];
  key: readonly string[];
}

/** A text, and what its names stand for; null where that is no relation. */
export interface Part {
  sql: string;
  reads: Reads;
  relationOf: (table: NamedTable) => Relation | null;
}

export interface Finding {
  /** As a message shows it, such as `now()`. */
  written: string;
  /** An offset in the text; null where it isn't in the text itself. */
  at: number | null;
  /** `the view recent_orders`; null for the text itself. */
  within: string | null;
}

export interface Sources {
  kind: 'read';
  text: Part;
  /** The views that are read, those before that others read. */
  views: readonly { relation: Relation; part: Part }[];
  /** Tables, and whatever else holds rows, each once. */
  tables: readonly Relation[];
  clock: readonly Finding[];
  /** What gives another result each time. */
  chance: readonly Finding[];
  /** Functions that may read anything. */
  opaque: readonly Finding[];
  /** Functions that read tables, and which. */
  readers: readonly (Finding & { table: string })[];
  /** The texts of the views and functions that it comes to, but for the system's: another one may mean something else. */
  behind: readonly string[];
}

interface Routine {
  schema: string;
  name: string;
  volatility: 'i' | 's' | 'v';
  language: string;
  isPlain: boolean;
  isConfigured: boolean;
  body: string;
  least: number;
  most: number | null;
}

/** Of the system's functions that are VOLATILE those that are told as the clock. */
const isClock = ({ name }: NamedFunction): boolean => name === 'clock_timestamp' || name === 'timeofday';
/** Of the system's functions those that read whatever table they are told. */
const READS_TABLES = /^(?:table|query|schema|database|cursor)_to_xml/;

/** `known` are names that stand for no table, such as `changed`. */
export async function sourcesOf(
  client: Client,
  sql: string,
  known: readonly string[] = [],
): Promise<Sources | { kind: 'unreadable' }> {
  const tables = new Map<string, Relation>();
  const views = new Map<string, { relation: Relation; part: Part }>();
  const routines = new Set<string>();
  const behind: string[] = [];
  const clock: Finding[] = [];
  const chance: Finding[] = [];
  const opaque: Finding[] = [];
  const readers: (Finding & { table: string })[] = [];

  /** Null where the text can't be parsed. `caller` is where the text itself comes to it, if by a function. */
  const follow = async (text: string, within: string | null, caller: Finding | null): Promise<Part | null> => {
    const reads = await readsOf(text, within === null ? known : []);
    if (reads === null) return null;
    const find = ({ written, at }: { written: string; at: number }): Finding => ({
      written,
      at: within === null ? at : null,
      within,
    });
    clock.push(...reads.clock.map(find));
    chance.push(...reads.chance.map(find));
    const part: Part = { sql: text, reads, relationOf: await resolve(client, reads.tables) };
    for (const table of reads.tables) {
      const relation = part.relationOf(table);
      if (relation === null) continue;
      if (caller !== null) readers.push({ ...caller, table: relation.shown });
      if (!relation.isView) tables.set(relation.oid, relation);
      else if (!views.has(relation.oid)) {
        const body = await viewText(client, relation.oid);
        behind.push(body);
        const view = await follow(body, `the view ${relation.shown}`, caller);
        if (view === null) opaque.push({ written: relation.shown, at: null, within });
        else views.set(relation.oid, { relation, part: view });
      }
    }
    for (const called of reads.functions)
      await judge(called, find({ written: `${called.name}()`, at: called.at }), caller);
    return part;
  };

  const judge = async (called: NamedFunction, finding: Finding, caller: Finding | null): Promise<void> => {
    for (const routine of await routinesOf(client, called)) {
      if (routine.schema !== 'pg_catalog') behind.push(JSON.stringify(routine));
      if (routine.schema === 'pg_catalog') {
        if (READS_TABLES.test(routine.name)) opaque.push(finding);
        else if (routine.volatility === 'v' && !isClock(called)) chance.push(finding);
      } else if (routine.language === 'sql' && routine.isPlain && !routine.isConfigured) {
        const id = JSON.stringify(routine);
        if (routines.has(id)) continue;
        routines.add(id);
        const body = await follow(routine.body, `the function ${routine.name}`, caller ?? finding);
        if (body === null) opaque.push(finding);
      } else if (routine.volatility !== 'i') opaque.push(finding);
    }
  };

  const text = await follow(sql, null, null);
  if (text === null) return { kind: 'unreadable' };
  const once = (findings: readonly Finding[]): Finding[] => [
    ...new Map(findings.map((finding) => [JSON.stringify(finding), finding])).values(),
  ];
  return {
    kind: 'read',
    text,
    views: [...views.values()],
    tables: [...tables.values()],
    clock: once(clock),
    chance: once(chance),
    opaque: once(opaque),
    readers,
    behind: [...new Set(behind)].sort(),
  };
}

const nameOf = ({ schema, name }: { schema: string | null; name: string }): string =>
  [...(schema === null ? [] : [schema]), name].map(quoteIdentifier).join('.');

/** What can't stand in a GROUP BY has no equality to tell rows apart by. */
const INCOMPARABLE = "('json', 'xml', 'point', 'line', 'lseg', 'box', 'path', 'polygon', 'circle', 'aclitem')";

async function resolve(client: Client, named: readonly NamedTable[]): Promise<Part['relationOf']> {
  const names = [...new Set(named.map(nameOf))];
  const { rows } = await client.query<{ written: string; relation: string }>(
    `select w.written, json_build_object(
       'oid', c.oid::text, 'name', format('%I.%I', n.nspname, c.relname), 'shown', c.oid::regclass::text, 'isView', c.relkind = 'v',
       'columns', array(select a.attname from pg_attribute as a join pg_type as t on t.oid = a.atttypid
         where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped and t.typname not in ${INCOMPARABLE} order by a.attnum),
       'key', array(select a.attname from pg_index as i join pg_attribute as a on a.attrelid = i.indrelid and a.attnum = any(i.indkey)
         where i.indrelid = c.oid and i.indisprimary))::text as relation
     from unnest($1::text[]) as w(written) join pg_class as c on c.oid = to_regclass(w.written)::oid
     join pg_namespace as n on n.oid = c.relnamespace`,
    [names],
  );
  const relations = new Map(rows.map(({ written, relation }) => [written, JSON.parse(relation) as Relation]));
  return (table) => relations.get(nameOf(table)) ?? null;
}

async function viewText(client: Client, oid: string): Promise<string> {
  const { rows } = await client.query<{ text: string }>('select pg_get_viewdef($1::oid) as text', [oid]);
  return rows[0]?.text ?? '';
}

/** The functions that a call may mean; where none takes its arguments, all of its name. Aggregates are none of them. */
async function routinesOf(client: Client, { schema, name, argumentCount }: NamedFunction): Promise<readonly Routine[]> {
  const { rows } = await client.query<{ routine: string }>(
    `select json_build_object(
       'schema', n.nspname, 'name', p.proname, 'volatility', p.provolatile, 'language', l.lanname, 'isPlain', p.prokind = 'f',
       'isConfigured', p.proconfig is not null, 'body', coalesce(pg_get_function_sqlbody(p.oid), p.prosrc),
       'least', p.pronargs - p.pronargdefaults, 'most', case when p.provariadic = 0 then p.pronargs end)::text as routine
     from pg_proc as p join pg_namespace as n on n.oid = p.pronamespace join pg_language as l on l.oid = p.prolang
     where p.proname = $2 and p.prokind <> 'a' and (n.nspname = $1 or $1 is null and pg_function_is_visible(p.oid))`,
    [schema, name],
  );
  const all = rows.map(({ routine }) => JSON.parse(routine) as Routine).map(withPlainBody);
  const fitting = all.filter(({ least, most }) => argumentCount >= least && argumentCount <= (most ?? argumentCount));
  return fitting.length > 0 ? fitting : all;
}

/** A body of the standard's form as statements by themselves. */
function withPlainBody(routine: Routine): Routine {
  const body = routine.body
    .replace(/^\s*return\s/i, 'select ')
    .replace(/^\s*begin\s+atomic\s([\s\S]*)\send\s*$/i, '$1');
  return { ...routine, body };
}
