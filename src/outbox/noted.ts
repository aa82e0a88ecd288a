import { inTransaction } from '../db/connect.js';
import { fenceLease } from '../db/lease.js';
import type { State } from '../db/state.js';
import { LIST } from './queue.js';

/**
 * What is noted of a destination, and of what a definition sends there: that it has stopped, what was refused or left out,
 * and which list it fills. Only while this instance leads.
 */

/** Stops a destination: nothing more is sent to it until a person resumes it; what waits stays. */
export async function stopDestination(
  state: State,
  leader: string,
  destinationId: number,
  reason: string,
): Promise<void> {
  await inTransaction(state.pool, async (client) => {
    await fenceLease(client, leader);
    await client.query(`update destination set state = 'stopped', reason = $2 where id = $1`, [destinationId, reason]);
  });
}

/** What of a definition isn't sent to a destination any more, and why, until a person resumes it. */
export interface Stop {
  definitionId: number;
  /** Left out of what is sent from now on; null: all of its calls wait. */
  field: string | null;
  reason: string;
  /** Its list is there no more: another is found or made when the calls go on. */
  isListGone: boolean;
}

/** What has stopped: where a field is left of a definition, it goes on. */
export type Stopped = 'field' | 'definition';

/**
 * Leaves a field out of what is sent to a destination until a person resumes its definition, or has all calls of the
 * definition wait, if no field of it is left. Gives the key of the definition, too.
 */
export async function stopCalls(
  state: State,
  leader: string,
  destinationId: number,
  { definitionId, field, reason, isListGone }: Stop,
): Promise<{ key: string; stopped: Stopped }> {
  return inTransaction(state.pool, async (client) => {
    await fenceLease(client, leader);
    const { rows } = await client.query<{ key: string; stopped: Stopped }>(
      `with told as (
         select d.key, case d.kind
             when 'audience' then array_remove(array[case when dd.identify then d.key end, case when dd.list is not null then '${LIST}' end], null)
             else array(select jsonb_object_keys(d.fields)) end as fields,
           dd.stopped_fields || case when $3::text is null then '{}' else jsonb_build_object($3::text, $4::text) end as fields_stopped
         from definition as d join definition_destination as dd on dd.definition_id = d.id and dd.destination_id = $1
         where d.id = $2),
       judged as (select told.*, $3::text is null or fields_stopped ?& fields as is_whole from told)
       update definition_destination as dd set
         stopped = case when is_whole then coalesce(dd.stopped, $4) else dd.stopped end,
         stopped_fields = case when is_whole then '{}' else fields_stopped end,
         list_id = case when $5 then null else list_id end
       from judged where dd.destination_id = $1 and dd.definition_id = $2
       returning judged.key, case when is_whole then 'definition' else 'field' end as stopped`,
      [destinationId, definitionId, field, reason, isListGone],
    );
    const written = rows[0] ?? { key: String(definitionId), stopped: 'definition' };
    // A leader that dies before it has noted what it counted leaves a count that has come to its end.
    await client.query(
      `update destination set streaks = coalesce((
         select jsonb_object_agg(name, count) from jsonb_each(streaks) as counted (name, count)
         where case when $3 then not starts_with(name, $2) else name <> $2 end), '{}') where id = $1`,
      [
        destinationId,
        `${definitionId} ${written.stopped === 'field' ? (field ?? '') : ''}`,
        written.stopped === 'definition',
      ],
    );
    return written;
  });
}

/** How many calls in a row were refused for their content, by definition and field. */
export type Streaks = Readonly<Record<string, number>>;

export async function readStreaks(state: State, destinationId: number): Promise<Streaks> {
  const { rows } = await state.pool.query<{ streaks: Streaks }>('select streaks from destination where id = $1', [
    destinationId,
  ]);
  return rows[0]?.streaks ?? {};
}

/** Whoever has lost the lease would write in the next leader's place. */
const IS_LEADER = 'exists (select from leader where holder = $3)';

/** Remembers how deliveries go, for whoever looks at the tables; JSON text. */
export async function noteDelivery(
  state: State,
  leader: string,
  destinationId: number,
  delivery: string,
): Promise<void> {
  await state.pool.query(`update destination set delivery = $2 where id = $1 and ${IS_LEADER}`, [
    destinationId,
    delivery,
    leader,
  ]);
}

export async function noteStreaks(
  state: State,
  leader: string,
  destinationId: number,
  streaks: Streaks,
): Promise<void> {
  await state.pool.query(`update destination set streaks = $2 where id = $1 and ${IS_LEADER}`, [
    destinationId,
    JSON.stringify(streaks),
    leader,
  ]);
}

/** For so long it is told that a field was left out. */
export const LEFT_OUT_FOR = '7 days';

/** Remembers that the destination has left these fields out of what it was sent. */
export async function noteLeftOut(
  state: State,
  leader: string,
  destinationId: number,
  fields: readonly string[],
): Promise<void> {
  await state.pool.query(
    `update destination as t set left_out = coalesce((
       select jsonb_object_agg(field, at) from jsonb_each_text(t.left_out
         || (select jsonb_object_agg(field, now()) from unnest($2::text[]) as field)) as known(field, at)
       where at::timestamptz > now() - interval '${LEFT_OUT_FOR}'), '{}')
     where id = $1 and ${IS_LEADER}`,
    [destinationId, fields, leader],
  );
}

/** Remembers the id of the list that a definition fills. */
export async function noteList(
  state: State,
  leader: string,
  {
    destinationId,
    definitionId,
    name,
    listId,
  }: { destinationId: number; definitionId: number; name: string; listId: number },
): Promise<void> {
  await inTransaction(state.pool, async (client) => {
    await fenceLease(client, leader);
    await client.query(
      'update definition_destination set list_id = $3 where destination_id = $1 and definition_id = $2 and list = $4',
      [destinationId, definitionId, listId, name],
    );
  });
}
