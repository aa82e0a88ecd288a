import { randomBytes } from 'node:crypto';
import { access, rm } from 'node:fs/promises';
import { join } from 'node:path';
import pg from 'pg';
import { inject } from 'vitest';
import { startEmbedded } from '../../src/demo/embedded.js';
import { temporaryFolder } from './postgres.js';

export interface TestDatabase {
  url: string;
  /** Up to ten connections; ended by `drop`. */
  pool: pg.Pool;
  /** Ends the pool and drops the database, with whoever is still connected to it. */
  drop: () => Promise<void>;
}

/** A fresh, empty database on the run's server, or on the one at `serverUrl`. */
export async function createDatabase(serverUrl: string = inject('postgresUrl')): Promise<TestDatabase> {
  const name = `test_${process.pid}_${randomBytes(4).toString('hex')}`;
  await onServer(serverUrl, `create database ${name} template template0`);
  const address = new URL(serverUrl);
  address.pathname = `/${name}`;
  const url = address.toString();
  const pool = new pg.Pool({ connectionString: url });
  pool.on('error', () => undefined); // tests cut connections, idle ones too
  return {
    url,
    pool,
    drop: async () => {
      await pool.end();
      await onServer(serverUrl, `drop database if exists ${name} with (force)`);
    },
  };
}

/** Debian's PostgreSQL of that version on a server of its own; null where it isn't installed. `stop` deletes it. */
export async function startDebianPostgres(version = 15): Promise<{ url: string; stop: () => Promise<void> } | null> {
  const programs = `/usr/lib/postgresql/${version}/bin`;
  try {
    await access(join(programs, 'postgres'));
  } catch {
    return null;
  }
  const directory = await temporaryFolder();
  const server = await startEmbedded({ directory, programs });
  return {
    url: server.url,
    stop: async () => {
      await server.stop();
      await rm(directory, { recursive: true, maxRetries: 10, retryDelay: 100 });
    },
  };
}

async function onServer(url: string, statement: string): Promise<void> {
  const client = new pg.Client({ connectionString: url });
  await client.connect();
  try {
    await client.query(statement);
  } finally {
    await client.end();
  }
}
