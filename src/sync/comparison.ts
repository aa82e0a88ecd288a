import type { Config } from '../config/types.js';
import type { Definition } from '../core/definition.js';
import type { FieldType } from '../core/field.js';
import { bindMoments } from '../core/moments.js';
import { quoteLiteral, type Client, type Runner } from '../db/connect.js';
import { describeStatement } from '../db/describe.js';
import { databaseFailure } from '../db/failure.js';
import { OperatorError } from '../lib/errors.js';
import {
  beginRun,
  enterState,
  fillDelta,
  findVanished,
  hasProfileTwice,
  withRunSession,
  type Databases,
  type Limits,
} from './compute.js';
import { countDelta, isEachOnce, leaveOutForgotten, type RunCounts } from './delta.js';
import { explainRunError } from './privileges.js';
import { describeDefinition, describePeople, explainSqlError, type Moments, type Shape } from './shape.js';
import { computedQuery, type Comparison, type Inputs } from './statement.js';
import { valueKey } from './value.js';

/**
 * What a definition's result would change: described, computed and compared, with nothing written but the temporary
 * `delta`. A run goes on from here to apply it, `plan` to look at it.
 */
export interface CompareContext {
  databases: Databases;
  config: Config;
  /** Ends what is under way. */
  signal?: AbortSignal;
}

/** The row of a definition that a run needs. */
export interface DefinitionRow {
  id: number;
  computationId: string;
  members: number;
  first: boolean;
  /** Whether changes are followed, so that a run in full isn't the only one who writes. */
  live: boolean;
  /** What has changed can't be evaluated singly at present. */
  stuck: boolean;
  /** Nothing asks for a run in full: neither somebody, nor that the last one was long ago. */
  settled: boolean;
  textHash: string | null;
  fields: Readonly<Record<string, string>>;
}

/** A definition that was never registered: nobody has it, and the state may not have been made yet. */
export const UNREGISTERED: DefinitionRow = {
  id: -1,
  computationId: 'not_registered_yet',
  members: 0,
  first: true,
  live: false,
  stuck: false,
  settled: false,
  textHash: null,
  fields: {},
};

const CONFLICT_SHARE = 0.01;

export function runLimits({ config: { runs }, signal }: CompareContext): Limits {
  return { workMemMb: Math.max(4, Math.floor(runs.memoryMb / runs.parallel)), timeoutMs: runs.timeoutMs, signal };
}

/** What stands for `:now` and `:lookback`; `now` is a run's time as PostgreSQL reads it. */
export function momentsAt(now: string, { lookback }: Pick<Definition, 'lookback'>): Moments {
  return {
    now: `(${quoteLiteral(now)}::timestamptz)`,
    lookback: lookback === null ? 'null::interval' : `(${quoteLiteral(lookback)}::interval)`,
  };
}

/**
 * The source's clock, as `momentsAt` takes it: another database's may be behind the times that the source's rows hold. It is
 * read the same by a session with any DateStyle.
 */
export async function readClock({ source }: Databases): Promise<string> {
  const { rows } = await source.query<{ now: string }>(
    `select to_char(clock_timestamp() at time zone 'UTC', 'YYYY-MM-DD HH24:MI:SS.US+00') as now`,
  );
  return rows[0]?.now ?? '';
}

export async function readDefinition({ state }: Databases, key: string): Promise<DefinitionRow> {
  const { rows } = await state.pool.query<DefinitionRow>(
    `select id, computation_id as "computationId", members, first_run_at is null as first, tracking = 'live' as live,
       stuck_because is not null as stuck, full_wanted = full_done and coalesce(reconcile_at > clock_timestamp(), false) as settled,
       text_hash as "textHash", fields
     from definition where key = $1`,
    [key],
  );
  const [row] = rows;
  if (row === undefined) throw new OperatorError(`No definition has the key "${key}".`);
  return row;
}

/** The members that the state counts; exact where the session holds the definition's lock. */
export async function readMembers(session: Client, definitionId: number): Promise<number> {
  const { rows } = await session.query<{ members: string }>(`select members from definition where id = $1`, [
    definitionId,
  ]);
  return Number(rows[0]?.members);
}

