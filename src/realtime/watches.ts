import { createHash } from 'node:crypto';
import type { Config } from '../config/types.js';
import type { Change, Definition } from '../core/definition.js';
import type { Problem } from '../lib/errors.js';
import { tableName, watchName, type SourceTable, type Watch } from './trigger-sql.js';

/**
 * What the configuration comes to, pure: which tables are watched by which columns, and for each watch the ways that lead
 * from its keys to profiles, with the definitions that are to be looked at then. A change of `profiles` concerns every
 * definition that is followed.
 */

/**
 * What the source says of a `Change`. `statement` finds profiles, as text, for an array of keys `$1`; null: the keys are
 * the profiles.
 */
export type ResolvedChange =
  | { kind: 'known'; watch: Watch; statement: string | null }
  /** `isMistake`: what is written can't be meant; otherwise the source has no triggers that would tell. */
  | { kind: 'refused'; problem: Problem; isMistake: boolean };

/** A way from the keys of a watch to profiles. */
export interface Route {
  statement: string | null;
  /** Keys of definitions. */
  definitions: readonly string[];
}

export interface WatchedTable {
  table: SourceTable;
  /** One for each tuple of columns that somebody needs. */
  watches: readonly Watch[];
}

export interface Refusal {
  definitions: readonly string[];
  problem: Problem;
  /** Of a change of `profiles`, or of the one definition. */
  of: 'profiles' | 'definition';
  isMistake: boolean;
}

export interface WatchPlan {
  tables: readonly WatchedTable[];
  /** By the name of the watch, as it stands in `capture`. */
  routes: ReadonlyMap<string, readonly Route[]>;
  /** Definitions that can't be followed, and why; the others are in `evaluates`. */
  refused: readonly Refusal[];
  /** By key: a hash of all that decides how a definition is evaluated for some profiles. */
  evaluates: ReadonlyMap<string, string>;
}

type Described = Pick<Config, 'definitions' | 'profiles'>;

/** Whether the cadence is one that changes are followed for. */
function isFollowed({ enabled, changes, cadence }: Definition): boolean {
  return enabled && changes.length > 0 && (cadence.kind === 'realtime' || cadence.kind === 'hourly');
}

/** The definitions whose changes are followed, if the source lets them: none while those of `profiles` aren't known. */
export function followedDefinitions({ definitions, profiles }: Described): readonly Definition[] {
  return profiles.changes.length === 0 ? [] : definitions.filter(isFollowed);
}

/** Every change that matters to a definition that is followed. */
export function followedChanges(config: Described): readonly Change[] {
  const followed = followedDefinitions(config);
  return followed.length === 0 ? [] : [...config.profiles.changes, ...followed.flatMap(({ changes }) => changes)];
}

/** `resolved` has each of `followedChanges`. A definition with a change that is refused is followed by none. */
export function planWatches(config: Described, resolved: ReadonlyMap<Change, ResolvedChange>): WatchPlan {
  const followed = followedDefinitions(config);
  const { profiles } = config;
  const refusalsOf = (
    changes: readonly Change[],
    of: Refusal['of'],
    definitions: readonly string[],
  ): readonly Refusal[] =>
    changes.flatMap((change) => {
      const found = resolved.get(change);
      return found?.kind === 'refused' ? [{ definitions, problem: found.problem, of, isMistake: found.isMistake }] : [];
    });
  const ofProfiles = refusalsOf(
    profiles.changes,
    'profiles',
    followed.map(({ key }) => key),
  );
  const ofDefinitions = followed.flatMap(({ key, changes }) => refusalsOf(changes, 'definition', [key]));
  const refused = [...ofProfiles, ...ofDefinitions];
  const refusedKeys = new Set(refused.flatMap(({ definitions }) => definitions));
  const live = followed.filter(({ key }) => !refusedKeys.has(key));

  const watches = new Map<string, Watch>();
  const routes = new Map<string, Map<string | null, Set<string>>>();
  const follow = (change: Change, keys: readonly string[]): void => {
    const found = resolved.get(change);
    if (found?.kind !== 'known') return;
    const name = watchName(found.watch);
    watches.set(name, watches.get(name) ?? found.watch);
    const ways = routes.get(name) ?? new Map<string | null, Set<string>>();
    routes.set(name, ways);
    ways.set(found.statement, new Set([...(ways.get(found.statement) ?? []), ...keys]));
  };
  const liveKeys = live.map(({ key }) => key);
  if (live.length > 0) for (const change of profiles.changes) follow(change, liveKeys);
  for (const { key, changes } of live) for (const change of changes) follow(change, [key]);

  return {
    tables: byTable([...watches.values()]),
    routes: new Map(
      [...routes].map(([name, ways]) => [
        name,
        [...ways].map(([statement, keys]) => ({ statement, definitions: [...keys] })),
      ]),
    ),
    refused,
    evaluates: new Map(live.map((definition) => [definition.key, evaluates(definition, profiles, resolved)])),
  };
}

/** In the order of their names, so that the text in the source doesn't depend on that of the configuration. */
function byTable(watches: readonly Watch[]): readonly WatchedTable[] {
  const tables = new Map<string, { table: SourceTable; watches: Watch[] }>();
  const sorted = watches
    .map((watch) => ({ name: watchName(watch), watch }))
    .sort((a, b) => (a.name < b.name ? -1 : 1))
    .map(({ watch }) => watch);
  for (const watch of sorted) {
    const name = tableName(watch.table);
    const entry = tables.get(name) ?? { table: watch.table, watches: [] };
    entry.watches.push(watch);
    tables.set(name, entry);
  }
  return [...tables.values()];
}

function evaluates(
  definition: Definition,
  profiles: Config['profiles'],
  resolved: ReadonlyMap<Change, ResolvedChange>,
): string {
  const ways = (changes: readonly Change[]): unknown =>
    changes.map((change) => {
      const found = resolved.get(change);
      return found?.kind === 'known' ? [watchName(found.watch), found.statement] : null;
    });
  const { kind, text, lookback, changes } = definition;
  const parts = [
    [kind, text.sql, lookback, ways(changes)],
    [profiles.text.sql, profiles.key, ways(profiles.changes)],
  ];
  return createHash('sha256').update(JSON.stringify(parts)).digest('hex');
}
