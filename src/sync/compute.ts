import { pipeline } from 'node:stream/promises';
import { quoteIdentifier, withCancellable, withClient, type Client, type Pool, type Runner } from '../db/connect.js';
import { copyInto, copyRows } from '../db/copy.js';
import { databaseFailure } from '../db/failure.js';
import type { State } from '../db/state.js';
import { otherKeysQuery, peopleQuery } from './people.js';
import { asSubquery } from './shape.js';
import { COLLECTED_ROWS, collectingWindows, WINDOWS_TABLE, windowsOfAll } from './windows.js';
import { DELTA_TABLE, ROW_COUNTERS, STAGING_TABLE, type RowCounts } from './delta.js';
import { compareStatement, computedQuery, type Comparison, type Inputs } from './statement.js';

/**
 * Computes a definition and leaves what differs from the snapshot in the temporary table `delta` of the run's own
 * transaction. Nothing is locked and nothing but temporary tables is written: a person's SQL runs in a savepoint that is
 * READ ONLY. With source and state in one database no row passes through this process; otherwise the rows are streamed
 * by COPY into a staging table, as bytes that nobody looks into.
 */
export interface Databases {
  source: Pool;
  /** The source without a pooler between, for sessions that last; the same pool where there is none. */
  direct: Pool;
  state: State;
  /** Whether source and state are one database. */
  same: boolean;
}

export interface Limits {
  workMemMb: number;
  timeoutMs: number;
  /** Ends the statements of a run that is under way. */
  signal?: AbortSignal | undefined;
}

/** How `delta` is filled; `windowed`: `windows` is, too. */
export interface Filling {
  grouped: boolean;
  limits: Limits;
  windowed: boolean;
}

/** The connection on which a run's transaction lives: it must see the snapshot, and in one database the source too. */
export async function withRunSession<T>(
  databases: Databases,
  signal: AbortSignal | undefined,
  work: (session: Client) => Promise<T>,
): Promise<T> {
  return withCancellable(databases.same ? databases.source : databases.state.pool, signal, work);
}

export async function beginRun(session: Client, limits: Limits): Promise<void> {
  await session.query('begin');
  await session.query(
    `set local work_mem = '${limits.workMemMb}MB'; set local statement_timeout = ${limits.timeoutMs}; set local synchronous_commit = on`,
  );
  // Temporary tables come last: a person's SQL may read a table of its own that is named as one of them.
  await session.query(
    `select set_config('search_path', concat_ws(', ', nullif(current_setting('search_path'), ''), 'pg_temp'), true)`,
  );
}

async function readOnly<T>(session: Client, work: () => Promise<T>): Promise<T> {
  await session.query('savepoint computing; set transaction read only');
  const result = await work();
  await session.query('release savepoint computing');
  return result;
}

/** Streams the computed rows from the source into `staging`; returns their number. */
async function stage(
  databases: Databases,
  session: Client,
  inputs: Inputs,
  { grouped, limits, windowed }: Filling,
): Promise<number> {
  await session.query(STAGING_TABLE);
  return withCancellable(databases.source, limits.signal, async (source) => {
    await source.query('begin transaction read only');
    await source.query(
      `set local work_mem = '${limits.workMemMb}MB'; set local statement_timeout = ${limits.timeoutMs}`,
    );
    const columns = 'recipient, profile_id, beside, value, unsendable, rivals, others';
    const rows = await copyRows(
      source,
      `select ${columns} from (${computedQuery(inputs, { grouped, counted: false })}) as c`,
    );
    const target = copyInto(session, `staging (${columns})`);
    await pipeline(rows, target);
    if (windowed) {
      const windows = await copyRows(source, `select profile_id, until from (${windowsOfAll(inputs)}) as w`);
      await pipeline(windows, copyInto(session, 'windows (profile_id, until)'));
    }
    await source.query('commit');
    return target.rowCount;
  });
}

