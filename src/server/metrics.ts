import { collectDefaultMetrics, Counter, Gauge, Registry } from 'prom-client';
import type { Queryable } from '../db/connect.js';
import type { Logger } from '../lib/logger.js';
import { within } from '../lib/until.js';
import type { LaneFigures } from '../delivery/lane.js';
import { LEFT_OUT_FOR } from '../outbox/noted.js';
import type { Page } from './server.js';

/**
 * `/metrics`, by the conventions of Prometheus (https://prometheus.io/docs/practices/naming/). Labels are destinations,
 * lanes, definitions and outcomes: never a person. What the tables know is read when it is asked for.
 */
export interface Observed {
  leading: () => boolean;
  /** Lanes by destination; those of a leader alone. */
  lanes: () => readonly { destination: string; lane: LaneFigures }[];
  /** Runs that have ended since this instance leads. */
  runs: () => readonly { definition: string; outcome: string; count: number; corrections: number }[];
}

interface DestinationRow {
  destination: string;
  waiting: number;
  oldest: number;
  dead: number;
  stopped: number;
  left_out: number;
}

interface PairRow {
  destination: string;
  definition: string;
  stopped: number;
}

interface DefinitionRow {
  definition: string;
  members: number;
  /** Seconds since 1970; null where none has succeeded. */
  succeeded: number | null;
  held: number;
}

/** A definition that asks for real time. */
interface RealtimeRow {
  definition: string;
  live: number;
  due: number;
  parked: number;
  lag_ms: number;
}

/** More captured rows than these aren't counted. */
const CAPTURED_AT_MOST = 1_000_000;

/** Counting what waits takes a second for some millions, so that it is done this often at most. */
const READ_AT_MOST_EVERY_MS = 5_000;
const READ_WITHIN_MS = 2_000;

/** Rows that wait in the source to be moved; null: nothing is captured there, or not for this role. */
async function countCaptured(source: Queryable): Promise<number | null> {
  const { rows } = await source.query<{ there: boolean }>(
    `select exists (select from pg_class as c join pg_namespace as n on n.oid = c.relnamespace
       where n.nspname = 'personas_capture' and c.relname = 'capture'
         and has_schema_privilege(n.oid, 'USAGE') and has_table_privilege(c.oid, 'SELECT')) as there`,
  );
  if (rows[0]?.there !== true) return null;
  const counted = await source.query<{ captured: number }>(
    `select count(*)::int4 as captured from (select from personas_capture.capture limit ${CAPTURED_AT_MOST}) as c`,
  );
  return counted.rows[0]?.captured ?? 0;
}

/**
 * Has `read` done again when it was done some seconds ago, and says whether it could be done in time: what is known
 * without it is told all the same.
 */
function keepFresh(what: string, log: Logger, read: () => Promise<void>): () => Promise<boolean> {
  let readAt = -Infinity;
  let reading: Promise<void> | null = null;
  const readOnce = async (): Promise<void> => {
    await read();
    readAt = performance.now();
  };
  return async () => {
    if (performance.now() - readAt < READ_AT_MOST_EVERY_MS) return true;
    reading ??= readOnce().finally(() => {
      reading = null;
    });
    try {
      return (await within(READ_WITHIN_MS, reading)) !== null;
    } catch (error) {
      log.failure(`The metrics of ${what} cannot be read`, error);
      return false;
    }
  };
}

