import { afterEach, describe, expect, it } from 'vitest';
import { runDaemon } from '../src/daemon.js';
import { install } from '../src/realtime/install.js';
import { readWatchPlan } from '../src/realtime/tables.js';
import { createHarness, type Harness, type HarnessOptions } from './support/harness.js';
import { until } from './support/until.js';

/** From a commit in the source to the request at Iterable, by the daemon as it runs. */
const TABLES = `
  create table people (id int primary key, user_id text, email text);
  create index on people (user_id); create index on people (lower(btrim(email)));
  create table orders (id bigint generated always as identity primary key, customer_id int, total numeric);
  create index on orders (customer_id);
  insert into people select n, 'u' || n, 'u' || n || '@x.de' from generate_series(1, 20) as n;
  insert into orders (customer_id, total) select n, 100 from generate_series(1, 5) as n;`;
const SPENDERS = {
  key: 'spenders',
  sql: 'SELECT customer_id AS profile_id FROM orders GROUP BY 1 HAVING sum(total) >= 100',
  changes: { orders: 'customer_id' },
  send: 'both',
  guard: 'off',
};

interface Site {
  harness: Harness;
  stop: () => Promise<void>;
}

const sites: Site[] = [];
afterEach(async () => {
  for (const { stop, harness } of sites.splice(0)) {
    await stop();
    await harness.close();
  }
});

async function installTriggers({ opened }: Harness): Promise<void> {
  const { databases, config } = opened;
  const [row] = (
    await databases.state.pool.query<{ id: string }>(
      `select value #>> '{}' as id from setting where name = 'installation'`,
    )
  ).rows;
  const plan = await readWatchPlan(databases.source, config, 'integer');
  await install(databases.source, plan, {
    installation: row!.id,
    notify: true,
    onDone: () => undefined,
    signal: new AbortController().signal,
  });
}

function start(harness: Harness): () => Promise<void> {
  const stopping = new AbortController();
  const running = runDaemon(harness.opened, stopping.signal, () => undefined);
  return async () => {
    stopping.abort();
    await running;
  };
}

async function open(options: Partial<HarnessOptions> = {}): Promise<Site> {
  const harness = await createHarness({
    tables: TABLES,
    profiles: { sql: 'SELECT id AS profile_id, user_id, email FROM people', changes: { people: 'id' } },
    audiences: [SPENDERS],
    ...options,
  });
  await installTriggers(harness);
  const site = { harness, stop: start(harness) };
  sites.push(site);
  return site;
}

const trackingOf = ({ harness }: Site): Promise<Record<string, unknown>[]> =>
  harness.state(
    `select key, tracking, polled_because, full_wanted = full_done and first_run_at is not null as settled from definition`,
  );

/** Resolves when every definition follows changes and nothing is left to compare in full. */
const isLive = (site: Site): Promise<unknown> =>
  until(async () => (await trackingOf(site)).every(({ tracking, settled }) => tracking === 'live' && settled === true));

const eventsOf = async ({ harness }: Site, email: string, count: number): Promise<readonly string[]> => {
  const names = (): string[] => harness.simulator.events(email).map(({ name }) => name);
  return until(() => Promise.resolve(names().length >= count && names()));
};

describe('real time', () => {
  it('tells of an entry when its transaction has committed, and of the exit', async () => {
    const site = await open();
    await isLive(site);
    await site.harness.sql('insert into orders (customer_id, total) values (9, 150)');
    expect(await eventsOf(site, 'u9@x.de', 1)).toEqual(['Audience Entered']);
    await site.harness.sql('delete from orders where customer_id = 9');
    expect(await eventsOf(site, 'u9@x.de', 2)).toEqual(['Audience Entered', 'Audience Exited']);
  });

  it('follows people by userIds that are made from their ids, by the index on the id', async () => {
    const site = await open({
      tables: `${TABLES}
        insert into people select n, null, 'u' || n || '@x.de' from generate_series(21, 20000) as n; analyze`,
      profiles: { sql: 'SELECT id AS profile_id, id::text AS user_id, email FROM people', changes: { people: 'id' } },
    });
    await isLive(site);
  });
});
