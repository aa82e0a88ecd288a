import pc from 'picocolors';
import { findLeader } from '../db/lease.js';
import type { DefinitionState, RunOutcome, RunTrigger } from '../db/state.js';
import type { CommandContext } from './command.js';
import { readKeys, refuseUnknown } from './known.js';
import type { Opened } from './open.js';
import { quotasOf } from './quotas.js';
import { countOf, formatCount, formatDuration, formatMoment, formatTable, plain, plainLines, SIGN } from './output.js';

/** `status`: what is, from the tables: definitions and their runs, what waits, what was refused, who leads. */
interface DefinitionStatus {
  key: string;
  kind: 'audience' | 'trait';
  cadence: string;
  /** `new`: in the configuration, and not synced yet; `held`: a run waits for a person. */
  state: DefinitionState | 'held' | 'new';
  /** Why it is held or paused. */
  reason: string | null;
  heldRun: number | null;
  members: number;
  /** How far a first sync or backfill has come. */
  backfill: { done: number; total: number } | null;
  lastRun: {
    id: number;
    trigger: RunTrigger;
    outcome: RunOutcome | null;
    startedAt: Date;
    error: string | null;
  } | null;
  nextRun: Date | null;
}

interface DestinationStatus {
  name: string;
  host: string;
  state: 'active' | 'paused' | 'stopped';
  reason: string | null;
  waiting: number;
  oldestWaitingSeconds: number | null;
  dead: number;
  /** Whether it still is in the configuration, with this host. */
  configured: boolean;
  /** How long it takes to drain at the present rate; null where nothing moves, or nobody leads. */
  drainsInSeconds: number | null;
  /** Fields that the destination leaves out of what it is sent. */
  droppedFields: readonly string[];
  /** Definitions whose calls wait here for a person, and why. */
  stoppedDefinitions: readonly { definition: string; reason: string }[];
  lanes: readonly LaneStatus[];
}

interface LaneStatus {
  name: string;
  /** Requests a second. */
  quota: number;
  /** What the lane lets through at present: less where the destination has asked to wait again and again. */
  allowed: number;
  /** Over the last ten seconds. */
  requestsPerSecond: number;
  callsPerSecond: number;
}

interface DefinitionRow extends Omit<DefinitionStatus, 'state' | 'lastRun' | 'nextRun'> {
  state: DefinitionState;
  dueAt: Date | null;
  runId: number | null;
  trigger: RunTrigger;
  outcome: RunOutcome | null;
  startedAt: Date;
  error: string | null;
}

async function readDefinitions({ config, databases }: Opened, key: string | null): Promise<DefinitionStatus[]> {
  const { rows } = await databases.state.pool.query<DefinitionRow>(
    `select d.key, d.kind, d.cadence, d.state, d.members, d.due_at as "dueAt", held.id as "heldRun",
       coalesce(held.error, d.paused_because) as reason, last.id as "runId", last.trigger, last.outcome,
       last.started_at as "startedAt", last.error, filled.backfill
     from definition as d
     left join lateral (select * from run as r where r.definition_id = d.id order by r.id desc limit 1) as last on true
     left join run as held on held.definition_id = d.id and held.outcome = 'held' and held.decision is null
     left join lateral (
       select jsonb_build_object('done', sum(dd.backfill_done), 'total', sum(dd.backfill_total)) as backfill
       from definition_destination as dd where dd.definition_id = d.id and dd.backfill is not null
       having count(*) > 0) as filled on true
     where case when $1::text is null then d.state <> 'archived' or held.id is not null else d.key = $1 end
     order by d.kind, d.key`,
    [key],
  );
  const registered = rows.map((row): DefinitionStatus => {
    const { dueAt, runId, trigger, outcome, startedAt, error, ...rest } = row;
    return {
      ...rest,
      state: row.heldRun === null ? row.state : 'held',
      lastRun: runId === null ? null : { id: runId, trigger, outcome, startedAt, error },
      nextRun: row.state === 'active' ? dueAt : null,
    };
  });
  const known = new Set(rows.map((row) => row.key));
  const added = config.definitions
    .filter((definition) => !known.has(definition.key) && (key === null || definition.key === key))
    .map((definition): DefinitionStatus => {
      const { key: name, kind, enabled } = definition;
      const nothing = { reason: null, heldRun: null, members: 0, backfill: null, lastRun: null, nextRun: null };
      return { key: name, kind, cadence: '', state: enabled ? 'new' : 'disabled', ...nothing };
    });
  return [...registered, ...added];
}