/** Whether all rows of a `profiles` had the project's own kind of key when they were last looked at. */
const ownKeysOnly = new Map<string, boolean>();

const profilesKey = ({ people: { text, shape } }: Inputs): string => `${shape.key} ${text.sql}`;

/**
 * Whether each row of `profiles` may be taken by itself. Looked at once, which costs a reading of `profiles`; a row that
 * comes later is found by the run that meets it.
 */
async function hasOwnKeysOnly(session: Client, inputs: Inputs): Promise<boolean> {
  if (inputs.shape.person.by !== 'profile') return false;
  const known = ownKeysOnly.get(profilesKey(inputs));
  if (known !== undefined) return known;
  const { rows } = await readOnly(session, () =>
    session.query<{ others: boolean }>(otherKeysQuery(inputs.people, inputs.moments)),
  );
  const only = rows[0]?.others === false;
  ownKeysOnly.set(profilesKey(inputs), only);
  return only;
}

/** The members that the state counted at the moment of the comparison. */
async function takeMembers(session: Client): Promise<number> {
  const { rows } = await session.query<{ members: string }>(
    'select last_value - 1 as members from pg_temp.member_count',
  );
  return Number(rows[0]?.members);
}

/** Compares by the form that counts its rows; returns how many there were, and how many had another kind of key. */
async function compareCounted(
  session: Client,
  inputs: Inputs,
  comparison: Comparison,
  { ownKeys, windowed }: { ownKeys: boolean; windowed: boolean },
): Promise<RowCounts & { others: number }> {
  await session.query(`${DELTA_TABLE}; ${ROW_COUNTERS}`);
  const collected = windowed ? { rows: COLLECTED_ROWS } : {};
  const query = computedQuery(inputs, { grouped: false, counted: true, ownKeys, ...collected });
  const compared = compareStatement(query, { ...comparison, counted: true }, inputs.people.shape);
  await readOnly(session, () => session.query(`${windowed ? collectingWindows(inputs) : ''}${compared}`));
  const used = (name: string): string =>
    `(select case when is_called then currval('pg_temp.${name}') else 0 end from pg_temp.${name}) as ${name}`;
  const { rows } = await session.query<{ computed_row: string; other_row: string }>(
    `select ${used('computed_row')}, ${used('other_row')}`,
  );
  const members = await takeMembers(session);
  await session.query('drop sequence pg_temp.computed_row, pg_temp.other_row, pg_temp.member_count');
  return { computed: Number(rows[0]?.computed_row), others: Number(rows[0]?.other_row), members };
}

/**
 * Fills `delta` and returns what was counted (null where nothing was). Must stand between `beginRun`
 * and the end of that transaction; may be repeated after a rollback to before it.
 */
export async function fillDelta(
  databases: Databases,
  session: Client,
  inputs: Inputs,
  comparison: Comparison,
  filling: Filling,
): Promise<RowCounts | null> {
  const { grouped, windowed } = filling;
  if (windowed) await session.query(WINDOWS_TABLE);
  const compareWith = (computed: string, counted = false): string =>
    compareStatement(computed, { ...comparison, counted }, inputs.people.shape);
  if (!databases.same) {
    await session.query(DELTA_TABLE);
    const computed = await stage(databases, session, inputs, filling);
    await session.query(compareWith('select * from pg_temp.staging', true));
    const members = await takeMembers(session);
    await session.query('drop sequence pg_temp.member_count');
    return grouped ? null : { computed, members };
  }
  if (grouped) {
    await session.query(DELTA_TABLE);
    const rows = windowed ? { rows: COLLECTED_ROWS } : {};
    const compared = compareWith(computedQuery(inputs, { grouped, counted: false, ...rows }));
    await readOnly(session, () => session.query(`${windowed ? collectingWindows(inputs) : ''}${compared}`));
    return null;
  }
  if (await hasOwnKeysOnly(session, inputs)) {
    await session.query('savepoint own_keys');
    const { others, ...counts } = await compareCounted(session, inputs, comparison, { ownKeys: true, windowed });
    if (others === 0) {
      await session.query('release savepoint own_keys');
      return counts;
    }
    ownKeysOnly.set(profilesKey(inputs), false);
    await session.query('rollback to savepoint own_keys');
  }
  return compareCounted(session, inputs, comparison, { ownKeys: false, windowed });
}

