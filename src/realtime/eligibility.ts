import type { Config } from '../config/types.js';
import { listed } from '../config/wording.js';
import type { Change, Definition, SqlText } from '../core/definition.js';
import { bindMoments, findMoments, withoutEnd, type BoundText } from '../core/moments.js';
import { withClient, type Client, type Pool } from '../db/connect.js';
import { databaseFailure, isUnreachable } from '../db/failure.js';
import { momentsAt } from '../sync/comparison.js';
import type { Moments } from '../sync/shape.js';
import { tryAlone, type TrialLimits } from './alone.js';
import { followingOf, lineageOf, type Following } from './followed.js';
import { relationsInPlan, wholeScansOf, type PlannedRelation } from './scans.js';
import { sourcesOf, type Finding, type Sources } from './sources.js';

/**
 * Whether a definition may be evaluated profile by profile, as real time does it: whoever isn't evaluated must not have
 * changed. So its result for a profile may depend on followed tables alone, not on the clock, and on no rows but those
 * that lead to that profile. And it must be cheap. `profiles` says whom a change concerns, so it is judged likewise, once. The
 * first reason against it, in the order of what is cheaper to find, is one sentence without its subject.
 */
export type Verdict = { kind: 'possible' } | { kind: 'impossible'; because: string };

export interface Subject {
  profiles: Config['profiles'];
  /** The type of `profile_id` in `profiles`, as PostgreSQL writes it. */
  profileType: string;
  /** Null: `profiles` itself. */
  definition: Pick<Definition, 'text' | 'lookback' | 'changes'> | null;
  /** What its columns are, as described. */
  gives: { profileId: boolean; validUntil: boolean };
}

/** What others know: each null or empty where it isn't looked at. */
export interface Known {
  /** What is wrong with the triggers of tables, a sentence by `Change.table`. */
  triggers: ReadonlyMap<string, string>;
  /** The statement that evaluates a few profiles, with literals for parameters. */
  statement: string | null;
  /** The schema of the state, where it is in the source. */
  stateSchema: string | null;
}

/**
 * All verdicts, the first that is against it. `limits` are those of the last, which runs the text up to fifty times. What
 * the database refuses is a verdict, too; only its being out of reach is thrown.
 */
export async function judgeEligibility(
  source: Pool,
  subject: Subject,
  known: Known,
  limits: TrialLimits,
): Promise<Verdict> {
  return withClient(source, async (client) => {
    try {
      const because = await findReason(client, subject, known, limits);
      return because === null ? { kind: 'possible' } : { kind: 'impossible', because };
    } catch (error) {
      const failure = isUnreachable(error) ? null : databaseFailure(error);
      if (failure === null) throw error;
      return { kind: 'impossible', because: failure.sentence };
    }
  });
}

async function findReason(client: Client, subject: Subject, known: Known, limits: TrialLimits): Promise<string | null> {
  if (!subject.gives.profileId) return 'gives email directly: real time needs `profile_id`';
  const { rows } = await client.query<{ now: string }>('select clock_timestamp()::text as now');
  const moments = momentsAt(rows[0]?.now ?? '', subject.definition ?? { lookback: null });
  const text = bindMoments(textOf(subject).sql, moments);
  const sources = await sourcesOf(client, text.text);
  if (sources.kind === 'unreadable') return "is written in a way that can't be read here";
  const beyond = judgeClock(subject, text, sources);
  if (beyond !== null) return beyond;
  const following = await followingOf(client, sources.tables, changesOf(subject));
  const planned = await relationsInPlan(client, withoutEnd(text.text));
  return (
    (await judgeTables(client, subject, planned.all, sources, following)) ??
    judgeTriggers(subject, known) ??
    (known.statement === null ? null : await judgeScans(client, subject, known.statement, known.stateSchema)) ??
    judgeOverall(subject, text, sources) ??
    (await judgeByTrial(client, subject, { text, moments, sources, following }, limits)) ??
    (await judgeOnce(client, subject, planned.once))
  );
}

async function judgeByTrial(
  client: Client,
  { definition, profiles, profileType }: Subject,
  { text, moments, ...read }: { text: BoundText; moments: Moments; sources: Sources; following: Following },
  limits: TrialLimits,
): Promise<string | null> {
  const bound = { sql: text.text, profiles: bindMoments(profiles.text.sql, moments).text };
  const { changes } = definition ?? profiles;
  // What is cast to `character` is one character long.
  const castTo = profileType === 'character' ? 'bpchar' : profileType;
  const result = await tryAlone(client, { ...read, ...bound, profileType: castTo, changes }, limits);
  switch (result.kind) {
    case 'same':
      return null;
    case 'untried':
      return `can't be tried alone: ${result.because}`;
    case 'differs':
      return `one person's rows decide about another's (${result.differing} of ${result.tried} differ when evaluated alone): a LIMIT, a window over all, a sub-query over everyone, or a column in \`changes\` that isn't the profile's`;
  }
}

const textOf = ({ definition, profiles }: Subject): SqlText => definition?.text ?? profiles.text;
const changesOf = ({ definition, profiles }: Subject): readonly Change[] => [
  ...(definition?.changes ?? []),
  ...profiles.changes,
];

