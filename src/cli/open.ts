import { existsSync } from 'node:fs';
import { join, relative, resolve } from 'node:path';
import { loadConfig } from '../config/load.js';
import type { Config, Destination, IterableDestination } from '../config/types.js';
import type { Resources, Target } from '../daemon.js';
import type { Simulator } from '../demo/simulator/server.js';
import { openPool } from '../db/connect.js';
import type { Port } from '../destinations/carrier.js';
import { isLoginRefused, isUnreachable } from '../db/failure.js';
import { migrate, planMigrations } from '../db/migrate.js';
import { openState } from '../db/state.js';
import { OperatorError, UnavailableError } from '../lib/errors.js';
import { createLogger, type Logger } from '../lib/logger.js';
import { Secret } from '../lib/secret.js';

/**
 * Opens what a command works with: configuration, databases, destinations. It decides where the stand-ins are: without a
 * database URL the embedded PostgreSQL, and the Iterable simulator where the configuration says so, or where the database
 * is the embedded one and no key is set. With a database of one's own a missing key is an error: nothing may be taken for
 * synced that never reached Iterable.
 */
export interface Opened extends Resources {
  embedded: boolean;
  /** Whether the state's tables are there. */
  hasState: boolean;
  /** Tells whoever runs a command something in a sentence. */
  note: (text: string) => void;
  /** Cancels the statements that are running. */
  cancel: () => Promise<void>;
  close: () => Promise<void>;
}

export interface OpenOptions {
  configFile: string;
  environment: NodeJS.ProcessEnv;
  /**
   * What happens where the state's tables aren't those of this version. `apply`: they are made so, unless the
   * configuration says `manual`; `refuse`: the command ends; `optional`: only where there are none, the command goes on;
   * `ignore`: the command sees to it.
   */
  migrations: 'apply' | 'refuse' | 'optional' | 'ignore';
  /** Only reads from a simulator that another process may be writing to. */
  readOnly: boolean;
  /** Is told, before anything else happens, what stands in for the real thing, and later what a person should know. */
  onNote?: (note: string) => void;
  /** Overrides the configuration's level. */
  logLevel?: Config['logging']['level'];
  /** Where the stand-ins keep their data. */
  folder?: string;
  /** How many customers a new sample shop begins with. */
  customers?: number;
  /** Is given each simulator that starts. */
  onSimulator?: (simulator: Simulator) => unknown;
}

const FOLDER = '.personas';
/** The most that `runs.parallel` may say. */
const MOST_PARALLEL = 32;

/** Whether the simulator stands in for a destination. */
const isSimulated = ({ region, apiKey }: IterableDestination, embedded: boolean): boolean =>
  region.kind === 'simulator' || (embedded && apiKey === null);

/** Says what stands in; throws where a key is missing and nothing may. */
function noteStandIns(config: Config, embedded: boolean): readonly string[] {
  const problems: { place: IterableDestination['place']; message: string }[] = [];
  const notes: string[] = [];
  for (const destination of config.destinations.filter(isIterableDestination)) {
    const { name, region, apiKey, place } = destination;
    if (isSimulated(destination, embedded)) {
      notes.push(
        region.kind === 'simulator'
          ? `Destination "${name}" is the built-in Iterable simulator (region: simulator); nothing reaches Iterable.`
          : `Destination "${name}" is the built-in Iterable simulator, since no API key is set; nothing reaches Iterable.`,
      );
    } else if (apiKey === null) {
      problems.push({
        place,
        message: `\`api_key\` of destination "${name}" is missing. Set ITERABLE_API_KEY, or write \`region: simulator\` to try without Iterable.`,
      });
    }
  }
  if (problems.length > 0) throw new OperatorError(problems);
  return notes;
}

const isIterableDestination = (destination: Destination): destination is IterableDestination =>
  destination.type === 'iterable';

function secretsOf(config: Config, more: readonly string[]): string[] {
  const urls = [config.source.url, config.source.directUrl, config.state.url].flatMap((url) =>
    url === null ? [] : [url.reveal()],
  );
  const passwords = [...urls, ...more].flatMap((url) => {
    try {
      const { password } = new URL(url);
      return password === '' ? [] : [password, decodeURIComponent(password)];
    } catch {
      return [];
    }
  });
  const keys = config.destinations.flatMap((destination) => {
    if (destination.type === 'file') return [];
    const key = destination.type === 'iterable' ? destination.apiKey : destination.writeKey;
    return key === null ? [] : [key.reveal()];
  });
  return [...passwords, ...keys];
}

