import { chmod, mkdtemp, rm, statfs } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import pg from 'pg';
import type { TestProject } from 'vitest/node';
import { startEmbedded } from '../../src/demo/embedded.js';

declare module 'vitest' {
  interface ProvidedContext {
    postgresUrl: string;
  }
}

/**
 * One PostgreSQL for the whole test run: that of `TEST_DATABASE_URL`, whose role must be allowed to create databases,
 * else the embedded one in a temporary folder. Returns what stops it.
 */
export default async function setup(project: TestProject): Promise<() => Promise<void>> {
  const url = process.env['TEST_DATABASE_URL'];
  if (url !== undefined && url !== '') {
    project.provide('postgresUrl', url);
    return () => Promise.resolve();
  }
  const directory = await temporaryFolder();
  const server = await startEmbedded({ directory });
  await forgoDurability(server.url);
  project.provide('postgresUrl', server.url);
  return async () => {
    await server.stop();
    await rm(directory, { recursive: true, maxRetries: 10, retryDelay: 100 });
  };
}

const MEMORY = '/dev/shm';
const ENOUGH_BYTES = 4 * 2 ** 30;

/** Where what is deleted soon is best kept: in memory where the system offers enough of it, since a disk may be busy. */
async function temporaryPlace(): Promise<string> {
  try {
    const { bavail, bsize } = await statfs(MEMORY);
    if (bavail * bsize >= ENOUGH_BYTES) return MEMORY;
  } catch {
    // Not every system has it.
  }
  return tmpdir();
}

/** A folder in which any user may run a server, in `place` or where tests have it best; the caller deletes it. */
export async function temporaryFolder(place?: string): Promise<string> {
  const directory = await mkdtemp(join(place ?? (await temporaryPlace()), 'personas-test-'));
  await chmod(directory, 0o755);
  return directory;
}

/** Nothing in the tests outlives the machine, and databases are made and dropped three times as fast. */
async function forgoDurability(url: string): Promise<void> {
  const client = new pg.Client({ connectionString: url });
  await client.connect();
  await client.query('alter system set fsync = off');
  await client.query('alter system set full_page_writes = off');
  await client.query('select pg_reload_conf()');
  await client.end();
}
