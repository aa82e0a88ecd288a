import { Writable } from 'node:stream';
import { runDaemon } from '../../src/daemon.js';
import { createLogger } from '../../src/lib/logger.js';
import { install } from '../../src/realtime/install.js';
import { readWatchPlan } from '../../src/realtime/tables.js';
import { createHarness, type Harness, type HarnessOptions } from './harness.js';
import { until } from './until.js';

/** A harness whose triggers are installed, and beside which a daemon may run. */
export interface Live {
  harness: Harness;
  /** Starts a daemon; the second call after `stop` starts another. */
  start: () => void;
  stop: () => Promise<void>;
  /** Resolves when every definition follows changes and nothing is left to compare in full. */
  isLive: () => Promise<unknown>;
  /** What the daemon has logged. */
  said: () => readonly string[];
  close: () => Promise<void>;
}

/** People 1 to 20, of whom the first five have an order of 100. */
export const SHOP = `
  create table people (id int primary key, user_id text, email text);
  create index on people (user_id); create index on people (lower(btrim(email)));
  create table orders (id bigint generated always as identity primary key, customer_id int, total numeric);
  create index on orders (customer_id);
  insert into people select n, 'u' || n, 'u' || n || '@x.de' from generate_series(1, 20) as n;
  insert into orders (customer_id, total) select n, 100 from generate_series(1, 5) as n;`;
export const SPENDERS = {
  key: 'spenders',
  sql: 'SELECT customer_id AS profile_id FROM orders GROUP BY 1 HAVING sum(total) >= 100',
  changes: { orders: 'customer_id' },
  send: 'both',
  guard: 'off',
};

export async function openLive(options: Partial<HarnessOptions> = {}): Promise<Live> {
  const harness = await createHarness({
    tables: SHOP,
    profiles: { sql: 'SELECT id AS profile_id, user_id, email FROM people', changes: { people: 'id' } },
    audiences: [SPENDERS],
    ...options,
  });
  const lines: string[] = [];
  const stream = new Writable({
    write: (chunk: Buffer, _, done) => {
      lines.push(chunk.toString());
      done();
    },
  });
  const log = createLogger({ level: 'info', format: 'json', secrets: [], stream });
  let running: { stopping: AbortController; ended: Promise<void> } | null = null;
  const stop = async (): Promise<void> => {
    running?.stopping.abort();
    await running?.ended;
    running = null;
  };
  await installTriggers(harness);
  return {
    harness,
    start: () => {
      const stopping = new AbortController();
      running = { stopping, ended: runDaemon({ ...harness.opened, log }, stopping.signal, () => undefined) };
    },
    stop,
    isLive: () =>
      until(async () => {
        const rows = await harness.state(
          `select tracking = 'live' and full_wanted = full_done and first_run_at is not null as live from definition`,
        );
        return rows.length > 0 && rows.every(({ live }) => live === true);
      }),
    said: () => lines,
    close: async () => {
      await stop();
      await harness.close();
    },
  };
}

export async function installTriggers({ opened, state }: Harness): Promise<void> {
  const { databases, config } = opened;
  const [row] = await state(`select value #>> '{}' as id from setting where name = 'installation'`);
  const plan = await readWatchPlan(databases.source, config, 'integer');
  await install(databases.source, plan, {
    installation: String(row?.['id']),
    notify: true,
    onDone: () => undefined,
    signal: new AbortController().signal,
  });
}
