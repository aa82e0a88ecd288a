import type { Change } from '../core/definition.js';
import type { Client } from '../db/connect.js';
import { databaseFailure, isUnreachable } from '../db/failure.js';
import { asSubquery } from '../sync/shape.js';
import { cutTables } from './cut.js';
import type { Following } from './followed.js';
import { rowsLeadingTo } from './leading.js';
import type { Sources } from './sources.js';

/**
 * Whether one person's rows decide about another's, found by trying: a sample of profiles is computed from the tables cut
 * down to the rows that lead to it, as real time would see them, and compared with the same profiles in the full result;
 * so are some of them in smaller groups and each alone: an average of many is near that of all, and somebody alone may be
 * as far above their own average as above everyone's. A condition around the text would show nothing: PostgreSQL pushes it only to where it
 * changes no result, so a LIMIT would still see everyone.
 */
export interface Trial {
  sources: Sources;
  following: Following;
  /** The text and that of `profiles`, moments bound. */
  sql: string;
  profiles: string;
  /** The type of `profile_id` in `profiles`. */
  profileType: string;
  /** Where profiles that have rows, but aren't in the result, are looked for. */
  changes: readonly Change[];
}

export interface TrialLimits {
  workMemMb: number;
  /** For each of its statements; when so much has gone by, nothing is tried but what must be. */
  timeoutMs: number;
}

export type TrialResult =
  | { kind: 'same'; tried: number }
  | { kind: 'differs'; tried: number; differing: number }
  | { kind: 'untried'; because: string };

const MEMBERS = 100;
const TOUCHED = 50;
const OTHERS = 50;
const SINGLES = 30;
const GROUP = 20;
/** All together, and ten each alone. */
const GROUPS_AT_LEAST = 11;
/** Sums of floats differ by their order. */
const TOLERANCE = 1e-9;

/** Ids as text, mixed by their hashes. */
interface Sample {
  all: readonly string[];
  members: readonly string[];
  /** Of those who aren't in the result, who have rows in a table that is followed. */
  touched: readonly string[];
}

type Rows = ReadonlyMap<string, readonly string[]>;

/** In a transaction of its own, with one snapshot, in which nothing is written. */
export async function tryAlone(client: Client, trial: Trial, limits: TrialLimits): Promise<TrialResult> {
  const ways = new Map<Change, string>();
  for (const change of new Set(trial.sources.tables.flatMap(trial.following))) {
    const way = await rowsLeadingTo(`any($1::text[]::${trial.profileType}[])`, change);
    if (way === null) return { kind: 'untried', because: `the SQL of \`changes.${change.written}\` can't be followed` };
    ways.set(change, way);
  }
  const cut = cutTables(trial.sources, (relation) => {
    const conditions = trial.following(relation).map((change) => ways.get(change) ?? 'false');
    return conditions.length === 0 ? null : conditions.map((condition) => `(${condition})`).join(' or ');
  });
  if (cut.kind === 'whole') return { kind: 'untried', because: cut.because };
  const alone = `${cut.ctes}${rowsQuery(cut.text, trial.profileType)}`;
  const full = rowsQuery(trial.sql, trial.profileType);

  await client.query('begin isolation level repeatable read read only');
  try {
    await client.query(
      `set local statement_timeout = ${limits.timeoutMs}; set local work_mem = '${limits.workMemMb}MB'`,
    );
    const sample = await takeSample(client, trial);
    const expected = await readRows(client, full, sample.all);
    const differing = new Set<string>();
    const began = performance.now();
    for (const [index, group] of groupsOf(sample).entries()) {
      if (index >= GROUPS_AT_LEAST && performance.now() - began > limits.timeoutMs) break;
      const found = await readRows(client, alone, group);
      for (const id of group) if (!isSame(expected.get(id), found.get(id))) differing.add(id);
    }
    const tried = sample.all.length;
    return differing.size === 0 ? { kind: 'same', tried } : { kind: 'differs', tried, differing: differing.size };
  } catch (error) {
    const failure = isUnreachable(error) ? null : databaseFailure(error);
    if (failure === null) throw error;
    return { kind: 'untried', because: `it ${failure.sentence} when its tables are cut down` };
  } finally {
    await client.query('rollback');
  }
}