/** Describes a definition and `profiles`: everything that can be known without running them. */
export async function prepareInputs(
  { databases, config }: CompareContext,
  definition: Definition,
  moments: Moments,
): Promise<Inputs> {
  const source = await databases.source.connect();
  try {
    await source.query('begin transaction read only');
    const people = await describePeople(source, config.profiles.text, config.profiles.key, moments);
    const shape = await describeDefinition(source, definition, moments);
    const inputs = { definition, shape, people: { text: config.profiles.text, shape: people }, moments };
    await describeTogether(source, inputs);
    await source.query('commit');
    source.release();
    return inputs;
  } catch (error) {
    source.release(true);
    throw error;
  }
}

/** Describes the definition's SQL joined to `profiles`: their profile_id must be comparable. */
async function describeTogether(source: Client, inputs: Inputs): Promise<void> {
  const { definition, shape, people } = inputs;
  try {
    await describeStatement(source, computedQuery(inputs, { grouped: false, counted: false }));
  } catch (error) {
    if (databaseFailure(error)?.sqlstate !== '42883' || shape.person.by !== 'profile')
      throw explainSqlError(error, `The SQL of "${definition.key}"`, definition.text);
    throw new OperatorError([
      {
        place: definition.text.placeOf(0),
        message: `\`profile_id\` of "${definition.key}" is ${shape.person.type}, that of \`profiles\` is ${people.shape.profileType}: they can't be compared. Cast one of them, such as profile_id::${people.shape.profileType}.`,
      },
    ]);
  }
}

export function fieldTypes(shape: Shape): Record<string, FieldType> {
  return Object.fromEntries(shape.columns.flatMap(({ field, type }) => (field === null ? [] : [[field, type]])));
}

/** The columns that only ride along on track calls, with their types. */
export function riderTypes(shape: Shape): Record<string, FieldType> {
  return Object.fromEntries(shape.columns.flatMap(({ name, field, type }) => (field === null ? [[name, type]] : [])));
}

/** Iterable fixes a field's type by its first value; another type would be refused there, so the run fails here. */
export function refuseTypeChange(definition: Definition, row: DefinitionRow, shape: Shape): void {
  const problems = Object.entries(fieldTypes(shape)).flatMap(([field, type]) => {
    const old = Object.hasOwn(row.fields, field) ? row.fields[field] : undefined;
    if (old === undefined || old === type) return [];
    return [
      {
        place: definition.text.placeOf(0),
        message: `The field \`${field}\` was sent as ${old} and would now be ${type}, which Iterable refuses. Cast it back to the old type, or give it another name.`,
      },
    ];
  });
  if (problems.length > 0) throw new OperatorError(problems);
}

/**
 * Refuses a field that another definition fills at one of the same destinations: one would overwrite the other. Fields
 * are known only once a definition has run, so the later one fails.
 */
export async function refuseSharedFields(
  pool: Runner,
  { key, kind, place }: Definition,
  row: DefinitionRow,
  shape: Shape,
): Promise<void> {
  const fields = kind === 'audience' ? [key] : Object.keys(fieldTypes(shape));
  const { rows } = await pool.query<{ field: string; other: string }>(
    `select f as field, d.key as other from unnest($2::text[]) as f
     join definition as d on d.id <> $1 and d.state in ('active', 'paused')
       and case d.kind when 'audience' then d.key = f and d.first_run_at is not null
         -- What it gave once and gives no more is nobody's.
         else d.fields ? f and exists (select from snapshot as s where s.definition_id = d.id and s.value ? f) end
     where exists (
       select from definition_destination as mine
       join definition_destination as theirs on theirs.destination_id = mine.destination_id and theirs.definition_id = d.id
       where mine.definition_id = $1 and mine.active and mine.identify and theirs.active and theirs.identify)
     order by 1, 2`,
    [row.id, fields],
  );
  if (rows.length === 0) return;
  throw new OperatorError(
    rows.map(({ field, other }) => ({
      place,
      message: `The field \`${field}\` of "${key}" is filled by "${other}" too: one would overwrite the other. Give one of them another name.`,
    })),
  );
}