export function createMetrics(
  { state: pool, source }: { state: Queryable; source: Queryable },
  { leading, lanes, runs }: Observed,
  log: Logger,
): () => Promise<Page> {
  const registry = new Registry();
  collectDefaultMetrics({ register: registry });
  const registers = [registry];
  const gauge = (name: string, help: string, labelNames: readonly string[] = []): Gauge =>
    new Gauge({ name: `personas_${name}`, help, labelNames: [...labelNames], registers });
  const counter = (name: string, help: string, labelNames: readonly string[]): Counter =>
    new Counter({ name: `personas_${name}_total`, help, labelNames: [...labelNames], registers });

  const isLeading = gauge('leading', 'Whether this instance leads (1) or stands by (0).');
  const databaseUp = gauge(
    'state_database_up',
    'Whether the state database answered; if not, what is read there is old.',
  );
  const ofLane = ['destination', 'lane'];
  const quota = gauge('lane_quota_requests_per_second', 'The quota of a lane.', ofLane);
  const allowed = gauge('lane_allowed_requests_per_second', 'What a lane lets through at present.', ofLane);
  const requests = counter('requests', 'Requests that were sent.', ofLane);
  const throttled = counter('requests_throttled', 'Requests that were answered with 429.', ofLane);
  const calls = counter('calls', 'Calls that were accepted.', ofLane);
  const ended = counter('runs', 'Runs that have ended while this instance leads.', ['definition', 'outcome']);
  const waiting = gauge('waiting_calls', 'Marks and events that are not acknowledged yet.', ['destination']);
  const oldest = gauge('oldest_waiting_call_seconds', 'The age of the oldest of them.', ['destination']);
  const dead = gauge('dead_calls', 'Calls that were refused and are kept.', ['destination']);
  const stopped = gauge('destination_stopped', 'Whether nothing is sent until a person says so.', ['destination']);
  const leftOut = gauge(
    'fields_left_out',
    'Fields that the destination has left out of what it was sent within a week.',
    ['destination'],
  );
  const callsStopped = gauge(
    'definition_calls_stopped',
    'Whether calls of a definition, or some of its fields, are not sent until a person says so.',
    ['destination', 'definition'],
  );
  const members = gauge('definition_members', 'Members as of the last sync.', ['definition']);
  const success = gauge('definition_last_success_timestamp_seconds', 'When the last run succeeded.', ['definition']);
  const held = gauge('definition_held', 'Whether a run waits for a person.', ['definition']);
  const corrections = counter(
    'reconcile_corrections',
    'What comparing everybody has found to be missed by following changes, while this instance leads.',
    ['definition'],
  );
  const live = gauge('realtime_live', 'Whether changes are followed (1) or it is polled instead (0).', ['definition']);
  const due = gauge('due_profiles', 'Profiles that have changed and wait to be evaluated.', ['definition']);
  const parked = gauge('due_parked', 'Profiles whose evaluation fails, which wait apart.', ['definition']);
  const lag = gauge('realtime_lag_seconds', 'How long the oldest of those that wait has waited.', ['definition']);
  const captured = gauge('captured_waiting', 'Captured rows in the source that wait to be moved to the state.');

  const readTables = async (): Promise<void> => {
    const destinations = await pool.query<DestinationRow>(
      `select t.name as destination, max((t.state = 'stopped')::int4) as stopped, coalesce(sum(w.waiting), 0)::int8 as waiting,
         coalesce(max(w.oldest), 0)::int8 as oldest,
         max((select count(*) from jsonb_each_text(t.left_out) as known(field, at)
           where at::timestamptz > now() - interval '${LEFT_OUT_FOR}')) as left_out,
         coalesce(sum((select count(*) from dead_call as x where x.destination_id = t.id)), 0)::int8 as dead
       from destination as t left join (
         select destination_id, count(*) as waiting, greatest(0, floor(extract(epoch from now() - min(raised_at)))) as oldest
         from outbox group by destination_id) as w on w.destination_id = t.id
       -- Of those with one name, the ones at another host are configured no more.
       where exists (select from definition_destination as dd where dd.destination_id = t.id and dd.active)
       group by t.name`,
    );
    const definitions = await pool.query<DefinitionRow>(
      `select d.key as definition, d.members,
         (select floor(extract(epoch from max(finished_at)))::int8 from run as r where r.definition_id = d.id and r.outcome = 'succeeded') as succeeded,
         exists (select from run as r where r.definition_id = d.id and r.outcome = 'held' and r.decision is null)::int4 as held
       from definition as d where d.state <> 'archived'`,
    );
    const pairs = await pool.query<PairRow>(
      `select t.name as destination, d.key as definition,
         max((dd.stopped is not null or dd.stopped_fields <> '{}')::int4) as stopped
       from definition_destination as dd join destination as t on t.id = dd.destination_id
       join definition as d on d.id = dd.definition_id where dd.active and d.state <> 'archived' group by 1, 2`,
    );
    for (const each of [waiting, oldest, dead, stopped, leftOut, callsStopped, members, success, held]) each.reset();
    for (const row of destinations.rows) {
      const { destination } = row;
      waiting.set({ destination }, row.waiting);
      oldest.set({ destination }, row.oldest);
      dead.set({ destination }, row.dead);
      stopped.set({ destination }, row.stopped);
      leftOut.set({ destination }, row.left_out);
    }
    for (const { destination, definition, ...row } of pairs.rows)
      callsStopped.set({ destination, definition }, row.stopped);
    for (const row of definitions.rows) {
      const { definition } = row;
      members.set({ definition }, row.members);
      if (row.succeeded !== null) success.set({ definition }, row.succeeded);
      held.set({ definition }, row.held);
    }
    const followed = await pool.query<RealtimeRow>(
      `select d.key as definition, (d.tracking = 'live')::int4 as live, w.due, w.parked, coalesce(w.lag_ms, 0)::int8 as lag_ms
       from definition as d cross join lateral (
         select count(distinct profile_id) filter (where parked_at is null) as due,
           count(distinct profile_id) filter (where parked_at is not null) as parked,
           1000 * extract(epoch from clock_timestamp() - min(at) filter (where parked_at is null)) as lag_ms
         from due where due.definition_id = d.id) as w
       where d.tracking <> 'none' and d.state <> 'archived'`,
    );
    for (const each of [live, due, parked, lag]) each.reset();
    for (const { definition, ...row } of followed.rows) {
      live.set({ definition }, row.live);
      due.set({ definition }, row.due);
      parked.set({ definition }, row.parked);
      lag.set({ definition }, row.lag_ms / 1000);
    }
  };
  const isRead = keepFresh('the tables', log, readTables);
  /** Missing where nothing is captured, or the source is out of reach. */
  const isCounted = keepFresh('the source', log, async () => {
    captured.remove();
    const count = await countCaptured(source);
    if (count !== null) captured.set(count);
  });

  return async () => {
    isLeading.set(leading() ? 1 : 0);
    for (const each of [quota, allowed, requests, throttled, calls, ended, corrections]) each.reset();
    for (const { destination, lane } of lanes()) {
      const labels = { destination, lane: lane.name };
      quota.set(labels, lane.quota);
      allowed.set(labels, lane.allowed);
      requests.inc(labels, lane.requests);
      throttled.inc(labels, lane.throttled);
      calls.inc(labels, lane.calls);
    }
    for (const { definition, outcome, count, corrections: corrected } of runs()) {
      ended.inc({ definition, outcome }, count);
      corrections.inc({ definition }, corrected);
    }
    const [isUp] = await Promise.all([isRead(), isCounted()]);
    databaseUp.set(isUp ? 1 : 0);
    return { status: 200, contentType: 'text/plain; version=0.0.4', body: await registry.metrics() };
  };
}