/** An error of reaching a database, in words for a person. */
function explainReach(error: unknown, which: string): unknown {
  if (isLoginRefused(error))
    return new OperatorError(
      `The ${which} database lets nobody in with this URL: look at its role, password and database name.`,
    );
  if (isUnreachable(error)) return new UnavailableError(`The ${which} database is out of reach.`);
  return error;
}

/** Sees to the state's tables; returns whether they are there. */
export async function prepareState(
  opened: Pick<Resources, 'config' | 'databases' | 'log'>,
  how: OpenOptions['migrations'],
): Promise<boolean> {
  const { config, databases, log } = opened;
  const { pool, schema } = databases.state;
  const isManual = config.state.migrate === 'manual';
  const { applied, pending } = await planMigrations(pool, schema);
  if (pending.length === 0) return true;
  if (how === 'ignore' || (how === 'optional' && applied.length === 0)) return false;
  if (how === 'refuse' && applied.length === 0 && !isManual) {
    throw new OperatorError(
      `Nothing has been synced yet: the database has no schema "${schema}". \`personas-sync sync\`, \`start\` or \`migrate\` makes it; \`plan\` shows what a sync would send.`,
    );
  }
  if (isManual || how !== 'apply') {
    throw new OperatorError(
      `The schema "${schema}" lacks ${pending.length === 1 ? 'a migration' : `${pending.length} migrations`} (${pending.join(', ')}). Run \`personas-sync migrate\` first.`,
    );
  }
  await migrate(pool, schema);
  log.debug('The state tables are ready.', { schema });
  return true;
}

export async function openResources(options: OpenOptions): Promise<Opened> {
  const { environment, migrations, readOnly } = options;
  const configFile = resolve(options.configFile);
  const folder = resolve(options.folder ?? FOLDER);
  if (!existsSync(configFile))
    throw new OperatorError(`There is no configuration at ${options.configFile}; name one with --config.`);
  const config = loadConfig(configFile, environment);
  const embedded = config.source.url === null;
  const notes = noteStandIns(config, embedded);
  const closers: (() => Promise<void>)[] = [];
  const close = async (): Promise<void> => {
    for (const closer of closers.reverse().splice(0)) await closer();
  };
  try {
    let sourceUrl = config.source.directUrl ?? config.source.url;
    if (sourceUrl === null) {
      options.onNote?.(
        `The database is the embedded PostgreSQL in ${relative(process.cwd(), folder)}/, since no DATABASE_URL is set.`,
      );
    }
    for (const note of notes) options.onNote?.(note);
    if (sourceUrl === null) {
      const { startEmbedded } = await import('../demo/embedded.js');
      const server = await startEmbedded({ directory: folder });
      closers.push(() => server.stop());
      sourceUrl = new Secret(server.url);
    }
    const log: Logger = createLogger({
      level: options.logLevel ?? config.logging.level,
      format: config.logging.format,
      secrets: secretsOf(config, [sourceUrl.reveal()]),
    });
    closers.push(() => log.close());
    const onError = (): void => undefined;
    // Sessions are opened as they are needed: one for each run, and some for all the rest, the lease and real time above all.
    const source = openPool({ url: sourceUrl, purpose: 'source', max: MOST_PARALLEL + 12, onError });
    closers.push(() => source.end());
    const { directUrl } = config.source;
    const direct =
      directUrl === null
        ? source
        : openPool({ url: directUrl, purpose: 'real time', max: MOST_PARALLEL + 12, onError });
    if (direct !== source) closers.push(() => direct.end());
    const state = openState({
      url: config.state.url ?? sourceUrl,
      purpose: 'state',
      max: MOST_PARALLEL + 32,
      schema: config.state.schema,
      onError,
    });
    closers.push(() => state.close());
    const databases = { source, direct, state, same: config.state.url === null };
    const cancels = [cancelOf(source), cancelOf(state.pool)];
    await reach(source, 'source');
    if (!databases.same) await reach(state.pool, 'state');
    if (embedded) await seedSample(source, config, log, options.customers);

    const simulators = new Map<string, Promise<string>>();
    const startSimulated = async (name: string): Promise<string> => {
      const { startSimulator } = await import('../demo/simulator/server.js');
      const simulator = await startSimulator({
        projectType: config.profiles.key,
        directory: join(folder, `iterable-${name}`),
        readOnly,
      });
      options.onSimulator?.(simulator);
      closers.push(() => simulator.close());
      return simulator.url;
    };
    const iterableTarget = (destination: IterableDestination): Target => {
      const { name, region, apiKey, quotas } = destination;
      const connect = async (baseUrl: string | Promise<string>, key: Secret): Promise<Port> =>
        (await import('../destinations/iterable/port.js')).createIterablePort({
          baseUrl: await baseUrl,
          apiKey: key,
          projectKey: config.profiles.key,
          quotas,
        });
      if (isSimulated(destination, embedded)) {
        return {
          host: 'simulator',
          connect: () => {
            const started = simulators.get(name) ?? startSimulated(name);
            simulators.set(name, started);
            started.catch(() => simulators.delete(name));
            return connect(started, apiKey ?? new Secret('simulator'));
          },
        };
      }
      if (apiKey === null || region.kind === 'simulator') throw new Error(`Destination ${name} has no key.`);
      const { baseUrl } = region;
      return { host: new URL(baseUrl).host, connect: () => connect(baseUrl, apiKey) };
    };
    const targetOf = (destination: Destination): Target => {
      const { schema: namespace } = config.state;
      switch (destination.type) {
        case 'iterable':
          return iterableTarget(destination);
        case 'segment': {
          const { baseUrl } = destination;
          const connect = async () =>
            (await import('../destinations/segment/port.js')).createSegmentPort({ ...destination, namespace });
          return { host: new URL(baseUrl).host, connect };
        }
        case 'file': {
          const connect = async () =>
            (await import('../destinations/file/port.js')).createFilePort({ ...destination, namespace });
          return { host: destination.path, connect };
        }
      }
    };
    const opened = { config, reread: () => rereadConfig(configFile, environment, config), databases, targetOf, log };
    const hasState = await prepareState(opened, migrations);
    const cancel = async (): Promise<void> => {
      await Promise.allSettled(cancels.map((each) => each()));
    };
    const note = (text: string): void => options.onNote?.(text);
    return { ...opened, embedded, hasState, note, cancel, close };
  } catch (error) {
    await close();
    throw error;
  }
}

