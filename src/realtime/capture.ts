import { isFullCheaper } from '../core/burst.js';
import { inTransaction, type Client, type Pool } from '../db/connect.js';
import { fenceLease } from '../db/lease.js';
import { openSession, type Session } from '../db/session.js';
import { addDue, wantFull } from '../sync/due.js';
import { weighDue } from '../sync/waiting.js';
import { ANSWER_MS, createResolve, MOST_PROFILES, type Found } from './resolve.js';

/**
 * Moves what the triggers captured in the source to `due` in the state. One take:
 *
 *   read ─▶ the mapping of now ─▶ keys resolved to profiles ─▶ `due`, in the state, fenced ─▶ deleted with the next read
 *
 * What must hold:
 * - A captured row is deleted only after what it leads to has been committed, by its own id: transactions commit out of
 *   order, so "up to an id" would delete what nobody has seen. If that fails, it is read and moved again, which is harmless.
 * - The mapping is asked for after the read. A definition is put into the mapping first, is made live second, and is run in
 *   full after that: what was read by an older mapping had been committed before that run began.
 * - Only the leader moves, whatever it has read: another one may have another mapping.
 * - A state takes only what was captured for it.
 */

/** How a row that has changed leads to the profiles whose definitions depend on it. */
export interface Way {
  /** The keys of these definitions. */
  keys: readonly string[];
  /**
   * Null: what was captured is the profile's id. Otherwise a statement in which `$1::text[]` is what was captured, and whose
   * first column is a profile's id as text.
   */
  resolve: null | { sql: string };
}

export interface CaptureOptions {
  state: Pool;
  /**
   * The source is in the same database, whose log is written in order: a crash that takes back what was moved takes back
   * that it was deleted there.
   */
  same: boolean;
  leader: string;
  /** The state's id: setting `installation`. */
  installation: string;
  /** The ways from each watch, as of now. */
  mapping: () => ReadonlyMap<string, readonly Way[]>;
  /** What evaluating a profile of the definition takes within a batch of many, as was last seen. */
  perProfileMs: (definitionId: number) => number;
  /** Something waits for these definitions. Must not throw. */
  onDue: (definitionIds: readonly number[]) => void;
  /** Whose rows have changed can't be found for these definitions, and why. They have been asked for a run in full. */
  onUnresolved: (keys: readonly string[], sentence: string) => Promise<void>;
}

export interface Taken {
  found: number;
  /** There may be more. */
  isFull: boolean;
}

export interface Capture {
  /**
   * Moves what there is. `whole`: from the first row on, not only what is newer than what was seen some seconds ago.
   * `source` is a session of `openSource`; one take after the other. Throws a LeaseLostError where another leads.
   */
  take: (source: Client, whole: boolean) => Promise<Taken>;
  /** Deletes what has been moved, without reading on. */
  sweep: (source: Client) => Promise<void>;
  /** After a failure: what was moved may be there or not, or be other rows with the same numbers. */
  forget: () => void;
}

/** Captured rows in one take, and about how many bytes of keys, as they are stored. */
const MOST_ROWS = 500;
const MOST_BYTES = 500_000;
/** What is seen now is crossed again for one to two of these: whoever took a number early and committed late is found. */
const REMEMBER_MS = 1_000;
const STATEMENT_MS = 10_000;
/** What waits is counted whenever so many more do. */
const WEIGH_EVERY = 1_000;

const readSql = (unswept: string): string => `
  select id, watch, keys, bytes from (
    select id, watch, keys, sum(pg_column_size(keys)) over (order by id) as bytes, pg_column_size(keys) as own
    from (
      select id, watch, keys from personas_capture.capture
      where id > $1 ${unswept} and exists (select from personas_capture.listener where installation = $2)
      order by id limit ${MOST_ROWS}) as first_rows) as measured
  where bytes is null or own is null or bytes - own < ${MOST_BYTES} order by id`;
const READ = readSql('');
const SWEEP_AND_READ = `
  with swept as (delete from personas_capture.capture where id = any($3::bigint[]))
  ${readSql('and id <> all($3::bigint[])')}`;
const SWEEP = 'delete from personas_capture.capture where id = any($1::bigint[])';

interface Captured {
  id: string;
  watch: string;
  /** Null: everybody may be meant. */
  keys: readonly string[] | null;
  /** The size of all keys up to here; null: there were none. */
  bytes: string | null;
}

/** A session in the source for takes. */
export function openSource(pool: Pool): Promise<Session> {
  return openSession(pool, (client) =>
    client.query(
      // What it writes need not outlive a crash: it would be done again. `capture` is planned for while it is empty, and
      // read when much may lie dead in it.
      `set synchronous_commit = off; set enable_seqscan = off; set statement_timeout = ${STATEMENT_MS}`,
    ),
  );
}

/** Whom captured rows lead to. */
interface Led {
  /** Profiles, by the definitions that depend on them. */
  groups: Map<string, { keys: readonly string[]; profiles: Set<string> }>;
  /** Definitions that have to compare everybody. */
  everybody: Set<string>;
  unresolved: { keys: readonly string[]; sentence: string }[];
}

