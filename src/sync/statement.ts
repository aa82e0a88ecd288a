import type { Definition } from '../core/definition.js';
import { bindMoments } from '../core/moments.js';
import { quoteIdentifier, quoteLiteral } from '../db/connect.js';
import { besideOf, directRecipient, ownKey, peopleQuery, recipientsQuery, type People } from './people.js';
import { asSubquery, type Column, type Moments, type PeopleShape, type Shape } from './shape.js';
import {
  differs,
  hasValue,
  isApart,
  isRisky,
  sameValue,
  settledValue,
  unsendableOf,
  valueKey,
  valueOf,
} from './value.js';

/**
 * The text of the comparison. A definition's rows become recipients through `profiles`, and are compared with the
 * snapshot by one full join; what differs goes into `delta`, one row a recipient:
 *
 *   e entered · x exited · c value changed · t only the owner or what rides along changed · k gone but kept
 *   w a profile without an identifier · d two profiles disagree about a recipient · s a value that cannot be sent
 *
 * The full join has no GROUP BY: grouping a million recipients would cost more than comparing them, and two rows for a
 * recipient are rare. So the plain form counts its rows (`computed_row`), and the run compares that count with the
 * matches afterwards; only where it doesn't add up is the grouped form run instead (`run.ts`).
 *
 * What is done for each row is what a run costs: a value is made once, and the commonest case, that nothing has changed,
 * found first.
 */
export interface Inputs {
  definition: Definition;
  shape: Shape;
  people: People;
  moments: Moments;
}

/** Some recipients, and all profiles that have a say about them, as SQL arrays. */
export interface Some {
  recipients: string;
  profiles: string;
}

interface ComputedForm {
  grouped: boolean;
  counted: boolean;
  ownKeys?: boolean;
  some?: Some;
  /** Where the definition's rows are, by the name of a CTE; left out: its text is put in. */
  rows?: string;
}

/**
 * (recipient, profile_id, beside, value, unsendable, rivals, others) of a definition's rows; recipient is null for a
 * profile without an identifier, `beside` is as it was written, `others` are the profiles that have a say beside this one.
 * `grouped` gives each recipient once, and `rivals`, some of the profiles, where its rows have different values. `some`
 * asks for some recipients alone, of whom each profile that has a say is named. `ownKeys` takes each row of `profiles` by itself, which halves the reading of them; a row that has
 * not the project's own kind of key can't be told so, and is counted by `other_row`: the result is void then.
 */
export function computedQuery(
  inputs: Inputs,
  { grouped, counted, ownKeys = false, some, rows: given }: ComputedForm,
): string {
  const { definition, shape, people, moments } = inputs;
  const written = given ?? asSubquery(bindMoments(definition.text.sql, moments).text);
  const rows = shape.member ? `(select * from ${written} as w where w.member) as m` : `${written} as m`;
  const value = `${valueOf(shape.columns)} as value, ${unsendableOf(shape.columns)} as unsendable, null::text[] as rivals`;
  const computed = (more = ''): string => {
    const alone = 'null::text[] as others';
    if (shape.person.by === 'identifier')
      return `${directRecipient(shape.person, people.shape)}, ${value}, ${alone}${more} from ${rows}`;
    const profile = 'm.profile_id::text as profile_id';
    if (some !== undefined) {
      return `r.recipient, ${profile}, r.beside, ${value}, ${LENDERS} as others${more}
        from ${rows} join (${recipientsQuery(people, moments, some.profiles)}) as r on r.profile_id = m.profile_id
        where m.profile_id = any(${some.profiles}) and r.recipient collate "C" = any(${some.recipients})`;
    }
    if (!ownKeys) {
      return `r.recipient, ${profile}, r.beside, ${value}, ${LENDERS} as others${more}
        from ${rows} left join (${recipientsQuery(people, moments)}) as r on r.profile_id = m.profile_id`;
    }
    const { there, recipient, beside } = ownKey(people.shape);
    return `case when ${there} then ${recipient} when r.profile_id is not null then '?' || nextval('pg_temp.other_row') end as recipient,
        ${profile}, ${beside} as beside, ${value}, ${alone}${more}
      from ${rows} left join (${peopleQuery(people, moments)}) as r on r.profile_id = m.profile_id`;
  };
  const counter = counted ? `, nextval('pg_temp.computed_row') as n` : '';
  // OFFSET 0 keeps what is computed here from being computed again wherever it is compared.
  const kept =
    definition.kind === 'audience'
      ? `select ${computed(counter)} offset 0`
      : `select c.*${counter} from (select ${computed()} offset 0) as c where ${hasValue(shape.columns)} or unsendable is not null offset 0`;
  return grouped ? groupedQuery(kept, inputs, some === undefined) : kept;
}

