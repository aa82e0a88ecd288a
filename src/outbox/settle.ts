import type { Queryable, Runner } from '../db/connect.js';
import { databaseFailure } from '../db/failure.js';
import { fenceLease } from '../db/lease.js';
import { repeat, type Repeated } from '../db/repeated.js';
import { keepSession } from '../db/session.js';
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
      /** For so long the request may still be applied; null where it can't be. */
      lateMs: number | null;
    };

/**
 * The keys under which a definition has whoever has left it under another one: a userId for an address or the reverse, and
 * any that came in its place.
 */
const IS_HERE = `s.definition_id = g.definition_id
  and (left(s.recipient, 2) <> left(g.recipient, 2) or s.entered_at >= (select max(x.at) from transition as x
    where x.recipient = g.recipient and x.definition_id = g.definition_id and x.kind = 'x'))`;

/**
 * The keys by which the destination may know somebody who has left under an address, from whatever definition: it may have
 * been given another one by now, and the userId that it was given by may be gone. A key that the definition has left itself
 * was told.
 */
const IS_ELSEWHERE = `
  not g.passed_on and starts_with(g.recipient, 'e:') and s.profile_id = g.exit_of
    and s.definition_id = any(array(select dd.definition_id from definition_destination as dd
      where dd.destination_id = g.destination_id and dd.active and (dd.identify or dd.list is not null)))
    and (starts_with(s.recipient, 'u:') or not exists (select from transition as x where x.recipient = s.recipient
      and x.definition_id = g.definition_id and x.kind = 'x' and x.at >= s.entered_at))`;

/**
 * The keys of those who have left, of whatever definition: looked up by the profiles of all of them at once, since one
 * definition's keys are too many to look through, and what was lately added to the index of `others` is read each time.
 */
const HELD = `
  select s.definition_id, s.recipient, s.profile_id, s.entered_at, p.id collate "C" as knows
  from snapshot as s cross join lateral unnest(s.profile_id || s.others) as p (id)
  where s.profile_id = any(array(select exit_of from gone))
    or s.others && array(select exit_of collate "default" from gone)`;

/**
 * After an acknowledged exit, what is true of the person's other keys is marked again: the destination may hold both as
 * one user, to whom the exit came last. And where a user may be given another address, the exit may have missed the one
 * who had it: the keys that the person has come to have are told that they have left, too.
 * A mark that is raised so tells what arose with the exit, and has its version, by which whoever waits for that counts it.
 */
const markOtherKeys = (isHybrid: boolean): string => `
  insert into outbox (kind, destination_id, definition_id, priority, recipient, version, columns, with_beside, exit_of, passed_on)
  select 'm', k.destination_id, k.definition_id, 1, k.recipient, max(k.version), array_agg(distinct c.name), true,
    case when bool_and(s.recipient is null) then min(k.exit_of) end, bool_and(s.recipient is null)
  from (select g.destination_id, g.definition_id, g.version, g.columns, g.exit_of, s.recipient
        from gone as g join held as s on s.knows = g.exit_of
        where s.recipient <> g.recipient and (${IS_HERE} ${isHybrid ? `or ${IS_ELSEWHERE}` : ''})
          -- What has waited for this very exit goes after it anyhow.
          and not exists (select from outbox as w where w.kind = 'm' and w.recipient = s.recipient
            and w.destination_id = g.destination_id and w.definition_id = g.definition_id
            and w.follows = g.exit_of and g.confirm = 0 offset 0)) as k
  join definition as d on d.id = k.definition_id
  left join lateral (select s.recipient, s.value from snapshot as s
    where s.definition_id = k.definition_id and s.recipient = k.recipient offset 0) as s on true
  cross join lateral unnest(case when d.kind = 'audience' or s.recipient is null then k.columns
    else array(select f from jsonb_object_keys(s.value) as f where d.fields ? f) end) as c (name)
  group by k.destination_id, k.definition_id, k.recipient order by k.recipient
  on conflict (recipient, destination_id, definition_id) where kind = 'm' do update set
    columns = ${COLUMNS_TOGETHER}, version = nextval('version'), with_beside = true, due_at = ${DUE_NOW}, attempts = 0,
    exit_of = case when outbox.follows is null then coalesce(outbox.exit_of, excluded.exit_of) end,
    passed_on = outbox.passed_on or outbox.exit_of is null and excluded.passed_on`;

