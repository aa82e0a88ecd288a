import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { stringify } from 'yaml';
import { startSimulator, type Simulator, type SimulatorOptions } from '../../src/demo/simulator/server.js';
import { createDatabase, type TestDatabase } from './database.js';
import { startProgram, type Ended, type Program } from './program.js';

/** What a user has: a source with tables, an Iterable (simulated), and a folder with a configuration that joins them. */
export interface Site {
  database: TestDatabase;
  simulator: Simulator;
  folder: string;
  /** Writes `personas.yaml`, in which source, profiles and destination stand already. */
  configure: (sections: Readonly<Record<string, unknown>>) => Promise<void>;
  /** Runs a command of the built program to its end. */
  run: (...words: string[]) => Promise<Ended & { json: unknown }>;
  start: (...words: string[]) => Program;
  sql: (text: string, values?: unknown[]) => Promise<Record<string, unknown>[]>;
  close: () => Promise<void>;
}

export async function createSite(
  tables: string,
  sections: Readonly<Record<string, unknown>>,
  simulatorOptions: Partial<SimulatorOptions> = {},
): Promise<Site> {
  const database = await createDatabase();
  const simulator = await startSimulator({ projectType: 'hybrid', quotas: 'off', ...simulatorOptions });
  const folder = await mkdtemp(join(tmpdir(), 'personas-cli-'));
  await database.pool.query(tables);
  const configure: Site['configure'] = (more) =>
    writeFile(
      join(folder, 'personas.yaml'),
      stringify({
        source: { url: '${DATABASE_URL}' },
        profiles: { sql: 'SELECT id AS profile_id, user_id, email FROM people', key: 'hybrid' },
        destinations: { iterable: { type: 'iterable', api_key: 'test-key', region: simulator.url } },
        // Several run at once.
        http: 'off',
        ...more,
      }),
    );
  await configure(sections);
  const start = (...words: string[]): Program =>
    startProgram(['--config', 'personas.yaml', ...words], { cwd: folder, environment: { DATABASE_URL: database.url } });
  return {
    database,
    simulator,
    folder,
    configure,
    start,
    run: async (...words) => {
      const ended = await start(...words).ended;
      return { ...ended, json: parseResult(ended.stdout) };
    },
    sql: async (text, values) => (await database.pool.query<Record<string, unknown>>(text, values)).rows,
    close: async () => {
      await simulator.close();
      await database.drop();
      await rm(folder, { recursive: true, force: true });
    },
  };
}

/** The one object that `--json` prints; undefined where stdout is none. */
export function parseResult(stdout: string): unknown {
  try {
    return JSON.parse(stdout) as unknown;
  } catch {
    return undefined;
  }
}
