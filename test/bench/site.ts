import { randomUUID } from 'node:crypto';
import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { stringify } from 'yaml';
import { openResources } from '../../src/cli/open.js';
import { tidyUp } from '../../src/sync/housekeeping.js';
import { runLimits } from '../../src/sync/comparison.js';
import type { RunCounts } from '../../src/sync/delta.js';
import { runDefinition } from '../../src/sync/run.js';
import { applyConfig } from '../support/apply.js';
import type { BenchDatabase } from './server.js';
import { PROFILES } from './shop.js';

/** A configuration and its state over a source, with the runs that the daemon makes and nothing that delivers. */
export interface Site {
  /** `work_mem` of a run, in megabytes. */
  workMemMb: number;
  /** The id of a definition in the state. */
  idOf: (key: string) => Promise<number>;
  /** Runs a definition as the scheduler does. Throws where it doesn't succeed. */
  run: (key: string) => Promise<RunCounts>;
  /** Forgets what waits to be sent, as if it had been delivered. */
  drain: () => Promise<void>;
  close: () => Promise<void>;
}

export interface Definitions {
  audiences?: Record<string, unknown>[];
  traits?: Record<string, unknown>[];
}

/** A configuration file over `source`; nothing listens at its destination unless `destination` is given. */
export async function writeConfig(
  folder: string,
  {
    source,
    state,
    destination = 'http://127.0.0.1:9',
    ...sections
  }: Definitions & { source: BenchDatabase; state: BenchDatabase; destination?: string; [section: string]: unknown },
): Promise<string> {
  const file = join(folder, 'personas.yaml');
  const content = {
    source: { url: source.url },
    ...(state === source ? {} : { state: { url: state.url } }),
    profiles: { sql: PROFILES, key: 'hybrid' },
    destinations: { iterable: { type: 'iterable', api_key: 'bench', region: destination } },
    http: 'off',
    ...sections,
  };
  await writeFile(file, stringify(content));
  return file;
}

/** Opens a site over `source`, with its state there too or in a database of its own. */
export async function openSite(source: BenchDatabase, state: BenchDatabase, definitions: Definitions): Promise<Site> {
  const folder = await mkdtemp(join(tmpdir(), 'personas-bench-'));
  const configFile = await writeConfig(folder, { source, state, ...definitions });
  const opened = await openResources({
    configFile,
    environment: {},
    migrations: 'apply',
    readOnly: false,
    logLevel: 'error',
  });
  const { config, databases } = opened;
  const leader = randomUUID();
  await applyConfig(opened);
  await tidyUp(databases.state);
  return {
    workMemMb: runLimits({ config, databases }).workMemMb,
    idOf: async (key) => {
      const row = await databases.state.db
        .selectFrom('definition')
        .select('id')
        .where('key', '=', key)
        .executeTakeFirstOrThrow();
      return row.id;
    },
    run: async (key) => {
      const definition = config.definitions.find((each) => each.key === key);
      if (definition === undefined) throw new Error(`There is no definition ${key}.`);
      const request = { trigger: 'schedule', approves: null, nextDueMs: () => null } as const;
      const result = await runDefinition({ databases, config, leader }, definition, request);
      if (result?.outcome !== 'succeeded' || result.counts === null)
        throw new Error(`The run of ${key} failed: ${result?.error ?? 'another is open'}`);
      return result.counts;
    },
    drain: async () => {
      await databases.state.pool.query(
        `truncate outbox; truncate transition;
         update definition_destination set backfill = null, backfill_until = null, backfill_position = null`,
      );
    },
    close: async () => {
      await opened.close();
      await rm(folder, { recursive: true });
    },
  };
}
