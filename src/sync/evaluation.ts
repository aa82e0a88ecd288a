import type { Definition } from '../core/definition.js';
import { withClient, type Client } from '../db/connect.js';
import { STANDS_STILL_MS } from '../db/locks.js';
import { repeat, type Repeated } from '../db/repeated.js';
import { hashDefinition } from './close.js';
import {
  comparisonOf,
  fieldsOf,
  momentsAt,
  prepareInputs,
  readDefinition,
  refuseTypeChange,
  type CompareContext,
} from './comparison.js';
import { KEPT_DELTA_TABLE } from './delta.js';
import {
  dueOf,
  dueParameters,
  dueQuery,
  lockedQuery,
  lockStatements,
  reasonToWait,
  type Due,
  type DueForm,
  type DueRow,
  type Locked,
} from './locked.js';
import { isUserIdProfileId } from './people.js';
import {
  COMPUTED_COLUMNS,
  evaluateStatement,
  evaluateSteps,
  NOW,
  type Differing,
  type Evaluated,
  type EvaluatedRow,
  type Steps,
} from './some.js';
import type { Moments } from './shape.js';
import type { Inputs } from './statement.js';

/**
 * Comparing some profiles again and again on a connection that is kept for it: what is described once, what is prepared,
 * and the two ways there are, one statement where source and state are one database, or its steps in turns where they are
 * two.
 */

/** A connection that evaluates changes for as long as it lives, with what it keeps for that. */
export interface BatchSession {
  /** Holds the lock and `delta`; sees the source too where the databases are one. */
  client: Client;
  /** The source's, where it is another database. */
  source: Client | null;
  context: CompareContext;
  plans: Map<string, Plan>;
  /** The statements of `client`, and of `source`. */
  run: Repeated;
  runSource: Repeated | null;
  plannedAt: number;
  /** Rows that `delta` has had since it was last truncated: what was deleted of it keeps its place. */
  deltaRows: number;
}

/** What is known of a definition and prepared for it. */
export interface Plan {
  definition: Definition;
  textHash: string;
  inputs: Inputs;
  windowed: boolean;
  /** One database: the statement; two: its steps. Each for what is due, or for some of it `only`. */
  way: (only: boolean) => { kind: 'one'; text: string } | { kind: 'two'; read: string; steps: Steps };
  madeAt: number;
  /** The definition's row has what this plan leaves there, but for members and fields. */
  isLeft: boolean;
}

/** Plans are made anew from time to time: tables grow, and so do what they are best read by. */
const PLAN_LASTS_MS = 60_000;
const STATEMENT_TIMEOUT_MS = 10_000;
/** So many deleted rows of `delta` are read over before it is truncated, which has everything that reads it planned anew. */
const DELTA_ROWS = 2_000;

/**
 * How what evaluates some profiles is planned: a page anywhere is as near as the next one, and no room is made for all the
 * groups that a table of a million rows is thought to have, which would cost more than the rest.
 */
export const PLANNED_FOR_SOME = {
  set: 'set random_page_cost = 1.1; set enable_hashagg = off',
  reset: 'reset random_page_cost; reset enable_hashagg',
};

/** Makes a connection ready for batches: plans are kept, and so is `delta`, which is empty between them. */
export async function openBatchSession(
  context: CompareContext,
  client: Client,
  source: Client | null,
): Promise<BatchSession> {
  for (const each of source === null ? [client] : [client, source]) {
    await each.query(
      // Planning ten joins costs more than running them for some profiles.
      `set plan_cache_mode = force_generic_plan; ${PLANNED_FOR_SOME.set}; set statement_timeout = ${STATEMENT_TIMEOUT_MS}`,
    );
  }
  await client.query(`set synchronous_commit = off; set idle_in_transaction_session_timeout = ${STANDS_STILL_MS}`);
  // Temporary tables come last: a person's SQL may read a table of its own that is named as one of them.
  await client.query(
    `select set_config('search_path', concat_ws(', ', nullif(current_setting('search_path'), ''), $1::text), false)`,
    [source === null ? 'pg_temp' : null],
  );
  await client.query(KEPT_DELTA_TABLE);
  return {
    client,
    source,
    context,
    plans: new Map(),
    run: repeat(client),
    runSource: source === null ? null : repeat(source),
    plannedAt: performance.now(),
    deltaRows: 0,
  };
}

