import type { Change, Definition, ProjectKey, SqlText } from '../core/definition.js';
import type { Place } from '../lib/errors.js';
import type { Secret } from '../lib/secret.js';

/** Where Iterable is: a host, or the built-in simulator. */
export type IterableRegion = { kind: 'host'; baseUrl: string } | { kind: 'simulator' };

/** An Iterable project to send to. Quotas are requests a second. */
export interface IterableDestination {
  type: 'iterable';
  name: string;
  /** Null only where the simulator stands in. */
  apiKey: Secret | null;
  region: IterableRegion;
  quotas: {
    usersUpdate: number;
    usersBulkUpdate: number;
    eventsTrack: number;
    eventsTrackBulk: number;
    lists: number;
    reads: number;
  };
  place: Place;
}

/** What takes Segment's HTTP tracking API: Segment itself, RudderStack, Jitsu. */
export interface SegmentDestination {
  type: 'segment';
  name: string;
  writeKey: Secret;
  /** Without `/v1`. */
  baseUrl: string;
  quotas: { batch: number };
  place: Place;
}

/** A file that gets a line of JSON for each call. */
export interface FileDestination {
  type: 'file';
  name: string;
  /** Absolute. */
  path: string;
  quotas: { batch: number };
  place: Place;
}

export type Destination = IterableDestination | SegmentDestination | FileDestination;

/** A whole configuration: read, checked and with its defaults. `file` and the places hold absolute paths. */
export interface Config {
  file: string;
  /** Null: the embedded PostgreSQL. `directUrl` is a way past a pooler. */
  source: { url: Secret | null; directUrl: Secret | null };
  /** `url` null: the source. */
  state: { url: Secret | null; schema: string; migrate: 'auto' | 'manual' };
  profiles: { text: SqlText; key: ProjectKey; changes: readonly Change[] };
  destinations: readonly Destination[];
  definitions: readonly Definition[];
  runs: { parallel: number; memoryMb: number; timeoutMs: number };
  /** Null: nothing is served. */
  http: { host: string; port: number } | null;
  logging: { level: 'error' | 'warn' | 'info' | 'debug'; format: 'pretty' | 'json' | 'auto' };
  /** Sentences about settings that have no effect in this version, for `check` and `start` to show. */
  remarks: readonly string[];
  /** Patterns of `include` that match no file. */
  unmatched: readonly string[];
  /** Every file that the configuration was read from, for watching; `include` patterns with their folder. */
  files: readonly string[];
}
