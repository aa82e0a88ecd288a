import type { Queryable } from '../db/connect.js';
import { countOf, formatCount, formatDuration, plain, SIGN } from './output.js';

/** What `status` tells of real time: whether changes of a definition are followed, and what waits to be evaluated. */
export interface RealtimeStatus {
  state: 'live' | 'polled';
  /** Why it is polled, or why what waits can't be evaluated at present. */
  because: string | null;
  /** Profiles that wait to be evaluated. */
  waiting: number;
  /** Profiles whose evaluation fails; each is tried again every hour, and when it changes. */
  parked: number;
  oldestSeconds: number | null;
  /** What the last reconcile had to correct; null: there was none. */
  corrections: number | null;
}

interface Row extends RealtimeStatus {
  key: string;
  distrusted: boolean;
  parkedBecause: string | null;
}

export interface RealtimeOf {
  status: RealtimeStatus;
  /** It was given up, and stays so until a person resumes it. */
  isGivenUp: boolean;
  /** Why one of those that are parked is. */
  parkedBecause: string | null;
}

/** By key, for the definitions that ask for it. */
export async function readRealtime(state: Queryable): Promise<ReadonlyMap<string, RealtimeOf>> {
  const { rows } = await state.query<Row>(
    `select d.key, d.tracking as state, coalesce(d.polled_because, d.stuck_because) as because,
       d.distrusted_at is not null as distrusted, w.waiting, w.parked, w.oldest as "oldestSeconds",
       w.because as "parkedBecause", reconciled.corrections
     from definition as d
     cross join lateral (
       select count(distinct profile_id) filter (where parked_at is null) as waiting,
         count(distinct profile_id) filter (where parked_at is not null) as parked, min(reason) as because,
         floor(extract(epoch from now() - min(at) filter (where parked_at is null)))::int8 as oldest
       from due where due.definition_id = d.id) as w
     left join lateral (
       select r.corrections from run as r where r.definition_id = d.id and r.corrections is not null order by r.id desc limit 1) as reconciled on true
     where d.tracking <> 'none'`,
  );
  return new Map(
    rows.map(({ key, distrusted, parkedBecause, ...status }) => [
      key,
      {
        // A row may be younger than this statement.
        status: { ...status, oldestSeconds: status.oldestSeconds === null ? null : Math.max(0, status.oldestSeconds) },
        isGivenUp: distrusted && status.state === 'polled',
        parkedBecause,
      },
    ]),
  );
}

/** How a definition comes to be run, given how its configuration says so. */
export function describeRuns(cadence: string, realtime: RealtimeStatus | null): string {
  return cadence === 'real time' && realtime?.state === 'polled' ? 'polled' : cadence;
}

/** What waits, as it follows a definition's state; empty where nothing does. */
export function describeWaiting(realtime: RealtimeStatus | null): string {
  if (realtime === null || realtime.waiting === 0) return '';
  const since = realtime.oldestSeconds === null ? '' : ` for ${formatDuration(realtime.oldestSeconds * 1000)}`;
  return `, ${formatCount(realtime.waiting)} changed${since}`;
}

/** What a person should know or do about a definition's real time, a line each. */
export function adviseOnRealtime(
  key: string,
  cadence: string,
  { status, isGivenUp, parkedBecause }: RealtimeOf,
): string[] {
  const { state, because, parked, corrections } = status;
  const lines: string[] = [];
  if (state === 'polled') {
    const instead = cadence === 'real time' ? 'is polled' : 'compares everybody each time';
    const mended = isGivenUp ? ` When that is mended, \`personas-sync resume ${key}\` has it followed again.` : '';
    lines.push(`${isGivenUp ? SIGN.bad : SIGN.note} ${key} ${instead}: ${plain(because ?? '')}${mended}`);
  } else if (because !== null) lines.push(`${SIGN.bad} What has changed of ${key} waits: ${plain(because)}`);
  if (parked > 0) {
    lines.push(
      `${SIGN.bad} ${countOf(parked, 'profile')} of ${key} can't be evaluated, tried again each hour: ${plain(parkedBecause ?? '')}`,
    );
  }
  if (state === 'live' && corrections !== null && corrections > 0)
    lines.push(`${SIGN.note} The last reconcile of ${key} corrected ${countOf(corrections, 'recipient')}.`);
  return lines;
}
