import type { Change, Definition } from '../core/definition.js';
import { withClient } from '../db/connect.js';
import { OperatorError, type Problem } from '../lib/errors.js';
import { inspect, type Inspection } from '../realtime/catalogue.js';
import { unfollowedOnTheWay } from '../realtime/followed.js';
import {
  asksForIt,
  createJudge,
  readProfileType,
  reasonInCapture,
  reasonInCatalogue,
  reasonInConfig,
} from '../realtime/judgement.js';
import { readWatchPlan } from '../realtime/tables.js';
import { tableName } from '../realtime/trigger-sql.js';
import type { Refusal, WatchPlan } from '../realtime/watches.js';
import { readInstallation } from './known.js';
import type { Opened } from './open.js';

/**
 * What `check` says of real time: for each definition that asks for it whether its changes can be followed, or why they
 * can't, as the daemon will find; and what is wrong with the triggers. Being polled instead is a mistake only where a
 * person has written `schedule: realtime`, or names in `changes` what isn't there.
 */
export interface RealtimeCheck {
  /** What is wrong with capturing, a sentence each; null: nothing is to be captured. */
  captured: readonly string[] | null;
  /** What is wrong with `profiles.changes`. */
  problems: readonly Problem[];
  /** Null: the definition doesn't ask for it. */
  judge: (definition: Definition) => Promise<RealtimeFinding | null>;
}

export interface RealtimeFinding {
  possible: boolean;
  /** Why it isn't possible, a sentence. */
  because: string | null;
  problems: readonly Problem[];
}

/** Reads what the source has. `profiles` must have been found right. */
export async function createRealtimeCheck(opened: Opened): Promise<RealtimeCheck> {
  const { config, databases, hasState } = opened;
  const { source } = databases;
  if (!config.definitions.some(asksForIt)) {
    return { captured: null, problems: [], judge: () => Promise.resolve(null) };
  }
  const profileType = await readProfileType(source, config);
  const plan = await readWatchPlan(source, config, profileType);
  const found = await inspect(source, plan, hasState ? await readInstallation(opened) : '');
  const findReason = createJudge(opened, profileType);
  const ofProfiles = config.profiles.changes;

  /** Before the triggers: they are in vain where the SQL can't be followed. */
  const reasonAgainst = async (definition: Definition): Promise<string | null> =>
    reasonInConfig(config, definition, plan) ??
    (await findReason(definition)) ??
    reasonInCatalogue(definition, plan, found);

  return {
    captured: plan.tables.length === 0 ? null : describeCapture(found),
    problems: [...mistakesIn(plan, 'profiles'), ...(await findUnfollowed(opened, ofProfiles, ofProfiles))],
    judge: async (definition) => {
      if (!asksForIt(definition)) return null;
      const { changes, cadence, place } = definition;
      const because = await sentenceOf(() => reasonAgainst(definition));
      const isAsked = cadence.kind === 'realtime' && cadence.asked;
      const problems = await findUnfollowed(opened, changes, [...changes, ...ofProfiles]);
      const against =
        because !== null && isAsked
          ? [refusalOf(definition, plan, because, place)]
          : mistakesIn(plan, 'definition', definition.key);
      return { possible: because === null, because, problems: [...against, ...problems] };
    },
  };
}

/** What is written in `changes` and can't be meant, as a name that the source doesn't have. */
function mistakesIn({ refused }: WatchPlan, of: Refusal['of'], key?: string): readonly Problem[] {
  return refused
    .filter((each) => each.isMistake && each.of === of && (key === undefined || each.definitions.includes(key)))
    .map(({ problem }) => problem);
}

/** What an OperatorError says, which is one more reason. */
async function sentenceOf(find: () => Promise<string | null>): Promise<string | null> {
  try {
    return await find();
  } catch (error) {
    if (error instanceof OperatorError) return error.message;
    throw error;
  }
}

function refusalOf({ key }: Definition, plan: WatchPlan, because: string, place: Problem['place']): Problem {
  const refused = plan.refused.find(({ definitions }) => definitions.includes(key));
  const at = refused?.problem.place ?? place;
  return {
    ...(at === undefined ? {} : { place: at }),
    message: `"${key}" asks for \`schedule: realtime\` and would be polled. ${because}`,
  };
}

/** The state of the triggers, table by table where there are any at all. */
function describeCapture(found: Inspection): readonly string[] {
  const whole = reasonInCapture(found);
  if (whole !== null) return [whole];
  return found.tables.flatMap(({ watched: { table }, because }) =>
    because === null ? [] : [`${tableName(table)} ${because}.`],
  );
}

/** `all` are the changes that count, `changes` among them. */
async function findUnfollowed(
  { databases }: Opened,
  changes: readonly Change[],
  all: readonly Change[],
): Promise<readonly Problem[]> {
  const missing = await withClient(databases.source, (client) => unfollowedOnTheWay(client, changes, all));
  return missing.map(({ change, table }) => ({
    place: change.way.kind === 'sql' ? change.way.text.placeOf(0) : change.place,
    message: `The SQL of \`changes.${change.written}\` reads \`${table}\`, which is not in \`changes\` itself: a row there may move while this one is looked up. Add it, such as \`${table}: customer_id\`.`,
  }));
}
