import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { stringify } from 'yaml';
import { act, watchDelivery, type Acted, type Delivery } from '../../src/cli/act.js';
import { openResources, type Opened } from '../../src/cli/open.js';
import { resume } from '../../src/cli/pause.js';
import { startSimulator, type Simulator, type SimulatorOptions } from '../../src/demo/simulator/server.js';
import type { RequestArguments } from '../../src/sync/asking.js';
import { createDatabase, type TestDatabase } from './database.js';

/**
 * A source with tables, an Iterable simulator, and a configuration between them: what a user has, on loopback. Commands
 * run in this process by the code that the command line runs.
 */
export interface Harness {
  database: TestDatabase;
  /** The state's own database where it is another. */
  stateDatabase: TestDatabase;
  simulator: Simulator;
  opened: Opened;
  configFile: string;
  /** One more instance over the same state, with connections of its own, which the caller closes. */
  openAnother: () => Promise<Opened>;
  /** Writes other definitions into the configuration, and opens it anew. */
  reconfigure: (definitions: Definitions) => Promise<void>;
  /** Runs `sync` until all is delivered or can't be. */
  sync: (...keys: string[]) => Promise<Result>;
  /** Runs another acting command. */
  request: <K extends keyof RequestArguments>(kind: K, args: RequestArguments[K]) => Promise<Result>;
  /** Runs `resume` for a definition or a destination. */
  resume: (name: string) => Promise<void>;
  /** Runs statements in the source. */
  sql: (text: string, values?: unknown[]) => Promise<Record<string, unknown>[]>;
  /** Runs a statement in the state, whose tables have their bare names there. */
  state: (text: string, values?: unknown[]) => Promise<Record<string, unknown>[]>;
  close: () => Promise<void>;
}

export interface Result extends Acted {
  delivery: (Delivery & { stalled: boolean }) | null;
}

export interface Definitions {
  profiles?: Record<string, unknown>;
  audiences?: Record<string, unknown>[];
  traits?: Record<string, unknown>[];
  [section: string]: unknown;
}

export interface HarnessOptions extends Definitions {
  /** SQL that makes the source. */
  tables: string;
  key?: 'email' | 'user_id' | 'hybrid';
  /** The state in a database of its own. */
  separate?: boolean;
  simulator?: Partial<SimulatorOptions>;
  serverUrl?: string;
  /** Of the state's own database. */
  stateServerUrl?: string;
}

const NEVER = new AbortController().signal;

export async function createHarness(options: HarnessOptions): Promise<Harness> {
  const { tables, key = 'hybrid', separate = false, simulator: simulatorOptions, serverUrl, ...rest } = options;
  const { stateServerUrl = serverUrl, ...definitions } = rest;
  const database = await createDatabase(serverUrl);
  const stateDatabase = separate ? await createDatabase(stateServerUrl) : database;
  const simulator = await startSimulator({ projectType: key, quotas: 'off', ...simulatorOptions });
  const folder = await mkdtemp(join(tmpdir(), 'personas-test-'));
  const configFile = join(folder, 'personas.yaml');
  await database.pool.query(tables);

  const write = async ({ profiles, ...sections }: Definitions): Promise<void> => {
    const content = {
      source: { url: database.url },
      ...(separate ? { state: { url: stateDatabase.url } } : {}),
      profiles: { sql: 'SELECT id AS profile_id, user_id, email FROM people', ...profiles, key },
      destinations: { iterable: { type: 'iterable', api_key: 'test-key', region: simulator.url } },
      // Several run at once.
      http: 'off',
      ...sections,
    };
    await writeFile(configFile, stringify(content));
  };
  const open = (): Promise<Opened> =>
    openResources({
      configFile,
      environment: {},
      migrations: 'apply',
      readOnly: false,
      logLevel: 'error',
      onNote: () => undefined,
    });
  await write(definitions);
  const harness: Harness = {
    database,
    stateDatabase,
    simulator,
    configFile,
    opened: await open(),
    openAnother: open,
    reconfigure: async (next) => {
      await harness.opened.close();
      await write(next);
      harness.opened = await open();
    },
    request: async (kind, args) => {
      let delivery: Result['delivery'] = null;
      const acted = await act(harness.opened, {
        kind,
        args,
        signal: NEVER,
        onProgress: () => undefined,
        afterwards: async (done) => {
          if (done.outcome === 'done') delivery = await watchDelivery(harness.opened, done, NEVER, () => undefined);
        },
      });
      if (acted.outcome === 'failed') throw new Error(`\`${kind}\` failed: ${acted.answer}`);
      return { ...acted, delivery };
    },
    sync: (...keys) => harness.request('sync', { keys, confirmRemovals: true }),
    resume: async (name) => {
      const nothing = (): undefined => undefined;
      const output = { json: false, line: nothing, object: nothing, objectWith: () => Promise.resolve(), say: nothing };
      const confirm = (): Promise<boolean> => Promise.resolve(true);
      await resume({ opened: harness.opened, output, signal: NEVER, confirm }, name);
    },
    sql: async (text, values) => (await database.pool.query<Record<string, unknown>>(text, values)).rows,
    state: async (text, values) =>
      (await harness.opened.databases.state.pool.query<Record<string, unknown>>(text, values)).rows,
    close: async () => {
      await harness.opened.close();
      await simulator.close();
      await database.drop();
      if (separate) await stateDatabase.drop();
      await rm(folder, { recursive: true, force: true });
    },
  };
  return harness;
}
