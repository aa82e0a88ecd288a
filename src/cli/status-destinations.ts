import pc from 'picocolors';
import { LEFT_OUT_FOR } from '../outbox/noted.js';
import { LIST } from '../outbox/queue.js';
import type { Opened } from './open.js';
import { countOf, formatCount, formatDuration, formatTable, plain, SIGN } from './output.js';
import { quotasOf } from './quotas.js';

/** What `status` tells of destinations: what waits for them, what they have refused, and how their lanes go. */
export interface DestinationStatus {
  name: string;
  host: string;
  state: 'active' | 'paused' | 'stopped';
  reason: string | null;
  waiting: number;
  oldestWaitingSeconds: number | null;
  dead: number;
  /** Whether it still is in the configuration, with this host. */
  configured: boolean;
  /**
   * How long it takes at the present rate until nothing waits any more that could be sent: 0 where nothing does, null where
   * nothing moves or nobody leads. Of one definition alone it is how long the destination takes for those of all, which
   * share the rate: an upper bound.
   */
  drainsInSeconds: number | null;
  /** Fields that the destination has left out of what it was sent lately. */
  droppedFields: readonly string[];
  /** Definitions whose calls wait here for a person, and why. */
  stoppedDefinitions: readonly { definition: string; reason: string }[];
  /** Fields that are left out of what is sent, since it was refused for them. */
  stoppedFields: readonly { definition: string; field: string; reason: string }[];
  lanes: readonly LaneStatus[];
}

interface LaneStatus {
  name: string;
  /** Requests a second. */
  quota: number;
  /** What the lane lets through at present: less where the destination has asked to wait again and again. */
  allowed: number;
  /** Requests, and calls that were accepted, over the last ten seconds. */
  requestsPerSecond: number;
  callsPerSecond: number;
}

/** What the leader has last told of a destination; all of it is old news where nobody leads. */
interface Told {
  acknowledgedPerSecond: number;
  lanes: readonly LaneStatus[];
}

interface DestinationRow extends Omit<DestinationStatus, 'lanes' | 'configured' | 'drainsInSeconds'> {
  /** Calls that nothing keeps from being sent and those of backfills that are still to come: of what is asked for, of all. */
  left: number;
  leftInAll: number;
  delivery: Told | null;
}

export async function readDestinations(
  { config, databases, targetOf }: Opened,
  key: string | null,
  isLed: boolean,
): Promise<DestinationStatus[]> {
  const { rows } = await databases.state.pool.query<DestinationRow>(
    `with held as materialized (
       select dd.definition_id, dd.destination_id from definition_destination as dd
       join definition as d on d.id = dd.definition_id where d.state = 'paused' or dd.stopped is not null),
     -- Those of the definition that is asked for, or of all.
     meant as materialized (select id from definition where $1::text is null or key = $1)
     select t.name, t.host, t.state, t.reason, t.delivery, coalesce(w.waiting, 0) as waiting,
       coalesce(w.moving, 0) + coalesce(b.ahead, 0) as left,
       coalesce(w.moving_in_all, 0) + coalesce(b.ahead_in_all, 0) as "leftInAll",
       w.oldest as "oldestWaitingSeconds", coalesce(x.dead, 0) as dead,
       (select coalesce(jsonb_agg(jsonb_build_object('definition', d.key, 'reason', dd.stopped) order by d.key), '[]')
        from definition_destination as dd join definition as d on d.id = dd.definition_id
        where dd.destination_id = t.id and dd.stopped is not null and ($1::text is null or d.key = $1)) as "stoppedDefinitions",
       (select coalesce(jsonb_agg(jsonb_build_object('definition', d.key, 'field', f.key, 'reason', f.value) order by d.key, f.key), '[]')
        from definition_destination as dd join definition as d on d.id = dd.definition_id
        cross join lateral jsonb_each_text(dd.stopped_fields) as f
        where dd.destination_id = t.id and ($1::text is null or d.key = $1)) as "stoppedFields",
       array(select field from jsonb_each_text(t.left_out) as known(field, at)
         where at::timestamptz > now() - interval '${LEFT_OUT_FOR}' order by field) as "droppedFields"
     from destination as t
     left join (
       select destination_id, count(meant.id) as waiting,
         count(meant.id) filter (where held.definition_id is null) as moving,
         count(*) filter (where held.definition_id is null) as moving_in_all,
         greatest(0, floor(extract(epoch from now() - min(raised_at) filter (where meant.id is not null))))::int8 as oldest
       from outbox left join held using (definition_id, destination_id) left join meant on meant.id = definition_id
       group by destination_id) as w on w.destination_id = t.id
     left join (
       select destination_id, sum(calls) filter (where meant.id is not null)::int8 as ahead, sum(calls)::int8 as ahead_in_all
       from definition_destination as dd left join meant on meant.id = dd.definition_id
       cross join lateral (
         select greatest(0, backfill_total - backfill_done) * (backfill_identify::int + backfill_events::int)) as c (calls)
       where dd.backfill is not null
         and (dd.definition_id, dd.destination_id) not in (select definition_id, destination_id from held)
       group by destination_id) as b on b.destination_id = t.id
     left join (
       select destination_id, count(*) as dead
       from dead_call join meant on meant.id = definition_id
       group by destination_id) as x on x.destination_id = t.id
     order by t.name, t.host`,
    [key],
  );
  const configured = new Map(config.destinations.map((each) => [`${each.name} ${targetOf(each).host}`, each]));
  return rows
    .map(({ left, leftInAll, delivery, ...row }) => {
      const destination = configured.get(`${row.name} ${row.host}`);
      const told = new Map((isLed ? (delivery?.lanes ?? []) : []).map((lane) => [lane.name, lane]));
      const lanes = (destination === undefined ? [] : quotasOf(destination)).map(({ name, quota }) => {
        const { allowed = quota, requestsPerSecond = 0, callsPerSecond = 0 } = told.get(name) ?? {};
        return { name, quota, allowed, requestsPerSecond, callsPerSecond };
      });
      const rate = isLed ? (delivery?.acknowledgedPerSecond ?? 0) : 0;
      const isMoving = row.state === 'active' && left > 0;
      return {
        ...row,
        configured: destination !== undefined,
        drainsInSeconds: isMoving ? (rate > 0 ? Math.ceil(leftInAll / rate) : null) : 0,
        lanes,
      };
    })
    .filter(({ configured: isThere, waiting, dead }) => isThere || waiting > 0 || dead > 0);
}