/** Whose userId the address stands for, where that is another's. */
const LENDERS = 'case when r.lender is not null then array[r.lender] end';

/** Enough of the profiles that disagree to find the mistake by. */
const RIVALS = 10;

/**
 * Each recipient once, with the first of its rows that have a value, as the plain form has it where the others have none.
 * Profiles that share a recipient disagree where their fields differ; what only rides along may. A field can't be sent
 * where one of the rows says so.
 */
function groupedQuery(
  computed: string,
  { definition, shape: { columns }, people }: Inputs,
  withAbsent: boolean,
): string {
  const isTrait = definition.kind === 'trait';
  const valued = isTrait ? hasValue(columns) : 'true';
  const unsendable = columns.filter(isRisky).map((column) => {
    const key = quoteLiteral(valueKey(column));
    return `case when bool_or(${key} = any(unsendable)) then ${key} end`;
  });
  const least = (column: string): string =>
    `case when bool_or(${valued}) then min(${column} collate "C") filter (where ${valued}) else min(${column} collate "C") end`;
  return `select recipient, ${least('profile_id')} as profile_id, ${least(besideOf(people.shape, 'beside'))} as beside,
      (array_agg(value order by ${valued} desc, value is null, profile_id collate "C", value))[1] as value,
      ${unsendable.length === 0 ? 'null::text[]' : `nullif(array_remove(array[${unsendable.join(', ')}], null), '{}')`} as unsendable,
      ${isTrait ? `case when ${disagreement(columns, valued)} then (array_agg(distinct profile_id) filter (where ${valued}))[1:${RIVALS}] end` : 'null::text[]'} as rivals,
      nullif(array_remove((select array_agg(distinct u.p collate "C") from unnest(array_agg(profile_id) || array_agg(others[1])) as u(p)
        where u.p is not null), ${least('profile_id')}), '{}') as others
    from (${computed}) as computed where recipient is not null group by recipient
    ${withAbsent ? `union all select null, profile_id, null, null, unsendable, null, null from (${computed}) as computed where recipient is null` : ''}`;
}

/** Whether the rows of a group that have a value have different ones; floats by a hair are the same. */
function disagreement(columns: readonly Column[], valued: string): string {
  const floats = columns.filter(({ field, form }) => field !== null && form === 'float').map(valueKey);
  const riders = columns.filter(({ field }) => field === null).map(valueKey);
  const loose = [...floats, ...riders].map(quoteLiteral).join(', ');
  const only = `filter (where ${valued})`;
  const apart = floats.map((key) => {
    const number = `(value ->> ${quoteLiteral(key)})::numeric`;
    const [most, least] = [`max(${number}) ${only}`, `min(${number}) ${only}`];
    return `count(${number}) ${only} between 1 and count(*) ${only} - 1 or coalesce(${isApart(most, least)}, false)`;
  });
  return [`count(distinct value - array[${loose}]::text[]) ${only} > 1`, ...apart].join(' or ');
}

export interface Comparison {
  /** Null: nobody has the definition yet, and the state isn't looked at. */
  definitionId: number | null;
  /** Whether the members that the state counts are to be read at the same moment (`member_count`). */
  counted?: boolean;
  /** The recipients to look at, and the profiles of theirs that exist (as text), as SQL arrays; left out: all. */
  some?: { recipients: string; present: string };
  /** The schema of the state, unquoted. */
  schema: string;
  kind: 'audience' | 'trait';
  onMissing: 'null' | 'keep';
  columns: readonly Column[];
  /** Fields that the definition had when it last ran and has no more. */
  gone: readonly string[];
}

/** Always true; leaves the members that the state counts, as of the same moment as the snapshot, in a temporary sequence. */
function countingMembers(schema: string, definitionId: number): string {
  return `and (select setval('pg_temp.member_count', members + 1) from ${quoteIdentifier(schema)}.definition where id = ${definitionId}) is not null`;
}

/** The fields whose value differs, as an array; null where none does. */
function changedFields({ kind, onMissing, columns, gone }: Comparison): string {
  const fields = columns.filter((column) => column.field !== null);
  const cases = [
    ...fields.map((column) => `case when ${differs(column)} then ${quoteLiteral(valueKey(column))} end`),
    ...(onMissing === 'keep' ? [] : gone).map(
      (field) => `case when old_value ? ${quoteLiteral(field)} then ${quoteLiteral(field)} end`,
    ),
  ];
  return kind === 'audience' || cases.length === 0
    ? 'null::text[]'
    : `nullif(array_remove(array[${cases.join(', ')}], null), '{}')`;
}