function rowsQuery(sql: string, profileType: string): string {
  return `select m.profile_id::${profileType}::text as id, to_jsonb(m)::text as content from ${asSubquery(sql)} as m
    where m.profile_id = any($1::text[]::${profileType}[])`;
}

async function readRows(client: Client, query: string, sample: readonly string[]): Promise<Rows> {
  const { rows } = await client.query<{ id: string; content: string }>(query, [sample]);
  const found = new Map<string, string[]>();
  for (const { id, content } of rows) found.set(id, [...(found.get(id) ?? []), content]);
  return found;
}

/** Profiles by the hash of their id: of the result, of others with rows in the followed tables, and of any others. */
async function takeSample(client: Client, { sql, profiles, profileType, changes }: Trial): Promise<Sample> {
  const idsOf = (from: string, column: string): string =>
    `select distinct ${column}::${profileType}::text as id from ${from} where ${column} is not null`;
  const some = (kind: string, ids: string, limit: number): string =>
    `(select '${kind}' as kind, id from (${ids}) as ids order by md5(id) limit ${limit})`;
  const others = (ids: string): string => `${ids} except select id from members`;
  const tables = changes.flatMap(({ table, way }) =>
    way.kind === 'column' ? [others(idsOf(`${table} as personas_row`, `personas_row.${way.column}`))] : [],
  );
  const { rows } = await client.query<{ kind: 'member' | 'touched' | 'other'; id: string }>(
    `with members as materialized (${idsOf(`${asSubquery(sql)} as m`, 'm.profile_id')})
     select kind, id from (${[
       some('member', 'select id from members', MEMBERS),
       ...tables.map((ids) => some('touched', ids, Math.ceil(TOUCHED / tables.length))),
       some('other', others(idsOf(`${asSubquery(profiles)} as p`, 'p.profile_id')), OTHERS),
     ].join(' union all ')}) as sample order by md5(id)`,
  );
  const of = (...kinds: string[]): readonly string[] => [
    ...new Set(rows.filter(({ kind }) => kinds.includes(kind)).map(({ id }) => id)),
  ];
  return { all: of('member', 'touched', 'other'), members: of('member'), touched: of('touched') };
}

/** All together, some each alone, and all in small groups; those alone who are likeliest to tell something come first. */
function groupsOf({ all, members, touched }: Sample): readonly (readonly string[])[] {
  const mixed = all.flatMap((_, index) => [members[index], touched[index]].filter((id) => id !== undefined));
  const singles = [...new Set([...mixed, ...all])].slice(0, SINGLES).map((id) => [id]);
  const groups = Array.from({ length: Math.ceil(all.length / GROUP) }, (_, index) =>
    all.slice(index * GROUP, (index + 1) * GROUP),
  );
  return [all, ...singles.slice(0, GROUPS_AT_LEAST - 1), ...groups, ...singles.slice(GROUPS_AT_LEAST - 1)];
}

function isSame(a: readonly string[] = [], b: readonly string[] = []): boolean {
  const sorted = (rows: readonly string[]): unknown[] => [...rows].sort().map((row) => JSON.parse(row) as unknown);
  return isAlike(sorted(a), sorted(b));
}

/** Equal, but for the last digits of numbers. */
function isAlike(a: unknown, b: unknown): boolean {
  if (typeof a === 'number' && typeof b === 'number') {
    return a === b || Math.abs(a - b) <= TOLERANCE * Math.max(Math.abs(a), Math.abs(b));
  }
  if (typeof a !== 'object' || typeof b !== 'object' || a === null || b === null) return a === b;
  const [left, right] = [Object.entries(a), new Map(Object.entries(b))];
  return left.length === right.size && left.every(([key, value]) => right.has(key) && isAlike(value, right.get(key)));
}
