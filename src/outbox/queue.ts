import type { Computation } from '../core/call.js';
import type { FieldType } from '../core/field.js';
import type { Waiting } from '../core/next.js';
import type { Queryable } from '../db/connect.js';

/**
 * The column of a mark that stands for membership of a list: no field can have this name. It is due, waits and dies like
 * any other.
 */
export const LIST = '.list';

/**
 * The outbox as the sender sees it: what waits for a recipient, with its values as of now.
 */
interface WaitingCall extends Waiting {
  version: number;
  priority: number;
  attempts: number;
  /** 1: not asked yet; 2: denied once. */
  confirmStage: number;
  computation: Computation;
  definitionId: number;
  /** The destination has said that it has forgotten this person. */
  isForgotten: boolean;
}

export interface WaitingMark extends WaitingCall {
  kind: 'm';
  /** The profile that leaves under this key by it, if any does: what is sent under its other keys comes after. */
  exitOf: string | null;
  withBeside: boolean;
  beside: string | null;
  /** The list that the definition fills; its id once that is known. */
  list: { id: number | null; name: string; existingOnly: boolean } | null;
  /** The due columns with their values as JSON text. */
  values: readonly { field: string; json: string; type: FieldType }[];
}

export interface WaitingEvent extends WaitingCall {
  kind: 'e';
  beside: string | null;
  event: string;
  messageId: string;
  occurredAt: number;
  properties: string;
  /** The properties that are dates. */
  dates: readonly string[];
}

/** The columns of a mark that is raised while one waits. */
export const COLUMNS_TOGETHER = `(select array_agg(distinct c) from unnest(outbox.columns || excluded.columns) as c)`;

/** When a mark that is raised while one waits is due: not before a request that went unanswered can have been applied. */
export const DUE_NOW = 'greatest(now(), outbox.not_before)';

/** The keyed hash by which an erased person is remembered. */
export const hashOf = (recipient: string): string =>
  `sha256(convert_to((select value #>> '{}' from setting where name = 'forget_key') || ${recipient}, 'UTF8'))`;

/** Definitions whose calls wait for a person: paused, or stopped at the destination `$1`. */
export const WAITS_FOR_A_PERSON = `array(select d.id from definition as d where d.state = 'paused'
  union all select dd.definition_id from definition_destination as dd where dd.destination_id = $1 and dd.stopped is not null)`;

/**
 * Whether the mark `row` waits for an exit of the same person under another key, of whatever definition: the destination may
 * hold both keys as one user, and gives that user the keys of what comes last. An exit waits for nothing. One that waits
 * for a person itself is not waited for, nor one before which the destination is asked: what it undoes is marked again.
 */
export const waitsForExit = (row: string): string => `(${row}.follows is not null and exists (select from outbox as x
  where x.exit_of = ${row}.follows and x.destination_id = ${row}.destination_id and x.recipient <> ${row}.recipient
    and x.confirm = 0 and x.definition_id <> all (${WAITS_FOR_A_PERSON}) offset 0))`;

export type WaitingRow = WaitingMark | WaitingEvent;

interface LoadedRow {
  id: number;
  version: number;
  kind: 'm' | 'e';
  recipient: string;
  definition_id: number;
  priority: number;
  attempts: number;
  confirm: number;
  forgotten: boolean;
  list: string | null;
  list_existing_only: boolean | null;
  list_id: number | null;
  due: boolean;
  blocked: boolean;
  exit_of: string | null;
  with_beside: boolean;
  event_beside: string | null;
  beside: string | null;
  definition_kind: 'audience' | 'trait';
  key: string;
  computation_id: string;
  columns: string[] | null;
  member: boolean;
  /** Null for an audience: its columns are all as `member`. */
  values: string[] | null;
  types: FieldType[] | null;
  event: string | null;
  message_id: string | null;
  occurred_at: string | null;
  properties: string | null;
  dates: string[] | null;
}

/** What all calls of a definition share. */
interface Shared {
  computation: Computation;
  list: WaitingMark['list'];
}

const toShared = (row: LoadedRow): Shared => ({
  computation: { kind: row.definition_kind, id: row.computation_id, key: row.key },
  list: row.list === null ? null : { id: row.list_id, name: row.list, existingOnly: row.list_existing_only === true },
});

