import type { Queryable } from '../db/connect.js';

/**
 * The table `due`: whose rows have changed in the source, for each definition that follows changes. It is a queue, not a
 * set: a profile that changes again while it is evaluated has another row, and whoever evaluates deletes the ids that it
 * had read and no others. Where too many wait, a run in full is wanted instead (`definition.full_wanted`), which only a
 * full run that began later may settle.
 *
 * The bare names of every `client` here are those of the state.
 */

/** Adds the profiles to each of the definitions that follow changes; returns the ids of those definitions. */
export async function addDue(
  client: Queryable,
  keys: readonly string[],
  profileIds: readonly string[],
): Promise<readonly number[]> {
  if (keys.length === 0 || profileIds.length === 0) return [];
  const { rows } = await client.query<{ id: number }>(
    `with followed as (select id from definition where key = any($1) and tracking = 'live'),
     added as (insert into due (definition_id, profile_id) select id, p from followed, unnest($2::text[]) as p)
     select id from followed`,
    [keys, profileIds],
  );
  return rows.map(({ id }) => id);
}

/**
 * Has each of these definitions that follows changes compared in full, as soon as there is a place. `dropDue`: that run
 * stands for all that waits, too; otherwise single changes don't wait for it.
 */
export async function wantFull(
  client: Queryable,
  keys: readonly string[],
  { dropDue }: { dropDue: boolean },
): Promise<void> {
  if (keys.length === 0) return;
  await client.query(
    `with wanted as (
       update definition set full_wanted = nextval('version'), due_at = least(due_at, clock_timestamp())
       where key = any($1) and tracking = 'live' returning id)
     delete from due using wanted where $2 and due.definition_id = wanted.id and due.parked_at is null and due.claimed_by is null`,
    [keys, dropDue],
  );
}
