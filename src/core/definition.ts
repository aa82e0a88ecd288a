import type { Place } from '../lib/errors.js';

/** SQL that a person wrote, with the way back to the file: `placeOf(offset)` takes a 0-based character offset. */
export interface SqlText {
  sql: string;
  placeOf: (offset: number) => Place;
}

/** What an Iterable project keys its users by; the same for all destinations of a configuration. */
export type ProjectKey = 'email' | 'user_id' | 'hybrid';

/** How a definition is run where real time is not to be had. `hourly` is spread over the hour by the key. */
export type Fallback = { kind: 'hourly' } | { kind: 'poll'; everyMs: number };
/** How a definition comes to be run. `asked`: `schedule: realtime` says so, and not `changes` alone. */
export type Cadence =
  | Fallback
  | { kind: 'cron'; expression: string }
  | { kind: 'manual' }
  | { kind: 'realtime'; fallback: Fallback; asked: boolean };

/** A table whose changes matter to a definition or to `profiles`, and how its rows lead to profiles. */
export interface Change {
  /** As SQL, quoted where needed, such as `"public"."orders"` or `"orders"`. */
  table: string;
  /** As the person wrote it. */
  written: string;
  place: Place;
  way: { kind: 'column'; column: string } | { kind: 'sql'; text: SqlText };
}

/** What a destination is sent for a definition. Event names are those of the track calls. */
export interface Send {
  identify: boolean;
  track: boolean;
  /** Audiences: the events of an entry and an exit. */
  entered: string;
  exited: string;
  /** Traits: the event of a new value. */
  computed: string;
  /** Audiences: the static list that is kept equal; null: none. */
  list: { name: string; existingOnly: boolean } | null;
}

/** Shares (0.3 is 30 %) above which a run is held; null leaves that check out. */
export interface GuardLimits {
  exits: number | null;
  growth: number | null;
  nulls: number | null;
}

/** One computed trait or audience, as the configuration says it, defaults filled in. */
export interface Definition {
  key: string;
  name: string;
  kind: 'audience' | 'trait';
  text: SqlText;
  /** An interval as PostgreSQL reads it, such as `30 days`; stands for `:lookback`. */
  lookback: string | null;
  cadence: Cadence;
  /** Tables whose changes are evaluated at once. */
  changes: readonly Change[];
  /** How often everyone is computed as well, where changes are evaluated at once. */
  reconcileMs: number;
  /** By destination name. A destination that is missing gets nothing. */
  sends: ReadonlyMap<string, Send>;
  /** Whether the first sync sends every member, or only remembers them. */
  initial: 'send' | 'skip';
  /** Traits: what happens to the fields of somebody whose row has gone. */
  onMissing: 'null' | 'keep';
  onDelete: 'leave' | 'exit_all';
  enabled: boolean;
  /** Null: the guard is off. */
  guard: GuardLimits | null;
  /** Columns that ride along on track calls. */
  properties: readonly string[];
  /** Put before the column names of a trait with several columns. */
  prefix: string;
  /** Where the definition stands, for messages about it as a whole. */
  place: Place;
}
