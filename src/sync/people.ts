import { bindMoments } from '../core/moments.js';
import type { SqlText } from '../core/definition.js';
import { asSubquery, type Moments, type PeopleShape } from './shape.js';

/**
 * Who is who, as SQL: which recipients a profile has by the project's kind of key, and the form in which an identifier is
 * compared and sent. An identifier is looked at before it is put into its form, which is done for each row of a run.
 */
export interface People {
  text: SqlText;
  shape: PeopleShape;
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
  switch (people.shape.key) {
    case 'user_id':
      return `select p.profile_id, 'u:' || p.user_id as recipient, p.email as beside, ${none} from ${all} as p where ${hasUserId('p.user_id')}${among}`;
    case 'email':
      return `select p.profile_id, 'e:' || lower(btrim(p.email)) as recipient, p.user_id as beside, ${none} from ${all} as p
        where ${hasEmail('p.email')}${among}
        union all
        select p.profile_id, 'u:' || p.user_id, null, null from ${all} as p
        where ${hasEmail('p.email')} is not true and ${hasUserId('p.user_id')}${among}
          and not exists (select from ${all} as q where q.profile_id = p.profile_id and ${hasEmail('q.email')})`;
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
      return `select p.profile_id, 'u:' || p.user_id as recipient, p.email as beside, ${none} from ${all} as p where ${hasUserId('p.user_id')}${among}
        union all
        select p.profile_id, coalesce('u:' || o.least[1], 'e:' || lower(btrim(p.email))),
          case when o.least is not null then p.email end, o.least[2]
        from ${all} as p ${owner}
        where ${hasUserId('p.user_id')} is not true and ${hasEmail('p.email')}${among}
          and not exists (select from ${all} as q where q.profile_id = p.profile_id and ${hasUserId('q.user_id')})`;
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
