import type { Counts } from '../core/guard.js';
import { quoteLiteral, type Client, type Runner } from '../db/connect.js';
import { hashOf } from '../outbox/queue.js';

/**
 * The temporary tables of a comparison, and what is read from them. `delta` holds what differs, one row a recipient
 * (`statement.ts` says what its `op` means). A run makes it for its own transaction; a session that evaluates changes all
 * day keeps one and empties it before each commit, since tables made and dropped at that rate would bloat the catalogue, and
 * having PostgreSQL empty it costs as much as comparing some profiles does.
 */
const deltaTable = (onCommit: 'drop' | 'preserve rows'): string => `create temporary table delta (
  op "char" not null, recipient text collate "C", profile_id text collate "C", beside text collate "C", value jsonb,
  old_value jsonb, columns text[], entered_at timestamptz, introduce boolean not null, unsendable boolean not null,
  matched boolean not null, was_kept boolean not null, known boolean not null default false,
  vanished boolean not null default false, rivals text[], others text[]
) on commit ${onCommit}`;

export const DELTA_TABLE = deltaTable('drop');
export const KEPT_DELTA_TABLE = deltaTable('preserve rows');

/** Counts the rows of a computed query as they are made; a temporary one may be used in a read-only transaction. */
export const ROW_COUNTERS =
  'create temporary sequence computed_row cache 10000; create temporary sequence other_row cache 10000; create temporary sequence member_count';

export const STAGING_TABLE = `create temporary table staging (
  recipient text collate "C", profile_id text collate "C", beside text collate "C", value jsonb, unsendable text[],
  rivals text[], others text[]
) on commit drop; create temporary sequence member_count`;

/** What a plain comparison counted: the rows that were computed, and the members that the state had at that moment. */
export interface RowCounts {
  computed: number;
  members: number;
}

export interface RunCounts extends Counts {
  members: number;
  withoutIdentifier: number;
  conflicting: number;
  skippedValues: number;
}

/**
 * Leaves people who were erased on request out of what a comparison found. `definitionId` null: it was never registered,
 * and the state may not have been made yet.
 */
export async function leaveOutForgotten(session: Runner, definitionId: number | null): Promise<void> {
  if (definitionId === null) {
    const { rows } = await session.query<{ there: boolean }>(`select to_regclass('forgotten') is not null as there`);
    if (rows[0]?.there !== true) return;
  }
  // An exit is told of while the snapshot still has them: who was erased meanwhile has left it.
  const isGone =
    definitionId === null
      ? 'false'
      : `not exists (select from snapshot as s where s.definition_id = ${definitionId} and s.recipient = delta.recipient)`;
  await session.query(
    `delete from delta where (op <> 'x' or ${isGone}) and recipient is not null and exists (select from forgotten)
     and ${hashOf('recipient')} in (select hash from forgotten)`,
  );
}

/** What is counted of the rows of `delta`. */
export type Counted = Record<
  'entered' | 'exited' | 'changed' | 'without' | 'conflicting' | 'skipped' | 'kept' | 'back' | 'nulled',
  number
>;

/** An aggregate over rows of `delta` that gives a `Counted`; `fields` are those whose values may turn to null. */
export function countsOf(fields: readonly string[]): string {
  const isNulled = (field: string): string =>
    `op in ('x', 'c') and old_value ? ${quoteLiteral(field)} and not coalesce(value ? ${quoteLiteral(field)}, false)`;
  const nulled = ['0', ...fields.map((field) => `count(*) filter (where ${isNulled(field)})`)];
  return `jsonb_build_object('entered', count(*) filter (where op = 'e'),
       'exited', count(*) filter (where op = 'x' and not was_kept), 'changed', count(*) filter (where op = 'c'),
       'without', count(*) filter (where op = 'w'), 'conflicting', count(*) filter (where op = 'd'),
       'skipped', count(*) filter (where unsendable), 'kept', count(*) filter (where op = 'k'),
       'back', count(*) filter (where matched and was_kept), 'nulled', greatest(${nulled.join(', ')}))`;
}

/** What these counts come to for a definition that has `before` members. */
export function toRunCounts(before: number, counted: Counted): RunCounts {
  const { entered, exited, changed, nulled, kept, back, without, conflicting, skipped } = counted;
  return {
    before,
    members: before + entered - exited - kept + back,
    entered,
    exited,
    changed,
    nulled,
    withoutIdentifier: without,
    conflicting,
    skippedValues: skipped,
  };
}

/** What applying `delta` does to a definition that has `before` members. */
export async function countDelta(session: Runner, before: number, fields: readonly string[]): Promise<RunCounts> {
  const { rows } = await session.query<{ counts: string }>(`select ${countsOf(fields)}::text as counts from delta`);
  return toRunCounts(before, JSON.parse(rows[0]?.counts ?? 'null') as Counted);
}

/**
 * Whether every recipient was computed once: each row that met the snapshot met another member. Counted, not grouped.
 * `computed` rows, less those that met nothing, must be the members less those whom nothing met.
 */
export async function isEachOnce(session: Client, { computed, members }: RowCounts): Promise<boolean> {
  const result = await session.query<{ each_once: boolean }>(
    `select $1::bigint - count(*) filter (where not matched and op not in ('x', 'k'))
          = $2::bigint - count(*) filter (where op in ('x', 'k') and not matched and not was_kept) + count(*) filter (where matched and was_kept)
       and count(recipient) = count(distinct recipient) as each_once from delta`,
    [computed, members],
  );
  return result.rows[0]?.each_once === true;
}
