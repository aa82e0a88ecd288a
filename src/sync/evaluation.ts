import type { Definition } from '../core/definition.js';
import { withClient, type Client } from '../db/connect.js';
import { repeat, type Repeated } from '../db/repeated.js';
import { hashDefinition } from './close.js';
import {
  comparisonOf,
  momentsAt,
  prepareInputs,
  refuseTypeChange,
  type CompareContext,
  type DefinitionRow,
} from './comparison.js';
import { KEPT_DELTA_TABLE } from './delta.js';
import { isUserIdProfileId } from './people.js';
import { COMPUTED_COLUMNS, evaluateStatement, evaluateSteps, NOW, type Evaluated, type Steps } from './some.js';
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
  /** Where bare names are looked for before they are those of the state, as SQL. */
  path: string;
  plannedAt: number;
}

/** What is known of a definition and prepared for it. */
export interface Plan {
  definition: Definition;
  textHash: string;
  inputs: Inputs;
  /** One database: the statement; two: its steps. */
  way: { kind: 'one'; text: string } | { kind: 'two'; steps: Steps };
  madeAt: number;
  /** The definition's row has what this plan leaves there, but for members and fields. */
  isLeft: boolean;
}

/** Plans are made anew from time to time: tables grow, and so do what they are best read by. */
const PLAN_LASTS_MS = 60_000;
const STATEMENT_TIMEOUT_MS = 10_000;

/** Makes a connection ready for batches: plans are kept, and `delta` is emptied at each commit instead of made anew. */
export async function openBatchSession(
  context: CompareContext,
  client: Client,
  source: Client | null,
): Promise<BatchSession> {
  for (const each of source === null ? [client] : [client, source]) {
    await each.query(
      // Planning ten joins costs more than running them for some profiles.
      `set plan_cache_mode = force_generic_plan; set random_page_cost = 1.1; set statement_timeout = ${STATEMENT_TIMEOUT_MS}`,
    );
  }
  // Temporary tables come last: a person's SQL may read a table of its own that is named as one of them.
  const { rows } = await client.query<{ path: string }>(
    `select set_config('search_path', concat_ws(', ', nullif(current_setting('search_path'), ''), $1::text), false) as path`,
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
    path: rows[0]?.path ?? '',
    plannedAt: performance.now(),
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

export async function planOf(session: BatchSession, definition: Definition, row: DefinitionRow): Promise<Plan> {
  const known = session.plans.get(definition.key);
  if (known?.definition === definition && performance.now() - known.madeAt < PLAN_LASTS_MS) return known;
  const { databases, config } = session.context;
  const described = await prepareSome(session.context, definition, momentsAt('now', definition));
  refuseTypeChange(definition, row, described.shape);
  const inputs: Inputs = {
    ...described,
    moments: { ...described.moments, now: `(${databases.same ? NOW : '$3::timestamptz'})` },
  };
  const comparison = comparisonOf(databases, row, inputs);
  if (performance.now() - session.plannedAt >= PLAN_LASTS_MS) {
    session.plannedAt = performance.now();
    await Promise.all([session.run.all('discard plans'), session.runSource?.all('discard plans')]);
  }
  const plan: Plan = {
    definition,
    textHash: hashDefinition(definition, config),
    inputs,
    way: databases.same
      ? { kind: 'one', text: evaluateStatement(inputs, comparison) }
      : { kind: 'two', steps: evaluateSteps(inputs, comparison) },
    madeAt: performance.now(),
    isLeft: false,
  };
  session.plans.set(definition.key, plan);
  return plan;
}

/** Compares the profiles; leaves what differs in `delta`. `after` is what is asked of that, and isn't waited for. */
export async function evaluate<T>(
  session: BatchSession,
  plan: Plan,
  called: readonly string[],
  now: string,
  after: () => Promise<T>,
): Promise<[Evaluated, T]> {
  const { run, runSource } = session;
  const { way } = plan;
  if (way.kind === 'one') {
    const [, { rows }, , found] = await Promise.all([
      run.all('savepoint computing; set transaction read only'),
      run.query<Evaluated>(way.text, [called, now]),
      run.all('release savepoint computing'),
      after(),
    ]);
    return [rows[0] ?? { affected: [], wanted: [], windows: [] }, found];
  }
  if (runSource === null) throw new Error('There is no session of the source.');
  const idsOf = async (on: Repeated, text: string, ids: readonly string[]): Promise<readonly string[]> =>
    (await on.query<{ id: string }>(text, [ids])).rows.map(({ id }) => id);
  const touched = await idsOf(run, way.steps.touched, called);
  let affected = [...new Set([...called, ...touched])];
  await runSource.all('begin transaction read only');
  try {
    const neighbours = way.steps.neighbours === null ? [] : await idsOf(runSource, way.steps.neighbours, called);
    affected = [...new Set([...affected, ...neighbours])];
    const before = await run.query<{ recipient: string }>(way.steps.before, [affected]);
    const { rows } = await runSource.query<Record<string, readonly string[]> & { windows: Evaluated['windows'] }>(
      way.steps.computed,
      [affected, before.rows.map(({ recipient }) => recipient), now],
    );
    const computed = rows[0];
    if (computed === undefined) throw new Error('Computing gave no row.');
    const { wanted = [], present = [], windows } = computed;
    const columns = COMPUTED_COLUMNS.map((column) => computed[column] ?? []);
    const [, found] = await Promise.all([run.query(way.steps.compared, [...columns, wanted, present]), after()]);
    return [{ affected, wanted, windows }, found];
  } finally {
    await runSource.all('commit');
  }
}
