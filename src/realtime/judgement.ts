import type { Config } from '../config/types.js';
import type { Definition } from '../core/definition.js';
import { bindMoments } from '../core/moments.js';
import { withClient, type Pool } from '../db/connect.js';
import { momentsAt, runLimits, type CompareContext } from '../sync/comparison.js';
import { prepareSome } from '../sync/evaluation.js';
import { describePeople } from '../sync/shape.js';
import { probeStatement } from '../sync/some.js';
import type { Inputs } from '../sync/statement.js';
import type { Inspection } from './catalogue.js';
import { judgeEligibility, type Verdict } from './eligibility.js';
import { FOREIGN } from './install.js';
import { tableName, watchName } from './trigger-sql.js';
import { followedDefinitions, type WatchPlan } from './watches.js';

/**
 * Whether changes of a definition can be followed, for whoever follows them and for whoever only asks. What is against it
 * is looked for in three places: the configuration, the source's catalogue, and the SQL itself, which takes running it.
 */
const TRIAL_MS = 20_000;
/** Describing takes milliseconds; more is a lock that somebody else holds. */
const PATIENCE_MS = 30_000;
const PROBED = 3;

/** Whether the configuration asks for a definition's changes to be followed. */
export function asksForIt({ enabled, cadence, changes }: Definition): boolean {
  return enabled && changes.length > 0 && (cadence.kind === 'realtime' || cadence.kind === 'hourly');
}

/** The type of `profile_id` in `profiles`, as PostgreSQL writes it. Throws an OperatorError where `profiles` is wrong. */
export async function readProfileType(source: Pool, { profiles }: Pick<Config, 'profiles'>): Promise<string> {
  return withClient(source, async (client) => {
    await client.query(`begin transaction read only; set local statement_timeout = ${PATIENCE_MS}`);
    const moments = momentsAt('now', { lookback: null });
    const { profileType } = await describePeople(client, profiles.text, profiles.key, moments);
    await client.query('commit');
    return profileType;
  });
}

/** What the configuration and what its tables are have against it, a sentence; null: nothing. */
export function reasonInConfig(config: Config, { key }: Definition, plan: WatchPlan): string | null {
  if (!followedDefinitions(config).some((each) => each.key === key))
    return '`profiles` has no `changes`, so nobody knows whose email or userId has changed.';
  return plan.refused.find(({ definitions }) => definitions.includes(key))?.problem.message ?? null;
}

/** What is wrong with capturing in the source, for any definition, a sentence; null: nothing. */
export function reasonInCapture({ capture }: Inspection): string | null {
  switch (capture.kind) {
    case 'missing':
      return 'Nothing captures changes in the source: run `personas-sync realtime install`.';
    case 'foreign':
      return FOREIGN;
    case 'denied':
      return `The role may not read what is captured: ${capture.grants.join('; ')}.`;
    case 'fine':
      return null;
  }
}

/** What the source's catalogue has against following a definition, a sentence; null: nothing. */
export function reasonInCatalogue({ key }: Definition, plan: WatchPlan, found: Inspection): string | null {
  const ofCapture = reasonInCapture(found);
  if (ofCapture !== null) return ofCapture;
  const names = new Set(tablesOf(plan, key));
  const wrong = found.tables.find(({ watched: { table }, because }) => because !== null && names.has(tableName(table)));
  return wrong === undefined ? null : `${tableName(wrong.watched.table)} ${wrong.because ?? ''}.`;
}

/** The names of the tables that a definition depends on. */
export function tablesOf(plan: WatchPlan, key: string): readonly string[] {
  return plan.tables
    .filter(({ watches }) =>
      watches.some(
        (watch) => plan.routes.get(watchName(watch))?.some(({ definitions }) => definitions.includes(key)) === true,
      ),
    )
    .map(({ table }) => tableName(table));
}

/**
 * What the SQL itself has against following definitions: `profiles` first, which is judged once, then the definition's own.
 * Either is run for some profiles. Gives a sentence; null: nothing. Throws an OperatorError where the SQL is wrong.
 */
export function createJudge(
  context: CompareContext,
  profileType: string,
): (definition: Definition) => Promise<string | null> {
  const { databases, config } = context;
  const { profiles } = config;
  const { workMemMb } = runLimits(context);
  const limits = { workMemMb, timeoutMs: TRIAL_MS };
  const stateSchema = databases.same ? databases.state.schema : null;
  const triggers = new Map<string, string>();
  let ofPeople: Promise<Verdict> | null = null;
  const judgePeople = (): Promise<Verdict> =>
    judgeEligibility(
      databases.source,
      { profiles, profileType, definition: null, gives: { profileId: true, validUntil: false } },
      { triggers, statement: null, stateSchema },
      limits,
    );

  return async (definition) => {
    const inputs = await prepareSome(context, definition, momentsAt(new Date().toISOString(), definition));
    ofPeople ??= judgePeople();
    const people = await ofPeople;
    if (people.kind === 'impossible') return `"${definition.key}" can't be followed: \`profiles\` ${people.because}.`;
    const gives = { profileId: inputs.shape.person.by === 'profile', validUntil: inputs.shape.validUntil !== null };
    const verdict = await judgeEligibility(
      databases.source,
      { profiles, profileType, definition, gives },
      { triggers, statement: await probeOf(databases.source, inputs), stateSchema },
      limits,
    );
    return verdict.kind === 'possible' ? null : `"${definition.key}" ${verdict.because}.`;
  };
}

/** The statement by which some profiles are evaluated; null: there are none to try it with. */
async function probeOf(source: Pool, inputs: Inputs): Promise<string | null> {
  const { people, moments } = inputs;
  const { rows } = await source.query<{ id: string }>(
    `select q.profile_id::text as id from (${bindMoments(people.text.sql, moments).text}\n) as q limit ${PROBED}`,
  );
  if (rows.length === 0) return null;
  return probeStatement(
    inputs,
    rows.map(({ id }) => id),
  );
}
