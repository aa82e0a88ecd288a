import type { Counts } from '../core/guard.js';
import type { Client, Runner } from '../db/connect.js';
import { hashOf } from '../outbox/queue.js';

/**
 * The temporary tables of a comparison, and what is read from them. `delta` holds what differs, one row a recipient
 * (`statement.ts` says what its `op` means). A run makes it for its own transaction; a session that evaluates changes all
 * day keeps one and has it emptied at each commit, since tables made and dropped at that rate would bloat the catalogue.
 */
const deltaTable = (onCommit: 'drop' | 'delete rows'): string => `create temporary table delta (
  op "char" not null, recipient text collate "C", profile_id text collate "C", beside text collate "C", value jsonb,
  old_value jsonb, columns text[], entered_at timestamptz, introduce boolean not null, unsendable boolean not null,
  matched boolean not null, was_kept boolean not null, known boolean not null default false,
  vanished boolean not null default false, rivals text[], others text[]
) on commit ${onCommit}`;

export const DELTA_TABLE = deltaTable('drop');
export const KEPT_DELTA_TABLE = deltaTable('delete rows');

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

/** What applying `delta` does to a definition that has `before` members; `fields` are those whose values may turn to null. */
export async function countDelta(session: Runner, before: number, fields: readonly string[]): Promise<RunCounts> {
  const result = await session.query<
    Record<
      'entered' | 'exited' | 'changed' | 'without' | 'conflicting' | 'skipped' | 'kept' | 'back' | 'nulled',
      string
    >
  >(
    `select count(*) filter (where op = 'e') as entered,
       count(*) filter (where op = 'x' and not was_kept) as exited, count(*) filter (where op = 'c') as changed,
       count(*) filter (where op = 'w') as without, count(*) filter (where op = 'd') as conflicting,
       count(*) filter (where unsendable) as skipped, count(*) filter (where op = 'k') as kept,
       count(*) filter (where matched and was_kept) as back,
       coalesce((select max(n) from (
         select count(*) as n from delta, unnest($1::text[]) as f
         where op in ('x', 'c') and old_value ? f and not coalesce(value ? f, false) group by f) as nulls), 0) as nulled
     from delta`,
    [fields],
  );
  const counts = result.rows[0];
  const count = (name: keyof NonNullable<typeof counts>): number => Number(counts?.[name] ?? 0);
  return {
    before,
    members: before + count('entered') - count('exited') - count('kept') + count('back'),
    entered: count('entered'),
    exited: count('exited'),
    changed: count('changed'),
    nulled: count('nulled'),
    withoutIdentifier: count('without'),
    conflicting: count('conflicting'),
    skippedValues: count('skipped'),
  };
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
