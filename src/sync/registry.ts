import { randomUUID } from 'node:crypto';
import { isDeepStrictEqual } from 'node:util';
import type { Config } from '../config/types.js';
import type { Cadence, Definition, Send } from '../core/definition.js';
import { inTransaction, type Client } from '../db/connect.js';
import { databaseFailure } from '../db/failure.js';
import { fenceLease } from '../db/lease.js';
import { definitionLock, lockRegistry } from '../db/locks.js';
import type { SendRow, State } from '../db/state.js';
import { OperatorError, UnavailableError } from '../lib/errors.js';
import { COLUMNS_TOGETHER, DUE_NOW, LIST } from '../outbox/queue.js';
import { backfillPair } from './cursor.js';

/**
 * Brings the tables `definition`, `destination` and `definition_destination` in line with a configuration, in one
 * transaction. What has left the configuration is archived, never deleted: its snapshot stays, and when its key comes
 * back it is compared with it. A destination or a kind of call that a synced definition gains gets a backfill of its own.
 */
export interface RegisteredDestination {
  id: number;
  name: string;
  host: string;
}

/** Where a configuration's destination is, as it is told apart from others. */
export type HostOf = (name: string) => string;

export function describeCadence(cadence: Cadence): string {
  switch (cadence.kind) {
    case 'hourly':
      return 'hourly';
    case 'poll':
      return `every ${cadence.everyMs % 60_000 === 0 ? `${cadence.everyMs / 60_000} min` : `${cadence.everyMs / 1000} s`}`;
    case 'cron':
      return cadence.expression;
    case 'manual':
      return 'manual';
    case 'realtime':
      return 'real time';
  }
}

/**
 * Two definitions and more that vanish, a third of all, are a mistake in `include` rather than meant; so is any that
 * vanishes while a pattern of `include` matches nothing.
 */
export function refuseMassRemoval(config: Config, definitions: readonly { key: string; state: string }[]): void {
  const known = definitions.filter(({ state }) => state !== 'archived').map(({ key }) => key);
  const keys = new Set(config.definitions.map(({ key }) => key));
  const removed = known.filter((key) => !keys.has(key));
  const [empty] = config.unmatched;
  const isMass = removed.length >= 2 && removed.length * 3 >= known.length;
  if (removed.length === 0 || !(isMass || empty !== undefined)) return;
  const because = empty === undefined ? '' : ` while \`include: ${empty}\` matches no file`;
  throw new OperatorError(
    `${removed.length} of ${known.length} definitions have left the configuration (${removed.slice(0, 5).join(', ')}${removed.length > 5 ? ', …' : ''})${because}. If that is meant, run \`personas-sync sync --confirm-removals\`; if not, look at \`include\` and the files that it names.`,
  );
}

async function registerDestinations(client: Client, config: Config, hostOf: HostOf): Promise<RegisteredDestination[]> {
  const registered: RegisteredDestination[] = [];
  for (const { name, type } of config.destinations) {
    const host = hostOf(name);
    const result = await client.query<{ id: number }>(
      `insert into destination (name, host, type) values ($1, $2, $3)
       on conflict (name, host) do update set type = excluded.type returning id`,
      [name, host, type],
    );
    const row = result.rows[0];
    if (row !== undefined) registered.push({ id: row.id, name, host });
  }
  return registered;
}

/** A partition of its own, made as a table and then attached: PARTITION OF would wait for every open transaction. */
async function addPartition(client: Client, definitionId: number): Promise<void> {
  const name = `snapshot_${definitionId}`;
  await client.query(`create table ${name} (like snapshot including defaults including constraints)`);
  await client.query(`alter table snapshot attach partition ${name} for values in (${definitionId})`);
}

/** What a registered definition comes to: `$4` is its cadence, `$5` whether it is enabled, `$6` whether it runs by itself. */
const NEXT = {
  dueAt: `(case when not $6 then null when cadence <> $4 or state in ('disabled', 'archived') or due_at is null then now() else due_at end)`,
  state: `(case when $5 and state in ('disabled', 'archived') then 'active' when not $5 then 'disabled' else state end)`,
  pausedBecause: '(case when $5 then paused_because end)',
};