/** Whether a trait's SQL gives some profile twice. */
export async function hasProfileTwice(
  databases: Databases,
  session: Client,
  inputs: Inputs,
  text: string,
): Promise<boolean> {
  if (inputs.shape.person.by !== 'profile') return false;
  const statement = `select exists (select from ${asSubquery(text)} as m where profile_id is not null group by profile_id having count(*) > 1) as twice`;
  if (databases.same)
    return (await readOnly(session, () => session.query<{ twice: boolean }>(statement))).rows[0]?.twice === true;
  return withClient(databases.source, async (source) => {
    await source.query('begin transaction read only');
    const result = await source.query<{ twice: boolean }>(statement);
    await source.query('commit');
    return result.rows[0]?.twice === true;
  });
}

const VANISHED_BATCH = 10_000;

/** Tries a comparison in the type of `profile_id`; as text, more slowly, where a stored id doesn't fit it any more. */
async function typedOrText<T>(client: Client, typed: () => Promise<T>, text: () => Promise<T>): Promise<T> {
  await client.query('savepoint typed');
  try {
    return await typed();
  } catch (error) {
    if (databaseFailure(error)?.sqlstate.startsWith('22') !== true) throw error;
    await client.query('rollback to savepoint typed');
    return text();
  }
}

/** Marks the exits in `delta` whose person is gone from `profiles` altogether. */
export async function findVanished(databases: Databases, session: Client, inputs: Inputs): Promise<void> {
  if (inputs.shape.person.by !== 'profile') return;
  const people = peopleQuery(inputs.people, inputs.moments);
  const type = inputs.people.shape.profileType;
  if (databases.same) {
    const among = (left: string, right: string) => () =>
      session.query(
        `update pg_temp.delta as d set vanished = true where op = 'x' and profile_id is not null
         and not exists (select from (${people}) as p where ${left} = ${right})`,
      );
    await session.query('analyze pg_temp.delta');
    await readOnly(session, () =>
      typedOrText(session, among('p.profile_id', `d.profile_id::${type}`), among('p.profile_id::text', 'd.profile_id')),
    );
    return;
  }
  await session.query(
    `declare exits no scroll cursor for select distinct profile_id from pg_temp.delta where op = 'x' and profile_id is not null`,
  );
  for (;;) {
    const { rows } = await session.query<{ profile_id: string }>(`fetch ${VANISHED_BATCH} from exits`);
    if (rows.length === 0) break;
    const ids = rows.map((row) => row.profile_id);
    const there = await withClient(databases.source, async (source) => {
      const among = (id: string, ids_: string) => () =>
        source.query<{ id: string }>(
          `select p.profile_id::text as id from (${people}) as p where ${id} = any(${ids_})`,
          [ids],
        );
      await source.query('begin transaction read only');
      const found = await typedOrText(
        source,
        among('p.profile_id', `$1::${type}[]`),
        among('p.profile_id::text', '$1::text[]'),
      );
      await source.query('commit');
      return found.rows.map((row) => row.id);
    });
    await session.query(
      `update pg_temp.delta set vanished = true where op = 'x' and profile_id = any($1) and not profile_id = any($2)`,
      [ids, there],
    );
  }
  await session.query('close exits');
}

/** From here on the bare names in `session` are those of the state. */
export async function enterState(session: Runner, schema: string): Promise<void> {
  await session.query(`set local search_path = ${quoteIdentifier(schema)}`);
}
