import type { Queryable } from '../db/connect.js';

/**
 * What waits in `due`, for those who evaluate it: which definitions have something, how much it is, and what becomes of
 * that which can't be evaluated. How it comes there is in due.ts. The bare names of every `client` here are the state's.
 */

/** How many profiles may wait before it isn't worth counting on. */
const COUNTED = 100_001;

export interface Weight {
  id: number;
  key: string;
  /** Profiles that wait to be evaluated, by their rows: 100,001 stands for more. */
  waiting: number;
  /** How long the last run in full took; null: there has been none. */
  fullMs: number | null;
}

/** What waits for each of these definitions, and what comparing everybody takes instead. */
export async function weighDue(client: Queryable, definitionIds: readonly number[]): Promise<readonly Weight[]> {
  const { rows } = await client.query<{ id: number; key: string; waiting: number; full_ms: number | null }>(
    `select d.id, d.key,
       (select count(*) from (
          select from due where definition_id = d.id and parked_at is null and claimed_by is null limit ${COUNTED}) as w) as waiting,
       (select (extract(epoch from r.finished_at - r.started_at) * 1000)::int from run as r
        where r.definition_id = d.id and r.outcome = 'succeeded' and r.evaluated is null order by r.id desc limit 1) as full_ms
     from definition as d where d.id = any($1)`,
    [definitionIds],
  );
  return rows.map(({ id, key, waiting, full_ms: fullMs }) => ({ id, key, waiting, fullMs }));
}

export interface Followed {
  id: number;
  key: string;
  /** Something waits to be evaluated, or a window has been reached. */
  isReady: boolean;
  isStuck: boolean;
}

/** The definitions that follow changes. */
export async function readFollowed(client: Queryable): Promise<readonly Followed[]> {
  const { rows } = await client.query<{ id: number; key: string; ready: boolean; stuck: boolean }>(
    `select d.id, d.key, d.stuck_because is not null as stuck,
       d.state = 'active' and (
         exists (select from due where definition_id = d.id and parked_at is null and claimed_by is null)
         or exists (select from validity where definition_id = d.id and until <= clock_timestamp())) as ready
     from definition as d where d.tracking = 'live'`,
  );
  return rows.map(({ id, key, ready, stuck }) => ({ id, key, isReady: ready, isStuck: stuck }));
}

/** The first that wait, reached windows among them, which come to have rows by this. */
export async function readWaiting(
  client: Queryable,
  definitionId: number,
  limit: number,
): Promise<readonly { id: number; profileId: string }[]> {
  await client.query(
    `insert into due (definition_id, profile_id)
     select v.definition_id, v.profile_id from validity as v where v.definition_id = $1 and v.until <= clock_timestamp()
       and not exists (select from due as d where d.definition_id = v.definition_id and d.profile_id = v.profile_id)
     order by v.until limit $2`,
    [definitionId, limit],
  );
  const { rows } = await client.query<{ id: number; profile_id: string }>(
    `select id, profile_id from due where definition_id = $1 and parked_at is null and claimed_by is null order by id limit $2`,
    [definitionId, limit],
  );
  return rows.map(({ id, profile_id: profileId }) => ({ id, profileId }));
}

/** Has what waits under these ids wait apart from all else, until it is tried again or the profile changes. */
export async function park(
  client: Queryable,
  definitionId: number,
  ids: readonly number[],
  sentence: string,
): Promise<void> {
  await client.query(
    `with parked as (
       update due set parked_at = clock_timestamp(), reason = $3 where definition_id = $1 and id = any($2) returning profile_id)
     update validity set until = clock_timestamp() + interval '1 hour'
     from parked where validity.definition_id = $1 and validity.profile_id = parked.profile_id and until <= clock_timestamp()`,
    [definitionId, ids, sentence],
  );
}

/** Has those that were parked an hour ago tried again. */
export async function retryParked(client: Queryable): Promise<void> {
  await client.query(
    `update due set parked_at = null, reason = null, at = clock_timestamp() where parked_at < clock_timestamp() - interval '1 hour'`,
  );
}

/** Why what waits for a definition can't be evaluated at present; null: it can. */
export async function markStuck(client: Queryable, definitionId: number, sentence: string | null): Promise<void> {
  await client.query('update definition set stuck_because = $2 where id = $1', [definitionId, sentence]);
}