async function registerDefinition(client: Client, definition: Definition): Promise<number> {
  const { key, kind, name, enabled, onDelete, cadence } = definition;
  const known = await client.query<{ id: number; kind: string }>('select id, kind from definition where key = $1', [
    key,
  ]);
  const row = known.rows[0];
  if (row !== undefined && row.kind !== kind) {
    throw new OperatorError([
      {
        place: definition.place,
        message: `"${key}" was ${row.kind === 'audience' ? 'an audience' : 'a trait'} and cannot become ${kind === 'audience' ? 'an audience' : 'a trait'}; give it another key.`,
      },
    ]);
  }
  if (row === undefined) {
    const prefix = kind === 'audience' ? 'aud' : 'tra';
    const inserted = await client.query<{ id: number }>(
      `insert into definition (key, kind, name, computation_id, state, on_delete, cadence, due_at)
       values ($1, $2, $3, $4, $5, $6, $7, case when $8 then now() end) returning id`,
      [
        key,
        kind,
        name,
        `${prefix}_${randomUUID().replaceAll('-', '')}`,
        enabled ? 'active' : 'disabled',
        onDelete,
        describeCadence(cadence),
        cadence.kind !== 'manual',
      ],
    );
    const id = inserted.rows[0]?.id;
    if (id === undefined) throw new Error('An inserted definition has no id.');
    await addPartition(client, id);
    return id;
  }
  await client.query(
    // One that is as it was isn't written to: it may be in the middle of a run.
    `update definition set name = $2, on_delete = $3, cadence = $4,
       due_at = ${NEXT.dueAt}, state = ${NEXT.state}, paused_because = ${NEXT.pausedBecause}
     where id = $1 and (name, on_delete, cadence, due_at, state, paused_because)
       is distinct from ($2, $3, $4, ${NEXT.dueAt}, ${NEXT.state}, ${NEXT.pausedBecause})`,
    [row.id, name, onDelete, describeCadence(cadence), enabled, cadence.kind !== 'manual'],
  );
  // A removal that was held is void once the definition is back.
  await client.query(
    `update run set outcome = 'cancelled', error = 'The definition came back.' where definition_id = $1 and trigger = 'delete' and outcome = 'held' and decision is null`,
    [row.id],
  );
  return row.id;
}

/**
 * A destination that is identified to again, after it wasn't for a while: marks whoever has left or changed meanwhile, as
 * the history tells (90 days). The members are sent by a backfill. The history has the moment for which something was
 * computed, which may lie before the end, though it was applied after it: by a run that took long, by a clock of another
 * database. Who is marked without need is sent what they have.
 */
async function catchUp(
  client: Client,
  { definitionId, destinationId, what }: { definitionId: number; destinationId: number; what: 'identified' | 'listed' },
): Promise<void> {
  const columns =
    what === 'listed'
      ? `array['${LIST}']`
      : `case d.kind when 'audience' then array[d.key] else array(select jsonb_object_keys(d.fields)) end`;
  await client.query(
    `insert into outbox (kind, destination_id, definition_id, priority, recipient, columns)
     select 'm', $2, $1, 1, gone.recipient, gone.columns
     from (
       select distinct x.recipient, ${columns} as columns
       from definition_destination as dd join definition as d on d.id = dd.definition_id
       cross join lateral (
         select least(dd.${what}_until, min(r.started_at)) - interval '2 hours' as since from run as r
         where r.definition_id = d.id and coalesce(r.finished_at, 'infinity') >= dd.${what}_until) as missed
       join transition as x on x.definition_id = d.id and x.at >= missed.since
       where dd.definition_id = $1 and dd.destination_id = $2
         and (d.kind = 'trait' or not exists (select from snapshot as s
           where s.definition_id = d.id and s.recipient = x.recipient and not s.kept))) as gone
     where cardinality(gone.columns) > 0
     order by gone.recipient
     on conflict (recipient, destination_id, definition_id) where kind = 'm' do update set
       columns = ${COLUMNS_TOGETHER}, version = nextval('version'), due_at = ${DUE_NOW}, attempts = 0`,
    [definitionId, destinationId],
  );
  await client.query(
    `update definition_destination set ${what}_until = null where definition_id = $1 and destination_id = $2`,
    [definitionId, destinationId],
  );
}

