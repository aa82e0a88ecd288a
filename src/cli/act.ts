import { lead, type Leadership, type Resources } from '../daemon.js';
import { findLeader, LeaseLostError, tryLead } from '../db/lease.js';
import type { RequestKind } from '../db/state.js';
import { wakeLeader } from '../db/wake.js';
import { QUOTA_WINDOW_MS } from '../delivery/pace.js';
import { until } from '../lib/until.js';
import { NOTHING, QUIET_REQUESTS, type RequestArguments, type RequestProgress } from '../sync/asking.js';
import type { Opened } from './open.js';

/**
 * How a command acts: it leaves a request for whoever leads, and watches. Where nobody leads it leads itself, carries its
 * own request out and gives the lease back. Either way the same code acts, and the command only looks at tables.
 */
export interface Acted {
  /** The request's row. */
  id: number;
  outcome: 'done' | 'refused' | 'failed' | 'interrupted';
  answer: string | null;
  progress: RequestProgress;
  /** When the request was left, by the database's clock. */
  since: Date;
}

export interface Delivery {
  /** Calls of the definitions in question that can be sent now. */
  waiting: number;
  /** Members whom a first sync or backfill has yet to reach. */
  ahead: number;
  /** Calls that wait longer than half a minute. */
  later: number;
  /** Calls to a destination that has stopped, or of a definition that is paused, or the other way round, and why. */
  stopped: number;
  reason: string | null;
  refused: number;
}

const LOOK_EVERY_MS = 50;
const COUNT_EVERY_MS = 200;
const STAND_BY_LOOK_MS = 500;
const LATER = '30 seconds';

export interface ActOptions<K extends RequestKind & keyof RequestArguments> {
  kind: K;
  args: RequestArguments[K];
  signal: AbortSignal;
  onProgress?: (progress: RequestProgress) => void;
  /** Goes on after the request itself has ended, while this instance still leads if it does. */
  afterwards?: (acted: Acted) => Promise<void>;
}

const pause = (ms: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, ms));

export async function act<K extends RequestKind & keyof RequestArguments>(
  resources: Opened,
  options: ActOptions<K>,
): Promise<Acted> {
  const { kind, args, signal, onProgress, afterwards } = options;
  const { state } = resources.databases;
  const left = await state.pool.query<{ id: number; since: Date }>(
    'insert into request (kind, arguments) values ($1, $2) returning id, requested_at as since',
    [kind, JSON.stringify(args)],
  );
  const request = left.rows[0];
  if (request === undefined) throw new Error('A request was not recorded.');
  await wakeLeader(state.pool);
  const read = async (): Promise<{
    outcome: Acted['outcome'] | null;
    answer: string | null;
    progress: RequestProgress;
  }> => {
    const row = await state.db
      .selectFrom('request')
      .select(['outcome', 'answer', 'progress'])
      .where('id', '=', request.id)
      .executeTakeFirst();
    return {
      outcome: row?.outcome ?? null,
      answer: row?.answer ?? null,
      progress: { ...NOTHING, ...(row?.progress as Partial<RequestProgress> | undefined) },
    };
  };

  /** Takes the request back where nobody has begun with it. */
  const withdraw = async (): Promise<void> => {
    await state.pool.query(
      `update request set outcome = 'failed', finished_at = now(), answer = 'withdrawn', arguments = '{}'
       where id = $1 and outcome is null and taken_by is null`,
      [request.id],
    );
  };

  let leading: { leadership: Leadership; isLost: boolean } | null = null;
  const leave = async (): Promise<void> => {
    const left = leading;
    leading = null;
    await left?.leadership.stop();
  };
  /** Leads where nobody does; gives way where another leads now. */
  const seeToLeader = async (): Promise<void> => {
    if (leading?.isLost === true) await leave();
    if (leading !== null || (await findLeader(state.pool)) !== null) return;
    const lease = await tryLead(state.pool);
    if (lease === null) return;
    const confirmRemovals = 'confirmRemovals' in args && args.confirmRemovals;
    const delivers = !QUIET_REQUESTS.includes(kind);
    if (delivers && lease.quietForMs > QUOTA_WINDOW_MS) {
      const seconds = Math.ceil(lease.quietForMs / 1_000);
      resources.note(
        `Sending begins in ${seconds} s: until then a request of the last leader may be open, or count for a quota.`,
      );
    }
    let leadership: Leadership;
    try {
      leadership = await lead(resources, lease, { scheduled: false, delivers, confirmRemovals, kept: null });
    } catch (error) {
      // Another leads by now, and carries the request out.
      if (error instanceof LeaseLostError) return;
      throw error;
    }
    const now = { leadership, isLost: false };
    leading = now;
    void leadership.lost.then(() => (now.isLost = true));
  };
  /** What the request has caused is delivered by whoever leads: if that one ends, by this instance. */
  const whileLed = async (work: () => Promise<void>): Promise<void> => {
    const over = new AbortController();
    const keeping = (async () => {
      for (;;) {
        await until(STAND_BY_LOOK_MS, over.signal);
        if (over.signal.aborted) return;
        await seeToLeader();
      }
    })();
    // Awaited below; until then it may fail unseen.
    keeping.catch(() => undefined);
    try {
      await work();
    } finally {
      over.abort();
      await keeping;
    }
  };
  try {
    for (;;) {
      await seeToLeader();
      const { outcome, answer, progress } = await read();
      onProgress?.(progress);
      if (outcome !== null) {
        const acted: Acted = { id: request.id, outcome, answer, progress, since: request.since };
        await whileLed(async () => afterwards?.(acted));
        return acted;
      }
      if (signal.aborted) {
        // Runs that this instance leads are cancelled; what the daemon has begun goes on there.
        await leave();
        await withdraw();
        return { id: request.id, outcome: 'interrupted', answer: null, progress, since: request.since };
      }
      await pause(LOOK_EVERY_MS);
    }
  } catch (error) {
    await withdraw().catch(() => undefined);
    throw error;
  } finally {
    await leave();
  }
}