/** A changed configuration; what was opened by it at the start can't change while running. */
function rereadConfig(file: string, environment: NodeJS.ProcessEnv, first: Config): Config {
  const next = loadConfig(file, environment);
  const fixed = (config: Config): string =>
    JSON.stringify(
      [config.source, config.state].map((part) =>
        Object.values(part).map((value) => (value instanceof Secret ? value.reveal() : value)),
      ),
    );
  const problems: string[] = [];
  if (fixed(next) !== fixed(first)) problems.push('`source` and `state` can only be changed by a restart.');
  if (next.profiles.key !== first.profiles.key) problems.push('`profiles.key` can only be changed by a restart.');
  noteStandIns(next, next.source.url === null);
  if (problems.length > 0) throw new OperatorError(problems.map((message) => ({ message })));
  return next;
}

/** What cancels the statements of a pool: a server goes on with them when their client is gone. */
function cancelOf(pool: Resources['databases']['source']): () => Promise<void> {
  const sessions = new Set<number>();
  pool.on('connect', (client) => {
    const id: unknown = Reflect.get(client, 'processID');
    if (typeof id === 'number') sessions.add(id);
  });
  return async () => {
    await pool.query('select pg_cancel_backend(pid) from unnest($1::int4[]) as pid where pid <> pg_backend_pid()', [
      [...sessions],
    ]);
  };
}

async function reach(pool: Resources['databases']['source'], which: string): Promise<void> {
  try {
    const { rows } = await pool.query<{ version: number }>(
      `select current_setting('server_version_num')::int4 as version`,
    );
    const version = rows[0]?.version ?? 0;
    if (version < 140_000)
      throw new OperatorError(
        `The ${which} database is PostgreSQL ${Math.floor(version / 10_000)}; 14 or later is needed.`,
      );
  } catch (error) {
    throw explainReach(error, which);
  }
}

/** The embedded database of the sample configuration begins with the sample shop in it. */
async function seedSample(
  source: Resources['databases']['source'],
  config: Config,
  log: Logger,
  customers?: number,
): Promise<void> {
  const { rows } = await source.query<{ empty: boolean }>(
    `select not exists (select from pg_class as c join pg_namespace as n on n.oid = c.relnamespace
       where n.nspname not like 'pg\\_%' and n.nspname not in ('information_schema', '${config.state.schema.replaceAll("'", "''")}') and c.relkind in ('r', 'v', 'm', 'p')) as empty`,
  );
  if (rows[0]?.empty !== true) return;
  const { seedShop } = await import('../demo/shop.js');
  const began = performance.now();
  await seedShop(source, customers === undefined ? {} : { customers });
  log.info('The embedded database has got a sample shop.', { seconds: Math.round(performance.now() - began) / 1000 });
}
