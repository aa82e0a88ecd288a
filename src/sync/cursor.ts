import type { Client, Queryable } from '../db/connect.js';
import { inTransaction } from '../db/connect.js';
import type { State } from '../db/state.js';
import { COLUMNS_TOGETHER, WAITS_FOR_A_PERSON } from '../outbox/queue.js';
import { lockDefinition } from '../db/locks.js';
import { audienceColumns, membershipEventId, membershipProperties } from './apply.js';

/**
 * First sync and backfill: a cursor over the snapshot, in the order of the recipients, that feeds marks (and events) into
 * the outbox a chunk at a time, behind everything live. It is a row, so it goes on after a restart where it stopped; a
 * chunk and its new position commit together, under the definition's lock. Who entered after the first run was told of
 * as they entered, and is passed over by a first sync.
 */
const CHUNK = 2_500;
/** No more of a destination's outbox is filled with what a cursor has fed. */
const WAITING_AT_MOST = 25_000;
/** Whatever has come to wait again below the first row is counted after this time. */
const COUNTED_ANEW_MS = 10_000;

interface Cursor {
  definition_id: number;
  destination_id: number;
  backfill: 'initial' | 'backfill';
  identify: boolean;
  events: boolean;
  entered: string;
  computed: string;
  priority: number;
  key: string;
  name: string;
  kind: 'audience' | 'trait';
  computation_id: string;
}

async function readCursors(state: State): Promise<readonly Cursor[]> {
  const { rows } = await state.pool.query<Cursor>(
    `select dd.definition_id, dd.destination_id, dd.backfill, dd.backfill_identify as identify, dd.backfill_events as events,
       dd.entered, dd.computed, dd.backfill_priority as priority, d.key, d.name, d.kind, d.computation_id
     from definition_destination as dd
     join definition as d on d.id = dd.definition_id
     join destination as t on t.id = dd.destination_id
     where dd.backfill is not null and dd.active and dd.stopped is null and d.state = 'active' and t.state = 'active'
     order by dd.backfill_until, dd.definition_id`,
  );
  return rows;
}

/**
 * Counts what a destination's outbox holds, from the first row that waited when it was last counted: before it may be very
 * many that are dead. What waits for a person takes up no room, since it could fill all of it.
 */
function createRoom(state: State): (destinationId: number, priority: number) => Promise<boolean> {
  const floors = new Map<string, { id: number; until: number }>();
  return async (destinationId, priority) => {
    const name = `${destinationId} ${priority}`;
    const known = floors.get(name);
    const floor = known !== undefined && known.until > performance.now() ? known : { id: 0, until: 0 };
    const { rows } = await state.pool.query<{ waiting: number; lowest: number | null }>(
      `select count(*) as waiting, min(id) as lowest from (select o.id from outbox as o
         where o.destination_id = $1 and o.priority = $2 and o.id >= $4 and o.definition_id <> all (${WAITS_FOR_A_PERSON})
         order by o.id limit $3) as w`,
      [destinationId, priority, WAITING_AT_MOST, floor.id],
    );
    const { waiting = 0, lowest = null } = rows[0] ?? {};
    const until = floor.id === 0 ? performance.now() + COUNTED_ANEW_MS : floor.until;
    floors.set(name, { id: lowest ?? floor.id, until });
    return waiting <= WAITING_AT_MOST - CHUNK;
  };
}

/** Feeds one chunk; gives the lowest id of what it has put into the outbox. */
async function feedChunk(client: Client, cursor: Cursor, size: number): Promise<number> {
  const { definition_id, destination_id, kind, key, name, computation_id } = cursor;
  await lockDefinition(client, definition_id);
  // Read again under the lock: a run or a person may have ended it.
  const current = await client.query<{ position: string | null }>(
    `select backfill_position as position from definition_destination
     where definition_id = $1 and destination_id = $2 and backfill = $3 and active for update`,
    [definition_id, destination_id, cursor.backfill],
  );
  const row = current.rows[0];
  if (row === undefined) return Infinity;
  let lowest = Infinity;
  const put = async (statement: string, values: unknown[]): Promise<void> => {
    const { rows } = await client.query<{ lowest: number | null }>(
      `with put as (${statement} returning id) select min(id) as lowest from put`,
      values,
    );
    lowest = Math.min(lowest, rows[0]?.lowest ?? Infinity);
  };
  const chunk = `select s.*, dd.backfill_until as until from snapshot as s
    join definition_destination as dd on dd.definition_id = s.definition_id and dd.destination_id = ${destination_id}
    where s.definition_id = ${definition_id} and not s.kept and s.recipient > $1 order by s.recipient limit ${size}`;
  const position = row.position ?? '';
  const isTold = cursor.backfill === 'initial' ? 'c.entered_at <= c.until' : 'true';
  if (cursor.identify) {
    const columns =
      kind === 'audience'
        ? audienceColumns('dd', 'd.key')
        : '(select array_agg(k) from jsonb_object_keys(c.value) as k where d.fields ? k)';
    await put(
      `insert into outbox (kind, destination_id, definition_id, priority, recipient, columns, with_beside)
       select 'm', ${destination_id}, ${definition_id}, ${cursor.priority}, c.recipient, ${columns}, true
       from (${chunk}) as c join definition as d on d.id = ${definition_id}
       join definition_destination as dd on dd.definition_id = d.id and dd.destination_id = ${destination_id}
       where ${isTold} and (dd.identify or dd.list is not null) order by c.recipient
       on conflict (recipient, destination_id, definition_id) where kind = 'm' do update set
         columns = ${COLUMNS_TOGETHER},
         version = nextval('version'), with_beside = true, priority = least(outbox.priority, excluded.priority),
         -- What has failed so far was without the columns that come to it. It still waits for its time.
         attempts = case when excluded.columns <@ outbox.columns then outbox.attempts else least(outbox.attempts, 1) end`,
      [position],
    );
  }
  if (cursor.events) {
    const [event, id, properties] =
      kind === 'audience'
        ? [
            cursor.entered,
            membershipEventId(computation_id, 'c.recipient', 'c.entered_at', 'entered'),
            membershipProperties(key, name, true, 'c.value'),
          ]
        : [
            cursor.computed,
            membershipEventId(computation_id, 'c.recipient', 'c.entered_at', 'computed'),
            `jsonb_build_object('trait_key', d.key) || coalesce(c.value, '{}')`,
          ];
    await put(
      `insert into outbox (kind, destination_id, definition_id, priority, recipient, event, message_id, occurred_at, properties, beside)
       select 'e', ${destination_id}, ${definition_id}, ${cursor.priority}, c.recipient, $2::text, ${id}, c.entered_at, ${properties}, c.beside
       from (${chunk}) as c join definition as d on d.id = ${definition_id} where ${isTold} order by c.recipient`,
      [position, event],
    );
  }
  const moved = await client.query<{ rows: number; last: string | null }>(
    `select count(*) as rows, max(recipient) as last from (${chunk}) as c`,
    [position],
  );
  const { rows = 0, last = null } = moved.rows[0] ?? {};
  const more = rows === size;
  await client.query(
    `update definition_destination set backfill_done = backfill_done + $3,
       backfill_position = case when $5 then $4 end, backfill = case when $5 then backfill end,
       backfill_until = case when $5 then backfill_until end
     where definition_id = $1 and destination_id = $2`,
    [definition_id, destination_id, rows, last, more],
  );
  if (!more) await backfillAgain(client, definition_id, destination_id);
  return lowest;
}