/** Such as `at line 4`. */
function whereIs({ at, within }: Pick<Finding, 'at' | 'within'>, subject: Subject, bound: BoundText): string {
  if (at === null) return `in ${within ?? 'it'}`;
  const offset = bound.originalOffset(Array.from(bound.text.slice(0, at)).length);
  return `at line ${textOf(subject).placeOf(offset).line}`;
}

/** Such as `now()` at line 4. */
function placed(finding: Finding, subject: Subject, bound: BoundText): string {
  return `\`${finding.written}\` ${whereIs(finding, subject, bound)}`;
}

function judgeClock(subject: Subject, bound: BoundText, { clock, chance, opaque }: Sources): string | null {
  const { definition, gives } = subject;
  const [moment] = findMoments(textOf(subject).sql);
  const [reading] = clock;
  const isBound = moment !== undefined && !gives.validUntil;
  if (reading !== undefined || isBound) {
    const what =
      reading !== undefined
        ? placed(reading, subject, bound)
        : `\`${moment?.name ?? ''}\` at line ${textOf(subject).placeOf(moment?.at ?? 0).line}`;
    if (definition === null) return `reads the clock (${what}), so that people change without a change of a table`;
    const instead = gives.validUntil ? 'write `:now` instead' : 'return `valid_until`';
    return `reads the clock (${what}), so that people enter and leave without a change: ${instead}, or leave it polled`;
  }
  const [first] = chance;
  if (first !== undefined) return `gives another result each time (${placed(first, subject, bound)})`;
  const [unknown] = opaque;
  return unknown === undefined ? null : `calls ${placed(unknown, subject, bound)}, which may read anything`;
}

/** The tables of the tree, and those of the plan, which also has what row level security reads. */
async function judgeTables(
  client: Client,
  subject: Subject,
  planned: readonly PlannedRelation[],
  sources: Sources,
  following: Following,
): Promise<string | null> {
  const ofPlan = await followingOf(client, planned, changesOf(subject));
  const lineage = await lineageOf(client, planned);
  const isOfTree = (row: PlannedRelation): boolean => sources.tables.some(({ oid }) => lineage(row).includes(oid));
  const lacking = [
    ...sources.tables.filter((table) => following(table).length === 0),
    ...planned.filter((row) => !isOfTree(row) && ofPlan(row).length === 0),
  ];
  const names = [...new Set(lacking.map(({ shown }) => shown))];
  if (names.length === 0) return null;
  return `reads ${listed(names, 'and')}, which \`${subject.definition === null ? 'profiles.changes' : 'changes'}\` ${names.length === 1 ? 'lacks' : 'lack'}`;
}

function judgeTriggers(subject: Subject, { triggers }: Known): string | null {
  return (
    changesOf(subject)
      .map(({ table }) => triggers.get(table))
      .find((sentence) => sentence !== undefined) ?? null
  );
}

/** The statement must read no large table whole. Names what to index: what the plan looks for, else the way's column. */
export async function judgeScans(
  client: Client,
  subject: Subject,
  statement: string,
  stateSchema: string | null,
): Promise<string | null> {
  const scans = await wholeScansOf(client, statement, stateSchema);
  if (scans.length === 0) return null;
  const following = await followingOf(client, scans, changesOf(subject));
  const indexes = scans.flatMap((scan) => {
    const columns = following(scan).flatMap(({ way }) => (way.kind === 'column' ? [way.column] : []));
    const expressions = scan.lookedUp.length > 0 ? scan.lookedUp : columns.slice(0, 1);
    return expressions.map((expression) => `CREATE INDEX ON ${scan.table} (${expression})`);
  });
  const tables = scans.map(({ table, scan }) => `\`${table}\` (${scan})`).join(' and ');
  const instead = indexes.length === 0 ? 'index what it is joined by' : `run ${listed(indexes, 'and')}`;
  return `evaluating one person reads all of ${tables}: ${instead}, or leave it polled`;
}

const OVERALL: Readonly<Record<string, string>> = {
  LIMIT: 'a LIMIT',
  OFFSET: 'an OFFSET',
  OVER: 'a window over all',
  WINDOW: 'a window over all',
};

/** What a trial need not find, and can't while a LIMIT is larger than the table. */
function judgeOverall(subject: Subject, bound: BoundText, { text, views }: Sources): string | null {
  const [own] = text.reads.overall;
  const view = views.find(({ part }) => part.reads.overall.length > 0);
  const found = own ?? view?.part.reads.overall[0];
  if (found === undefined) return null;
  const within = view === undefined ? null : `the view ${view.relation.shown}`;
  const where = whereIs(own === undefined ? { at: null, within } : { at: own.at, within: null }, subject, bound);
  return `one person's rows decide about another's: ${OVERALL[found.written] ?? found.written} ${where}`;
}

/** A trial tells nothing of a sub-query over everyone that turns out the same for each of the sample, as yet. */
async function judgeOnce(
  client: Client,
  subject: Subject,
  relations: readonly PlannedRelation[],
): Promise<string | null> {
  const following = await followingOf(client, relations, changesOf(subject));
  // Rows that lead to profiles by more than a column may lead to everyone, as settings do.
  const found = relations.find((relation) => following(relation).some(({ way }) => way.kind === 'column'));
  return found === undefined
    ? null
    : `one person's rows decide about another's: a sub-query reads \`${found.shown}\` for everyone`;
}
