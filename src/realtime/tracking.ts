import type { Config } from '../config/types.js';
import type { Definition } from '../core/definition.js';
import { inTransaction, type Client } from '../db/connect.js';
import { isUnreachable } from '../db/failure.js';
import { readHistory } from '../db/history.js';
import { fenceLease } from '../db/lease.js';
import { OperatorError } from '../lib/errors.js';
import type { Logger } from '../lib/logger.js';
import type { CompareContext } from '../sync/comparison.js';
import type { Way } from './capture.js';
import { inspect, type Inspection } from './catalogue.js';
import { asksForIt, createJudge, readProfileType, reasonInCatalogue, reasonInConfig, tablesOf } from './judgement.js';
import { createPartitions } from './partitions.js';
import { createReadings } from './readings.js';
import { readWatchPlan } from './tables.js';
import { tableName } from './trigger-sql.js';
import type { WatchPlan } from './watches.js';

/**
 * Whether each definition that asks for it follows changes, is polled instead and why:
 *
 *   none ──asks for it──▶ polled ◀──────────── something is against it ──────────── live
 *                           └── nothing is against it: first the mapping has it, then it is live and wanted in full ──▶┘
 *
 * What is against it is looked for in the configuration, in the source's catalogue (every few seconds) and in the SQL
 * itself (once for each text, since that runs it). Whatever may have let a change go by, a trigger that was missing or
 * another table in its place, is seen as another signature of the table, and has the definitions that depend on it
 * compared in full. So has a database that is not what it was: what the one of two has forgotten, the other knows. A
 * partition that has come is given its triggers first, where that may be.
 */
export interface Tracking {
  /** Looks at everything once and writes what follows. */
  look: (config: Config) => Promise<void>;
  /** The ways from each watch, of the definitions that are followed or about to be. */
  mapping: () => ReadonlyMap<string, readonly Way[]>;
  /** Whether anything is captured for this state, and whether its triggers notify. */
  captured: () => { notifies: boolean } | null;
}

export interface TrackingOptions {
  context: Omit<CompareContext, 'config'>;
  leader: string;
  installation: string;
  /** Whether partitions that have come are given their triggers. */
  completes: boolean;
  log: Logger;
}

/** What the SQL was found to be is looked at again after this. */
const JUDGED_FOR_MS = 24 * 3_600_000;
const REFUSED_FOR_MS = 10 * 60_000;
/** One that couldn't be judged is tried again after this. */
const TRY_AGAIN_MS = 60_000;

interface Judged {
  evaluates: string;
  because: string | null;
  until: number;
}

interface Row {
  id: number;
  key: string;
  tracking: 'none' | 'polled' | 'live';
  polled_because: string | null;
  evaluates: string | null;
  distrusted: boolean;
}

