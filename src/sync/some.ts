import { quoteIdentifier, quoteLiteral } from '../db/connect.js';
import { castOf, holdersQuery, neighboursQuery, presentQuery, recipientsQuery, uncollated } from './people.js';
import { windowsOfSome } from './windows.js';
import { compareStatement, computedQuery, type Comparison, type Inputs } from './statement.js';

/**
 * The comparison of some profiles alone: which others and which recipients have to be looked at with them, so that what is
 * found is what a run in full would find about these recipients.
 *
 *   called     whose rows have changed
 *   affected   whose recipients may have changed by that: they, those they share or shared a recipient with, and in a
 *              hybrid project all who hold one of their addresses
 *   wanted     the recipients that those had, as the snapshot knows, and the ones that they have now
 *   holders    everybody with a say about those: their rows alone are computed
 *
 * Each list is an array by the time it is compared with a column, so that PostgreSQL pushes the condition down through
 * GROUP BY, DISTINCT and set operations to its indexes, which it does for no other form of sub-query.
 */
export interface Evaluated {
  /** Profiles all of whose recipients were looked at, and these recipients. */
  affected: readonly string[];
  wanted: readonly string[];
  /** When these profiles have to be looked at again, in PostgreSQL's own writing: [profile_id, moment]. */
  windows: readonly (readonly [string, string])[];
}

/** The snapshot rows and conflicts that profiles of `called`, an SQL array of text, have a say in: (profile_id, others). */
function touchedQuery({ definitionId, schema }: Comparison, called: string): string {
  const snapshot = `${quoteIdentifier(schema)}.snapshot_${definitionId}`;
  return `select profile_id, others from ${snapshot} where profile_id = any(${called})
    union all select profile_id, others from ${snapshot} where others && (${called})
    union all select null, others from ${quoteIdentifier(schema)}.conflict where definition_id = ${definitionId} and others && (${called})`;
}

/** The recipients that profiles of `affected`, an SQL array of text, have a say in so far. */
function beforeQuery({ definitionId, schema }: Comparison, affected: string): string {
  const snapshot = `${quoteIdentifier(schema)}.snapshot_${definitionId}`;
  return `select recipient from ${snapshot} where profile_id = any(${affected})
    union select recipient from ${snapshot} where others && (${affected})
    union select recipient from ${quoteIdentifier(schema)}.conflict where definition_id = ${definitionId} and others && (${affected})`;
}

/** The profiles of an array of text that fit their type. */
const typed = (type: string, ids: string): string =>
  `array(select ${castOf(type, 'i.id')} from unnest(${ids}) as i(id))`;

/** The parameters of the statement that evaluates in one database. */
export const CALLED = '$1::text[]';
export const NOW = '$2::timestamptz';

/**
 * One statement that fills `delta` and gives what it looked at, where source and state are one database. Bare names are
 * those of the source.
 */
export function evaluateStatement(inputs: Inputs, comparison: Comparison): string {
  const { people, moments, shape } = inputs;
  const { profileType } = people.shape;
  const called = `array(select profile_id from personas_called)`;
  const affected = 'array(select profile_id from personas_affected)';
  // Compared with columns of two collations, by the index of each.
  const affectedText = `array(select ${uncollated('profile_id::text')} from personas_affected)`;
  const wanted = 'array(select recipient from personas_wanted)';
  const neighbours = neighboursQuery(people, moments, called);
  const computed = computedQuery(inputs, {
    grouped: true,
    counted: false,
    some: { recipients: wanted, profiles: 'array(select profile_id from personas_holders)' },
  });
  const compared = compareStatement(
    computed,
    {
      ...comparison,
      some: { recipients: wanted, present: 'array(select profile_id::text collate "C" from personas_present)' },
    },
    people.shape,
  );
  const windows =
    shape.validUntil === null
      ? `'{}'::text[]`
      : `array(select array[profile_id, until] from (${windowsOfSome(inputs, affected)}) as windows)`;
  return `with personas_called as materialized (select distinct ${castOf(profileType, 'i.id')} as profile_id from unnest(${CALLED}) as i(id)),
    personas_touched as materialized (${touchedQuery(comparison, CALLED)}),
    personas_affected as materialized (
      select profile_id from personas_called where profile_id is not null
      union select ${castOf(profileType, 't.id')} from (select profile_id as id from personas_touched union select unnest(others) from personas_touched) as t
      where ${castOf(profileType, 't.id')} is not null
      ${neighbours === null ? '' : `union ${neighbours}`}),
    personas_before as materialized (${beforeQuery(comparison, `${affectedText} || ${CALLED}`)}),
    personas_held as materialized (${recipientsQuery(people, moments, affected)}),
    personas_wanted as materialized (select recipient from personas_before union select recipient collate "C" from personas_held where recipient is not null),
    personas_holders as materialized (select profile_id from personas_affected union ${holdersQuery(people, moments, wanted)}),
    personas_present as materialized (${presentQuery(people, moments, affected)}),
    personas_filled as (${compared} returning 1)
    select ${affectedText} || ${CALLED} as affected, ${wanted} as wanted, ${windows} as windows,
      (select count(*)::int4 from personas_filled) as differing, ${NOW} as now`;
}

