import { inTransaction } from '../db/connect.js';
import { fenceLease } from '../db/lease.js';
import type { State } from '../db/state.js';

/**
 * What is noted of a destination, and of what a definition sends there: that it has stopped, and which list it fills. Only
 * while this instance leads.
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

export interface Stop {
  destinationId: number;
  definitionId: number;
  reason: string;
  /** Its list is there no more: another is found or made when the calls go on. */
  isListGone: boolean;
}

/** Has the calls of one definition wait until a person resumes it; those of the others go on. Gives the key of the definition. */
export async function stopDefinition(
  state: State,
  leader: string,
  { destinationId, definitionId, reason, isListGone }: Stop,
): Promise<string> {
  return inTransaction(state.pool, async (client) => {
    await fenceLease(client, leader);
    await client.query(
      `update definition_destination set stopped = $3, list_id = case when $4 then null else list_id end
       where destination_id = $1 and definition_id = $2 and stopped is null`,
      [destinationId, definitionId, reason, isListGone],
    );
    const { rows } = await client.query<{ key: string }>('select key from definition where id = $1', [definitionId]);
    return rows[0]?.key ?? String(definitionId);
  });
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
