import { inTransaction, type Client, type Pool, type Queryable } from '../db/connect.js';
import { LeaseLostError } from '../db/lease.js';
import { lockDefinition } from '../db/locks.js';

/**
 * The table `due`: whose rows have changed in the source, for each definition that follows changes. It is a queue, not a
 * set: a profile that changes again while it is evaluated has another row, and whoever evaluates deletes the ids that it
 * had read and no others. Where too many wait, a run in full is wanted instead (`definition.full_wanted`), which only a
 * full run that began later may settle.
 *
 * The bare names of every `client` here are those of the state.
 */

/** Profiles, and the keys of the definitions that depend on them. */
export interface Dependents {
  keys: readonly string[];
  profileIds: readonly string[];
}

/**
 * As `fenceLease`: whoever would lead next waits until it has ended. One statement, so that what comes with each change of a
 * source is one message and one answer.
 */
const ADD_DUE = `with leads as (select from leader where holder = $1 and expires_at > clock_timestamp() for key share),
  followed as (
    select d.id, k.n from unnest($2::text[], $3::int4[]) as k(key, n) join definition as d on d.key = k.key
    where d.tracking = 'live' and exists (select from leads)),
  added as (
    insert into due (definition_id, profile_id)
    select f.id, p.id from followed as f join unnest($4::text[], $5::int4[]) as p(id, n) on p.n = f.n)
  select set_config('synchronous_commit', $6, true), exists (select from leads) as leads, array(select id::text from followed) as ids, array(select n::text from followed) as numbers`;

/**
 * Adds the profiles to those of their definitions that follow changes, in a transaction of its own; returns how many came to
 * each of these definitions. `durable` false: a crash of the server may take it back. Throws a LeaseLostError where `leader`
 * leads no more.
 */
export async function addDue(
  pool: Pool,
  leader: string,
  dependents: readonly Dependents[],
  { durable }: { durable: boolean },
): Promise<ReadonlyMap<number, number>> {
  const numbered = (of: (each: Dependents) => readonly string[]): [string[], number[]] => [
    dependents.flatMap((each) => of(each)),
    dependents.flatMap((each, n) => of(each).map(() => n)),
  ];
  const values = [
    leader,
    ...numbered(({ keys }) => keys),
    ...numbered(({ profileIds }) => profileIds),
    durable ? 'on' : 'off',
  ];
  const { rows } = await pool.query<{ leads: boolean; ids: string[]; numbers: string[] }>({
    name: 'personas_add_due',
    text: ADD_DUE,
    values,
  });
  const [row] = rows;
  if (row?.leads !== true) throw new LeaseLostError();
  const added = new Map<number, number>();
  row.ids.map(Number).forEach((id, index) => {
    const count = dependents[Number(row.numbers[index])]?.profileIds.length ?? 0;
    added.set(id, (added.get(id) ?? 0) + count);
  });
  return added;
}

/**
 * Has each of these definitions that follows changes compared in full, as soon as there is a place. `dropDue`: that run
 * stands for all that waits, too; otherwise single changes don't wait for it.
 */
export async function wantFull(
  client: Queryable,
  keys: readonly string[],
  { dropDue }: { dropDue: boolean },
): Promise<void> {
  if (keys.length === 0) return;
  await client.query(
    `with wanted as (
       update definition set full_wanted = nextval('version'),
         due_at = case when cadence = 'hourly' then due_at else least(due_at, clock_timestamp()) end
       where key = any($1) and tracking = 'live' returning id),
     -- Not those that a batch is deleting: it may be waiting for the definition's row, which is held here.
     dropped as (
       select due.definition_id, due.id from due join wanted on wanted.id = due.definition_id
       where $2 and due.parked_at is null for update of due skip locked)
     delete from due using dropped where due.definition_id = dropped.definition_id and due.id = dropped.id`,
    [keys, dropDue],
  );
}

/** What a run in full knows of its start. */
export interface Start {
  /** What was wanted by then: the run settles that and nothing that is asked for later. */
  fullWanted: number;
  /** Whether nothing but corrections is left to find: changes were followed, and no run in full was wanted. */
  isReconcile: boolean;
}

