import type { Client, Queryable } from '../db/connect.js';
import { COLUMNS_TOGETHER, DUE_NOW, hashOf } from './queue.js';

/**
 * Dead calls: what a destination has refused, with its answer. They wait for a person (`failed retry`, `failed discard`),
 * for a newer change, which takes their place, or, where the refusal may pass, for the next day.
 */
export interface DeadFilter {
  /** Definition keys; none: all. */
  keys: readonly string[];
  /** A refusal's code, such as InvalidEmailAddressError; null: any. */
  reason: string | null;
  destination: string | null;
  /** An interval as PostgreSQL reads it: only what died longer ago; null: any age. */
  olderThan: string | null;
}

const MATCHES = `(cardinality($1::text[]) = 0 or d.key = any($1)) and ($2::text is null or x.reason = $2)
  and ($3::text is null or t.name = $3) and ($4::interval is null or x.died_at < now() - $4::interval)`;
const FROM = `dead_call as x join definition as d on d.id = x.definition_id join destination as t on t.id = x.destination_id`;

const parameters = ({ keys, reason, destination, olderThan }: DeadFilter): unknown[] => [
  keys,
  reason,
  destination,
  olderThan,
];

export interface DeadGroup {
  definition: string;
  destination: string;
  reason: string;
  count: number;
  oldest: Date;
  samples: readonly { recipient: string; field: string | null; event: string | null; answer: string }[];
}

/** Dead calls by definition and reason, each with up to three samples. */
export async function listDead(pool: Queryable, filter: DeadFilter): Promise<readonly DeadGroup[]> {
  const sample = `jsonb_build_object('recipient', x.recipient, 'field', x.field, 'event', x.event, 'answer', x.answer)`;
  const { rows } = await pool.query<DeadGroup>(
    `select d.key as definition, t.name as destination, x.reason, count(*) as count, min(x.died_at) as oldest,
       to_jsonb((array_agg(${sample} order by x.id))[1:3]) as samples
     from ${FROM} where ${MATCHES} group by 1, 2, 3 order by count(*) desc, 1, 3`,
    parameters(filter),
  );
  return rows;
}

/** Puts the dead calls that `condition` picks back into the outbox, at the end of the queue; returns how many. */
async function revive(client: Client, condition: string, values: unknown[], byItself: 0 | 1): Promise<number> {
  const picked = await client.query<{ id: number }>(
    `select x.id from ${FROM} where ${condition} order by x.id for update of x`,
    values,
  );
  const ids = picked.rows.map(({ id }) => id);
  if (ids.length === 0) return 0;
  await client.query(
    `insert into outbox (kind, destination_id, definition_id, priority, recipient, columns, with_beside, revived, successors)
     select 'm', x.destination_id, x.definition_id, 1, x.recipient, array_agg(x.field), bool_or(x.with_beside), max(x.retries) + $2,
       (select last.successors from dead_call as last where last.id = max(x.id))
     from dead_call as x where x.id = any($1) and x.kind = 'm' group by x.destination_id, x.definition_id, x.recipient
     on conflict (recipient, destination_id, definition_id) where kind = 'm' do update set
       columns = ${COLUMNS_TOGETHER},
       version = nextval('version'), due_at = ${DUE_NOW}, attempts = 0, revived = excluded.revived,
       with_beside = outbox.with_beside or excluded.with_beside,
       successors = coalesce(outbox.successors, excluded.successors)`,
    [ids, byItself],
  );
  await client.query(
    `insert into outbox (kind, destination_id, definition_id, priority, recipient, event, message_id, occurred_at, properties, beside, revived)
     select 'e', destination_id, definition_id, 1, recipient, event, message_id, occurred_at, properties, beside, retries + $2
     from dead_call where id = any($1) and kind = 'e' order by id`,
    [ids, byItself],
  );
  await client.query('delete from dead_call where id = any($1)', [ids]);
  return ids.length;
}

/** Sends them again, to people whom the destination had forgotten, too: a person says so. */
export async function retryDead(client: Client, filter: DeadFilter): Promise<number> {
  await client.query(
    `delete from forgotten_there as f using (select x.destination_id, x.recipient from ${FROM} where ${MATCHES}) as r
     where f.destination_id = r.destination_id and f.hash = ${hashOf('r.recipient')}`,
    parameters(filter),
  );
  return revive(client, MATCHES, parameters(filter), 0);
}

export async function discardDead(pool: Queryable, filter: DeadFilter): Promise<number> {
  const result = await pool.query(
    `delete from dead_call where id in (select x.id from ${FROM} where ${MATCHES})`,
    parameters(filter),
  );
  return result.rowCount ?? 0;
}

const RETRIES = 5;

/** Revives what was to be tried again by itself, and drops what has been dead for 90 days. */
export async function tendDead(client: Client): Promise<void> {
  await revive(client, `x.retry_at <= now() and x.retries < ${RETRIES}`, [], 1);
  await client.query(`delete from dead_call where died_at < now() - interval '90 days'`);
}
