import type { Client, Queryable } from '../db/connect.js';
import { inTransaction } from '../db/connect.js';
import { fenceLease } from '../db/lease.js';
import type { State } from '../db/state.js';
import { COLUMNS_TOGETHER, DUE_NOW, hashOf, type WaitingMark } from './queue.js';

/**
 * What becomes of calls that were sent. Whatever settles one does so only while this instance leads, and a mark only at
 * the version that was sent: what changed meanwhile stays due.
 */

/** What became of a call. `columns` null: all of a mark's columns, or the event. */
export type Settlement =
  | { kind: 'acknowledged'; id: number; version: number; columns: readonly string[] | null }
  | {
      kind: 'refused';
      id: number;
      version: number;
      columns: readonly string[] | null;
      reason: string;
      answer: string;
      retryAfterMs: number | null;
      /** The recipient, where the destination has forgotten them: no call is sent for them any more. */
      forgotten: string | null;
    }
  | {
      kind: 'again';
      id: number;
      version: number;
      afterMs: number;
      attempts: number;
      confirmStage?: number;
      late?: boolean;
    };

/**
 * An acknowledged exit whose person lives on under other keys: those are marked again, unless their own marks have waited
 * for this very exit.
 */
const MARK_SUCCESSORS = `
  insert into outbox (kind, destination_id, definition_id, priority, recipient, columns, with_beside)
  select 'm', destination_id, definition_id, 1, recipient, columns, true from (
    select g.destination_id, g.definition_id, s.recipient,
      case d.kind when 'audience' then g.columns
        else (select array_agg(k) from jsonb_object_keys(s.value) as k where d.fields ? k) end as columns
    from gone as g
    cross join unnest(g.successors) as n(recipient)
    join definition as d on d.id = g.definition_id
    join snapshot as s on s.definition_id = g.definition_id and s.recipient = n.recipient
    where not exists (select from outbox as w where w.kind = 'm' and w.recipient = n.recipient
      and w.destination_id = g.destination_id and w.definition_id = g.definition_id and g.id = any(w.after))
  ) as successors where columns is not null
  on conflict (recipient, destination_id, definition_id) where kind = 'm' do update set
    columns = ${COLUMNS_TOGETHER}, version = nextval('version'), with_beside = true, due_at = ${DUE_NOW}, attempts = 0`;

/** What was refused before and has now been acknowledged is dead no more. */
const NO_LONGER_DEAD = `delete from dead_call as x using gone as g
  where x.kind = 'm' and x.recipient = g.recipient and x.destination_id = g.destination_id
    and x.definition_id = g.definition_id and x.field = any(g.columns)`;

/** Columns of a mark, the others of which are still due. */
async function acknowledgePart(
  client: Client,
  { id, version, columns }: { id: number; version: number; columns: readonly string[] },
): Promise<void> {
  await client.query(
    `with gone as (update outbox set columns = array(select c from unnest(columns) as c where not c = any($3))
       where id = $1 and version = $2 returning destination_id, definition_id, recipient, $3::text[] as columns)
     ${NO_LONGER_DEAD}`,
    [id, version, columns],
  );
}

async function acknowledge(client: Client, rows: readonly { id: number; version: number }[]): Promise<void> {
  await client.query(
    `with sent as (select * from unnest($1::bigint[], $2::bigint[]) as s(id, version)),
     gone as (delete from outbox as o using sent where o.id = sent.id and o.version = sent.version
              returning o.id, o.destination_id, o.definition_id, o.recipient, o.columns, o.successors),
     alive as (${NO_LONGER_DEAD})
     ${MARK_SUCCESSORS}`,
    [rows.map(({ id }) => id), rows.map(({ version }) => version)],
  );
}