/** A literal with all of its members: one that begins with a spread object takes eight times the memory to make. */
function toWaiting(row: LoadedRow, { computation, list }: Shared): WaitingRow {
  return row.kind === 'm'
    ? {
        kind: 'm',
        id: row.id,
        version: row.version,
        priority: row.priority,
        attempts: row.attempts,
        due: row.due,
        blocked: row.blocked,
        confirm: row.confirm > 0,
        confirmStage: row.confirm,
        isForgotten: row.forgotten,
        definitionId: row.definition_id,
        computation,
        exitOf: row.exit_of,
        withBeside: row.with_beside,
        beside: row.beside,
        list,
        values: valuesOf(row),
      }
    : {
        kind: 'e',
        id: row.id,
        version: row.version,
        priority: row.priority,
        attempts: row.attempts,
        due: row.due,
        blocked: row.blocked,
        confirm: row.confirm > 0,
        confirmStage: row.confirm,
        isForgotten: row.forgotten,
        definitionId: row.definition_id,
        computation,
        beside: row.event_beside,
        event: row.event ?? '',
        messageId: row.message_id ?? '',
        occurredAt: Number(row.occurred_at),
        properties: row.properties ?? '{}',
        dates: row.dates ?? [],
      };
}

function valuesOf({ columns, member, values, types }: LoadedRow): WaitingMark['values'] {
  return (columns ?? []).map((field, index) =>
    values === null
      ? { field, json: member ? 'true' : 'false', type: 'boolean' }
      : { field, json: values[index] ?? 'null', type: types?.[index] ?? 'string' },
  );
}

/** More events of a recipient are loaded when these have been sent: there may be very many. */
export const MOST_EVENTS = 20;

/**
 * All that waits for `recipients`, of events the first 20, in the order in which it arose; a mark with its values read from the snapshot in the
 * same statement. A recipient that has left the snapshot reads as false (audience) or null (trait).
 */
export async function loadWaiting(
  reader: Queryable,
  destinationId: number,
  recipients: readonly string[],
): Promise<ReadonlyMap<string, readonly WaitingRow[]>> {
  const { rows } = await reader.query<LoadedRow>({
    name: 'personas_waiting',
    text: `select o.id, o.version, o.kind, o.recipient, o.definition_id, o.priority, o.attempts, o.confirm,
        o.due_at <= now() as due, dd.list, dd.list_existing_only, dd.list_id,
        exists (select from forgotten_there where destination_id = $1) and exists (select from forgotten_there as f
          where f.destination_id = $1 and f.hash = ${hashOf('o.recipient')}) as forgotten,
        ${waitsForExit('o')} as blocked, o.exit_of, o.with_beside, o.beside as event_beside, s.beside,
        d.kind as definition_kind, d.key, d.computation_id, s.recipient is not null and not s.kept as member,
        -- Arrays as JSON, which is read in a fraction of the time that a text[] takes.
        to_json(o.columns) as columns,
        case when o.kind = 'm' and d.kind = 'trait' then
          to_json(array(select coalesce((s.value -> c)::text, 'null')
            from unnest(o.columns) with ordinality as u(c, n) order by n))
        end as values,
        case when o.kind = 'm' and d.kind = 'trait' then
          to_json(array(select coalesce(d.fields ->> c, 'string')
            from unnest(o.columns) with ordinality as u(c, n) order by n))
        end as types,
        o.event, o.message_id, extract(epoch from o.occurred_at)::text as occurred_at, o.properties::text as properties,
        case when o.kind = 'e' then
          to_json(array(select key from jsonb_each_text(d.fields || d.riders) where value = 'date'))
        end as dates
      from outbox as o
      join definition as d on d.id = o.definition_id
      left join definition_destination as dd on dd.definition_id = o.definition_id and dd.destination_id = o.destination_id
      -- By the index for each row, whatever the size was when this was planned: a first run fills a snapshot at once.
      left join lateral (select * from snapshot as s
        where o.kind = 'm' and s.definition_id = o.definition_id and s.recipient = o.recipient offset 0) as s on true
      -- Each kind has an index of its own.
      where (o.kind = 'm' and o.recipient = any($2) and o.destination_id = $1
          or o.kind = 'e' and o.recipient = any($2) and o.destination_id = $1
            and (select count(*) from (select from outbox as b where b.kind = 'e' and b.recipient = o.recipient
              and b.destination_id = $1 and b.id < o.id limit ${MOST_EVENTS}) as earlier) < ${MOST_EVENTS})
        and d.state <> 'paused' and dd.stopped is null`,
    values: [destinationId, recipients],
  });
  // Not by PostgreSQL: a reader's session would rather read the whole queue in the order of its index than sort.
  rows.sort((a, b) => a.id - b.id);
  const byDefinition = new Map<number, Shared>();
  const byRecipient = new Map<string, WaitingRow[]>();
  for (const row of rows) {
    const shared = byDefinition.get(row.definition_id) ?? toShared(row);
    byDefinition.set(row.definition_id, shared);
    const waiting = toWaiting(row, shared);
    const others = byRecipient.get(row.recipient);
    if (others === undefined) byRecipient.set(row.recipient, [waiting]);
    else others.push(waiting);
  }
  return byRecipient;
}
