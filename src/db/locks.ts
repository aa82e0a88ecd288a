import type { Client, Runner } from './connect.js';

/** Locks by which this program's own transactions wait for each other, held until the transaction ends. */

/** Tells this program's locks apart from those of others in the same database. */
const LOCK_CLASS = 0x70657273;
/** An instance that stands still with a lock for which others wait is cut off by the server after this. */
export const STANDS_STILL_MS = 10_000;
/** Selected by the statement that locks: an instance that stands still in this transaction is cut off by the server. */
export const CUTS_OFF = `set_config('idle_in_transaction_session_timeout', '${STANDS_STILL_MS}', true)`;

/**
 * Waits until no other transaction writes this definition's snapshot or marks. An instance that stands still with it is
 * cut off by the server: others wait for the lock.
 */
export async function lockDefinition(session: Client, definitionId: number): Promise<void> {
  await session.query(`select ${CUTS_OFF}, lock.* from (${definitionLock(definitionId)}) as lock`);
}

/** The statement by which `lockDefinition` waits, for a session that has its time-out already. */
export function definitionLock(definitionId: number): string {
  return `select pg_advisory_xact_lock(${LOCK_CLASS}, ${definitionId})`;
}

/** Waits until no other transaction gives fields to a definition. */
export async function lockFields(session: Runner): Promise<void> {
  await session.query('select pg_advisory_xact_lock($1::int4, 0)', [LOCK_CLASS]);
}

/** Waits until no other transaction brings the tables in line with a configuration. */
export async function lockRegistry(session: Runner): Promise<void> {
  await session.query('select pg_advisory_xact_lock($1::int4, -1)', [LOCK_CLASS]);
}