async function bury(client: Client, refused: Extract<Settlement, { kind: 'refused' }>): Promise<void> {
  const { id, version, columns, reason, answer, retryAfterMs, forgotten } = refused;
  await client.query(
    `with sent as (select * from outbox where id = $1 and version = $2),
     cut as (update outbox as o set columns = array(select c from unnest(o.columns) as c where not c = any($3))
             from sent where o.id = sent.id and $3::text[] is not null and not sent.columns <@ $3::text[] returning o.id),
     gone as (delete from outbox as o using sent
              where o.id = sent.id and ($3::text[] is null or sent.columns <@ $3::text[]) returning o.id)
     insert into dead_call (destination_id, definition_id, kind, recipient, reason, answer, retry_at, field, with_beside,
       successors, retries, beside, event, message_id, occurred_at, properties)
     select destination_id, definition_id, kind, recipient, $4, $5, now() + $6 * interval '1 millisecond', field,
       with_beside, successors, revived, beside, event, message_id, occurred_at, properties
     from sent left join lateral unnest(coalesce($3, sent.columns)) as field on true
     on conflict (recipient, destination_id, definition_id, field) where kind = 'm' do update set
       died_at = now(), reason = excluded.reason, answer = excluded.answer, retry_at = excluded.retry_at,
       retries = excluded.retries, with_beside = dead_call.with_beside or excluded.with_beside,
       successors = coalesce(excluded.successors, dead_call.successors)`,
    [id, version, columns, reason, answer, retryAfterMs],
  );
  if (forgotten === null) return;
  await client.query(
    `insert into forgotten_there (destination_id, hash) select destination_id, ${hashOf('$1::text')}
     from dead_call where recipient = $1 and reason = $2 on conflict do nothing`,
    [forgotten, reason],
  );
}

/** What has to wait, and the events behind it, which go after it. */
async function postpone(client: Client, rows: readonly Extract<Settlement, { kind: 'again' }>[]): Promise<void> {
  await client.query(
    `with postponed as (
       update outbox as o set due_at = now() + s.after_ms * interval '1 millisecond', attempts = case when o.version = s.version then s.attempts else o.attempts end,
         confirm = case when o.version = s.version then coalesce(s.confirm, o.confirm) else o.confirm end,
         not_before = case when s.late then now() + s.after_ms * interval '1 millisecond' end
       from unnest($1::bigint[], $2::bigint[], $3::float8[], $4::smallint[], $5::smallint[], $6::boolean[])
         as s(id, version, after_ms, attempts, confirm, late)
       -- What has changed meanwhile waits, too, where the request may still be applied.
       where o.id = s.id and (o.version = s.version or s.late)
       returning o.id, o.destination_id, o.recipient, o.due_at
     )
     update outbox as o set due_at = p.due_at
     from (select e.id, max(p.due_at) as due_at from postponed as p
           join outbox as e on e.recipient = p.recipient and e.destination_id = p.destination_id and e.kind = 'e'
             and e.id > p.id and e.due_at < p.due_at
           where not exists (select from postponed as own where own.id = e.id) group by e.id) as p
     where o.id = p.id`,
    [
      rows.map(({ id }) => id),
      rows.map(({ version }) => version),
      rows.map(({ afterMs }) => afterMs),
      rows.map(({ attempts }) => attempts),
      rows.map(({ confirmStage }) => confirmStage ?? null),
      rows.map(({ late }) => late === true),
    ],
  );
}

/**
 * Writes what became of some calls of one destination, in one transaction; may be repeated. Returns the settlements of
 * rows that somebody else is writing to, of which nothing was written. Throws a LeaseLostError, with nothing written, if
 * another leads.
 *
 * The rows are locked first, so that the versions that are compared below can't change any more. None is waited for: a
 * run that changes very many people takes a while, and may have locked what others don't know of.
 */
export async function settle(
  state: State,
  leader: string,
  all: readonly Settlement[],
): Promise<ReadonlySet<Settlement>> {
  return inTransaction(state.pool, async (client) => {
    await fenceLease(client, leader);
    const busy = await client.query<{ id: number }>(
      `with locked as materialized (select id from outbox where id = any($1) order by recipient, id for update skip locked)
       select o.id from outbox as o where o.id = any($1) and not exists (select from locked where locked.id = o.id)`,
      [all.map(({ id }) => id)],
    );
    const taken = new Set(busy.rows.map(({ id }) => id));
    const left = new Set(all.filter(({ id }) => taken.has(id)));
    const settlements = all.filter((settlement) => !left.has(settlement));
    for (const settlement of settlements) if (settlement.kind === 'refused') await bury(client, settlement);
    const again = settlements.filter((settlement) => settlement.kind === 'again');
    if (again.length > 0) await postpone(client, again);
    const acknowledged = settlements.filter((settlement) => settlement.kind === 'acknowledged');
    for (const { id, version, columns } of acknowledged) {
      if (columns !== null) await acknowledgePart(client, { id, version, columns });
    }
    const whole = acknowledged.filter(({ columns }) => columns === null);
    if (whole.length > 0) await acknowledge(client, whole);
    return left;
  });
}

