import { quoteIdentifier, quoteLiteral } from '../db/connect.js';
import { castOf, holdersQuery, neighboursQuery, presentQuery, recipientsQuery, uncollated } from './people.js';
import { countsOf } from './delta.js';
import { dueQuery, lockedQuery, NOW_KEPT, type DueForm, type DueRow } from './locked.js';
import { windowsOfSome } from './windows.js';
import { computedQuery, DELTA_COLUMNS, differingQuery, type Comparison, type Inputs } from './statement.js';

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

/** The moment of a batch where the statement is one: read once, not for each row. */
export const NOW = `(select ${NOW_KEPT})`;

/** What differs, summed up. */
export interface Differing {
  /** Of each row of `delta` its op. */
  ops: string;
  /** A profile came twice. */
  twice: boolean;
  /** The owners, so far, of recipients that are about to change. */
  owners: readonly string[];
  /** A `Counted`, as JSON. */
  counts: string;
}

/** CTEs that put what differs into `delta`, and the columns of a `Differing`; `fields` are those whose values may turn to null. */
function fillingDelta(compared: string, fields: readonly string[]): { ctes: string; columns: string } {
  return {
    ctes: `personas_differing as materialized (${compared}),
      personas_filled as (insert into pg_temp.delta (${DELTA_COLUMNS}) select ${DELTA_COLUMNS} from personas_differing)`,
    columns: `coalesce(string_agg(op::text, ''), '') as ops, coalesce(bool_or(op = 'd' and cardinality(rivals) = 1), false) as twice,
      coalesce(array_agg(owner) filter (where op in ('x', 'c', 't', 'k') and owner is not null), '{}') as owners, ${countsOf(fields)}::text as counts`,
  };
}

/** What one statement gives that evaluates what is due. */
export interface EvaluatedRow extends DueRow, Evaluated, Differing {
  /** A `Locked`, as JSON. */
  locked: string;
}

/**
 * One statement that reads what is due, fills `delta` and gives what it looked at, where source and state are one database:
 * one snapshot shows what is due and the rows that it is due for. Bare names are those of the source. The parameters are
 * those of `dueQuery`, and profiles to evaluate beside what is due.
 */
export function evaluateStatement(
  inputs: Inputs,
  comparison: Comparison,
  form: DueForm,
  fields: readonly string[],
): string {
  const { people, moments, shape } = inputs;
  const { profileType } = people.shape;
  const asked = 'array(select profile_id from personas_asked)';
  const called = `array(select profile_id from personas_called)`;
  const affected = 'array(select profile_id from personas_affected)';
  // Compared with columns of two collations, by the index of each.
  const affectedText = `array(select ${uncollated('profile_id::text')} from personas_affected)`;
  const wanted = 'array(select recipient from personas_wanted)';
  const due = dueQuery(form);
  const neighbours = neighboursQuery(people, moments, called);
  const computed = computedQuery(inputs, {
    grouped: true,
    counted: false,
    some: { recipients: wanted, profiles: 'array(select profile_id from personas_holders)' },
  });
  const some = { recipients: wanted, present: 'array(select profile_id::text collate "C" from personas_present)' };
  const filling = fillingDelta(differingQuery(computed, { ...comparison, some }, people.shape), fields);
  const windows =
    shape.validUntil === null
      ? `'{}'::text[]`
      : `array(select array[profile_id, until] from (${windowsOfSome(inputs, affected)}) as windows)`;
  return `with ${due.ctes},
    personas_asked as materialized (select ${uncollated('a.profile_id')} as profile_id from (
      select profile_id from personas_due union select profile_id from personas_reached union select unnest(${form.only ? '$3' : '$2'}::text[])) as a),
    personas_called as materialized (select distinct ${castOf(profileType, 'i.profile_id')} as profile_id from personas_asked as i),
    personas_touched as materialized (${touchedQuery(comparison, asked)}),
    personas_affected as materialized (
      select profile_id from personas_called where profile_id is not null
      union select ${castOf(profileType, 't.id')} from (select profile_id as id from personas_touched union select unnest(others) from personas_touched) as t
      where ${castOf(profileType, 't.id')} is not null
      ${neighbours === null ? '' : `union ${neighbours}`}),
    personas_before as materialized (${beforeQuery(comparison, `${affectedText} || ${asked}`)}),
    personas_held as materialized (${recipientsQuery(people, moments, affected)}),
    personas_wanted as materialized (select recipient from personas_before union select recipient collate "C" from personas_held where recipient is not null),
    personas_holders as materialized (select profile_id from personas_affected union ${holdersQuery(people, moments, wanted)}),
    personas_present as materialized (${presentQuery(people, moments, affected)}),
    ${filling.ctes}
    select ${due.columns}, ${affectedText} || ${asked} as affected, ${wanted} as wanted, ${windows} as windows, ${filling.columns},
      (${lockedQuery(form, 'exists (select from personas_differing)')}) as locked
    from personas_differing`;
}

/** The steps of the same where source and state are two databases; each text takes what the one before has given. */
export interface Steps {
  /** State: $1 called → (id) of all that are touched. */
  touched: string;
  /** Source: $1 called → (id) of the neighbours; null: there are none. */
  neighbours: string | null;
  /** State: $1 affected → (recipient). */
  before: string;
  /** Source: $1 affected, $2 before → one row: what was computed, as arrays, and what was looked at. */
  computed: string;
  /** State: fills `delta` from those arrays, $1 … $7 the columns of what was computed, $8 wanted, $9 present → a `Differing`. */
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

export function evaluateSteps(inputs: Inputs, comparison: Comparison, fields: readonly string[]): Steps {
  const { people, moments } = inputs;
  const neighbours = neighboursQuery(people, moments, typed(people.shape.profileType, '$1::text[]'));
  const differing = differingQuery(
    `select recipient, profile_id, beside, value::jsonb as value, unsendable::text[] as unsendable, rivals::text[] as rivals, others::text[] as others
       from unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[])
         as c(recipient, profile_id, beside, value, unsendable, rivals, others)`,
    { ...comparison, some: { recipients: '$8::text[]', present: '$9::text[]' } },
    people.shape,
  );
  const filling = fillingDelta(differing, fields);
  return {
    touched: `select distinct id from (
      select profile_id as id from (${touchedQuery(comparison, '$1::text[]')}) as t
      union all select unnest(others) from (${touchedQuery(comparison, '$1::text[]')}) as t) as ids where id is not null`,
    neighbours: neighbours === null ? null : `select distinct n.profile_id::text as id from (${neighbours}) as n`,
    before: beforeQuery(comparison, '$1::text[]'),
    computed: computedStep(inputs, '$1::text[]', '$2::text[]'),
    compared: `with ${filling.ctes} select ${filling.columns} from personas_differing`,
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
