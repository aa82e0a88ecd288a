import { quoteIdentifier, withClient, type Pool } from '../db/connect.js';
import { databaseFailure } from '../db/failure.js';
import { OperatorError, UnavailableError, type Problem } from '../lib/errors.js';
import { until } from '../lib/until.js';
import { inspect, type Inspection, type Node, type TableState } from './catalogue.js';
import {
  CAPTURE_SCHEMA,
  createFunction,
  createSchema,
  createTriggers,
  dropEmptySchema,
  dropFunction,
  dropSchema,
  nameOf,
  tableName,
  transaction,
  withShortLocks,
} from './trigger-sql.js';
import type { WatchPlan } from './watches.js';

/**
 * Puts the triggers into the source and takes them out again. A trigger is made under a lock that lets nobody write, and
 * whoever waits for that lock keeps later writers waiting behind it. So each table is a transaction of its own, waits for
 * half a second at most, lets the writers through and tries again. What is there already is left alone; whatever breaks
 * off is completed by the next call. Two at once wait for each other.
 */
export interface InstallOptions {
  /** The id of the state that consumes what is captured. */
  installation: string;
  /** Without: for a source with prepared transactions, which may not notify. */
  notify: boolean;
  /** Is told of each thing that was done. */
  onDone: (what: string) => void;
  signal: AbortSignal;
  /** How long one table is tried for. */
  patienceMs?: number;
}

const PATIENCE_MS = 60_000;
const FIRST_PAUSE_MS = 500;
const LONGEST_PAUSE_MS = 4000;
/** Tells the lock of an installation apart from others of the same database. */
const LOCK = '(1885696627, -1)';
/** SQLSTATE lock_not_available and deadlock_detected: somebody else has the lock. */
const IS_TAKEN = new Set(['55P03', '40P01']);

/**
 * Statements in one transaction; false, with nothing done, where somebody else holds a lock that they need for longer than
 * half a second.
 */
export async function attempt(source: Pool, statements: readonly string[]): Promise<boolean> {
  try {
    await withClient(source, async (client) => {
      await client.query('begin');
      await client.query(withShortLocks());
      await client.query(`select pg_advisory_xact_lock${LOCK}`);
      for (const statement of statements) await client.query(statement);
      await client.query('commit');
    });
    return true;
  } catch (error) {
    if (IS_TAKEN.has(databaseFailure(error)?.sqlstate ?? '')) return false;
    throw error;
  }
}

/** The same, again until it gets its locks. */
async function perform(
  source: Pool,
  subject: string,
  statements: readonly string[],
  { signal, patienceMs = PATIENCE_MS }: Pick<InstallOptions, 'signal' | 'patienceMs'>,
): Promise<void> {
  const ends = performance.now() + patienceMs;
  for (let pauseMs = FIRST_PAUSE_MS; ; pauseMs = Math.min(pauseMs * 2, LONGEST_PAUSE_MS)) {
    if (await attempt(source, statements)) return;
    if (performance.now() + pauseMs > ends) {
      throw new UnavailableError(`${subject} is locked by others; run it again.`);
    }
    await until(pauseMs, signal);
    if (signal.aborted) throw new UnavailableError('Stopped; what was begun is completed by running it again.');
  }
}

const lacking = (node: Node): boolean => node.state !== 'fine';

const isRight = (table: TableState, notify: boolean): boolean => table.function === 'fine' && table.notifies === notify;

/** What the role lacks for what `install` has to do, all of it, as the GRANT that gives it. */
export function findLacking(
  { role, database, capture, mayMakeSchema, tables }: Inspection,
  { notify }: Pick<InstallOptions, 'notify'>,
): readonly Problem[] {
  const to = `TO ${quoteIdentifier(role)}`;
  const ofTables = tables.flatMap((table) => {
    const nodes = table.nodes.filter(lacking);
    if (isRight(table, notify) ? nodes.length > 0 && !table.mayCall : !table.mayMake) {
      return [
        `${tableName(table.watched.table)}: only the role that \`${CAPTURE_SCHEMA}\` belongs to may make its function and triggers; run what \`personas-sync realtime sql\` prints as that one.`,
      ];
    }
    return nodes
      .filter(({ mayTrigger }) => !mayTrigger)
      .map((node) => `The role may make no triggers on ${tableName(node)}: GRANT TRIGGER ON ${tableName(node)} ${to}.`);
  });
  return [
    ...(capture.kind === 'missing' && !mayMakeSchema
      ? [
          `The role may not make the schema \`${CAPTURE_SCHEMA}\`: GRANT CREATE ON DATABASE ${quoteIdentifier(database)} ${to}, or run what \`personas-sync realtime sql\` prints as a role that may.`,
        ]
      : []),
    ...(capture.kind === 'denied' ? [`The role may not read what is captured: ${capture.grants.join('; ')}.`] : []),
    ...new Set(ofTables),
  ].map((message) => ({ message }));
}

export const FOREIGN =
  'The source is captured for another personas-sync (its state has another id). Uninstall there first, or give this one a source of its own.';

