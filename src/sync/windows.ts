import { bindMoments } from '../core/moments.js';
import type { Client } from '../db/connect.js';
import { asSubquery } from './shape.js';
import type { Inputs } from './statement.js';

/**
 * When profiles have to be looked at again though nothing of them changes (`validity`): a window closes, or opens. One
 * moment a profile, the earliest that its rows name. The bare names of a session that writes are those of the state.
 */
export const WINDOWS_TABLE =
  'create temporary table windows (profile_id text collate "C" primary key, until timestamptz not null) on commit drop';

/** (profile_id, until) of rows, as `m`, that have a `valid_until`. */
function windowsFrom({ shape }: Inputs, rows: string, condition = ''): string {
  const until = shape.validUntil === 'timestamp' ? `m.valid_until at time zone 'UTC'` : 'm.valid_until';
  return `select m.profile_id::text as profile_id, min(${until}) as until from ${rows} as m
    where m.profile_id is not null and isfinite(${until}) ${condition} group by 1`;
}

const rowsOf = ({ definition, moments }: Inputs): string => asSubquery(bindMoments(definition.text.sql, moments).text);

/** When each of `profiles`, an SQL array of their own type, has to be looked at again, the moments as text. */
export function windowsOfSome(inputs: Inputs, profiles: string): string {
  return `select profile_id, until::text as until
    from (${windowsFrom(inputs, rowsOf(inputs), `and m.profile_id = any(${profiles})`)}) as w`;
}

/** The same of everybody. */
export function windowsOfAll(inputs: Inputs): string {
  return windowsFrom(inputs, rowsOf(inputs));
}

/** The name under which `collectingWindows` has the definition's rows. */
export const COLLECTED_ROWS = 'personas_rows';

/** What comes before an INSERT, so that `windows` is filled from the rows that it computes. */
export function collectingWindows(inputs: Inputs): string {
  return `with ${COLLECTED_ROWS} as materialized (select * from ${rowsOf(inputs)} as r),
    personas_windows as (insert into pg_temp.windows (profile_id, until) ${windowsFrom(inputs, COLLECTED_ROWS)}) `;
}

/**
 * Writes what differs, under the definition's lock. What was evaluated since the run's start has newer moments, and what
 * is due or was reached comes to have them: these are left as they are, or nobody would look at them again.
 */
export async function writeWindows(session: Client, definitionId: number): Promise<void> {
  await session.query(`create index on pg_temp.windows (until); analyze pg_temp.windows`);
  const newer = `select name from noted where definition_id = ${definitionId} and kind = 'p'
    union all select profile_id from due where definition_id = ${definitionId} and claimed_by is null
    union all select profile_id from validity where definition_id = ${definitionId} and until <= clock_timestamp()`;
  await session.query(
    `delete from validity as v where definition_id = ${definitionId}
     and not exists (select from pg_temp.windows as w where w.profile_id = v.profile_id) and v.profile_id not in (${newer})`,
  );
  await session.query(
    `insert into validity (definition_id, profile_id, until)
     select ${definitionId}, w.profile_id, greatest(w.until, now() + interval '1 second')
     from pg_temp.windows as w left join validity as v on v.definition_id = ${definitionId} and v.profile_id = w.profile_id
     where w.until is distinct from v.until and w.profile_id not in (${newer})
     on conflict (definition_id, profile_id) do update set until = excluded.until`,
  );
}