export function createTracking({ context, leader, installation, completes, log }: TrackingOptions): Tracking {
  const { databases } = context;
  const { pool } = databases.state;
  let ways: ReadonlyMap<string, readonly Way[]> = new Map();
  let captured: { notifies: boolean } | null = null;
  const judged = new Map<string, Judged>();
  const readings = createReadings(databases.source);
  const partitions = createPartitions(databases.source, log);

  /** Why the SQL can't be evaluated profile by profile; null: it can. */
  const judge = async (
    definition: Definition,
    evaluates: string,
    find: ReturnType<typeof createJudge>,
  ): Promise<string | null> => {
    const known = judged.get(definition.key);
    if (known?.evaluates === evaluates && performance.now() < known.until) return known.because;
    const remember = (because: string | null, forMs: number): string | null => {
      judged.set(definition.key, { evaluates, because, until: performance.now() + forMs });
      return because;
    };
    try {
      const because = await find(definition);
      // What is against it may be mended, by an index above all.
      return remember(because, because === null ? JUDGED_FOR_MS : REFUSED_FOR_MS);
    } catch (error) {
      if (isUnreachable(error)) throw error;
      if (!(error instanceof OperatorError))
        log.failure(`Whether "${definition.key}" can be followed is not known`, error);
      return remember(
        error instanceof OperatorError
          ? error.message
          : `Whether "${definition.key}" can be followed is not known; it is tried again.`,
        TRY_AGAIN_MS,
      );
    }
  };

  return {
    mapping: () => ways,
    captured: () => captured,
    look: async (config) => {
      const asking = config.definitions.filter(asksForIt);
      const profileType = asking.length === 0 ? null : await readProfileType(databases.source, config);
      const plan = profileType === null ? NOTHING : await readWatchPlan(databases.source, config, profileType);
      const evaluated = await readings(config, asking, plan.evaluates);
      const before = await readWatched(pool);
      let found = await inspect(databases.source, plan, installation);
      if (completes && (await partitions.complete(found, (table) => before.get(tableName(table))?.covered ?? [])))
        found = await inspect(databases.source, plan, installation);
      const rows = await readRows(pool);
      const seen = watchedOf(found, plan.tables.length === 0 ? '' : await readHistories(databases), before);
      const isChanged = (name: string): boolean => before.get(name)?.signature !== seen.get(name)?.signature;
      const isMissed = (key: string): boolean => tablesOf(plan, key).some(isChanged);
      const against = new Map<string, string>();
      for (const definition of asking) {
        const because = reasonInConfig(config, definition, plan) ?? reasonInCatalogue(definition, plan, found);
        if (because !== null) against.set(definition.key, because);
      }
      const find = createJudge({ ...context, config }, profileType ?? '');
      for (const definition of asking) {
        const { key } = definition;
        const row = rows.get(key);
        const evaluates = evaluated.get(key);
        // New, or a person has resumed it: what was found before may have been mended.
        if (row?.evaluates === null) judged.delete(key);
        if (row === undefined || evaluates === undefined || against.has(key)) continue;
        const isAsBefore = row.evaluates === evaluates;
        if (row.distrusted && isAsBefore && !isMissed(key))
          against.set(key, row.polled_because ?? 'Following was given up.');
        // What was found to be possible before is believed while nothing about it has changed.
        else if (!(row.tracking === 'live' && isAsBefore && !judged.has(key))) {
          const because = await judge(definition, evaluates, find);
          if (because !== null) against.set(key, because);
        }
      }
      ways = waysOf(plan, (key) => !against.has(key));
      captured =
        found.capture.kind === 'fine' && plan.tables.length > 0
          ? { notifies: found.tables.every(({ notifies }) => notifies) }
          : null;
      await inTransaction(pool, async (client) => {
        await fenceLease(client, leader);
        await writeWatched(client, before, seen);
        for (const definition of config.definitions) {
          const row = rows.get(definition.key);
          if (row === undefined) continue;
          if (!asking.includes(definition)) await follow(client, row, { tracking: 'none' });
          else {
            const because = against.get(definition.key);
            const evaluates = evaluated.get(definition.key);
            if (because !== undefined || evaluates === undefined)
              await follow(client, row, {
                tracking: 'polled',
                because: because ?? 'It is not known how to follow it.',
                evaluates: evaluates ?? row.evaluates,
              });
            else {
              await follow(client, row, { tracking: 'live', evaluates, isMissed: isMissed(definition.key) });
            }
          }
        }
        await dropUnfollowed(client);
      });
    },
  };
}

const NOTHING: WatchPlan = { tables: [], routes: new Map(), refused: [], evaluates: new Map() };

function waysOf(plan: WatchPlan, isFollowed: (key: string) => boolean): ReadonlyMap<string, readonly Way[]> {
  const entries = [...plan.routes].map(([watch, routes]) => {
    const ways = routes
      .map(({ statement, definitions }) => ({
        keys: definitions.filter(isFollowed),
        resolve: statement === null ? null : { sql: statement },
      }))
      .filter(({ keys }) => keys.length > 0);
    return [watch, ways] as const;
  });
  return new Map(entries.filter(([, ways]) => ways.length > 0));
}

async function readRows(pool: Pick<Client, 'query'>): Promise<ReadonlyMap<string, Row>> {
  const { rows } = await pool.query<Row>(
    `select id, key, tracking, polled_because, evaluates, distrusted_at is not null as distrusted from definition where state <> 'archived'`,
  );
  return new Map(rows.map((row) => [row.key, row]));
}

/**
 * Two databases are restored, or taken over by a standby, apart: what was moved from the one is deleted there, and must not
 * be missing in the other. One database goes back as a whole.
 */
async function readHistories({ same, source, state }: TrackingOptions['context']['databases']): Promise<string> {
  if (same) return '';
  return `${await readHistory(source, null)} ${await readHistory(state.pool, 'watched')}`;
}

