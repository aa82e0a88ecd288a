import type { Client, Pool, Queryable } from '../db/connect.js';
import { keepSession, type KeptSession } from '../db/session.js';
import { LIST, WAITS_FOR_A_PERSON, waitsForExit } from './queue.js';

/** How many more calls of each kind can be sent now. */
export interface Room {
  marks: number;
  /** Marks that have a place on a list due, and nothing else. */
  lists: number;
  events: number;
  /** Marks for which the destination has to be asked first. */
  asks: number;
}

/**
 * How far the queue has been read: what is new by priority, what has waited for its time by that time. Only a hint:
 * transactions commit out of order, and what was passed over may have come to be ready, so that the reader goes back to
 * the start now and then, and to the lowest id of which it hears that it is new.
 */
export interface Position {
  new: readonly [number, number, number];
  waited: { dueAt: string; id: number };
}

export const START: Position = { new: [0, 0, 0], waited: { dueAt: '-infinity', id: 0 } };

/** Back to what has the id `from`, or to the start where that may be any. */
export const goBack = (position: Position, from: number): Position => {
  const [live, scheduled, backfill] = position.new.map((id) => Math.min(id, from - 1));
  return from <= 0 ? START : { ...position, new: [live ?? 0, scheduled ?? 0, backfill ?? 0] };
};

/** Of what is behind `position`, the live calls alone. */
export const liveOnly = ({ new: [live] }: Position): Position => ({
  new: [live, Number.MAX_SAFE_INTEGER, Number.MAX_SAFE_INTEGER],
  waited: { dueAt: 'infinity', id: Number.MAX_SAFE_INTEGER },
});

export interface QueueRead {
  /** What the destination is in; nothing is read unless it is active. */
  state: 'active' | 'paused' | 'stopped';
  /** Why it stopped. */
  reason: string | null;
  /** Which definitions are paused, or stopped here. */
  paused: readonly number[];
  /** Fields that are left out of what is sent here: the definition and the name. */
  stoppedFields: readonly string[];
  /** Calls that may be sent; a recipient may come twice. */
  rows: readonly { id: number; version: number; recipient: string }[];
  /** Whether that was all. */
  isEnd: boolean;
  /** In how many milliseconds the next call is due that waits for its time; Infinity: none waits. */
  nextMs: number;
  position: Position;
}

/**
 * A session for reading the queue. Planning these statements takes ten times as long as running them, so they are planned
 * once: for the indexes, whatever the tables looked like then. Read whole and sorted, a queue that was short when that was
 * planned would be read like that when it is long.
 */
export const keepReader = (pool: Pool): KeptSession<Client> =>
  keepSession(pool, async (client) => {
    await client.query('set enable_seqscan = off; set enable_sort = off');
    return client;
  });

const isOn = (row: string): string => `${row}.definition_id <> all (${WAITS_FOR_A_PERSON})`;
/** What waits for the recipient of `o`, by kind: each has an index of its own, by which `offset 0` has it looked up. */
const another = (kind: 'm' | 'e', condition: string): string =>
  `exists (select from outbox as b where b.kind = '${kind}' and b.recipient = o.recipient
     and b.destination_id = o.destination_id and ${isOn('b')} and ${condition} offset 0)`;

/**
 * A call may be sent when its time has come, its definition isn't paused, and no exit of the same person goes first;
 * an event also when nothing earlier of its recipient waits for its time or for an exit, and no mark for its lane.
 */
const IS_READY = `o.due_at <= now() and ${isOn('o')}
  and not ${waitsForExit('o')}
  and (o.confirm = 0 or $8)
  and case o.kind
    when 'm' then $6 and ($11 or not o.columns <@ array['${LIST}'])
    else $7 and not ${another('m', `(not $6 or b.id < o.id and (b.due_at > now() or ${waitsForExit('b')}))`)}
      and not ${another('e', 'b.id < o.id and b.due_at > now()')}
  end`;
const WAITED = '(o.attempts > 0 or o.confirm > 0)';

/** What is read of a call; `way` is the kind of room that it takes. */
const CALL = `o.id, o.version, o.recipient, o.due_at, case when o.kind = 'e' then 'events' when o.confirm > 0 then 'asks'
    when o.columns <@ array['${LIST}'] then 'lists' else 'marks' end as way`;

const readNew = (priority: number, position: string): string =>
  `(select ${priority} as part, ${CALL} from outbox as o
    where o.destination_id = $1 and o.priority = ${priority} and o.id > ${position} and not ${WAITED} and ${IS_READY}
    order by o.id limit $9)`;