/**
 * What is still to be delivered of what a request has caused. In one statement: between two, a cursor could feed what the
 * first has not seen yet and the second sees no more.
 */
export async function readDelivery(
  resources: Resources,
  { progress, since }: Pick<Acted, 'progress' | 'since'>,
): Promise<Delivery> {
  const { rows } = await resources.databases.state.pool.query<Delivery>(
    `with pair as (
       select dd.*,
         case when d.state = 'paused' then format('"%s" is paused.', d.key)
           when dd.stopped is not null then format('The calls of "%s" to "%s" wait: %s', d.key, t.name, dd.stopped)
           when t.state = 'paused' then format('Destination "%s" is paused.', t.name) else t.reason end as reason
       from definition_destination as dd join definition as d on d.id = dd.definition_id
       join destination as t on t.id = dd.destination_id where d.key = any($1) and dd.active),
     late_exit as (
       select x.exit_of, x.destination_id, x.recipient
       from outbox as x join definition as d on d.id = x.definition_id
       join definition_destination as dd on dd.definition_id = x.definition_id and dd.destination_id = x.destination_id
       where x.exit_of is not null and x.confirm = 0 and x.due_at > now() + interval '${LATER}'
         and d.state <> 'paused' and dd.stopped is null),
     call as (
       select pair.reason, o.due_at > now() + interval '${LATER}' or o.follows is not null and exists (
         select from late_exit as x where x.exit_of = o.follows and x.destination_id = o.destination_id
           and x.recipient <> o.recipient) as is_later
       from outbox as o join pair using (definition_id, destination_id)
       where o.priority = 2 or $2::bigint is null or o.version <= $2),
     member as (
       select greatest(0, backfill_total - backfill_done) * (backfill_identify::int + backfill_events::int) as calls, reason
       from pair where backfill is not null)
     select (select count(*) from call where reason is null and not is_later) as waiting,
       (select count(*) from call where reason is null and is_later) as later,
       (select coalesce(sum(calls), 0)::int8 from member where reason is null) as ahead,
       (select count(*) from call where reason is not null)
         + (select coalesce(sum(calls), 0)::int8 from member where reason is not null) as stopped,
       (select min(reason) from (select reason from call union all select reason from member) as all_reasons) as reason,
       (select count(*) from dead_call as x join definition as d on d.id = x.definition_id
        where d.key = any($1) and x.died_at >= $3) as refused`,
    [progress.definitions, progress.upTo, since],
  );
  const [delivery] = rows;
  if (delivery === undefined) throw new Error('A count gave no row.');
  return delivery;
}

/** Longer than a request of an earlier leader can be open. */
const STALLED_MS = 60_000;

/**
 * Watches until all that a request has caused is delivered, waits for later, or goes nowhere for a minute (`stalled`).
 */
export async function watchDelivery(
  resources: Resources,
  acted: Pick<Acted, 'progress' | 'since'>,
  signal: AbortSignal,
  onLook: (delivery: Delivery) => void,
): Promise<Delivery & { stalled: boolean }> {
  let best = Infinity;
  let movedAt = performance.now();
  for (;;) {
    const delivery = await readDelivery(resources, acted);
    onLook(delivery);
    const left = delivery.waiting + delivery.ahead;
    if (left < best) {
      best = left;
      movedAt = performance.now();
    }
    if (left === 0 || signal.aborted) return { ...delivery, stalled: false };
    if (performance.now() - movedAt > STALLED_MS) return { ...delivery, stalled: true };
    await pause(COUNT_EVERY_MS);
  }
}
