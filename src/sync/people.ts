import { bindMoments } from '../core/moments.js';
import type { SqlText } from '../core/definition.js';
import type { Queryable } from '../db/connect.js';
import { asSubquery, type Moments, type PeopleShape } from './shape.js';

/**
 * Who is who, as SQL: which recipients a profile has by the project's kind of key, and the form in which an identifier is
 * compared and sent. An identifier is looked at before it is put into its form, which is done for each row of a run.
 */
export interface People {
  text: SqlText;
  shape: PeopleShape;
  /** Whether `user_id` is known to be nothing but `profile_id` as text, so that an index on one finds the other. */
  userIdIsProfileId?: boolean;
}

/**
 * Whether everybody is known to have a userId of their own: it is their id, which is never an empty text. No address stands
 * for anybody then, so that a person's recipients hang on their own row alone.
 */
function areAllUsers({ userIdIsProfileId, shape }: People): boolean {
  return (
    userIdIsProfileId === true &&
    shape.key !== 'email' &&
    (shape.profileType in INTEGERS || shape.profileType === 'uuid')
  );
}

/** An identifier in the form in which it is compared and sent; null where it is absent. */
const userIdOf = (column: string): string => `nullif(${column}, '')`;
const emailOf = (column: string): string => `nullif(lower(btrim(${column})), '')`;

/** Whether an identifier is there: what its form says, for a fraction of the work. */
const hasUserId = (column: string): string => `(${column} <> '')`;
const hasEmail = (column: string): string =>
  `(${column} <> '' and (not starts_with(${column} collate "C", ' ') or btrim(${column}) <> ''))`;

/** `profiles` with its identifiers as they are written, as text. */
export function peopleQuery({ text, shape }: People, moments: Moments): string {
  const userId = shape.userId ? 'p.user_id::text' : 'null::text';
  const email = shape.email ? 'p.email::text' : 'null::text';
  return `select p.profile_id, ${userId} as user_id, ${email} as email from ${asSubquery(bindMoments(text.sql, moments).text)} as p`;
}

/**
 * (profile_id, recipient, beside, lender): which recipients a profile has, by the kind of key; `beside` as written, `lender`
 * the other profile whose userId the profile's address stands for. `only`, an SQL array of profile ids, asks for theirs
 * alone, so that an index is enough to answer.
 */
export function recipientsQuery(people: People, moments: Moments, only: string | null = null): string {
  const all = asSubquery(peopleQuery(people, moments));
  const among = only === null ? '' : ` and p.profile_id = any(${only})`;
  const none = 'null::text as lender';
  // Asked of some alone, the others' rows must not be read to find that they have none.
  const without = (has: string): string =>
    only === null
      ? `not exists (select from ${all} as q where q.profile_id = p.profile_id and ${has})`
      : `not p.profile_id = any(array(select q.profile_id from ${all} as q where q.profile_id = any(${only}) and ${has}))`;
  switch (people.shape.key) {
    case 'user_id':
      return `select p.profile_id, 'u:' || p.user_id as recipient, p.email as beside, ${none} from ${all} as p where ${hasUserId('p.user_id')}${among}`;
    case 'email':
      return `select p.profile_id, 'e:' || lower(btrim(p.email)) as recipient, p.user_id as beside, ${none} from ${all} as p
        where ${hasEmail('p.email')}${among}
        union all
        select p.profile_id, 'u:' || p.user_id, null, null from ${all} as p
        where ${hasEmail('p.email')} is not true and ${hasUserId('p.user_id')}${among}
          and ${without(hasEmail('q.email'))}`;
    case 'hybrid': {
      // The smallest userId comes first, and of those who have it the smallest profile.
      const least = `min(array[q.user_id, q.profile_id::text] collate "C")`;
      const holds = `${hasUserId('q.user_id')} and ${hasEmail('q.email')}`;
      const owner =
        only === null
          ? `left join (select lower(btrim(q.email)) as email, ${least} as least from ${all} as q where ${holds} group by 1) as o
               on o.email = lower(btrim(p.email))`
          : `left join lateral (select ${least} as least from ${all} as q
               where ${holds} and lower(btrim(q.email)) = lower(btrim(p.email))) as o on true`;
      const own = `select p.profile_id, 'u:' || p.user_id as recipient, p.email as beside, ${none} from ${all} as p where ${hasUserId('p.user_id')}${among}`;
      if (areAllUsers(people)) return own;
      return `${own}
        union all
        select p.profile_id, coalesce('u:' || o.least[1], 'e:' || lower(btrim(p.email))),
          case when o.least is not null then p.email end, o.least[2]
        from ${all} as p ${owner}
        where ${hasUserId('p.user_id')} is not true and ${hasEmail('p.email')}${among}
          and ${without(hasUserId('q.user_id'))}`;
    }
  }
}

/** Whether a row of `profiles`, as `r`, has the kind of key that the project is known by, and its recipient then. */
export function ownKey({ key }: PeopleShape): { there: string; recipient: string; beside: string } {
  return key === 'email'
    ? { there: hasEmail('r.email'), recipient: `'e:' || lower(btrim(r.email))`, beside: 'r.user_id' }
    : { there: hasUserId('r.user_id'), recipient: `'u:' || r.user_id`, beside: 'r.email' };
}

/** Whether some row of `profiles` has another kind of key, or none. */
export function otherKeysQuery(people: People, moments: Moments): string {
  return `select exists (select from ${asSubquery(peopleQuery(people, moments))} as r where ${ownKey(people.shape).there} is not true) as others`;
}