/**
 * Marks the start of a full run of a definition that follows changes, in a transaction of its own under the definition's
 * lock: whatever is evaluated after its commit is noted, and newer than what the run computes. `claims`: nothing can be
 * evaluated singly at present, so what is due by now is settled by this run.
 */
export async function markStart(
  pool: Pool,
  { definitionId, runId, claims }: { definitionId: number; runId: number; claims: boolean },
): Promise<Start> {
  return inTransaction(pool, async (client) => {
    await lockDefinition(client, definitionId);
    const { rows } = await client.query<{ wanted: number; settled: boolean }>(
      `update definition set full_run = $2 where id = $1
       returning full_wanted as wanted, full_wanted = full_done and tracking = 'live' as settled`,
      [definitionId, runId],
    );
    await client.query('delete from noted where definition_id = $1', [definitionId]);
    await client.query(`update due set claimed_by = $2 where definition_id = $1 and claimed_by is distinct from $2`, [
      definitionId,
      claims ? runId : null,
    ]);
    const { wanted = 0, settled = false } = rows[0] ?? {};
    return { fullWanted: wanted, isReconcile: settled && !claims };
  });
}

/** More than these aren't looked for in `delta`: the run writes what it has computed, and they are evaluated after it. */
const LEFT_OUT_AT_MOST = 5_000;

/**
 * Leaves out of `delta`, under the definition's lock, what was evaluated since the run's start, and what waits to be: for
 * these people the run knows only what was before. With a profile go all whom it shares or shared a recipient with, and
 * with an exit the entry that belongs to it. Who is to be looked at since a window was reached waits, too, where all that is
 * left counts as missed; any other run writes what it has found of them. False where too many wait to be looked for. The
 * bare names are the state's.
 */
export async function leaveOut(
  session: Client,
  definitionId: number,
  { isReconcile }: Pick<Start, 'isReconcile'>,
): Promise<boolean> {
  const snapshot = `snapshot_${definitionId}`;
  const waiting = await session.query<{ profiles: readonly string[] | null }>(
    `select array_agg(profile_id) as profiles from (
       select profile_id from due where definition_id = ${definitionId} and claimed_by is null
       union select profile_id from validity where definition_id = ${definitionId} and until <= clock_timestamp() and $1
       limit ${LEFT_OUT_AT_MOST + 1}) as w`,
    [isReconcile],
  );
  const profiles = waiting.rows[0]?.profiles ?? [];
  const isComplete = profiles.length <= LEFT_OUT_AT_MOST;
  await session.query(
    `with named as materialized (
       select profile_id from unnest($1::text[]) as w(profile_id)
       union select name from noted where definition_id = ${definitionId} and kind = 'p'),
     touched as materialized (
       select profile_id from named
       union select unnest(s.profile_id || s.others) from ${snapshot} as s
         where s.profile_id = any(array(select profile_id from named)) or s.others && array(select profile_id from named)),
     met as materialized (
       select d.recipient, d.profile_id from pg_temp.delta as d left join ${snapshot} as s on s.recipient = d.recipient
       where d.recipient in (select name from noted where definition_id = ${definitionId} and kind = 'r')
         or d.profile_id in (select profile_id from touched) or s.profile_id in (select profile_id from touched)
         or d.others && array(select profile_id from touched) or s.others && array(select profile_id from touched))
     delete from pg_temp.delta where op <> 'w'
       and (recipient in (select recipient from met) or profile_id in (select profile_id from met))`,
    [isComplete ? profiles : []],
  );
  return isComplete;
}

/**
 * Recipients that a comparison found to be other than what following changes has left: it must find none. Null where it
 * can't tell: everybody came to be wanted since `start`, as by a TRUNCATE, so what it found may be what that is about.
 */
export async function countCorrections(
  session: Client,
  definitionId: number,
  { fullWanted, isReconcile }: Start,
): Promise<number | null> {
  if (!isReconcile) return null;
  const { rows } = await session.query<{ corrections: string }>(
    `select (select count(*) from pg_temp.delta where op in ('e', 'x', 'c', 't', 'k')) as corrections
     from definition where id = $1 and full_wanted = $2 and tracking = 'live'`,
    [definitionId, fullWanted],
  );
  return rows[0] === undefined ? null : Number(rows[0].corrections);
}
