import type { Pool } from './connect.js';
import { databaseFailure } from './failure.js';

/** Some hosts don't have, or don't give away, what tells histories apart. */
const REFUSED = new Set(['0A000', '42501', '42883']);

/**
 * Tells which database a pool leads to and which of its histories: another text after it was restored from a backup or a
 * standby has taken over, so that what was committed last may not be there. `table` is one of the database's own, which
 * has another number when it is made again. Empty where the host refuses to say.
 */
export async function readHistory(pool: Pick<Pool, 'query'>, table: string | null): Promise<string> {
  try {
    const { rows } = await pool.query<{ history: string }>(
      `select concat_ws('/', (select system_identifier from pg_control_system()),
         case when not pg_is_in_recovery() then left(pg_walfile_name(pg_current_wal_insert_lsn()), 8) end,
         (select oid from pg_database where datname = current_database()), to_regclass($1)::oid) as history`,
      [table],
    );
    return rows[0]?.history ?? '';
  } catch (error) {
    if (REFUSED.has(databaseFailure(error)?.sqlstate ?? '')) return '';
    throw error;
  }
}
