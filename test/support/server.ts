import { readFile, rm } from 'node:fs/promises';
import { join } from 'node:path';
import { isAlive } from '../../src/demo/postgres.js';
import { startEmbedded, type EmbeddedServer } from '../../src/demo/embedded.js';
import { temporaryFolder } from './postgres.js';
import { until } from './until.js';

/** A PostgreSQL that a test may crash, since nobody else uses it. */
export interface OwnServer {
  url: string;
  /** Ends it at once, as `pg_ctl stop -m immediate` does, and starts it again: it recovers from its log. */
  crash: () => Promise<void>;
  /** Stops and deletes it. */
  stop: () => Promise<void>;
}

export async function startOwnServer(): Promise<OwnServer> {
  const directory = await temporaryFolder();
  const first = await startEmbedded({ directory });
  const users: EmbeddedServer[] = [first];
  return {
    url: first.url,
    crash: async () => {
      const file = await readFile(join(directory, 'postgres', 'data', 'postmaster.pid'), 'utf8');
      const pid = Number(file.split('\n')[0]);
      process.kill(pid, 'SIGQUIT');
      await until(() => Promise.resolve(!isAlive(pid)));
      const again = await startEmbedded({ directory });
      users.push(again);
      if (again.url !== first.url) throw new Error('The server has come back at another port.');
    },
    stop: async () => {
      for (const user of users.splice(0)) await user.stop();
      await rm(directory, { recursive: true, maxRetries: 10, retryDelay: 100 });
    },
  };
}