/**
 * Makes what is missing or out of date, and drops what no watched table has any more. Throws an OperatorError where the
 * role lacks something, before anything is made, or where the source is captured for another state; an UnavailableError
 * where a table stays locked.
 */
export async function install(source: Pool, plan: WatchPlan, options: InstallOptions): Promise<void> {
  const { installation, notify, onDone } = options;
  const found = await inspect(source, plan, installation);
  if (found.capture.kind === 'foreign') throw new OperatorError(FOREIGN);
  const problems = findLacking(found, options);
  if (problems.length > 0) throw new OperatorError(problems);
  if (found.capture.kind === 'missing' && plan.tables.length > 0) {
    await perform(
      source,
      `The schema \`${CAPTURE_SCHEMA}\``,
      createSchema({ installation, role: found.role }),
      options,
    );
    onDone(`schema ${CAPTURE_SCHEMA}`);
  }
  for (const table of found.tables) await completeTable(source, table, notify, options);
  for (const name of found.stale) {
    await perform(source, `A table with triggers of ${CAPTURE_SCHEMA}.${name}`, [dropFunction(name)], options);
    onDone(`dropped ${CAPTURE_SCHEMA}.${name} and its triggers: nothing is watched by it any more`);
  }
}

async function completeTable(source: Pool, state: TableState, notify: boolean, options: InstallOptions): Promise<void> {
  const { table, watches } = state.watched;
  if (!isRight(state, notify)) {
    await perform(source, `The function of ${tableName(table)}`, createFunction(table, watches, { notify }), options);
    options.onDone(`function of ${tableName(table)}`);
  }
  for (const node of state.nodes.filter(lacking)) {
    await perform(source, `The table ${tableName(node)}`, createTriggers(table, node), options);
    options.onDone(`triggers on ${tableName(node)}`);
  }
}

const INSTALLED = `
  select array_agg(distinct pg_get_userbyid(owner)::text) as owners, bool_and(pg_has_role(owner, 'USAGE')) as own,
    coalesce(array_agg(name order by name) filter (where name is not null), '{}') as names
  from (
    select n.nspowner as owner, null::text as name from pg_namespace as n where n.nspname = '${CAPTURE_SCHEMA}'
    union all select p.proowner, p.proname::text from pg_namespace as n join pg_proc as p on p.pronamespace = n.oid
      where n.nspname = '${CAPTURE_SCHEMA}'
  ) as there having count(*) > 0`;

/**
 * Takes everything out of the source, whoever it is captured for; returns whether there was anything. A function that is
 * dropped takes its triggers with it, for which the tables needn't be one's own. Throws an OperatorError, before anything
 * is dropped, where some of it belongs to another role.
 */
export async function uninstall(
  source: Pool,
  options: Pick<InstallOptions, 'onDone' | 'signal' | 'patienceMs'>,
): Promise<boolean> {
  const { rows } = await source.query<{ owners: readonly string[]; own: boolean; names: readonly string[] }>(INSTALLED);
  const [there] = rows;
  if (there === undefined) return false;
  if (!there.own) throw new OperatorError(explainOwners(there));
  for (const name of there.names) {
    await perform(source, `A table with triggers of ${CAPTURE_SCHEMA}.${name}`, [dropFunction(name)], options);
    options.onDone(`dropped ${CAPTURE_SCHEMA}.${name} and its triggers`);
  }
  await perform(source, `The schema \`${CAPTURE_SCHEMA}\``, [dropSchema()], options);
  options.onDone(`dropped the schema ${CAPTURE_SCHEMA}`);
  return true;
}

/** A table at a time, as `uninstall` does it: dropping the schema with what is in it would lock all tables together. */
function explainOwners({ owners, names }: { owners: readonly string[]; names: readonly string[] }): string {
  const drops = [...names.map((name) => [dropFunction(name)]), dropEmptySchema()];
  const script = drops.map((statements) => transaction([withShortLocks(), ...statements])).join('');
  return `What is installed belongs to ${owners.map(nameOf).join(', ')}: run this as a role that may drop it. A table that others hold makes it give up after half a second; then run it again.
${script.trimEnd()}`;
}

const HEADER = `-- What captures changes for personas-sync, in the schema ${CAPTURE_SCHEMA}. It may be run again at any time.
-- A statement that gives up after half a second has met somebody who holds the table: run it again.
-- Before a watched column is renamed or dropped: personas-sync realtime uninstall. Its table couldn't be written to
-- until the functions are made anew.
`;

/** All that `install` makes, whatever is there already, as a script for whoever may run it. */
export function installScript(found: Inspection, options: { installation: string; notify: boolean }): string {
  const tables = found.tables.flatMap(({ watched: { table, watches }, nodes }) => [
    transaction(createFunction(table, watches, options)),
    ...nodes.map((node) => transaction([withShortLocks(), ...createTriggers(table, node)])),
  ]);
  const schema = transaction(createSchema({ installation: options.installation, role: found.role }));
  const stale = found.stale.map((name) => transaction([withShortLocks(), dropFunction(name)]));
  return [HEADER, schema, ...tables, ...stale].join('\n');
}