/** What the leader has last told of a destination; all of it is old news where nobody leads. */
interface Told {
  acknowledgedPerSecond: number;
  lanes: readonly (LaneStatus & { dropped: readonly string[] })[];
}

interface DestinationRow extends Omit<DestinationStatus, 'lanes' | 'configured' | 'drainsInSeconds' | 'droppedFields'> {
  ahead: number;
  delivery: Told | null;
}

async function readDestinations(
  { config, databases, targetOf }: Opened,
  key: string | null,
  isLed: boolean,
): Promise<DestinationStatus[]> {
  const { rows } = await databases.state.pool.query<DestinationRow>(
    `select t.name, t.host, t.state, t.reason, t.delivery, coalesce(w.waiting, 0) as waiting,
       w.oldest as "oldestWaitingSeconds", coalesce(x.dead, 0) as dead,
       (select coalesce(sum(greatest(0, backfill_total - backfill_done) * (backfill_identify::int + backfill_events::int)), 0)::int8
        from definition_destination as dd join definition as d on d.id = dd.definition_id
        where dd.destination_id = t.id and dd.backfill is not null and ($1::text is null or d.key = $1)) as ahead,
       (select coalesce(jsonb_agg(jsonb_build_object('definition', d.key, 'reason', dd.stopped) order by d.key), '[]')
        from definition_destination as dd join definition as d on d.id = dd.definition_id
        where dd.destination_id = t.id and dd.stopped is not null and ($1::text is null or d.key = $1)) as "stoppedDefinitions"
     from destination as t
     left join (
       select destination_id, count(*) as waiting,
         greatest(0, floor(extract(epoch from now() - min(raised_at))))::int8 as oldest
       from outbox where $1::text is null or definition_id = (select id from definition where key = $1)
       group by destination_id) as w on w.destination_id = t.id
     left join (
       select destination_id, count(*) as dead
       from dead_call where $1::text is null or definition_id = (select id from definition where key = $1)
       group by destination_id) as x on x.destination_id = t.id
     order by t.name, t.host`,
    [key],
  );
  const configured = new Map(config.destinations.map((each) => [`${each.name} ${targetOf(each).host}`, each]));
  return rows
    .map(({ ahead, delivery, ...row }) => {
      const destination = configured.get(`${row.name} ${row.host}`);
      const told = new Map((isLed ? (delivery?.lanes ?? []) : []).map((lane) => [lane.name, lane]));
      const lanes = (destination === undefined ? [] : quotasOf(destination)).map(({ name, quota }) => {
        const { allowed = quota, requestsPerSecond = 0, callsPerSecond = 0 } = told.get(name) ?? {};
        return { name, quota, allowed, requestsPerSecond, callsPerSecond };
      });
      const rate = isLed ? (delivery?.acknowledgedPerSecond ?? 0) : 0;
      const left = row.waiting + ahead;
      return {
        ...row,
        configured: destination !== undefined,
        drainsInSeconds: left === 0 ? 0 : rate > 0 ? Math.ceil(left / rate) : null,
        droppedFields: [...new Set(delivery?.lanes.flatMap(({ dropped }) => dropped))],
        lanes,
      };
    })
    .filter(({ configured: isThere, waiting, dead }) => isThere || waiting > 0 || dead > 0);
}

function describeState({ state, backfill }: DefinitionStatus): string {
  const colour = state === 'active' ? pc.green : state === 'held' ? pc.red : pc.yellow;
  const sending = backfill === null ? '' : `, ${formatCount(backfill.done)} of ${formatCount(backfill.total)} queued`;
  return `${colour(state)}${sending}`;
}

function describeNext({ nextRun, cadence, state }: DefinitionStatus, now: Date): string {
  if (nextRun !== null) return nextRun <= now ? 'due' : formatMoment(nextRun, now);
  return state === 'active' ? cadence : '–';
}

function describeDefinitions(definitions: readonly DefinitionStatus[], now: Date): string {
  const columns = [
    { title: 'definition' },
    { title: 'kind' },
    { title: 'runs' },
    { title: 'state' },
    { title: 'members', align: 'right' },
    { title: 'last run', align: 'right' },
    { title: '' },
    { title: 'next run', align: 'right' },
  ] as const;
  const rows = definitions.map((each) => [
    each.key,
    each.kind,
    each.cadence,
    describeState(each),
    formatCount(each.members),
    formatMoment(each.lastRun?.startedAt ?? null, now),
    each.lastRun === null ? '' : (each.lastRun.outcome ?? 'running'),
    describeNext(each, now),
  ]);
  return formatTable(columns, rows);
}