function sendRow(destinationId: number, { identify, track, entered, exited, computed, list }: Send): SendRow {
  return {
    destination_id: destinationId,
    active: true,
    identify,
    track,
    entered,
    exited,
    computed,
    list: list?.name ?? null,
    list_existing_only: list?.existingOnly ?? false,
  };
}

async function registerSends(
  client: Client,
  definition: Definition,
  definitionId: number,
  destinations: readonly RegisteredDestination[],
): Promise<void> {
  const known = await client.query<SendRow>(
    `select destination_id, active, identify, track, entered, exited, computed, list, list_existing_only
     from definition_destination where definition_id = $1`,
    [definitionId],
  );
  const before = new Map(known.rows.map((row) => [row.destination_id, row]));
  const wanted = destinations.flatMap((destination) => {
    const send = definition.sends.get(destination.name);
    return send === undefined ? [] : [{ destination, send, next: sendRow(destination.id, send) }];
  });
  const changed = wanted.filter(({ next }) => !isDeepStrictEqual({ ...before.get(next.destination_id) }, next));
  const kept = new Set(wanted.map(({ destination }) => destination.id));
  if (changed.length === 0 && known.rows.every(({ active, destination_id }) => !active || kept.has(destination_id)))
    return;
  // What is being applied tells its changes to those who were told before: all that it writes has to be seen here.
  await client.query(definitionLock(definitionId));
  for (const { destination, send, next } of changed) {
    const old = before.get(destination.id);
    const { identify, track, entered, exited, computed, list, list_existing_only } = next;
    await client.query(
      `insert into definition_destination (definition_id, destination_id, identify, track, entered, exited, computed, list, list_existing_only)
       values ($1, $2, $3, $4, $5, $6, $7, $8, $9)
       on conflict (definition_id, destination_id) do update set
         active = true, identify = excluded.identify, track = excluded.track, entered = excluded.entered,
         exited = excluded.exited, computed = excluded.computed, list = excluded.list,
         list_existing_only = excluded.list_existing_only,
         list_id = case when definition_destination.list = excluded.list then definition_destination.list_id end`,
      [definitionId, destination.id, identify, track, entered, exited, computed, list, list_existing_only],
    );
    const isNew = old === undefined || !old.active;
    const gained = send.identify && (isNew || !old.identify);
    const gainedList = send.list !== null && (isNew || old.list !== send.list.name);
    const pair = { definitionId, destinationId: destination.id };
    for (const [what, ends] of [
      ['identified', old?.identify === true && !send.identify],
      ['listed', old !== undefined && old.list !== null && send.list === null],
    ] as const) {
      if (!ends) continue;
      await client.query(
        `update definition_destination set ${what}_until = now() where definition_id = $1 and destination_id = $2`,
        [definitionId, destination.id],
      );
    }
    if (gained && old !== undefined) await catchUp(client, { ...pair, what: 'identified' });
    if (gainedList && old !== undefined) await catchUp(client, { ...pair, what: 'listed' });
    if ((gained || gainedList) && definition.initial === 'send')
      await backfillPair(client, definitionId, destination.id);
  }
  await client.query(
    `update definition_destination set active = false, backfill = null, backfill_until = null, backfill_position = null,
       identified_until = coalesce(identified_until, case when identify then now() end),
       listed_until = coalesce(listed_until, case when list is not null then now() end)
     where definition_id = $1 and active and not destination_id = any($2)`,
    [definitionId, [...kept]],
  );
}

