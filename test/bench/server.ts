import { rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import pg from 'pg';
import { startEmbedded } from '../../src/demo/embedded.js';
import { temporaryFolder } from '../support/postgres.js';

/**
 * The PostgreSQL that is measured on: the embedded one in a temporary folder, as durable as a user's, with the memory
 * that a user would give it. Nothing runs in parallel and nothing vacuums by itself, so that the two sides of a
 * comparison do their work alone, on the same footing.
 */
export interface BenchServer {
  version: string;
  /** Creates an empty database; everything ends with `stop`. */
  createDatabase: (name: string) => Promise<BenchDatabase>;
  /** Deletes the server with all of its data. */
  stop: () => Promise<void>;
}

export interface BenchDatabase {
  url: string;
  client: pg.Client;
  drop: () => Promise<void>;
}

const SETTINGS = {
  shared_buffers: '2GB',
  effective_cache_size: '6GB',
  maintenance_work_mem: '512MB',
  max_parallel_workers_per_gather: '0',
  max_parallel_maintenance_workers: '0',
  autovacuum: 'off',
};

async function connect(url: string): Promise<pg.Client> {
  const client = new pg.Client({ connectionString: url });
  await client.connect();
  return client;
}

export async function startServer(): Promise<BenchServer> {
  const directory = await temporaryFolder(tmpdir());
  const untuned = await startEmbedded({ directory });
  const tuner = await connect(untuned.url);
  for (const [name, value] of Object.entries(SETTINGS)) await tuner.query(`alter system set ${name} = '${value}'`);
  await tuner.end();
  await untuned.stop();

  const server = await startEmbedded({ directory });
  const admin = await connect(server.url);
  const { rows } = await admin.query<{ version: string }>(`select current_setting('server_version') as version`);
  return {
    version: rows[0]?.version ?? '',
    createDatabase: async (name) => {
      await admin.query(`create database ${name} template template0`);
      const address = new URL(server.url);
      address.pathname = `/${name}`;
      const url = address.toString();
      const client = await connect(url);
      return {
        url,
        client,
        drop: async () => {
          await client.end();
          await admin.query(`drop database ${name} with (force)`);
        },
      };
    },
    stop: async () => {
      await admin.end();
      await server.stop();
      await rm(directory, { recursive: true, force: true });
    },
  };
}
