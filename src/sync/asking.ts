import type { Definition } from '../core/definition.js';
import type { RequestKind } from '../db/state.js';
import type { Logger } from '../lib/logger.js';
import type { DeadFilter } from '../outbox/dead.js';
import type { RunContext } from './run.js';
import type { Scheduler } from './scheduler.js';
import type { CompareUser, Verified, VerifyOptions } from './verify.js';

/** What a command may ask of the leader, what it is told of how that goes, and what carrying it out takes. */
export interface RequestArguments {
  sync: { keys: readonly string[]; confirmRemovals: boolean };
  /** `resumes`: the person saw one that was begun, and only that goes on, though it may have ended meanwhile. */
  backfill: { key: string; events: boolean; resumes: boolean };
  approve: { run: number };
  reject: { run: number };
  retry: DeadFilter;
  discard: DeadFilter;
  forget: { person: string };
  verify: VerifyOptions;
}

/** What a request has come to: definitions whose calls it caused, up to which version, and the runs that it made. */
export interface RequestProgress {
  definitions: readonly string[];
  /** Calls with a higher version arose later; null until all have arisen. */
  upTo: number | null;
  runs: readonly {
    definition: string;
    run: number;
    outcome: string;
    error: string | null;
    unavailable: boolean;
    members: number | null;
    entered: number | null;
    exited: number | null;
    changed: number | null;
    /** Profiles that have neither userId nor email. */
    withoutIdentifier: number | null;
    /** Recipients for whom two profiles have different values. */
    conflicting: number | null;
    /** Rows with a value that can't be sent. */
    skippedValues: number | null;
  }[];
  count: number | null;
  /** Definitions of whose changes some can't be evaluated at present: they are as soon as that is mended. */
  unevaluated: readonly string[];
  verified?: readonly Verified[];
}

/** Requests that cause no calls: a command that leads for one of them sends nothing at all. */
export const QUIET_REQUESTS: readonly RequestKind[] = ['reject', 'discard', 'forget'];
export const ALL_REQUESTS: readonly RequestKind[] = [
  ...QUIET_REQUESTS,
  'sync',
  'backfill',
  'approve',
  'retry',
  'verify',
];

export interface RequestDeps {
  context: RunContext;
  /** Nothing new is begun. */
  draining: AbortSignal;
  /** Those that are carried out. */
  kinds: readonly RequestKind[];
  scheduler: Scheduler;
  definitions: () => readonly Definition[];
  /** Reads the configuration again; throws where it may not be applied. */
  reload: (confirmRemovals: boolean) => Promise<void>;
  nudge: () => void;
  /** How long to wait before looking again, where that is `deafMs` unless a command is heard. */
  lookMs: (deafMs: number) => number;
  /** Evaluates what has changed of a definition by now, where its changes are followed; false where some of it waits. */
  drain: (key: string) => Promise<boolean>;
  /** The destinations that are sent to; `compare` null where their users can't be read. */
  destinations: () => readonly { id: number; name: string; compare: CompareUser | null }[];
  log: Logger;
}

/** Writes down how far it has come. */
export type Save = (progress: RequestProgress) => Promise<void>;

/** What has come to nothing yet. */
export const NOTHING: RequestProgress = { definitions: [], upTo: null, runs: [], count: null, unevaluated: [] };
