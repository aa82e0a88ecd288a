import pc from 'picocolors';
import { findLeader } from '../db/lease.js';
import type { DefinitionState, RunOutcome, RunTrigger } from '../db/state.js';
import type { CommandContext } from './command.js';
import { readKeys, refuseUnknown } from './known.js';
import type { Opened } from './open.js';
import { countOf, formatCount, formatDuration, formatMoment, formatTable, plain, plainLines, SIGN } from './output.js';
import { adviseOnDestinations, describeDestinations, describeLanes, readDestinations } from './status-destinations.js';
import {
  adviseOnRealtime,
  describeRuns,
  describeWaiting,
  readRealtime,
  type RealtimeOf,
  type RealtimeStatus,
} from './status-realtime.js';

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
  /** Null: it doesn't ask for real time. */
  realtime: RealtimeStatus | null;
}

interface DefinitionRow extends Omit<DefinitionStatus, 'state' | 'lastRun' | 'nextRun' | 'realtime'> {
  state: DefinitionState;
  dueAt: Date | null;
  runId: number | null;
  trigger: RunTrigger;
  outcome: RunOutcome | null;
  startedAt: Date;
  error: string | null;
}

async function readDefinitions(
  { config, databases }: Opened,
  key: string | null,
  realtime: ReadonlyMap<string, RealtimeOf>,
): Promise<DefinitionStatus[]> {
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
      realtime: realtime.get(row.key)?.status ?? null,
    };
  });
  const known = new Set(rows.map((row) => row.key));
  const added = config.definitions
    .filter((definition) => !known.has(definition.key) && (key === null || definition.key === key))
    .map((definition): DefinitionStatus => {
      const { key: name, kind, enabled } = definition;
      const nothing = { reason: null, heldRun: null, members: 0, backfill: null, lastRun: null, nextRun: null };
      return { key: name, kind, cadence: '', state: enabled ? 'new' : 'disabled', ...nothing, realtime: null };
    });
  return [...registered, ...added];
}

function describeState({ state, backfill, realtime }: DefinitionStatus): string {
  const colour = state === 'active' ? pc.green : state === 'held' ? pc.red : pc.yellow;
  const sending = backfill === null ? '' : `, ${formatCount(backfill.done)} of ${formatCount(backfill.total)} queued`;
  return `${colour(state)}${sending}${describeWaiting(realtime)}`;
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
    describeRuns(each.cadence, each.realtime),
    describeState(each),
    formatCount(each.members),
    formatMoment(each.lastRun?.startedAt ?? null, now),
    each.lastRun === null ? '' : (each.lastRun.outcome ?? 'running'),
    describeNext(each, now),
  ]);
  return formatTable(columns, rows);
}

/** What a person should know or do, a line each. */
function adviseOn(definitions: readonly DefinitionStatus[], realtime: ReadonlyMap<string, RealtimeOf>): string[] {
  const lines: string[] = [];
  for (const { key, cadence, state, reason, heldRun, lastRun } of definitions) {
    if (heldRun !== null) {
      lines.push(
        `${SIGN.bad} ${key}: ${plain(reason ?? '')} \`personas-sync plan ${key}\` shows it; then \`approve ${heldRun}\` or \`reject ${heldRun}\`.`,
      );
    } else if (state === 'paused') {
      lines.push(`${SIGN.note} ${key} is paused. ${plain(reason ?? '')} \`personas-sync resume ${key}\` ends that.`);
    } else if (lastRun?.outcome === 'failed') lines.push(`${SIGN.bad} ${key}: ${plainLines(lastRun.error ?? '')}`);
    const followed = realtime.get(key);
    if (followed !== undefined) lines.push(...adviseOnRealtime(key, cadence, followed));
  }
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
  const realtime = await readRealtime(pool);
  const definitions = await readDefinitions(opened, key, realtime);
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
  output.line(describeDestinations(destinations, key));
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
  for (const line of [...adviseOn(definitions, realtime), ...adviseOnDestinations(destinations)]) output.line(line);
  return 0;
}