const READ_QUEUE = `
  select q.part, q.id, q.version, q.recipient, q.due_at::text as due_at, q.way, head.*
  from destination as t left join lateral (
    select *, row_number() over () as n from (
      ${readNew(0, '$2')}
      union all
      (select 3, ${CALL} from outbox as o
        where o.destination_id = $1 and ${WAITED} and o.due_at >= $5::timestamptz
          and (o.due_at, o.id) > ($5::timestamptz, $10::bigint) and ${IS_READY}
        order by o.due_at, o.id limit $9)
      union all
      ${readNew(1, '$3')}
      union all
      ${readNew(2, '$4')}
    ) as parts where t.state = 'active' limit $9
  ) as q on true
  -- What is said once stands in the first row alone.
  left join lateral (
    select t.state, t.reason, (now() - interval '1 second')::text as read_until,
      (select extract(epoch from min(w.due_at) - now())::float8 * 1000 from outbox as w
        where (w.attempts > 0 or w.confirm > 0) and w.due_at > now()) as next_ms,
      (select last_value from version) as last, ${WAITS_FOR_A_PERSON} as paused,
      array(select dd.definition_id || ' ' || field from definition_destination as dd, jsonb_object_keys(dd.stopped_fields) as field
        where dd.destination_id = $1) as stopped_fields
  ) as head on q.n is null or q.n = 1
  where t.id = $1`;

interface ReadRow {
  /** These seven are null but in the first row. */
  state: QueueRead['state'] | null;
  reason: string | null;
  paused: readonly number[] | null;
  stopped_fields: readonly string[] | null;
  read_until: string | null;
  last: number | null;
  next_ms: string | null;
  /** Null where nothing was found. */
  part: 0 | 1 | 2 | 3 | null;
  id: number;
  version: number;
  recipient: string;
  due_at: string;
  way: keyof Room;
}

/** The first of them, as far as there is room for each. */
function cut(rows: readonly ReadRow[], room: Room): readonly ReadRow[] {
  const left = { ...room };
  const end = rows.findIndex(({ part, way }) => part !== null && (left[way] -= 1) < 0);
  return end < 0 ? rows : rows.slice(0, end);
}

/**
 * Behind the rows that were read, or behind all that there are: whoever writes more says so. What has just come to be due
 * is read again, since it may have been written a moment later.
 */
function positionAfter(before: Position, read: readonly ReadRow[], isEnd: boolean): Position {
  const { last = null, read_until: dueAt = null } = read[0] ?? {};
  if (isEnd && last !== null && dueAt !== null) {
    return { new: [last, last, last], waited: { dueAt, id: Number.MAX_SAFE_INTEGER } };
  }
  const reached: [number, number, number] = [...before.new];
  let { waited } = before;
  for (const { part, id, due_at } of read) {
    if (part === 3) waited = { dueAt: due_at, id };
    else if (part !== null) reached[part] = Math.max(reached[part], id);
  }
  return { new: reached, waited };
}

/**
 * The next calls after `position` that may be sent, at most `limit` and as many as there is room for: live ones first, then
 * those that waited for their time, then the others in the order of priority and arrival. `reader` is a connection of
 * `keepReader`.
 */
export async function readQueue(
  reader: Queryable,
  destinationId: number,
  { position, room, limit }: { position: Position; room: Room; limit: number },
): Promise<QueueRead> {
  const { rows } = await reader.query<ReadRow>({
    name: 'personas_queue',
    text: READ_QUEUE,
    values: [
      destinationId,
      ...position.new,
      position.waited.dueAt,
      room.marks > 0,
      room.events > 0,
      room.asks > 0,
      limit,
      position.waited.id,
      room.lists > 0,
    ],
  });
  const [head] = rows;
  const state = head?.state ?? 'paused';
  const fitting = cut(rows, room);
  const read = fitting.filter(({ part }) => part !== null);
  const isEnd = read.length < limit && fitting.length === rows.length;
  return {
    state,
    reason: head?.reason ?? null,
    paused: head?.paused ?? [],
    stoppedFields: head?.stopped_fields ?? [],
    rows: read,
    isEnd,
    nextMs: Number(head?.next_ms ?? Infinity),
    position: positionAfter(position, fitting, isEnd && state === 'active'),
  };
}

/**
 * Whether more than so many recipients have something due, as far as can be told from the next calls of each priority
 * behind `position`.
 */
export async function isMoreWaiting(
  pool: Queryable,
  destinationId: number,
  { position, recipients }: { position: Position; recipients: number },
): Promise<boolean> {
  const part = (priority: number): string =>
    `(select o.recipient from outbox as o where o.destination_id = $1 and o.priority = ${priority} and o.id > $${priority + 2}
      and o.due_at <= now() and ${isOn('o')} order by o.id limit $5)`;
  const { rows } = await pool.query<{ more: boolean }>({
    text: `select count(distinct recipient) > $6 as more
      from (${part(0)} union all ${part(1)} union all ${part(2)}) as o`,
    values: [destinationId, ...position.new, 3 * recipients, recipients],
  });
  return rows[0]?.more === true;
}