/** The form of a `beside` that is as it was written. */
export function besideOf({ key }: PeopleShape, column: string): string {
  return key === 'email' ? userIdOf(column) : emailOf(column);
}

export function directRecipient(person: { email: boolean; userId: boolean }, { key }: PeopleShape): string {
  const userId = person.userId ? userIdOf('m.user_id::text') : 'null::text';
  const email = person.email ? emailOf('m.email::text') : 'null::text';
  switch (key) {
    case 'user_id':
      return `'u:' || ${userId} as recipient, null::text as profile_id, ${email} as beside`;
    case 'hybrid':
      return `coalesce('u:' || ${userId}, 'e:' || ${email}) as recipient, null::text as profile_id, case when ${userId} is not null then ${email} end as beside`;
    case 'email':
      return `coalesce('e:' || ${email}, 'u:' || ${userId}) as recipient, null::text as profile_id, case when ${email} is not null then ${userId} end as beside`;
  }
}

/** (profile_id) of the profiles that exist among `only`, an SQL array of profile ids. */
export function presentQuery(people: People, moments: Moments, only: string): string {
  return `select distinct p.profile_id from (${peopleQuery(people, moments)}) as p where p.profile_id = any(${only})`;
}

/**
 * (profile_id) of those whose recipients hang on the rows of `only` in `profiles`, an SQL array: in a hybrid project an
 * address stands for the smallest userId that anybody holds beside it. Null where each profile's hang on its own alone.
 */
export function neighboursQuery(people: People, moments: Moments, only: string): string | null {
  if (people.shape.key !== 'hybrid' || !people.shape.email || areAllUsers(people)) return null;
  const all = `(${peopleQuery(people, moments)})`;
  return `select q.profile_id from ${all} as q where lower(btrim(q.email)) = any(array(
    select lower(btrim(p.email)) from ${all} as p where p.profile_id = any(${only}) and ${hasEmail('p.email')}))`;
}

/** (profile_id) of all who may have one of `recipients`, an SQL array of text; more than have it, never fewer. */
export function holdersQuery(people: People, moments: Moments, recipients: string): string {
  const all = `(${peopleQuery(people, moments)})`;
  const { key, userId, email, profileType } = people.shape;
  const ids = (kind: 'u' | 'e'): string =>
    `array(select ${uncollated('substr(w.recipient, 3)')} from unnest(${recipients}) as w(recipient) where starts_with(w.recipient, '${kind}:'))`;
  const byUserId = (column: string): string =>
    people.userIdIsProfileId === true
      ? `${column}.profile_id = any(array(select ${castOf(profileType, 'i.id')} from unnest(${ids('u')}) as i(id)))`
      : `${column}.user_id = any(${ids('u')})`;
  const byEmail = `lower(btrim(p.email)) = any(${ids('e')})`;
  const among = (condition: string): string => `select p.profile_id from ${all} as p where ${condition}`;
  if (areAllUsers(people)) return among(byUserId('p'));
  const parts = [
    ...(userId ? [among(byUserId('p'))] : []),
    ...(email && key !== 'user_id' ? [among(byEmail)] : []),
    // An address that stands for one of the userIds.
    ...(key === 'hybrid' && userId && email
      ? [
          among(
            `lower(btrim(p.email)) = any(array(select lower(btrim(o.email)) from ${all} as o where ${byUserId('o')} and ${hasEmail('o.email')}))`,
          ),
        ]
      : []),
  ];
  return parts.join(' union ');
}

/** Whether `user_id` is made from `profile_id` by a cast alone, as PostgreSQL's plan writes both out. Executes nothing. */
export async function isUserIdProfileId(client: Queryable, people: People, moments: Moments): Promise<boolean> {
  if (!people.shape.userId) return false;
  const { rows } = await client.query<{ 'QUERY PLAN': string }>(
    `explain (verbose, costs off, format json)
     select q.profile_id, q.user_id::text from ${asSubquery(bindMoments(people.text.sql, moments).text)} as q`,
  );
  const plan = JSON.parse(rows[0]?.['QUERY PLAN'] ?? '[]') as readonly { Plan?: { Output?: readonly string[] } }[];
  const [profile, user] = plan[0]?.Plan?.Output ?? [];
  return profile !== undefined && (user === profile || user === `(${profile})::text`);
}

const INTEGERS: Readonly<Record<string, { digits: number; least: string; most: string }>> = {
  smallint: { digits: 5, least: '-32768', most: '32767' },
  integer: { digits: 10, least: '-2147483648', most: '2147483647' },
  bigint: { digits: 19, least: '-9223372036854775808', most: '9223372036854775807' },
};
const UUID = '^[0-9a-fA-F]{8}-([0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}$';

/** Text as a value of `type`, of profile ids; null where it is none, for the types that ids commonly have. */
export function castOf(type: string, text: string): string {
  const range = INTEGERS[type];
  if (range !== undefined) {
    const { digits, least, most } = range;
    return `(case when ${text} ~ '^-?[0-9]{1,${digits}}$' then case when ${text}::numeric between ${least} and ${most} then ${text}::${type} end end)`;
  }
  if (type === 'uuid') return `(case when ${text} ~ '${UUID}' then ${text}::uuid end)`;
  return `${uncollated(text)}::${type}`;
}

/** Text without a collation of its own: compared with a column it takes that column's, as the column's index has it. */
export const uncollated = (text: string): string => `(to_jsonb(${text}) #>> '{}')`;