/** The steps of the same where source and state are two databases; each text takes what the one before has given. */
export interface Steps {
  /** State: $1 called → (id) of all that are touched. */
  touched: string;
  /** Source: $1 called → (id) of the neighbours; null: there are none. */
  neighbours: string | null;
  /** State: $1 affected → (recipient). */
  before: string;
  /** Source: $1 affected, $2 before, $3 now → one row: what was computed, as arrays, and what was looked at. */
  computed: string;
  /** State: fills `delta` from those arrays: $1 … $7 the columns of what was computed, $8 wanted, $9 present. */
  compared: string;
}

/** The columns of what was computed, in the order of the parameters of `compared`. */
export const COMPUTED_COLUMNS = [
  'recipient',
  'profile_id',
  'beside',
  'value',
  'unsendable',
  'rivals',
  'others',
] as const;

export function evaluateSteps(inputs: Inputs, comparison: Comparison): Steps {
  const { people, moments } = inputs;
  const neighbours = neighboursQuery(people, moments, typed(people.shape.profileType, '$1::text[]'));
  return {
    touched: `select distinct id from (
      select profile_id as id from (${touchedQuery(comparison, '$1::text[]')}) as t
      union all select unnest(others) from (${touchedQuery(comparison, '$1::text[]')}) as t) as ids where id is not null`,
    neighbours: neighbours === null ? null : `select distinct n.profile_id::text as id from (${neighbours}) as n`,
    before: beforeQuery(comparison, '$1::text[]'),
    computed: `${computedStep(inputs, '$1::text[]', '$2::text[]')}, $3::timestamptz as now`,
    compared: compareStatement(
      `select recipient, profile_id, beside, value::jsonb as value, unsendable::text[] as unsendable, rivals::text[] as rivals, others::text[] as others
       from unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[])
         as c(recipient, profile_id, beside, value, unsendable, rivals, others)`,
      { ...comparison, some: { recipients: '$8::text[]', present: '$9::text[]' } },
      people.shape,
    ),
  };
}

/** What evaluating these profiles reads in the source, for a look at its plan; `moments` are literals. */
export function probeStatement(inputs: Inputs, profileIds: readonly string[]): string {
  return computedStep(inputs, `array[${profileIds.map(quoteLiteral).join(', ')}]::text[]`, `'{}'::text[]`);
}

/** One row: what is computed for the profiles of `affected` and the recipients of `before`, SQL arrays of text. */
function computedStep(inputs: Inputs, affectedText: string, before: string): string {
  const { people, moments, shape } = inputs;
  const { profileType } = people.shape;
  const affected = 'array(select profile_id from personas_affected)';
  const wanted = 'array(select recipient from personas_wanted)';
  const computed = computedQuery(inputs, {
    grouped: true,
    counted: false,
    some: { recipients: wanted, profiles: 'array(select profile_id from personas_holders)' },
  });
  const windows =
    shape.validUntil === null
      ? `'{}'::text[]`
      : `array(select array[profile_id, until] from (${windowsOfSome(inputs, affected)}) as windows)`;
  return `with personas_affected as materialized (select i as profile_id from unnest(${typed(profileType, affectedText)}) as i where i is not null),
    personas_held as materialized (${recipientsQuery(people, moments, affected)}),
    personas_wanted as materialized (select unnest(${before}) as recipient union select recipient collate "C" from personas_held where recipient is not null),
    personas_holders as materialized (select profile_id from personas_affected union ${holdersQuery(people, moments, wanted)}),
    personas_present as materialized (${presentQuery(people, moments, affected)}),
    personas_computed as materialized (${computed})
    select ${wanted} as wanted, array(select profile_id::text from personas_present) as present, ${windows} as windows,
      ${
        // An array of arrays would need them to be of one length: these travel as their text.
        COMPUTED_COLUMNS.map(
          (column) => `(select array_agg(${column}::text) from personas_computed) as ${column}`,
        ).join(', ')
      }`;
}