export function comparisonOf(databases: Databases, row: DefinitionRow, { definition, shape }: Inputs): Comparison {
  const fields = new Set(shape.columns.map(valueKey));
  return {
    definitionId: row === UNREGISTERED ? null : row.id,
    schema: databases.state.schema,
    kind: definition.kind,
    onMissing: definition.onMissing,
    columns: shape.columns,
    gone: Object.keys(row.fields).filter((field) => !fields.has(field)),
  };
}

/**
 * Computes and compares within the session's open transaction, plainly first and grouped where a recipient turns up
 * twice; leaves `delta` filled and the session's bare names those of the state. Nothing is locked.
 */
export async function compare(
  context: CompareContext,
  session: Client,
  inputs: Inputs,
  row: DefinitionRow,
  grouped: boolean,
): Promise<'compared' | 'twice'> {
  const { databases } = context;
  const { definition } = inputs;
  const comparison = comparisonOf(databases, row, inputs);
  const counted = await fillDelta(databases, session, inputs, comparison, {
    grouped,
    limits: runLimits(context),
    windowed: isWindowed(inputs, row),
  });
  if (!row.first) await findVanished(databases, session, inputs);
  if (grouped && definition.kind === 'trait') {
    const { text } = bindMoments(definition.text.sql, inputs.moments);
    if (await hasProfileTwice(databases, session, inputs, text)) throw givesProfileTwice(definition);
  }
  await enterState(session, databases.state.schema);
  return counted === null || row.first || (await isEachOnce(session, counted)) ? 'compared' : 'twice';
}

/** Whether it matters when profiles have to be looked at again: only where changes are followed, it is done. */
export function isWindowed({ shape }: Inputs, row: DefinitionRow): boolean {
  return row.live && shape.validUntil !== null;
}

export function givesProfileTwice({ key, text }: Definition): OperatorError {
  return new OperatorError([
    {
      place: text.placeOf(0),
      message: `The SQL of "${key}" gives a profile more than once; GROUP BY profile_id, or take one row of each.`,
    },
  ]);
}

/** What applying `delta` does, counted; people who were erased are left out. The session's bare names are the state's. */
export async function countChanges(session: Runner, inputs: Inputs, row: DefinitionRow): Promise<RunCounts> {
  await leaveOutForgotten(session, row === UNREGISTERED ? null : row.id);
  return countDelta(session, row.members, fieldsOf(inputs, row));
}

/** The fields of a definition, those that it gave once included. */
export function fieldsOf({ shape }: Inputs, row: DefinitionRow): string[] {
  return [...new Set([...Object.keys(fieldTypes(shape)), ...Object.keys(row.fields)])];
}

/** A few profiles that share a recipient and disagree about it are counted; many of them are a mistake in the SQL. */
export function refuseConflicts(
  { key, text }: Definition,
  { before, members, conflicting }: Pick<RunCounts, 'before' | 'members' | 'conflicting'>,
): void {
  if (conflicting <= Math.max(before, members + conflicting) * CONFLICT_SHARE) return;
  throw new OperatorError([
    {
      place: text.placeOf(0),
      message: `"${key}" gives ${conflicting === 1 ? 'a recipient' : `${conflicting} recipients`} two different values (profiles that share an email or userId), over 1 % of its members; \`personas-sync plan ${key}\` shows some.`,
    },
  ]);
}

/** What a run would do, for `plan`: `look` reads `delta` before all is rolled back. */
export async function tryRun<T>(
  context: CompareContext,
  definition: Definition,
  row: DefinitionRow,
  look: (session: Client, counts: RunCounts, inputs: Inputs) => Promise<T>,
): Promise<T> {
  const moments = momentsAt(await readClock(context.databases), definition);
  const inputs = await prepareInputs(context, definition, moments);
  refuseTypeChange(definition, row, inputs.shape);
  if (row !== UNREGISTERED) await refuseSharedFields(context.databases.state.pool, definition, row, inputs.shape);
  return withRunSession(context.databases, context.signal, async (session) => {
    await beginRun(session, runLimits(context));
    try {
      await compare(context, session, inputs, row, true);
      return await look(session, await countChanges(session, inputs, row), inputs);
    } catch (error) {
      throw await explainRunError(context.databases.source, error, definition, context.config.profiles.text.sql);
    } finally {
      await session.query('rollback').catch(() => undefined);
    }
  });
}