/** What was refused before and has now been acknowledged is dead no more: looked up by the index, one after the other. */
const NO_LONGER_DEAD = `delete from dead_call where id = any(array(
  select x.id from gone as g cross join lateral (
    select x.id from dead_call as x where x.kind = 'm' and x.recipient = g.recipient
      and x.destination_id = g.destination_id and x.definition_id = g.definition_id and x.field = any(g.columns) offset 0
  ) as x))`;

/** Columns of a mark, the others of which are still due. */
const ACKNOWLEDGE_PART = `
  with gone as (update outbox set columns = array(select c from unnest(columns) as c where not c = any($2))
    where id = $1 returning destination_id, definition_id, recipient, $2::text[] as columns)
  ${NO_LONGER_DEAD}`;

const ACKNOWLEDGE = `
  with gone as (delete from outbox where id = any($1) returning destination_id, definition_id, recipient, columns)
  ${NO_LONGER_DEAD}`;

/** The same of exits; counts the marks that are raised after them. */
const acknowledgeExitsIn = (isHybrid: boolean): string => `
  with gone as (delete from outbox where id = any($1)
    returning destination_id, definition_id, recipient, version, columns, confirm, exit_of, passed_on),
  alive as (${NO_LONGER_DEAD}),
  held as materialized (${HELD})
  ${markOtherKeys(isHybrid)}`;

const CUT = `update outbox set columns = array(select c from unnest(columns) as c where not c = any($2))
  where id = $1 and not columns <@ $2`;
const BURY = `
  with sent as (select * from outbox where id = $1),
  gone as (delete from outbox where id = $1 and ($2::text[] is null or columns <@ $2))
  insert into dead_call (destination_id, definition_id, kind, recipient, reason, answer, retry_at, field, with_beside,
    exit_of, retries, beside, event, message_id, occurred_at, properties)
  select destination_id, definition_id, kind, recipient, $3, $4, now() + $5 * interval '1 millisecond', field,
    with_beside, exit_of, revived, beside, event, message_id, occurred_at, properties
  from sent left join lateral unnest(coalesce($2, sent.columns)) as field on true
  on conflict (recipient, destination_id, definition_id, field) where kind = 'm' do update set
    died_at = now(), reason = excluded.reason, answer = excluded.answer, retry_at = excluded.retry_at,
    retries = excluded.retries, with_beside = dead_call.with_beside or excluded.with_beside,
    exit_of = excluded.exit_of`;
const REMEMBER_FORGOTTEN = `
  insert into forgotten_there (destination_id, hash) select destination_id, ${hashOf('$1::text')}
  from dead_call where recipient = $1 and reason = $2 on conflict do nothing`;

/** What has to wait, and the events behind it, which go after it. */
const POSTPONE = `
  with postponed as (
    update outbox as o set
      due_at = now() + case when o.version = s.version then s.after_ms else s.late_ms end * interval '1 millisecond',
      attempts = case when o.version = s.version then s.attempts else o.attempts end,
      confirm = case when o.version = s.version then coalesce(s.confirm, o.confirm) else o.confirm end,
      not_before = now() + s.late_ms * interval '1 millisecond'
    from unnest($1::bigint[], $2::bigint[], $3::float8[], $4::smallint[], $5::smallint[], $6::float8[])
      as s(id, version, after_ms, attempts, confirm, late_ms)
    -- What has changed meanwhile waits, too, where the request may still be applied.
    where o.id = s.id and (o.version = s.version or s.late_ms is not null)
    returning o.id, o.destination_id, o.recipient, o.due_at
  )
  update outbox as o set due_at = p.due_at
  from (select e.id, max(p.due_at) as due_at from postponed as p
        join outbox as e on e.recipient = p.recipient and e.destination_id = p.destination_id and e.kind = 'e'
          and e.id > p.id and e.due_at < p.due_at
        where not exists (select from postponed as own where own.id = e.id) group by e.id) as p
  where o.id = p.id`;