/** `–` where nothing is to be drained, `unknown` where it can't be said how long it takes. */
function describeDraining(seconds: number | null): string {
  if (seconds === null) return 'unknown';
  return seconds === 0 ? '–' : formatDuration(seconds * 1000);
}

export function describeDestinations(destinations: readonly DestinationStatus[], key: string | null): string {
  const columns = [
    { title: 'destination' },
    { title: 'host' },
    { title: 'state' },
    { title: 'waiting', align: 'right' },
    { title: 'longest', align: 'right' },
    { title: 'refused', align: 'right' },
    // Calls of several definitions go side by side: that of one alone isn't known.
    { title: key === null ? 'drains in' : 'all drain in', align: 'right' },
  ] as const;
  const rows = destinations.map(({ name, host, state, waiting, oldestWaitingSeconds, dead, drainsInSeconds }) => [
    plain(name),
    plain(host),
    (state === 'active' ? pc.green : pc.red)(state),
    formatCount(waiting),
    oldestWaitingSeconds === null ? '–' : formatDuration(oldestWaitingSeconds * 1000),
    formatCount(dead),
    describeDraining(drainsInSeconds),
  ]);
  return formatTable(columns, rows);
}

const perSecond = (rate: number): string =>
  rate >= 10 ? formatCount(Math.round(rate)) : String(Math.round(rate * 10) / 10);

export function describeLanes(destinations: readonly DestinationStatus[]): string {
  const columns = [
    { title: 'lane' },
    { title: 'requests/s', align: 'right' },
    { title: 'quota', align: 'right' },
    { title: 'calls/s', align: 'right' },
    { title: '' },
  ] as const;
  const rows = destinations.flatMap(({ name, lanes }) =>
    lanes.map((lane) => [
      plain(`${name} ${lane.name}`),
      perSecond(lane.requestsPerSecond),
      perSecond(lane.quota),
      perSecond(lane.callsPerSecond),
      lane.allowed < lane.quota ? pc.yellow(`slowed down to ${perSecond(lane.allowed)}`) : '',
    ]),
  );
  return formatTable(columns, rows);
}

/** What a person should know or do about destinations, a line each. */
export function adviseOnDestinations(destinations: readonly DestinationStatus[]): string[] {
  const lines: string[] = [];
  for (const { name, host, state, reason, configured, waiting, droppedFields, ...stopped } of destinations) {
    for (const { definition, reason: why } of stopped.stoppedDefinitions) {
      lines.push(
        `${SIGN.bad} The calls of ${definition} to ${plain(name)} wait: ${plain(why)} When that is mended, \`personas-sync resume ${definition}\` lets them go.`,
      );
    }
    for (const { definition, field, reason: why } of stopped.stoppedFields) {
      const what = field === LIST ? `The list of ${definition}` : `The field ${plain(field)} of ${definition}`;
      lines.push(
        `${SIGN.bad} ${what} is not sent to ${plain(name)} any more: ${plain(why)} When that is mended, \`personas-sync resume ${definition}\` sends it.`,
      );
    }
    if (droppedFields.length > 0) {
      const fields = droppedFields.slice(0, 10).map(plain).join(', ');
      lines.push(
        `${SIGN.bad} ${plain(name)} has left out these fields of what it was sent, within the last week: ${fields}. Look at its field list.`,
      );
    }
    if (!configured && waiting > 0) {
      lines.push(
        `${SIGN.note} ${countOf(waiting, 'call')} for ${plain(name)} at ${plain(host)}, which is no longer configured, would go on if it came back.`,
      );
    }
    if (state === 'active' || !configured) continue;
    const why = state === 'paused' ? 'is paused.' : `has stopped: ${plain(reason ?? '')}`;
    lines.push(`${SIGN.bad} Destination ${plain(name)} ${why} \`personas-sync resume ${plain(name)}\` lets it go on.`);
  }
  const dead = destinations.reduce((sum, destination) => sum + destination.dead, 0);
  if (dead > 0) lines.push(`${SIGN.bad} ${countOf(dead, 'refused call')}: \`personas-sync failed list\` shows them.`);
  return lines;
}
