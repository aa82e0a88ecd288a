import type { Client, Runner } from './connect.js';

/** Locks by which this program's own transactions wait for each other, held until the transaction ends. */

/** Tells this program's locks apart from those of others in the same database. */
const LOCK_CLASS = 0x70657273;

/**
 * Waits until no other transaction writes this definition's snapshot or marks. An instance that stands still with it is
 * cut off by the server: others wait for the lock.
 */
export async function lockDefinition(session: Client, definitionId: number): Promise<void> {
  await session.query(definitionLock(definitionId));
}

/** The statement by which `lockDefinition` does that, to be sent together with others. */
export function definitionLock(definitionId: number): string {
  return `select set_config('idle_in_transaction_session_timeout', '10000', true), pg_advisory_xact_lock(${LOCK_CLASS}, ${definitionId})`;
}

/** Waits until no other transaction gives fields to a definition. */
export async function lockFields(session: Runner): Promise<void> {
  await session.query('select pg_advisory_xact_lock($1::int4, 0)', [LOCK_CLASS]);
}
