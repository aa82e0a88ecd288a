import type { Counts } from '../core/guard.js';
import type { Queryable } from '../db/connect.js';
import type { RunOutcome, RunTrigger, State } from '../db/state.js';
import type { RunCounts } from './delta.js';

/** The table `run`: what is written of a run from its start to its outcome, and of a held one until a person decides. */
export interface RunRecord {
  id: number;
}

export interface NewRun {
  definitionId: number;
  trigger: RunTrigger;
  /** The held run that a person approved. */
  approves: number | null;
  leader: string;
  textHash: string;
}

/** Records a run, for the moment that is due where one is; null where the definition has an open one. */
export async function recordRun(pool: Queryable, run: NewRun): Promise<RunRecord | null> {
  const { definitionId, trigger, approves, leader, textHash } = run;
  const { rows } = await pool.query<RunRecord>(
    `insert into run (definition_id, trigger, scheduled_for, approves, leader, text_hash)
     select id, $2, case when due_at <= now() then due_at end, $3, $4, $5 from definition where id = $1
     on conflict (definition_id) where outcome is null do nothing returning id`,
    [definitionId, trigger, approves, leader, textHash],
  );
  return rows[0] ?? null;
}

/** Closes open runs of a definition that nobody runs: their outcome could not be written when the database was away. */
export async function abandonOpenRuns(pool: Queryable, key: string): Promise<void> {
  await pool.query(
    `update run set outcome = 'abandoned', finished_at = clock_timestamp()
     where outcome is null and definition_id = (select id from definition where key = $1)`,
    [key],
  );
}

/** Whether the run is still this instance's, until the transaction ends: whoever would give it up waits that long. */
export async function isOpen(client: Queryable, { id }: RunRecord): Promise<boolean> {
  const { rowCount } = await client.query('select from run where id = $1 and outcome is null for share', [id]);
  return rowCount === 1;
}

export interface Finish {
  outcome: RunOutcome;
  counts: RunCounts | null;
  error: string | null;
  /** How long each phase took, in milliseconds. */
  phases: Readonly<Record<string, number>>;
  /** When the definition is due again once the run has answered its moment; null: never by itself. */
  dueInMs: number | null;
  /** What a full run settles of `definition.full_wanted`; null: nothing. */
  fullDone: number | null;
  /** How many profiles were evaluated; null: all. */
  evaluated: number | null;
  /** In how long it is to be compared in full again, though nothing asks for it; only where `fullDone` isn't null. */
  reconcileInMs: number;
  /** What it found that following changes had missed; null: it can't tell. */
  corrections: number | null;
}

/**
 * Writes a run's outcome, and when its definition is due again: unless another moment has come to be due meanwhile, or the
 * schedule was changed. The bare names of `client` are those of the state. False, with nothing written, where the run is
 * no longer open: another instance leads, and has given it up.
 */
export async function finishRun(client: Queryable, { id }: RunRecord, finish: Finish): Promise<boolean> {
  const { outcome, counts, error, phases, dueInMs, fullDone, evaluated, reconcileInMs, corrections } = finish;
  const finished = await client.query(
    `update run set finished_at = clock_timestamp(), outcome = $2, error = $3, phases = $4, members = $5, entered = $6, exited = $7,
       changed = $8, nulled = $9, without_identifier = $10, conflicting = $11, skipped_values = $12, corrections = $13, evaluated = $14
     where id = $1 and outcome is null
     -- Whoever leads next waits for this row: an instance that stands still before it commits is cut off.
     returning set_config('idle_in_transaction_session_timeout', '3000', true)`,
    [
      id,
      outcome,
      error,
      JSON.stringify(phases),
      counts?.members ?? null,
      counts?.entered ?? null,
      counts?.exited ?? null,
      counts?.changed ?? null,
      counts?.nulled ?? null,
      counts?.withoutIdentifier ?? null,
      counts?.conflicting ?? null,
      counts?.skippedValues ?? null,
      corrections,
      evaluated,
    ],
  );
  if (finished.rowCount === 0) return false;
  await client.query(
    `with settled as (delete from due using run as r where r.id = $1 and $3::bigint is not null
       and due.definition_id = r.definition_id and due.claimed_by = r.id),
     unclaimed as (update due set claimed_by = null from run as r where r.id = $1 and $3::bigint is null
       and due.definition_id = r.definition_id and due.claimed_by = r.id)
     update definition as d set full_run = case when d.full_run = r.id then null else d.full_run end,
       full_done = greatest(d.full_done, $3::bigint),
       reconcile_at = case when $3::bigint is null then d.reconcile_at else clock_timestamp() + $6 * interval '1 millisecond' end,
       -- Changes were missed: it is polled from now on, until a person looks at it.
       tracking = case when $4::bigint > 0 and d.tracking = 'live' then 'polled' else d.tracking end,
       polled_because = case when $4::bigint > 0 and d.tracking = 'live' then $5 else d.polled_because end,
       distrusted_at = case when $4::bigint > 0 then clock_timestamp() else d.distrusted_at end,
       due_at = case when $4::bigint > 0 or d.full_wanted > greatest(d.full_done, $3::bigint) and $3::bigint is not null then clock_timestamp()
         when d.due_at = r.scheduled_for then clock_timestamp() + $2 * interval '1 millisecond' else d.due_at end
     from run as r where r.id = $1 and d.id = r.definition_id
       and (d.due_at = r.scheduled_for or d.full_run = r.id or $3::bigint is not null)`,
    [id, dueInMs, fullDone, corrections, missed(id, corrections ?? 0), reconcileInMs],
  );
  return true;
}

const missed = (run: number, corrections: number): string =>
  `Run ${run} compared everybody and had to correct ${corrections === 1 ? 'one recipient' : `${corrections} recipients`}: following changes has missed something.`;

export interface HeldRun {
  id: number;
  textHash: string | null;
  /** The counts that a person can see. */
  seen: Omit<Counts, 'before'>;
}

/** The held run of a definition that waits for a person, or null. */
export async function readHeldRun({ db }: State, definitionId: number): Promise<HeldRun | null> {
  const row = await db
    .selectFrom('run')
    .select(['id', 'text_hash', 'entered', 'exited', 'changed', 'nulled'])
    .where('definition_id', '=', definitionId)
    .where('outcome', '=', 'held')
    .where('decision', 'is', null)
    .executeTakeFirst();
  if (row === undefined) return null;
  const seen = {
    entered: row.entered ?? 0,
    exited: row.exited ?? 0,
    changed: row.changed ?? 0,
    nulled: row.nulled ?? 0,
  };
  return { id: row.id, textHash: row.text_hash, seen };
}

/** Closes a held run, whose place a newer one takes. */
export async function replaceHeldRun(client: Queryable, held: HeldRun, by: number): Promise<void> {
  await client.query(
    `update run set outcome = 'cancelled', error = error || $2
     where id = $1 and outcome = 'held' and decision is null`,
    [held.id, ` Run ${by} has taken its place.`],
  );
}

/** Closes a held run within the transaction of the run that has come to pass: approved, or passing the guard by itself. */
export async function releaseHeldRun(client: Queryable, held: HeldRun, approved: boolean): Promise<void> {
  await client.query(
    approved
      ? `update run set decision = 'approved' where id = $1`
      : `update run set outcome = 'cancelled', error = error || ' Since then it has come to pass the guard.' where id = $1`,
    [held.id],
  );
}