/** What is known of a definition before some of its profiles can be compared. */
export async function prepareSome(context: CompareContext, definition: Definition, moments: Moments): Promise<Inputs> {
  const inputs = await prepareInputs(context, definition, moments);
  const userIdIsProfileId = await withClient(context.databases.source, (client) =>
    isUserIdProfileId(client, inputs.people, inputs.moments),
  );
  return { ...inputs, people: { ...inputs.people, userIdIsProfileId } };
}

export async function planOf(session: BatchSession, definition: Definition): Promise<Plan> {
  const known = session.plans.get(definition.key);
  if (known?.definition === definition && performance.now() - known.madeAt < PLAN_LASTS_MS) return known;
  const { databases, config } = session.context;
  const row = await readDefinition(databases, definition.key);
  const described = await prepareSome(session.context, definition, momentsAt('now', definition));
  refuseTypeChange(definition, row, described.shape);
  const inputs: Inputs = {
    ...described,
    // Two databases have two clocks, and the source's own transaction begins under the lock as well.
    moments: { ...described.moments, now: databases.same ? NOW : '(now())' },
  };
  const comparison = comparisonOf(databases, row, inputs);
  if (performance.now() - session.plannedAt >= PLAN_LASTS_MS) {
    session.plannedAt = performance.now();
    await Promise.all([session.run.query('discard plans'), session.runSource?.query('discard plans')]);
  }
  const windowed = inputs.shape.validUntil !== null;
  const textHash = hashDefinition(definition, config);
  const way = (only: boolean): ReturnType<Plan['way']> => {
    const form: DueForm = { schema: databases.state.schema, definitionId: row.id, textHash, windowed, only };
    const fields = fieldsOf(inputs, row);
    if (databases.same) return { kind: 'one', text: evaluateStatement(inputs, comparison, form, fields) };
    const due = dueQuery(form);
    const read = `with ${due.ctes} select ${due.columns}, (${lockedQuery(form)}) as locked`;
    return { kind: 'two', read, steps: evaluateSteps(inputs, comparison, fields) };
  };
  const all = way(false);
  const plan: Plan = {
    definition,
    textHash,
    inputs,
    windowed,
    way: (only) => (only ? way(true) : all),
    madeAt: performance.now(),
    isLeft: false,
  };
  session.plans.set(definition.key, plan);
  return plan;
}

/** What a batch found under the definition's lock. */
export interface Found {
  locked: Locked;
  due: Due;
  evaluated: Evaluated;
  /** What is in `delta` now. */
  differing: Differing;
}

export interface Asked {
  /** How many due rows are taken at once. */
  limit: number;
  /** Only these due rows. */
  only?: readonly number[] | undefined;
}

const NOTHING: Pick<Found, 'evaluated' | 'differing'> = {
  evaluated: { affected: [], wanted: [], windows: [] },
  differing: { ops: '', twice: false, owners: [], counts: '{}' },
};