/** Stops a destination: nothing more is sent to it until a person resumes it; what waits stays. */
export async function stopDestination(
  state: State,
  leader: string,
  destinationId: number,
  reason: string,
): Promise<void> {
  await inTransaction(state.pool, async (client) => {
    await fenceLease(client, leader);
    await client.query(`update destination set state = 'stopped', reason = $2 where id = $1`, [destinationId, reason]);
  });
}

export interface Stop {
  destinationId: number;
  definitionId: number;
  reason: string;
  /** Its list is there no more: another is found or made when the calls go on. */
  isListGone: boolean;
}

/** Has the calls of one definition wait until a person resumes it; those of the others go on. */
export async function stopDefinition(
  state: State,
  leader: string,
  { destinationId, definitionId, reason, isListGone }: Stop,
): Promise<void> {
  await inTransaction(state.pool, async (client) => {
    await fenceLease(client, leader);
    await client.query(
      `update definition_destination set stopped = $3, list_id = case when $4 then null else list_id end
       where destination_id = $1 and definition_id = $2 and stopped is null`,
      [destinationId, definitionId, reason, isListGone],
    );
  });
}

/** Remembers the id of the list that a definition fills. */
export async function noteList(
  state: State,
  leader: string,
  {
    destinationId,
    definitionId,
    name,
    listId,
  }: { destinationId: number; definitionId: number; name: string; listId: number },
): Promise<void> {
  await inTransaction(state.pool, async (client) => {
    await fenceLease(client, leader);
    await client.query(
      'update definition_destination set list_id = $3 where destination_id = $1 and definition_id = $2 and list = $4',
      [destinationId, definitionId, listId, name],
    );
  });
}

/** Has all that is due for some recipients wait: a request to them may still be applied, and what follows comes after. */
export async function holdBack(
  pool: Queryable,
  destinationId: number,
  recipients: readonly { recipient: string; forMs: number }[],
): Promise<void> {
  await pool.query(
    `with held as materialized (
       select o.id, h.for_ms from unnest($2::text[], $3::float8[]) as h(recipient, for_ms)
       join outbox as o on o.recipient = h.recipient and o.due_at <= now()
       where o.kind = 'm' and o.recipient = any($2) and o.destination_id = $1
         or o.kind = 'e' and o.recipient = any($2) and o.destination_id = $1
       order by o.recipient, o.id for update of o
     )
     update outbox as o set due_at = now() + held.for_ms * interval '1 millisecond' from held where o.id = held.id`,
    [destinationId, recipients.map(({ recipient }) => recipient), recipients.map(({ forMs }) => forMs)],
  );
}

/**
 * Marks anew what was under way when the lease was lost, due after `afterMs`: a request of this instance may have been
 * applied after a newer one of the instance that leads now. Written without the lease; sending again is harmless.
 */
export async function markAnew(
  state: State,
  destinationId: number,
  recipient: string,
  marks: readonly WaitingMark[],
  afterMs: number,
): Promise<void> {
  for (const { definitionId, values } of marks) {
    const columns = values.map(({ field }) => field);
    await state.pool.query(
      `insert into outbox (kind, destination_id, definition_id, priority, recipient, columns, attempts, due_at)
       select 'm', $1, $2, 1, $3, $4::text[], 1, now() + $5 * interval '1 millisecond'
       where not exists (select from forgotten where hash = ${hashOf('$3')})
       on conflict (recipient, destination_id, definition_id) where kind = 'm' do update set
         columns = ${COLUMNS_TOGETHER}, version = nextval('version'), attempts = 1, due_at = excluded.due_at`,
      [destinationId, definitionId, recipient, columns, afterMs],
    );
  }
}
