import type { Client } from '../db/connect.js';
import { DELTA_TABLE } from './delta.js';
import { WINDOWS_TABLE } from './windows.js';

/**
 * A large `delta` in parts, so that whoever evaluates single changes never waits long for the definition's lock. The whole
 * outlives the transaction that computed it; each part is put into a `delta` of its own transaction. A profile is in one
 * part with all its recipients: the exit of an old key and the entry of the new belong together.
 */

/** From so many changes on it is worth it. */
export const PARTED_FROM = 20_000;
const PROFILES = 5_000;

/** Keeps what was found beyond the end of this transaction; returns the number of parts. */
export async function keepWhole(session: Client, { windowed }: { windowed: boolean }): Promise<number> {
  // Who has no identifier is counted and not written; who is in conflict is noted once, with the first.
  await session.query(
    `create temporary table whole on commit preserve rows as
     select d.*, case when op = 'd' then 0
       else (dense_rank() over (order by coalesce(profile_id, recipient)) - 1) / ${PROFILES} end as part
     from pg_temp.delta as d where op <> 'w'`,
  );
  await session.query('create index on pg_temp.whole (part)');
  if (windowed)
    await session.query(
      'create temporary table whole_windows on commit preserve rows as select * from pg_temp.windows',
    );
  const { rows } = await session.query<{ parts: string }>(
    'select coalesce(max(part), 0) + 1 as parts from pg_temp.whole',
  );
  return Number(rows[0]?.parts);
}

/** Makes a `delta` of one part, and with the last one `windows`. */
export async function takePart(session: Client, part: number, { windowed }: { windowed: boolean }): Promise<void> {
  await session.query(DELTA_TABLE);
  const columns = `op, recipient, profile_id, beside, value, old_value, columns, entered_at, introduce, unsendable, matched,
    was_kept, known, vanished, rivals, others`;
  await session.query(
    `insert into pg_temp.delta (${columns}) select ${columns} from pg_temp.whole where part = ${part}`,
  );
  if (!windowed) return;
  await session.query(WINDOWS_TABLE);
  await session.query('insert into pg_temp.windows select * from pg_temp.whole_windows');
}

/** Lets go of it; the session may be in no transaction any more. */
export async function dropWhole(session: Client): Promise<void> {
  await session.query('drop table if exists pg_temp.whole, pg_temp.whole_windows');
}