/** How many cursors were fed, how many there was no room for, and the lowest id of what has been put into the outbox. */
export interface Fed {
  count: number;
  left: number;
  lowestId: number;
}

/** Gives what feeds a chunk of each cursor for which there is room. */
export function createFeeder(state: State, size = CHUNK): () => Promise<Fed> {
  const hasRoom = createRoom(state);
  return async () => {
    const fed: Fed = { count: 0, left: 0, lowestId: Infinity };
    for (const cursor of await readCursors(state)) {
      if (!(await hasRoom(cursor.destination_id, cursor.priority))) {
        fed.left += 1;
        continue;
      }
      const lowest = await inTransaction(state.pool, (client) => feedChunk(client, cursor, size));
      fed.lowestId = Math.min(fed.lowestId, lowest);
      fed.count += 1;
    }
    return fed;
  };
}

/** What begins a backfill: everybody is fed again, behind everything live. `events` is a boolean expression. */
const backfillFrom = (
  events: string,
): string => `backfill = 'backfill', backfill_identify = identify or list is not null,
  backfill_events = ${events}, backfill_position = null, backfill_until = now(), backfill_done = 0, backfill_priority = 2,
  backfill_total = (select members from definition where id = definition_id)`;

/**
 * Begins a backfill of a definition at all of its destinations; one that is under way, or has calls left to send, goes on
 * instead.
 */
export async function beginBackfill(
  state: State,
  definitionId: number,
  { events }: { events: boolean },
): Promise<void> {
  await state.pool.query(
    `update definition_destination set ${backfillFrom('$2 and track')}
     where definition_id = $1 and active and backfill is null
       and not exists (select from outbox as o where o.destination_id = definition_destination.destination_id
         and o.priority = 2 and o.definition_id = $1)`,
    [definitionId, events],
  );
}

/** Gives a synced definition's members to a destination, without events; after what is under way, where something is. */
export async function backfillPair(client: Queryable, definitionId: number, destinationId: number): Promise<void> {
  await client.query(
    `update definition_destination set backfill_again = true where definition_id = $1 and destination_id = $2 and active
       and exists (select from definition where id = $1 and first_run_at is not null)`,
    [definitionId, destinationId],
  );
  await backfillAgain(client, definitionId, destinationId);
}

/** Begins the backfill that was to come after the one that has ended. */
async function backfillAgain(client: Queryable, definitionId: number, destinationId: number): Promise<void> {
  await client.query(
    `update definition_destination set ${backfillFrom('false')}, backfill_again = false
     where definition_id = $1 and destination_id = $2 and active and backfill_again and backfill is null`,
    [definitionId, destinationId],
  );
}

/**
 * Lets the calls of a definition go that waited for a person, and has fields sent that were left out; returns how many
 * destinations that concerns. A list that was gone is found or made again, and gets everybody.
 */
export async function resumeCalls(client: Client, definitionId: number): Promise<number> {
  const { rows } = await client.query<{ destination_id: number; is_list_gone: boolean }>(
    `with before as (select * from definition_destination
       where definition_id = $1 and (stopped is not null or stopped_fields <> '{}') for update)
     update definition_destination as dd set stopped = null, stopped_fields = '{}' from before
     where dd.definition_id = $1 and dd.destination_id = before.destination_id
     returning dd.destination_id,
       before.stopped is not null and before.list is not null and before.list_id is null as is_list_gone`,
    [definitionId],
  );
  for (const { destination_id, is_list_gone } of rows) {
    if (is_list_gone) await backfillPair(client, definitionId, destination_id);
  }
  return rows.length;
}
