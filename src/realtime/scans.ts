import { quoteIdentifier, type Client } from '../db/connect.js';
import { PLANNED_FOR_SOME } from '../sync/evaluation.js';

/**
 * Whether evaluating a few profiles reads whole tables, told from the plan: each scan of a table that isn't small must
 * have a condition on an index. The parts of a partitioned table count together.
 */
export interface WholeScan {
  /** As a person would write it. */
  table: string;
  oid: string;
  /** As EXPLAIN calls it, such as `Seq Scan`. */
  scan: string;
  /** What indexes would find the rows by, as SQL; none where the plan doesn't tell. */
  lookedUp: readonly string[];
}

const SMALL_ROWS = 10_000;
/** What a row takes at least, where nobody has counted them yet. */
const ROW_BYTES = 100;

type Plan = Readonly<Record<string, unknown>>;

/**
 * The tables that `statement` reads whole, the largest first. It is planned, not run, so its parameters must stand in it
 * as literals. Tables of `except`, a schema, are left out.
 */
export async function wholeScansOf(
  client: Client,
  statement: string,
  except: string | null,
): Promise<readonly WholeScan[]> {
  const scans = scansIn(await explainAsEvaluated(client, statement)).filter(({ schema }) => schema !== except);
  const whole = scans.filter(({ isIndexed }) => !isIndexed);
  const { rows } = await client.query<{ at: string; root: string; shown: string; size: string }>(
    `select s.at, r.root::oid::text as root, r.root::text as shown,
       sum(case when c.reltuples < 0 then pg_relation_size(c.oid) / ${ROW_BYTES} else c.reltuples end) over (partition by r.root)::bigint as size
     from unnest($1::text[], $2::text[]) with ordinality as s(schema, name, at)
     join pg_namespace as n on n.nspname = s.schema join pg_class as c on c.relnamespace = n.oid and c.relname = s.name,
     lateral (select coalesce(pg_partition_root(c.oid), c.oid::regclass) as root) as r
     order by size desc, s.at`,
    [whole.map(({ schema }) => schema), whole.map(({ name }) => name)],
  );
  const large = rows.filter(({ size }) => Number(size) > SMALL_ROWS);
  return [...new Set(large.map(({ root }) => root))].map((root) => {
    const rowsOfRoot = large.filter((row) => row.root === root);
    const scansOfRoot = rowsOfRoot.flatMap(({ at }) => whole[Number(at) - 1] ?? []);
    return {
      table: rowsOfRoot[0]?.shown ?? '',
      oid: root,
      scan: scansOfRoot[0]?.type ?? '',
      lookedUp: [...new Set(scansOfRoot.flatMap((scan) => lookedUpBy(scan) ?? []))],
    };
  });
}

export interface PlannedRelation {
  oid: string;
  shown: string;
}

/**
 * The relations that the plan of a statement reads; and those among them that it reads once for all rows, in a sub-query
 * that depends on none.
 */
export async function relationsInPlan(
  client: Client,
  statement: string,
): Promise<{ all: readonly PlannedRelation[]; once: readonly PlannedRelation[] }> {
  const plan = await explain(client, statement);
  const [all, once] = [scansIn(plan), onceIn(plan)];
  const { rows } = await client.query<PlannedRelation & { schema: string; name: string }>(
    `select c.oid::text as oid, c.oid::regclass::text as shown, s.schema, s.name from unnest($1::text[], $2::text[]) as s(schema, name)
     join pg_namespace as n on n.nspname = s.schema join pg_class as c on c.relnamespace = n.oid and c.relname = s.name`,
    [all.map(({ schema }) => schema), all.map(({ name }) => name)],
  );
  const isAmong = (scans: readonly Scan[], row: { schema: string; name: string }): boolean =>
    scans.some(({ schema, name }) => schema === row.schema && name === row.name);
  return { all: rows, once: rows.filter((row) => isAmong(once, row)) };
}

