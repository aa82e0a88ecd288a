import { Kysely, PostgresDialect, type Generated, type Selectable } from 'kysely';
import { openPool, type Connection, type Pool } from './connect.js';

/**
 * The state database: a pool for statements that are the design, and Kysely over the same pool for the plain ones.
 * Both find the tables by their bare names.
 */
export interface State {
  pool: Pool;
  db: Kysely<Tables>;
  schema: string;
  close: () => Promise<void>;
}

export type DefinitionState = 'active' | 'paused' | 'disabled' | 'archived';
export type RunOutcome = 'succeeded' | 'failed' | 'held' | 'skipped' | 'cancelled' | 'abandoned';
export type RunTrigger = 'schedule' | 'sync' | 'approve' | 'delete';
export type RequestKind = 'sync' | 'backfill' | 'approve' | 'reject' | 'retry' | 'discard' | 'forget' | 'verify';

/** The columns of the tables as migrations/ makes them; what each means is said there. */
interface Tables {
  setting: { name: string; value: unknown };
  leader: {
    only_row: Generated<boolean>;
    holder: string | null;
    expires_at: Date;
    quiet_until: Date;
    since: Date | null;
    host: string | null;
    pid: number | null;
    bulk_until: Generated<Date>;
  };
  definition: {
    id: Generated<number>;
    key: string;
    kind: 'audience' | 'trait';
    name: string;
    computation_id: string;
    state: Generated<DefinitionState>;
    paused_because: string | null;
    on_delete: Generated<'leave' | 'exit_all'>;
    text_hash: string | null;
    fields: Generated<unknown>;
    riders: Generated<unknown>;
    members: Generated<number>;
    first_run_at: Date | null;
    cadence: Generated<string>;
    due_at: Date | null;
    tracking: Generated<'none' | 'polled' | 'live'>;
    polled_because: string | null;
    stuck_because: string | null;
    distrusted_at: Date | null;
    evaluates: string | null;
    full_wanted: Generated<number>;
    full_done: Generated<number>;
    full_run: number | null;
    reconcile_at: Date | null;
  };
  destination: {
    id: Generated<number>;
    name: string;
    host: string;
    type: string;
    state: Generated<'active' | 'paused' | 'stopped'>;
    reason: string | null;
    delivery: unknown;
    left_out: Generated<unknown>;
    streaks: Generated<unknown>;
  };
  definition_destination: {
    definition_id: number;
    destination_id: number;
    active: Generated<boolean>;
    identify: boolean;
    track: boolean;
    entered: string;
    exited: string;
    computed: string;
    list: string | null;
    list_existing_only: Generated<boolean>;
    list_id: number | null;
    stopped: string | null;
    stopped_fields: Generated<unknown>;
    identified_until: Date | null;
    listed_until: Date | null;
    backfill: 'initial' | 'backfill' | null;
    backfill_identify: Generated<boolean>;
    backfill_events: Generated<boolean>;
    backfill_position: string | null;
    backfill_until: Date | null;
    backfill_total: number | null;
    backfill_done: Generated<number>;
    backfill_priority: Generated<number>;
    backfill_again: Generated<boolean>;
  };
  run: {
    id: Generated<number>;
    definition_id: number;
    trigger: RunTrigger;
    scheduled_for: Date | null;
    approves: number | null;
    leader: string;
    started_at: Generated<Date>;
    finished_at: Date | null;
    outcome: RunOutcome | null;
    phases: Generated<unknown>;
    text_hash: string | null;
    members: number | null;
    entered: number | null;
    exited: number | null;
    changed: number | null;
    nulled: number | null;
    without_identifier: number | null;
    conflicting: number | null;
    skipped_values: number | null;
    error: string | null;
    decision: 'approved' | 'rejected' | null;
    evaluated: number | null;
    corrections: number | null;
  };
  due: {
    definition_id: number;
    id: Generated<number>;
    profile_id: string;
    at: Generated<Date>;
    parked_at: Date | null;
    reason: string | null;
    claimed_by: number | null;
  };
  validity: { definition_id: number; profile_id: string; until: Date };
  watched: { name: string; signature: string; problem: string | null; seen_at: Generated<Date> };
  request: {
    id: Generated<number>;
    kind: RequestKind;
    arguments: unknown;
    requested_at: Generated<Date>;
    taken_by: string | null;
    progress: Generated<unknown>;
    finished_at: Date | null;
    read_at: Date | null;
    outcome: 'done' | 'refused' | 'failed' | null;
    answer: string | null;
  };
  dead_call: {
    id: Generated<number>;
    destination_id: number;
    definition_id: number;
    kind: 'm' | 'e';
    recipient: string;
    died_at: Generated<Date>;
    retries: Generated<number>;
    retry_at: Date | null;
    reason: string;
    answer: string;
    field: string | null;
    event: string | null;
    message_id: string | null;
  };
}

/** How a definition is sent to a destination, as the configuration says. */
export type SendRow = Pick<
  Selectable<Tables['definition_destination']>,
  'destination_id' | 'active' | 'identify' | 'track' | 'entered' | 'exited' | 'computed' | 'list' | 'list_existing_only'
>;

export function openState(connection: Omit<Connection, 'schema'> & { schema: string }): State {
  const pool = openPool(connection);
  const db = new Kysely<Tables>({ dialect: new PostgresDialect({ pool }) });
  return { pool, db, schema: connection.schema, close: () => db.destroy() };
}
