import type { Queryable } from '../../src/db/connect.js';

/** Has the profiles wait for those of these definitions that follow changes; returns the ids of these definitions. */
export async function addDue(
  client: Queryable,
  keys: readonly string[],
  profileIds: readonly string[],
): Promise<readonly number[]> {
  const { rows } = await client.query<{ id: number }>(
    `with followed as (select id from definition where key = any($1) and tracking = 'live'),
     added as (insert into due (definition_id, profile_id) select id, p from followed, unnest($2::text[]) as p)
     select id from followed`,
    [keys, profileIds],
  );
  return rows.map(({ id }) => id);
}