/** Begins a transaction, waits for the definition's lock, and evaluates what is due; leaves what differs in `delta`. */
export async function begin(session: BatchSession, plan: Plan, definitionId: number, asked: Asked): Promise<Found> {
  const { run } = session;
  if (session.deltaRows > DELTA_ROWS) {
    await run.query('truncate pg_temp.delta');
    session.deltaRows = 0;
  }
  const way = plan.way(asked.only !== undefined);
  const texts = lockStatements(definitionId);
  if (way.kind === 'one') {
    const reading = [...texts, 'savepoint computing', 'set transaction read only'].map((text) => run.query(text));
    const [, found] = await Promise.all([Promise.all(reading), evaluateDue(run, way.text, asked, [])]);
    return found;
  }
  const locking = texts.map((text) => run.query(text));
  const reading = run.query<DueRow & { locked: string }>(way.read, dueParameters(asked.limit, asked.only));
  const [, { rows }] = await Promise.all([Promise.all(locking), reading]);
  const row = requireRow(rows);
  const read = { locked: JSON.parse(row.locked) as Locked, due: dueOf(row, asked.limit) };
  const isNothing = read.due.profiles.length === 0 || reasonToWait(read.locked, plan.textHash) !== null;
  return {
    ...read,
    ...(isNothing ? NOTHING : await evaluateInSteps(session, way.steps, read.due.profiles)),
  };
}

/** Evaluates the same again, and `strangers` with it. */
export async function beginAgain(
  session: BatchSession,
  plan: Plan,
  { locked, due }: Found,
  strangers: readonly string[],
  asked: Asked,
): Promise<Found> {
  const { run } = session;
  const way = plan.way(asked.only !== undefined);
  const emptying = run.query('delete from pg_temp.delta');
  if (way.kind === 'one') {
    const [, found] = await Promise.all([emptying, evaluateDue(run, way.text, asked, strangers)]);
    return found;
  }
  const called = [...due.profiles, ...strangers];
  const [, evaluated] = await Promise.all([emptying, evaluateInSteps(session, way.steps, called)]);
  return { locked, due, ...evaluated };
}

/** What has a transaction that computes become one that may write. */
export const endComputing = (plan: Plan): readonly string[] =>
  plan.way(false).kind === 'one' ? ['release savepoint computing'] : [];

async function evaluateDue(
  run: Repeated,
  text: string,
  { limit, only }: Asked,
  strangers: readonly string[],
): Promise<Found> {
  const { rows } = await run.query<EvaluatedRow>(text, [...dueParameters(limit, only), strangers]);
  const row = requireRow(rows);
  const { affected, wanted, windows, ops, twice, owners, counts } = row;
  return {
    locked: JSON.parse(row.locked) as Locked,
    due: dueOf(row, limit),
    evaluated: { affected, wanted, windows },
    differing: { ops, twice, owners, counts },
  };
}

async function evaluateInSteps(
  { run, runSource }: BatchSession,
  steps: Steps,
  called: readonly string[],
): Promise<Pick<Found, 'evaluated' | 'differing'>> {
  if (runSource === null) throw new Error('There is no session of the source.');
  const idsOf = async (on: Repeated, text: string, ids: readonly string[]): Promise<readonly string[]> =>
    (await on.query<{ id: string }>(text, [ids])).rows.map(({ id }) => id);
  const touched = await idsOf(run, steps.touched, called);
  let affected = [...new Set([...called, ...touched])];
  await runSource.query('begin transaction read only');
  try {
    const neighbours = steps.neighbours === null ? [] : await idsOf(runSource, steps.neighbours, called);
    affected = [...new Set([...affected, ...neighbours])];
    const before = await run.query<{ recipient: string }>(steps.before, [affected]);
    const { rows } = await runSource.query<Record<string, readonly string[]> & { windows: Evaluated['windows'] }>(
      steps.computed,
      [affected, before.rows.map(({ recipient }) => recipient)],
    );
    const computed = requireRow(rows);
    const { wanted = [], present = [], windows } = computed;
    const columns = COMPUTED_COLUMNS.map((column) => computed[column] ?? []);
    const compared = await run.query<Differing>(steps.compared, [...columns, wanted, present]);
    return { evaluated: { affected, wanted, windows }, differing: requireRow(compared.rows) };
  } finally {
    await runSource.query('commit');
  }
}

function requireRow<R>([row]: readonly R[]): R {
  if (row === undefined) throw new Error('A statement that gives a row gave none: the definition has gone.');
  return row;
}