/** A table of the source as it was last seen. */
interface Watched {
  /** Another one, and something may have been missed. */
  signature: string;
  problem: string | null;
  /** What of it has been seen with its triggers, by `Node.id`. */
  covered: readonly string[];
}

/** By the name of the table. */
async function readWatched(pool: Pick<Client, 'query'>): Promise<ReadonlyMap<string, Watched>> {
  const { rows } = await pool.query<Watched & { name: string }>(
    'select name, signature, problem, covered from watched',
  );
  return new Map(rows.map((row) => [row.name, row]));
}

function watchedOf(
  { tables }: Inspection,
  histories: string,
  before: ReadonlyMap<string, Watched>,
): ReadonlyMap<string, Watched> {
  return new Map(
    tables.map(({ watched: { table }, signature, because, nodes }) => {
      const had = new Set(before.get(tableName(table))?.covered);
      const covered = nodes.filter(({ id, state }) => state === 'fine' || had.has(id)).map(({ id }) => id);
      return [tableName(table), { signature: `${signature} ${histories}`.trimEnd(), problem: because, covered }];
    }),
  );
}

async function writeWatched(
  client: Client,
  before: ReadonlyMap<string, Watched>,
  seen: ReadonlyMap<string, Watched>,
): Promise<void> {
  await client.query('delete from watched where not name = any($1)', [[...seen.keys()]]);
  for (const [name, { signature, problem, covered }] of seen) {
    const old = before.get(name);
    if (old?.signature === signature && old.covered.join() === covered.join()) continue;
    await client.query(
      `insert into watched (name, signature, problem, covered) values ($1, $2, $3, $4)
       on conflict (name) do update
         set signature = excluded.signature, problem = excluded.problem, covered = excluded.covered, seen_at = now()`,
      [name, signature, problem, covered],
    );
  }
}

/** What waits for a definition that isn't followed any more is nothing that anybody waits for. */
async function dropUnfollowed(client: Client): Promise<void> {
  const unfollowed = `select id from definition where tracking <> 'live'`;
  await client.query(`delete from due where definition_id in (${unfollowed})`);
  await client.query(`delete from validity where definition_id in (${unfollowed})`);
}

/** Gives following a definition up until a person resumes it, or what decides about it is another. */
export async function giveUp(pool: Pick<Client, 'query'>, keys: readonly string[], because: string): Promise<void> {
  await pool.query(
    `update definition set tracking = 'polled', polled_because = $2, stuck_because = null, distrusted_at = clock_timestamp(),
       due_at = clock_timestamp() where key = any($1) and tracking = 'live'`,
    [keys, because],
  );
}

type Next =
  | { tracking: 'none' }
  | { tracking: 'polled'; because: string; evaluates: string | null }
  | { tracking: 'live'; evaluates: string; isMissed: boolean };

const FULL = `full_wanted = nextval('version'), due_at = least(due_at, clock_timestamp())`;

/** Writes what has changed about it; nothing where it is as it was. */
async function follow(client: Client, row: Row, next: Next): Promise<void> {
  if (next.tracking === 'live') {
    if (row.tracking === 'live' && row.evaluates === next.evaluates && !next.isMissed) return;
    await client.query(
      `update definition set tracking = 'live', polled_because = null, stuck_because = null, distrusted_at = null, evaluates = $2, ${FULL}
       where id = $1 and state <> 'archived'`,
      [row.id, next.evaluates],
    );
    return;
  }
  if (next.tracking === 'polled' && row.tracking === 'polled') {
    const { because, evaluates } = next;
    if (row.polled_because !== because || row.evaluates !== evaluates)
      await client.query(
        `update definition set polled_because = $2, evaluates = $3,
           -- What was given up was another way to evaluate it.
           distrusted_at = case when evaluates is distinct from $3 then null else distrusted_at end
         where id = $1 and tracking = 'polled'`,
        [row.id, because, evaluates],
      );
    return;
  }
  if (row.tracking === next.tracking) return;
  const { because, evaluates } = next.tracking === 'polled' ? next : { because: null, evaluates: row.evaluates };
  await client.query(
    `update definition set tracking = $2, polled_because = $3, stuck_because = null, evaluates = $4,
       due_at = case when tracking = 'live' and state = 'active' and due_at is not null then clock_timestamp() else due_at end
     where id = $1`,
    [row.id, next.tracking, because, evaluates],
  );
}