const LOCK = `select id, version, exit_of as "exitOf" from outbox where id = any($1)
  order by recipient, id for update skip locked`;

/** How long an acknowledged exit waits for whoever is writing to the person's other keys: they may be a long run. */
const MARKING_MS = 100;
const WAITED_TOO_LONG = '55P03';

interface Locked {
  id: number;
  version: number;
  exitOf: string | null;
}

/**
 * Prepared statements find each row by an index, whatever the size of the table when they were planned. What a crash of the
 * server takes back is sent again, which is harmless: nobody waits for the disk.
 */
const BY_INDEX = 'set enable_seqscan = off; set synchronous_commit = off';

/**
 * What is put off is seldom, and its statement joins: it is planned whenever it runs. Nothing may be asked of one while the
 * other is under way.
 */
interface Session {
  prepared: Repeated;
  planned: Runner;
  /** The statement for exits. */
  acknowledgeExits: string;
}

function bury({ prepared }: Session, refused: Extract<Settlement, { kind: 'refused' }>): Promise<unknown>[] {
  const { id, columns, reason, answer, retryAfterMs, forgotten } = refused;
  return [
    ...(columns === null ? [] : [prepared.query(CUT, [id, columns])]),
    prepared.query(BURY, [id, columns, reason, answer, retryAfterMs]),
    ...(forgotten === null ? [] : [prepared.query(REMEMBER_FORGOTTEN, [forgotten, reason])]),
  ];
}

function postpone({ planned }: Session, rows: readonly Extract<Settlement, { kind: 'again' }>[]): Promise<unknown> {
  return planned.query(POSTPONE, [
    rows.map(({ id }) => id),
    rows.map(({ version }) => version),
    rows.map(({ afterMs }) => afterMs),
    rows.map(({ attempts }) => attempts),
    rows.map(({ confirmStage }) => confirmStage ?? null),
    rows.map(({ lateMs }) => lateMs),
  ]);
}

/** Those of the rows that weren't locked which are there: somebody else is writing to them. */
async function findBusy({ planned }: Session, ids: readonly number[]): Promise<ReadonlySet<number>> {
  if (ids.length === 0) return new Set();
  const { rows } = await planned.query<{ id: number }>('select id from outbox where id = any($1)', [ids]);
  return new Set(rows.map(({ id }) => id));
}

export interface Settled {
  /** Settlements of which nothing was written: somebody else is writing to their rows, or to those of a person's other keys. */
  left: ReadonlySet<Settlement>;
  /** Something else that waits may have come to be ready. */
  released: boolean;
}

/** Acknowledged exits mark other keys of their persons: where `exitsAre` left they are given back instead. */
async function settle(
  session: Session,
  leader: string,
  all: readonly Settlement[],
  exitsAre: 'written' | 'left',
): Promise<Settled> {
  const { prepared, acknowledgeExits } = session;
  const [, , { rows }] = await Promise.all([
    prepared.query('begin'),
    fenceLease(prepared, leader),
    prepared.query<Locked>(LOCK, [all.map(({ id }) => id)]),
  ]);
  const locked = new Map(rows.map((row) => [row.id, row]));
  const missing = all.filter(({ id }) => !locked.has(id));
  const busy = await findBusy(
    session,
    missing.map(({ id }) => id),
  );

  const again = all.flatMap((each) => (each.kind === 'again' && locked.has(each.id) ? [each] : []));
  if (again.length > 0) await postpone(session, again);
  const sent = all.filter(({ id, version }) => locked.get(id)?.version === version);
  const writing: Promise<unknown>[] = [];
  const gone: number[] = [];
  const exits: Settlement[] = [];
  for (const each of sent) if (each.kind === 'refused') writing.push(...bury(session, each));
  for (const each of sent) {
    if (each.kind !== 'acknowledged') continue;
    if (each.columns !== null) writing.push(prepared.query(ACKNOWLEDGE_PART, [each.id, each.columns]));
    else if (typeof locked.get(each.id)?.exitOf === 'string') exits.push(each);
    else gone.push(each.id);
  }
  if (gone.length > 0) writing.push(prepared.query(ACKNOWLEDGE, [gone]));
  // Last: a mark of another key may be among the others, and is raised anew.
  let marking: Promise<{ rowCount: number | null }> | null = null;
  if (exits.length > 0 && exitsAre === 'written') {
    writing.push(prepared.query(`set local lock_timeout = '${MARKING_MS}ms'`));
    marking = prepared.query(acknowledgeExits, [exits.map(({ id }) => id)]);
  }
  await Promise.all([...writing, marking, prepared.query('commit')]);
  const marked = (await marking)?.rowCount ?? 0;
  const unwritten = new Set(exitsAre === 'left' ? exits : []);
  const ended = sent.filter((each) => each.kind !== 'again' && !unwritten.has(each));
  const leavers = ended.flatMap(({ id }) => locked.get(id)?.exitOf ?? []);
  return {
    left: new Set([...missing.filter(({ id }) => busy.has(id)), ...unwritten]),
    released: marked > 0 || (await isFollowed(session, leavers)),
  };
}

