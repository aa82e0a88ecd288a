import type { GuardLimits } from '../core/definition.js';
import { judgeGuard, overHour, type Counts, type GuardVerdict } from '../core/guard.js';
import { quoteIdentifier, type Client, type Runner } from '../db/connect.js';

/**
 * What was written of a definition within the hour, by the minute (`tally`): in real time a guard judges that, since any
 * single change is small. The bare names of every session are those of the state, unless a schema is given.
 */
export type Hour = Omit<Counts, 'before'>;

/** An SQL expression that gives an `Hour` as JSON, up to the moment `now`; `schema` is the state's, unquoted. */
export function hourQuery(schema: string, definitionId: number, now: string): string {
  const sum = (name: keyof Hour): string => `'${name}', coalesce(sum(${name}), 0)`;
  return `(select jsonb_build_object(${[sum('entered'), sum('exited'), sum('changed'), sum('nulled')].join(', ')})
    from ${quoteIdentifier(schema)}.tally where definition_id = ${definitionId} and minute > ${now} - interval '1 hour')`;
}

export async function readHour(session: Client, schema: string, definitionId: number): Promise<Hour> {
  const { rows } = await session.query<{ hour: string }>(
    `select ${hourQuery(schema, definitionId, 'clock_timestamp()')}::text as hour`,
  );
  return JSON.parse(rows[0]?.hour ?? 'null') as Hour;
}

/**
 * The same, of whoever is elsewhere than an hour ago: somebody who leaves and comes back ten times is no exit. Read from
 * the history and `delta`, which is what would be written next; so these counts hold both.
 */
async function readNetHour(session: Runner, definitionId: number): Promise<Pick<Hour, 'entered' | 'exited'>> {
  const { rows } = await session.query<{ entered: string; exited: string }>(
    `with moves as (
       select recipient, kind::text as kind, at from transition
         where definition_id = ${definitionId} and kind in ('e', 'x')
         and at >= (select min(minute) from tally where definition_id = ${definitionId} and minute > clock_timestamp() - interval '1 hour')
       union all select recipient, op::text, 'infinity' from delta where op in ('e', 'x')),
     people as (
       select (array_agg(kind order by at))[1] as first, (array_agg(kind order by at desc))[1] as last from moves group by recipient)
     select count(*) filter (where first = 'e' and last = 'e') as entered, count(*) filter (where first = 'x' and last = 'x') as exited
     from people`,
  );
  return { entered: Number(rows[0]?.entered), exited: Number(rows[0]?.exited) };
}

/**
 * Judges what would be written together with what was written within the hour; the sums first, which cost nothing, and
 * where they would hold, the people that they are made of.
 */
export async function judgeHour(
  session: Runner,
  definitionId: number,
  limits: GuardLimits | null,
  counts: Counts,
  hour: Hour,
): Promise<GuardVerdict> {
  const summed = overHour(counts, hour);
  const verdict = judgeGuard(limits, summed, { first: false });
  if (verdict.kind === 'passes') return verdict;
  const net = await readNetHour(session, definitionId);
  return judgeGuard(
    limits,
    { ...summed, ...net, before: counts.before + counts.entered - counts.exited - net.entered + net.exited },
    { first: false },
  );
}

/** Adds what is being written in this transaction. */
export async function addToHour(
  session: Runner,
  definitionId: number,
  { entered, exited, changed, nulled }: Hour,
): Promise<void> {
  if (entered + exited + changed + nulled === 0) return;
  await session.query(
    `with over as (delete from tally where definition_id = ${definitionId} and minute < now() - interval '61 minutes')
     insert into tally (definition_id, minute, entered, exited, changed, nulled)
     values (${definitionId}, greatest(date_trunc('minute', now()), (select max(minute) from tally where definition_id = ${definitionId})), $1::bigint, $2::bigint, $3::bigint, $4::bigint)
     on conflict (definition_id, minute) do update set entered = tally.entered + excluded.entered,
       exited = tally.exited + excluded.exited, changed = tally.changed + excluded.changed, nulled = tally.nulled + excluded.nulled`,
    [entered, exited, changed, nulled],
  );
}

/** The hour begins anew: a person has seen what was to be written, and approved it. */
export async function beginHour(session: Client, definitionId: number): Promise<void> {
  await session.query(
    `with gone as (delete from tally where definition_id = ${definitionId} and minute < now())
     insert into tally (definition_id, minute, entered, exited, changed, nulled) values (${definitionId}, now(), 0, 0, 0, 0)
     on conflict do nothing`,
  );
}
