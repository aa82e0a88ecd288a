import type { Cadence, Change, Definition, SqlText } from '../../src/core/definition.js';
import { openPool, type Pool } from '../../src/db/connect.js';
import { Secret } from '../../src/lib/secret.js';
import { inspect, type Inspection } from '../../src/realtime/catalogue.js';
import { install, type InstallOptions } from '../../src/realtime/install.js';
import { readWatchPlan } from '../../src/realtime/tables.js';
import type { WatchPlan } from '../../src/realtime/watches.js';
import { createDatabase } from './database.js';

/** What a configuration says of changes, made without a file: `[table, column]` or `[table, SELECT …]`. */
export type Written = readonly [table: string, way: string];

const PLACE = { file: 'personas.yaml', line: 1, column: 1 };

export function sqlText(sql: string): SqlText {
  return { sql, placeOf: (offset) => ({ ...PLACE, column: offset + 1 }) };
}

function changeOf([written, way]: Written): Change {
  const table = written
    .split('.')
    .map((part) => (part.startsWith('"') ? part : `"${part}"`))
    .join('.');
  return {
    table,
    written,
    place: PLACE,
    way: /^(select|with)\b/i.test(way) ? { kind: 'sql', text: sqlText(way) } : { kind: 'column', column: way },
  };
}

export function definitionOf(
  key: string,
  changes: readonly Written[],
  cadence: Cadence = { kind: 'realtime', fallback: { kind: 'hourly' }, asked: false },
): Definition {
  return {
    key,
    name: key,
    kind: 'audience',
    text: sqlText('SELECT customer_id AS profile_id FROM orders'),
    lookback: null,
    cadence,
    changes: changes.map(changeOf),
    reconcileMs: 86_400_000,
    sends: new Map(),
    initial: 'send',
    onMissing: 'null',
    onDelete: 'leave',
    enabled: true,
    guard: null,
    properties: [],
    prefix: '',
    place: PLACE,
  };
}

export interface Described {
  definitions: readonly Definition[];
  profiles: { text: SqlText; key: 'hybrid'; changes: readonly Change[] };
}

export function describe(definitions: readonly Definition[], ofProfiles: readonly Written[]): Described {
  const text = sqlText('SELECT id AS profile_id, NULL AS email FROM customers');
  return { definitions, profiles: { text, key: 'hybrid', changes: ofProfiles.map(changeOf) } };
}

export const INSTALLATION = '6b1f6a8e-7a2b-4d7e-9a6b-0e0f6c5d4c3b';

/** A source with tables, and what real time does to it. */
export interface Captured {
  url: string;
  /** As the program's own. */
  pool: Pool;
  sql: (text: string, values?: unknown[]) => Promise<Record<string, unknown>[]>;
  plan: (definitions: readonly Written[], ofProfiles?: readonly Written[]) => Promise<WatchPlan>;
  install: (plan: WatchPlan, options?: Partial<InstallOptions>) => Promise<string[]>;
  inspect: (plan: WatchPlan) => Promise<Inspection>;
  /** What was captured since the last call, in the order of the names of the watches. */
  take: () => Promise<{ watch: string; keys: string[] | null }[]>;
  drop: () => Promise<void>;
}

export async function createCaptured(
  tables: string,
  options: { serverUrl?: string; profileType?: string } = {},
): Promise<Captured> {
  const database = await createDatabase(options.serverUrl);
  await database.pool.query(tables);
  const pool = openPool({ url: new Secret(database.url), purpose: 'test', max: 5 });
  const sql: Captured['sql'] = async (text, values) =>
    (await database.pool.query<Record<string, unknown>>(text, values)).rows;
  return {
    url: database.url,
    pool,
    sql,
    plan: (changes, ofProfiles = [['customers', 'id']]) =>
      readWatchPlan(pool, describe([definitionOf('d', changes)], ofProfiles), options.profileType ?? 'bigint'),
    install: async (plan, more = {}) => {
      const done: string[] = [];
      await install(pool, plan, {
        installation: INSTALLATION,
        notify: true,
        signal: new AbortController().signal,
        ...more,
        onDone: (what) => done.push(what),
      });
      return done;
    },
    inspect: (plan) => inspect(pool, plan, INSTALLATION),
    take: async () => {
      const { rows } = await database.pool.query<{ watch: string; keys: string[] | null }>(
        `with taken as (delete from personas_capture.capture returning id, watch, keys)
         select watch, keys from taken order by watch, id`,
      );
      return rows;
    },
    drop: async () => {
      await pool.end();
      await database.drop();
    },
  };
}