export function createCapture(options: CaptureOptions): Capture {
  const { state, same, leader, installation, mapping, perProfileMs, onDue, onUnresolved } = options;
  const resolve = createResolve();
  /** Moved, and still to be deleted. */
  let moved: readonly string[] = [];
  /** The greatest ids that had been seen at the last two looks at the clock, and by now. */
  let seen = { position: 0, later: 0, greatest: 0, at: performance.now() };
  /** Profiles that have come to wait since a definition's were last counted. */
  const unweighed = new Map<number, number>();

  const remember = (rows: readonly Captured[]): void => {
    if (performance.now() - seen.at >= REMEMBER_MS) {
      seen = { position: seen.later, later: seen.greatest, greatest: seen.greatest, at: performance.now() };
    }
    if (rows.length === 0) return;
    const [first, last] = [Number(rows[0]?.id), Number(rows.at(-1)?.id)];
    // Somebody committed late, or the numbers began anew.
    if (first <= seen.position) seen = { position: first - 1, later: first - 1, greatest: last, at: performance.now() };
    else seen.greatest = Math.max(seen.greatest, last);
  };

  const read = async (source: Client, whole: boolean): Promise<readonly Captured[]> => {
    const values = [whole ? 0 : seen.position, installation];
    const statement =
      moved.length === 0
        ? { name: 'personas_read', text: READ, values, query_timeout: ANSWER_MS }
        : { name: 'personas_sweep', text: SWEEP_AND_READ, values: [...values, moved], query_timeout: ANSWER_MS };
    const { rows } = await source.query<Captured>(statement);
    moved = [];
    remember(rows);
    return rows;
  };

  const follow = async (source: Client, rows: readonly Captured[]): Promise<Led> => {
    const led: Led = { groups: new Map(), everybody: new Set(), unresolved: [] };
    const ways = mapping();
    for (const [watch, { keys, everybody }] of byWatch(rows)) {
      for (const way of ways.get(watch) ?? []) {
        if (everybody) addAll(led.everybody, way.keys);
        if (keys.size === 0) continue;
        const found: Found =
          way.resolve === null ? { kind: 'profiles', ids: [...keys] } : await resolve(source, way.resolve.sql, keys);
        if (found.kind === 'profiles') join(led, way.keys, found.ids);
        else addAll(led.everybody, way.keys);
        if (found.kind === 'fails') led.unresolved.push({ keys: way.keys, sentence: found.sentence });
      }
    }
    for (const [name, { keys, profiles }] of led.groups) {
      if (profiles.size <= MOST_PROFILES) continue;
      led.groups.delete(name);
      addAll(led.everybody, keys);
    }
    return led;
  };

  /** Asks for a run in full instead of what waits, where that is cheaper. */
  const weigh = async (client: Client, definitionIds: readonly number[]): Promise<void> => {
    if (definitionIds.length === 0) return;
    const weights = await weighDue(client, definitionIds);
    const cheaper = weights.filter((each) => isFullCheaper({ ...each, perProfileMs: perProfileMs(each.id) }));
    const keys = cheaper.map(({ key }) => key);
    await wantFull(client, keys, { dropDue: true });
  };

  /** Writes whom rows lead to; returns the definitions for whom something waits. */
  const write = async ({ groups, everybody }: Led): Promise<readonly number[]> => {
    const dependents = [...groups.values()].map(({ keys, profiles }) => ({ keys, profileIds: [...profiles] }));
    const added =
      dependents.length === 0 ? new Map<number, number>() : await addDue(state, leader, dependents, { durable: !same });
    const isWeighed = (id: number): boolean => (unweighed.get(id) ?? WEIGH_EVERY) + (added.get(id) ?? 0) >= WEIGH_EVERY;
    const weighed = [...added.keys()].filter(isWeighed);
    if (everybody.size > 0 || weighed.length > 0) {
      await inTransaction(state, async (client) => {
        await fenceLease(client, leader);
        await wantFull(client, [...everybody], { dropDue: false });
        await weigh(client, weighed);
      });
    }
    for (const [id, count] of added) unweighed.set(id, isWeighed(id) ? 0 : (unweighed.get(id) ?? 0) + count);
    return [...added.keys()];
  };

  return {
    take: async (source, whole) => {
      const rows = await read(source, whole);
      const last = rows.at(-1);
      if (last === undefined) return { found: 0, isFull: false };
      const led = await follow(source, rows);
      const ids = await write(led);
      moved = rows.map(({ id }) => id);
      onDue(ids);
      for (const { keys, sentence } of led.unresolved) await onUnresolved(keys, sentence);
      return { found: rows.length, isFull: rows.length === MOST_ROWS || Number(last.bytes) >= MOST_BYTES };
    },
    sweep: async (source) => {
      if (moved.length > 0) await source.query(SWEEP, [moved]);
      moved = [];
    },
    forget: () => {
      moved = [];
    },
  };
}

/** The keys of each watch, and whether everybody may be meant, too. */
function byWatch(rows: readonly Captured[]): ReadonlyMap<string, { keys: Set<string>; everybody: boolean }> {
  const watches = new Map<string, { keys: Set<string>; everybody: boolean }>();
  for (const { watch, keys } of rows) {
    const known = watches.get(watch) ?? { keys: new Set<string>(), everybody: false };
    if (keys === null) known.everybody = true;
    else addAll(known.keys, keys);
    watches.set(watch, known);
  }
  return watches;
}

function join({ groups }: Led, keys: readonly string[], profiles: readonly string[]): void {
  if (profiles.length === 0) return;
  const name = keys.join(' ');
  const group = groups.get(name) ?? { keys, profiles: new Set<string>() };
  addAll(group.profiles, profiles);
  groups.set(name, group);
}

function addAll<T>(set: Set<T>, values: Iterable<T>): void {
  for (const value of values) set.add(value);
}
