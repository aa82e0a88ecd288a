import { quoteIdentifier, quoteLiteral } from '../db/connect.js';
import { definitionLock } from '../db/locks.js';
import type { DefinitionRow } from './comparison.js';
import { hourQuery, type Hour } from './hour.js';

/**
 * What a batch reads of the state under its definition's lock: how it is with the definition, and what is due of it. As SQL,
 * so that it can be read by the statement that compares, whose snapshot then is that of all of it.
 */
export interface Locked {
  /** The moment of the batch, as PostgreSQL wrote it. */
  now: string;
  row: DefinitionRow;
  state: string;
  held: boolean;
  full_run: number | null;
  /** Recipients about whom profiles disagree; some that is due is parked; somebody was erased on request. */
  conflicts: boolean;
  parked: boolean;
  forgotten: boolean;
  /** Whether some destination is sent events. */
  tracked: boolean;
  hour: Hour;
}

/** The moment of the batch, read under the lock: a setting of the transaction, so that texts are constant. */
export const NOW_KEPT = `current_setting('personas.now')::timestamptz`;

/** What begins a transaction that evaluates a definition: texts, to be sent one after the other. */
export function lockStatements(definitionId: number): readonly string[] {
  // The moment is read by whoever has the lock.
  const locked = `(${definitionLock(definitionId)} offset 0) as lock`;
  return ['begin', `select set_config('personas.now', clock_timestamp()::text, true) from ${locked}`];
}

/** Gives a `Locked`, as text of JSON, beside the CTEs of `dueQuery`; the hour's sums only where `differs`, a condition. */
export function lockedQuery({ schema, definitionId }: DueForm, differs = 'true'): string {
  const at = quoteIdentifier(schema);
  return `select jsonb_build_object('now', current_setting('personas.now'), 'state', d.state, 'full_run', d.full_run, 'held', d.held,
       'hour', case when ${differs} then ${hourQuery(schema, definitionId, NOW_KEPT)} end,
       'conflicts', exists (select from ${at}.conflict where definition_id = ${definitionId}),
       'parked', exists (select from ${at}.due where definition_id = ${definitionId} and parked_at is not null),
       'forgotten', exists (select from ${at}.forgotten),
       'tracked', exists (select from ${at}.definition_destination where definition_id = ${definitionId} and active and track),
       'row', jsonb_build_object('id', d.id, 'computationId', d.computation_id, 'members', d.members, 'first', d.first_run_at is null,
         'live', d.tracking = 'live', 'stuck', d.stuck_because is not null, 'settled', false, 'textHash', d.text_hash, 'fields', d.fields))::text as locked
     from personas_definition as d`;
}

/** Why a batch may not write at present; null: it may. `mayWrite` says the same in SQL. */
export function reasonToWait({ state, held, row }: Locked, textHash: string): string | null {
  if (state !== 'active') return 'it is paused';
  if (!row.live) return 'its changes are not followed';
  if (row.first) return 'its first run has not ended';
  if (row.textHash !== textHash) return 'its new text has not run yet';
  if (held) return 'a held run waits for a person';
  return null;
}

const mayWrite = (textHash: string): string =>
  `exists (select from personas_definition
     where state = 'active' and tracking = 'live' and first_run_at is not null and text_hash = ${quoteLiteral(textHash)} and not held)`;

/** What was read as due. */
export interface Due {
  ids: readonly number[];
  profiles: readonly string[];
  more: boolean;
}

export interface DueRow {
  due_ids: readonly string[];
  due_profiles: readonly string[];
  reached: readonly string[];
}

export interface DueForm {
  /** The schema of the state, unquoted. */
  schema: string;
  definitionId: number;
  textHash: string;
  /** Whether profiles are looked at again when a window closes, too. */
  windowed: boolean;
  /** Only some due rows, whose ids are the last parameter. */
  only: boolean;
}

/** The parameters: how many at most, and which alone. */
const LIMIT = '$1::int4';
const ONLY = '$2::bigint[]';

/** CTEs that read what is due, nothing where nothing may be written, and the columns that give it, as a `DueRow`. */
export function dueQuery({ schema, definitionId, textHash, windowed, only }: DueForm): {
  ctes: string;
  columns: string;
} {
  const at = quoteIdentifier(schema);
  const may = mayWrite(textHash);
  const reached =
    windowed && !only
      ? `select profile_id from ${at}.validity where definition_id = ${definitionId} and until <= (select ${NOW_KEPT}) and ${may} order by until limit ${LIMIT}`
      : 'select null::text as profile_id where false';
  return {
    ctes: `personas_definition as materialized (select d.*,
        exists (select from ${at}.run where definition_id = ${definitionId} and outcome = 'held' and decision is null) as held
        from ${at}.definition as d where d.id = ${definitionId}),
      personas_due as materialized (select id, profile_id from ${at}.due
        where definition_id = ${definitionId} and parked_at is null and claimed_by is null ${only ? `and id = any(${ONLY})` : ''} and ${may}
        order by id limit ${LIMIT}),
      personas_reached as materialized (${reached})`,
    columns: `array(select id::text from personas_due) as due_ids, array(select profile_id from personas_due) as due_profiles,
      array(select profile_id from personas_reached) as reached`,
  };
}

export const dueParameters = (limit: number, only: readonly number[] | undefined): unknown[] =>
  only === undefined ? [limit] : [limit, only];

export function dueOf({ due_ids: ids, due_profiles: profiles, reached }: DueRow, limit: number): Due {
  return {
    ids: ids.map(Number),
    profiles: [...new Set([...profiles, ...reached])],
    more: ids.length === limit || reached.length === limit,
  };
}