/** The columns of `delta` that a comparison fills. */
export const DELTA_COLUMNS =
  'op, recipient, profile_id, beside, value, old_value, columns, entered_at, introduce, unsendable, matched, was_kept, vanished, rivals, others';

/** Fills `delta` from `computed`, a query that gives what `computedQuery` gives. */
export function compareStatement(computed: string, comparison: Comparison, people: PeopleShape): string {
  return `insert into pg_temp.delta (${DELTA_COLUMNS}) select ${DELTA_COLUMNS} from (${differingQuery(computed, comparison, people)}) as differing`;
}

/**
 * The rows of `delta`, with the `owner` that each recipient has had so far. The steps stand as sub-queries, not as CTEs: one
 * that counts its rows would be written out before it is read. `beside` is put into its form only where it isn't what the
 * snapshot has.
 */
export function differingQuery(computed: string, comparison: Comparison, people: PeopleShape): string {
  const { definitionId, schema, kind, onMissing, columns, counted = false, some } = comparison;
  const member = kind === 'audience' ? 'true' : hasValue(columns);
  // What can't be sent keeps what the snapshot has, unless another profile of the recipient has a value for it.
  const value = columns.some(isRisky)
    ? `case when c.unsendable is null or s.value is null then c.value
         else nullif((select coalesce(jsonb_object_agg(e.key, e.value), '{}') from jsonb_each(s.value) as e where e.key = any(c.unsendable)) || coalesce(c.value, '{}'), '{}') end`
    : 'c.value';
  const known =
    definitionId === null
      ? `select null::text collate "C" as recipient, null::text as profile_id, null::text as beside, null::jsonb as value,
           null::text[] as others, false as kept, false as beside_changed, null::timestamptz as entered_at where false`
      : some === undefined
        ? `select * from ${quoteIdentifier(schema)}.snapshot where definition_id = ${definitionId} ${counted ? countingMembers(schema, definitionId) : ''}`
        : `select * from ${quoteIdentifier(schema)}.snapshot_${definitionId} where definition_id = ${definitionId} and recipient = any(${some.recipients})`;
  const gone =
    kind === 'trait' && onMissing === 'keep' ? `case when not kept then 'k' when unsendable then 's' end` : `'x'`;
  const beside = besideOf(people, 'beside');
  // Of some profiles, planning and beginning cost more than a row does: nothing is to stand there twice.
  const once = some === undefined ? '' : 'offset 0';
  const isSamePerson = `old_profile_id is not distinct from profile_id and not kept and old_others is not distinct from others
            and (old_beside is not distinct from beside or old_beside is not distinct from ${beside})`;
  const paired = `select c.present is true as computed, c.recipient, s.recipient as known_recipient, c.profile_id,
        s.profile_id as old_profile_id, c.beside, s.beside as old_beside, ${value} as value, s.value as old_value,
        coalesce(s.kept, false) as kept, s.beside_changed, s.entered_at, c.rivals, c.others, s.others as old_others, c.unsendable is not null as unsendable
      from (select true as present, q.* from (${computed}) as q) as c
      full join (${known}) as s
        on s.recipient = c.recipient ${once}`;
  const judged = `select paired.*, ${member} as member, ${changedFields(comparison)} as columns from (${paired}) as paired`;
  const classified = `select judged.*,
        case
          when not computed then ${gone}
          when recipient is null then 'w'
          when rivals is not null then 'd'
          when known_recipient is null then case when member then 'e' else 's' end
          when old_value is not distinct from value and ${isSamePerson} then case when unsendable then 's' end
          when not member then ${gone}
          when columns is not null then 'c'
          when ${sameValue(columns)} and ${isSamePerson} then case when unsendable then 's' end
          else 't'
        end as op
      from (${judged}) as judged ${once}`;
  return `select op::"char" as op, coalesce(recipient, known_recipient) as recipient, case when computed then profile_id else old_profile_id end as profile_id,
      case when computed then ${beside} else old_beside end as beside, ${settledValue(columns)} as value, old_value, columns, entered_at,
      case when op = 'c' then beside_changed or ${beside} is distinct from old_beside else op = 'e' end as introduce, unsendable,
      computed and known_recipient is not null and not (kept and (rivals is not null or not member)) as matched, kept as was_kept,
      ${some === undefined ? 'false' : `op = 'x' and coalesce(not old_profile_id = any(${some.present}), false)`} as vanished, rivals, others,
      old_profile_id as owner
    from (${classified}) as classified where op is not null`;
}
