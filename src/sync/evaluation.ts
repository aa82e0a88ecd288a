import type { Definition } from '../core/definition.js';
import { withClient, type Client } from '../db/connect.js';
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
import { evaluateStatement, evaluateSteps, NOW, type Evaluated, type Steps } from './some.js';
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
  /** Statements that were prepared on `client` so far. */
  prepared: number;
}

/** What is known of a definition and prepared for it. */
interface Plan {
  definition: Definition;
  textHash: string;
  inputs: Inputs;
  /** One database: the statement and its name; two: its steps. */
  way: { kind: 'one'; name: string; text: string } | { kind: 'two'; steps: Steps; name: string };
  madeAt: number;
  uses: number;
}

/** A prepared plan is made anew from time to time: tables grow, and so do what they are best read by. */
const PLAN_LASTS_MS = 60_000;
const PLAN_USES = 2_000;
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
  if (source === null)
    await client.query(
      `select set_config('search_path', concat_ws(', ', nullif(current_setting('search_path'), ''), 'pg_temp'), false)`,
    );
  await client.query(KEPT_DELTA_TABLE);
  return { client, source, context, plans: new Map(), prepared: 0 };
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
  if (known?.definition === definition && known.uses < PLAN_USES && performance.now() - known.madeAt < PLAN_LASTS_MS) {
    known.uses += 1;
    return known;
  }
  const { databases, config } = session.context;
  const described = await prepareSome(session.context, definition, momentsAt('now', definition));
  refuseTypeChange(definition, row, described.shape);
  const inputs: Inputs = {
    ...described,
    moments: { ...described.moments, now: `(${databases.same ? NOW : '$3::timestamptz'})` },
  };
  const comparison = comparisonOf(databases, row, inputs);
  if (known !== undefined) {
    const owner = known.way.kind === 'one' ? session.client : session.source;
    await owner?.query(`deallocate ${known.way.name}`).catch(() => undefined);
  }
  session.prepared += 1;
  const name = `some_${session.prepared}`;
  const plan: Plan = {
    definition,
    textHash: hashDefinition(definition, config),
    inputs,
    way: databases.same
      ? { kind: 'one', name, text: evaluateStatement(inputs, comparison) }
      : { kind: 'two', name, steps: evaluateSteps(inputs, comparison) },
    madeAt: performance.now(),
    uses: 1,
  };
  session.plans.set(definition.key, plan);
  return plan;
}

/** Compares the profiles; leaves what differs in `delta`. */
export async function evaluate(
  session: BatchSession,
  plan: Plan,
  called: readonly string[],
  now: string,
): Promise<Evaluated> {
  const { client, source } = session;
  const { way } = plan;
  if (way.kind === 'one') {
    await client.query('savepoint computing; set transaction read only');
    const { rows } = await client.query<Evaluated>({ name: way.name, text: way.text, values: [called, now] });
    await client.query('release savepoint computing');
    return rows[0] ?? { affected: [], wanted: [], windows: [] };
  }
  if (source === null) throw new Error('There is no session of the source.');
  const idsOf = async (on: Client, text: string, ids: readonly string[]): Promise<readonly string[]> =>
    (await on.query<{ id: string }>(text, [ids])).rows.map(({ id }) => id);
  const touched = await idsOf(client, way.steps.touched, called);
  let affected = [...new Set([...called, ...touched])];
  await source.query('begin transaction read only');
  try {
    const neighbours = way.steps.neighbours === null ? [] : await idsOf(source, way.steps.neighbours, called);
    affected = [...new Set([...affected, ...neighbours])];
    const before = await client.query<{ recipient: string }>(way.steps.before, [affected]);
    const { rows } = await source.query<Record<string, readonly string[]> & { windows: Evaluated['windows'] }>({
      name: way.name,
      text: way.steps.computed,
      values: [affected, before.rows.map(({ recipient }) => recipient), now],
    });
    const computed = rows[0];
    if (computed === undefined) throw new Error('Computing gave no row.');
    const {
      wanted = [],
      present = [],
      windows,
      recipient,
      profile_id,
      beside,
      value,
      unsendable,
      rivals,
      others,
    } = computed;
    await client.query(way.steps.compared, [
      recipient ?? [],
      profile_id ?? [],
      beside ?? [],
      value ?? [],
      unsendable ?? [],
      rivals ?? [],
      others ?? [],
      wanted,
      present,
    ]);
    return { affected, wanted, windows };
  } finally {
    await source.query('commit');
  }
}