/**
 * Whether anything waits for an exit of these profiles; acknowledged or dead, theirs lets go of it. Asked when those are gone
 * for everybody: what is raised after that finds none to wait for.
 */
async function isFollowed({ prepared }: Session, profiles: readonly string[]): Promise<boolean> {
  if (profiles.length === 0) return false;
  const { rowCount } = await prepared.query('select from outbox where follows = any($1) limit 1', [profiles]);
  return rowCount !== 0;
}

/** Writes down what became of calls, on a session of its own: one call after the other. */
export interface Settler {
  /**
   * Writes what became of some calls of one destination, in one transaction; may be repeated. Throws a LeaseLostError, with
   * nothing written, if another leads.
   *
   * The rows are locked first, so that the versions that are compared can't change any more. None is waited for: a run
   * that changes very many people takes a while, and may have locked what others don't know of.
   */
  settle: (all: readonly Settlement[]) => Promise<Settled>;
  close: () => void;
}

/** `isHybrid`: a user may have a userId and an address, and be found by either. */
export function createSettler(
  { pool }: Pick<State, 'pool'>,
  leader: string,
  { isHybrid }: { isHybrid: boolean },
): Settler {
  const kept = keepSession(pool, async (client): Promise<Session> => {
    await client.query(BY_INDEX);
    return { prepared: repeat(client), planned: client, acknowledgeExits: acknowledgeExitsIn(isHybrid) };
  });
  return {
    settle: async (all) => {
      const settling = (exitsAre: 'written' | 'left'): Promise<Settled> =>
        kept.use((session) => settle(session, leader, all, exitsAre));
      try {
        return await settling('written');
      } catch (error) {
        if (databaseFailure(error)?.sqlstate !== WAITED_TOO_LONG) throw error;
        return settling('left');
      }
    },
    close: kept.close,
  };
}

/**
 * Has all that is due for some recipients wait: a request to them may still be applied, and what follows comes after. Not
 * what somebody else is writing to, which whoever reads it next puts off.
 */
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
       order by o.recipient, o.id for update of o skip locked
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
  for (const { definitionId, values, exitOf } of marks) {
    const columns = values.map(({ field }) => field);
    await state.pool.query(
      `insert into outbox (kind, destination_id, definition_id, priority, recipient, columns, attempts, due_at, exit_of)
       select 'm', $1, $2, 1, $3, $4::text[], 1, now() + $5 * interval '1 millisecond', $6
       where not exists (select from forgotten where hash = ${hashOf('$3')})
       on conflict (recipient, destination_id, definition_id) where kind = 'm' do update set
         columns = ${COLUMNS_TOGETHER}, version = nextval('version'), attempts = 1, due_at = excluded.due_at`,
      [destinationId, definitionId, recipient, columns, afterMs, exitOf],
    );
  }
}
