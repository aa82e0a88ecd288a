import pg from 'pg';
import { UnavailableError } from '../lib/errors.js';
import type { Secret } from '../lib/secret.js';

/**
 * The one place that opens connections to PostgreSQL. Every session has its name, time-outs and keep-alive; values come
 * back as PostgreSQL's own text, so that no digit passes through a JavaScript number. `state` sessions find the tables
 * of this program by their bare names, `source` sessions keep the search_path of their user.
 */

export type Pool = pg.Pool;
export type Client = pg.PoolClient;
/** What can run a statement: a pool or one of its connections. */
export type Queryable = Pick<pg.Pool, 'query'>;

/** The same, of nothing but statements as text. */
export interface Runner {
  query: <R extends pg.QueryResultRow>(text: string, values?: unknown[]) => Promise<pg.QueryResult<R>>;
}

export interface Connection {
  url: Secret;
  /** Shown in pg_stat_activity, after `personas-sync `. */
  purpose: string;
  max: number;
  /** The schema of the state; left out for a source. */
  schema?: string;
  onError?: (error: Error) => void;
}

const CONNECT_TIMEOUT_MS = 10_000;
/** What is polled every minute finds its connection open: a new backend's first reading of a million rows costs a quarter more. */
const IDLE_MS = 3 * 60_000;
const IDLE_IN_TRANSACTION_MS = 10 * 60_000;

type Parse = (text: string) => unknown;

const isTrue: Parse = (text) => text === 't';
const json: Parse = (text) => JSON.parse(text) as unknown;

/** What becomes something else than text, by type. A state's counts and ids stay below 2^53; its moments are dates. */
const SOURCE_PARSERS = new Map<number, Parse>([
  [pg.types.builtins.BOOL, isTrue],
  [pg.types.builtins.INT4, Number],
]);
const STATE_PARSERS = new Map<number, Parse>([
  [pg.types.builtins.BOOL, isTrue],
  [pg.types.builtins.INT2, Number],
  [pg.types.builtins.INT4, Number],
  [pg.types.builtins.INT8, Number],
  [pg.types.builtins.JSON, json],
  [pg.types.builtins.JSONB, json],
  [pg.types.builtins.TIMESTAMPTZ, pg.types.getTypeParser(pg.types.builtins.TIMESTAMPTZ, 'text')],
]);
/** text[], which pg's list of built-in types lacks, though it parses it. */
const TEXT_ARRAY = 1009;
const textArray: Parse = pg.types.getTypeParser(TEXT_ARRAY as never, 'text') as Parse;

function parsersOf(parsers: ReadonlyMap<number, Parse>): pg.CustomTypesConfig {
  const asText: Parse = (text) => text;
  return { getTypeParser: (oid: number) => (oid === TEXT_ARRAY ? textArray : (parsers.get(oid) ?? asText)) };
}

/** Opens a pool; nothing is connected before the first statement. A broken idle connection is replaced, not thrown. */
export function openPool({ url, purpose, max, schema, onError }: Connection): Pool {
  const settings = [
    'timezone=UTC',
    'datestyle=ISO',
    'intervalstyle=postgres',
    'extra_float_digits=1',
    'standard_conforming_strings=on',
    'lock_timeout=0',
    // What is generated has many expressions: compiling them takes seconds, can't be cancelled, and gains nothing.
    'jit=off',
    `idle_in_transaction_session_timeout=${IDLE_IN_TRANSACTION_MS}`,
    ...(schema === undefined ? [] : [`search_path=${escapeOption(quoteIdentifier(schema))}`, 'synchronous_commit=on']),
  ];
  const { connectionString, options } = takeOptions(url.reveal());
  const pool = new pg.Pool({
    connectionString,
    application_name: `personas-sync ${purpose}`,
    max,
    connectionTimeoutMillis: CONNECT_TIMEOUT_MS,
    idleTimeoutMillis: IDLE_MS,
    keepAlive: true,
    options: [...options, ...settings.map((setting) => `-c ${setting}`)].join(' '),
    types: parsersOf(schema === undefined ? SOURCE_PARSERS : STATE_PARSERS),
  });
  pool.on('error', onError ?? (() => undefined));
  // A connection that breaks between two statements tells nobody else; the next statement fails, and says so.
  pool.on('connect', (client) => client.on('error', () => undefined));
  return pool;
}

/** The `options` of a connection string, which would replace ours, apart from the rest of it. */
function takeOptions(connectionString: string): { connectionString: string; options: readonly string[] } {
  const address = new URL(connectionString);
  const options = address.searchParams.getAll('options');
  address.searchParams.delete('options');
  return { connectionString: address.toString(), options };
}

/** Runs `work` on one connection, which is thrown away when `work` fails in the middle of a transaction. */
export async function withClient<T>(pool: Pool, work: (client: Client) => Promise<T>): Promise<T> {
  const client = await pool.connect();
  let broken: Error | undefined;
  try {
    return await work(client);
  } catch (error) {
    broken = error instanceof Error ? error : new Error(String(error));
    throw error;
  } finally {
    client.release(broken);
  }
}

/**
 * As `withClient`; when `signal` fires, the statement that runs is cancelled on the server, which would otherwise go on
 * with it, and `work` fails with SQLSTATE 57014.
 */
export async function withCancellable<T>(
  pool: Pool,
  signal: AbortSignal | undefined,
  work: (client: Client) => Promise<T>,
): Promise<T> {
  return withClient(pool, async (client) => {
    const { rows } = await client.query<{ pid: number }>('select pg_backend_pid() as pid');
    const cancel = (): void => {
      pool.query('select pg_cancel_backend($1)', [rows[0]?.pid]).catch(() => undefined);
    };
    if (signal?.aborted === true) throw new UnavailableError('Stopped.');
    signal?.addEventListener('abort', cancel, { once: true });
    try {
      return await work(client);
    } finally {
      signal?.removeEventListener('abort', cancel);
    }
  });
}

/** Runs `work` in one transaction of a connection of its own. */
export async function inTransaction<T>(pool: Pool, work: (client: Client) => Promise<T>): Promise<T> {
  return withClient(pool, async (client) => {
    await client.query('begin');
    const result = await work(client);
    await client.query('commit');
    return result;
  });
}

export function quoteIdentifier(name: string): string {
  return `"${name.replaceAll('"', '""')}"`;
}

export function quoteLiteral(text: string): string {
  const escaped = text.replaceAll("'", "''");
  return escaped.includes('\\') ? ` E'${escaped.replaceAll('\\', '\\\\')}'` : `'${escaped}'`;
}

/** A value within the `options` of a connection, where a space and a backslash need a backslash. */
function escapeOption(text: string): string {
  return text.replaceAll(/[\\ ]/g, '\\$&');
}