/** The scans of sub-queries that are run once, CTEs that they read among them; what is run for each row may depend on it. */
function onceIn(plan: unknown): readonly Scan[] {
  const all = nodesIn(plan);
  const names = new Set<string>();
  const scans: Scan[] = [];
  const take = (node: unknown): void => {
    scans.push(...scansIn(node));
    for (const { 'CTE Name': name } of nodesIn(node)) {
      if (typeof name !== 'string' || names.has(name)) continue;
      names.add(name);
      all.filter((each) => each['Subplan Name'] === `CTE ${name}`).forEach(take);
    }
  };
  const look = (node: Plan): void => {
    const isOfCte = textIn(node, 'Subplan Name').startsWith('CTE ');
    if (node['Parent Relationship'] === 'InitPlan' && !isOfCte) take(node);
    else if (node['Parent Relationship'] !== 'SubPlan') {
      const isLoop = node['Node Type'] === 'Nested Loop';
      const below = childrenOf(node).filter((child) => !isLoop || child['Parent Relationship'] !== 'Inner');
      below.forEach(look);
    }
  };
  rootsOf(plan).forEach(look);
  return scans;
}

/** As sessions that evaluate would plan it. */
async function explainAsEvaluated(client: Client, statement: string): Promise<unknown> {
  await client.query(PLANNED_FOR_SOME.set);
  try {
    return await explain(client, statement);
  } finally {
    await client.query(PLANNED_FOR_SOME.reset);
  }
}

async function explain(client: Client, statement: string): Promise<unknown> {
  const { rows } = await client.query<{ 'QUERY PLAN': unknown }>(`explain (format json, verbose) ${statement}`);
  const plan = rows[0]?.['QUERY PLAN'];
  return typeof plan === 'string' ? JSON.parse(plan) : plan;
}

interface Scan {
  schema: string;
  name: string;
  type: string;
  alias: string;
  filter: string;
  isIndexed: boolean;
}

function scansIn(plan: unknown): readonly Scan[] {
  return nodesIn(plan).flatMap((node) => {
    const name = textIn(node, 'Relation Name');
    if (name === '') return [];
    return {
      schema: textIn(node, 'Schema'),
      name,
      type: textIn(node, 'Node Type'),
      alias: textIn(node, 'Alias'),
      filter: textIn(node, 'Filter'),
      isIndexed: ['Index Cond', 'Recheck Cond', 'TID Cond'].some((key) => node[key] !== undefined),
    };
  });
}

const isPlan = (value: unknown): value is Plan => typeof value === 'object' && value !== null && !Array.isArray(value);
const plansOf = (value: unknown): readonly Plan[] => (Array.isArray(value) ? value : [value]).filter(isPlan);
const childrenOf = (node: Plan): readonly Plan[] => plansOf(node.Plans);
/** Of what EXPLAIN gives, or of a node, which is its own. */
const rootsOf = (plan: unknown): readonly Plan[] =>
  plansOf(plan).flatMap((node) => (node.Plan === undefined ? node : plansOf(node.Plan)));
const nodesIn = (plan: unknown): readonly Plan[] =>
  rootsOf(plan).flatMap((node) => [node, ...childrenOf(node).flatMap(nodesIn)]);
const textIn = (node: Plan, key: string): string => (typeof node[key] === 'string' ? node[key] : '');

/** The expression on the left of the first `= ANY (…)` of a filter, as an index takes it. */
function lookedUpBy({ filter, alias }: Scan): string | null {
  const end = filter.indexOf(' = ANY (');
  if (end < 0) return null;
  let depth = 0;
  let start = end;
  while (start > 0) {
    const character = filter.charAt(start - 1);
    if (character === ')') depth += 1;
    if (character === '(') depth -= 1;
    if (depth < 0) break;
    start -= 1;
  }
  // EXPLAIN VERBOSE names columns with their table.
  const qualifiers = [`${alias}.`, `${quoteIdentifier(alias)}.`];
  const expression = qualifiers.reduce((text, qualifier) => text.replaceAll(qualifier, ''), filter.slice(start, end));
  return /^[\w.]+(?:\(.*\))?$/.test(expression) ? expression : `(${expression})`;
}