/** What has left the configuration is archived; `exit_all` becomes a held run, which a person decides. */
async function archive(client: Client, keys: readonly string[], leader: string): Promise<void> {
  const archived = await client.query<{ id: number; members: number; on_delete: string }>(
    `update definition set state = 'archived', due_at = null, paused_because = null, tracking = 'none',
       polled_because = null, stuck_because = null, distrusted_at = null, evaluates = null
     where state <> 'archived' and not key = any($1) returning id, members, on_delete`,
    [keys],
  );
  const ids = archived.rows.map(({ id }) => id);
  for (const table of ['due', 'validity', 'tally']) {
    await client.query(`delete from ${table} where definition_id = any($1)`, [ids]);
  }
  for (const { id, members, on_delete } of archived.rows) {
    await client.query(
      `update run set outcome = 'cancelled', error = 'The definition was removed.' where definition_id = $1 and outcome = 'held' and decision is null`,
      [id],
    );
    if (on_delete !== 'exit_all' || members === 0) continue;
    await client.query(
      `insert into run (definition_id, trigger, leader, finished_at, outcome, members, entered, exited, changed, nulled, error)
       values ($1, 'delete', $2, now(), 'held', 0, 0, $3, 0, 0, $4)`,
      [
        id,
        leader,
        members,
        `Held: the definition was removed with on_delete: exit_all; ${members === 1 ? 'its only member' : `all ${members} members`} would exit.`,
      ],
    );
  }
}

/**
 * Runs lock the same rows in another order. Whoever registers gives way before PostgreSQL looks for a deadlock (after a
 * second), of which a run that has taken minutes could be the victim.
 */
const GIVES_WAY_MS = 250;
const GIVES_UP_AFTER_MS = 120_000;
const PASSING = new Set(['55P03', '40P01']);

/**
 * Registers a configuration, as the leader alone may. It gives way to runs and tries again for two minutes. Throws, with
 * nothing written: an OperatorError where two thirds or fewer of the definitions are left and `confirmRemovals` doesn't
 * say that this is meant, or where one would become of another kind; a LeaseLostError where `leader` leads no more; an
 * UnavailableError where a run has kept something locked all that time.
 */
export async function register(
  state: State,
  config: Config,
  hostOf: HostOf,
  options: { confirmRemovals: boolean; leader: string },
): Promise<readonly RegisteredDestination[]> {
  const since = performance.now();
  for (;;) {
    try {
      return await inTransaction(state.pool, (client) => registerIn(client, config, hostOf, options));
    } catch (error) {
      if (!PASSING.has(databaseFailure(error)?.sqlstate ?? '')) throw error;
      if (performance.now() - since > GIVES_UP_AFTER_MS)
        throw new UnavailableError(
          'Another transaction has kept a definition locked for two minutes; try again later.',
        );
      await new Promise((resolve) => setTimeout(resolve, GIVES_WAY_MS * Math.random()));
    }
  }
}

async function registerIn(
  client: Client,
  config: Config,
  hostOf: HostOf,
  { confirmRemovals, leader }: { confirmRemovals: boolean; leader: string },
): Promise<readonly RegisteredDestination[]> {
  await client.query(`set local lock_timeout = ${GIVES_WAY_MS}`);
  // Each time: while this gave way, another may have begun to lead, with newer files.
  await fenceLease(client, leader);
  await lockRegistry(client);
  const known = await client.query<{ key: string; state: string }>('select key, state from definition');
  if (!confirmRemovals) refuseMassRemoval(config, known.rows);
  const destinations = await registerDestinations(client, config, hostOf);
  for (const definition of config.definitions) {
    const id = await registerDefinition(client, definition);
    await registerSends(client, definition, id, destinations);
  }
  await archive(
    client,
    config.definitions.map(({ key }) => key),
    leader,
  );
  return destinations;
}

/** Remembers what is wrong with the files of the configuration, for `status`; null: nothing. */
export async function noteProblem({ pool }: State, problem: string | null): Promise<void> {
  await pool.query(
    `insert into setting (name, value) values ('configuration_problem', to_jsonb($1::text))
     on conflict (name) do update set value = excluded.value`,
    [problem ?? ''],
  );
}