function describeDestinations(destinations: readonly DestinationStatus[]): string {
  const columns = [
    { title: 'destination' },
    { title: 'host' },
    { title: 'state' },
    { title: 'waiting', align: 'right' },
    { title: 'longest', align: 'right' },
    { title: 'refused', align: 'right' },
    { title: 'drains in', align: 'right' },
  ] as const;
  const rows = destinations.map(({ name, host, state, waiting, oldestWaitingSeconds, dead, drainsInSeconds }) => [
    plain(name),
    plain(host),
    (state === 'active' ? pc.green : pc.red)(state),
    formatCount(waiting),
    oldestWaitingSeconds === null ? '–' : formatDuration(oldestWaitingSeconds * 1000),
    formatCount(dead),
    drainsInSeconds === null || drainsInSeconds === 0 ? '–' : formatDuration(drainsInSeconds * 1000),
  ]);
  return formatTable(columns, rows);
}

const perSecond = (rate: number): string =>
  rate >= 10 ? formatCount(Math.round(rate)) : String(Math.round(rate * 10) / 10);

function describeLanes(destinations: readonly DestinationStatus[]): string {
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

/** What a person should know or do, a line each. */
function adviseOn(definitions: readonly DefinitionStatus[], destinations: readonly DestinationStatus[]): string[] {
  const lines: string[] = [];
  for (const { key, state, reason, heldRun, lastRun } of definitions) {
    if (heldRun !== null) {
      lines.push(
        `${SIGN.bad} ${key}: ${plain(reason ?? '')} \`personas-sync plan ${key}\` shows it; then \`approve ${heldRun}\` or \`reject ${heldRun}\`.`,
      );
    } else if (state === 'paused') {
      lines.push(`${SIGN.note} ${key} is paused. ${plain(reason ?? '')} \`personas-sync resume ${key}\` ends that.`);
    } else if (lastRun?.outcome === 'failed') lines.push(`${SIGN.bad} ${key}: ${plainLines(lastRun.error ?? '')}`);
  }
  for (const { name, host, state, reason, configured, waiting, droppedFields, stoppedDefinitions } of destinations) {
    for (const { definition, reason: why } of stoppedDefinitions) {
      lines.push(
        `${SIGN.bad} The calls of ${definition} to ${plain(name)} wait: ${plain(why)} When that is mended, \`personas-sync resume ${definition}\` lets them go.`,
      );
    }
    if (droppedFields.length > 0) {
      const fields = droppedFields.slice(0, 10).map(plain).join(', ');
      lines.push(
        `${SIGN.bad} ${plain(name)} leaves out these fields of what it is sent: ${fields}. Look at its field list.`,
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
  const added = definitions.filter(({ state }) => state === 'new').length;
  if (added > 0)
    lines.push(
      `${SIGN.note} ${countOf(added, 'definition')} new: a running daemon takes them up by itself; \`sync\` does it now.`,
    );
  return lines;
}

export async function status({ opened, output }: CommandContext, key: string | null): Promise<number> {
  const { pool } = opened.databases.state;
  if (key !== null) refuseUnknown([key], await readKeys(opened), 'definition');
  const definitions = await readDefinitions(opened, key);
  const found = await findLeader(pool);
  const destinations = await readDestinations(opened, key, found !== null);
  const leader = found === null ? null : { host: found.host, pid: found.pid, since: found.since };
  const { rows } = await pool.query<{ now: Date; problem: string | null }>(
    `select now() as now, (select nullif(value #>> '{}', '') from setting where name = 'configuration_problem') as problem`,
  );
  const { now = new Date(), problem = null } = rows[0] ?? {};
  output.object({ definitions, destinations, leader, configurationProblem: problem });

  output.line(describeDefinitions(definitions, now));
  output.line();
  output.line(describeDestinations(destinations));
  output.line();
  output.line(describeLanes(destinations));
  output.line();
  output.line(
    leader === null
      ? `${SIGN.note} No daemon is running: nothing is computed or sent until \`personas-sync start\`, or once by \`sync\`.`
      : `${SIGN.good} ${plain(leader.host)} (process ${leader.pid}) has led for ${formatDuration(now.getTime() - leader.since.getTime())}.`,
  );
  if (problem !== null)
    output.line(`${SIGN.bad} The changed configuration is not used:\n${problem.split('\n').map(plain).join('\n')}`);
  for (const line of adviseOn(definitions, destinations)) output.line(line);
  return 0;
}
