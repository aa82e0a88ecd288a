import { readFileSync } from 'node:fs';
import { setFlagsFromString } from 'node:v8';
import { runInNewContext } from 'node:vm';
import { afterAll, beforeAll, beforeEach, describe, expect, it } from 'vitest';
import { runDaemon } from '../src/daemon.js';
import { createHarness, type Harness } from './support/harness.js';

/** With 50,000 calls that can't be sent now the daemon waits: it neither works nor asks. */
const WAITING = 50_000;
/** The queue is read from its start when a daemon comes to lead, and every ten seconds. */
const SETTLING_MS = 700;
const MEASURED_MS = 1_500;
const TABLES = `create table people (id bigint primary key, user_id text, email text, vip boolean not null default true)`;
const DEFINITIONS = {
  audiences: [{ name: 'VIP', sql: 'SELECT id AS profile_id FROM people WHERE vip', send: 'both', schedule: 'manual' }],
};
const SOON = { timeout: 20_000 };

let harness: Harness;
let heapBefore = 0;
beforeAll(async () => {
  harness = await createHarness({ tables: TABLES, ...DEFINITIONS });
  await harness.sync();
  heapBefore = heap();
  await harness.state(
    `insert into outbox (kind, destination_id, definition_id, priority, recipient, columns, due_at, attempts)
     select 'm', t.id, d.id, 1, 'u:' || n, array['vip'], now() + interval '1 hour', 3
     from destination as t, definition as d, generate_series(1, ${WAITING}) as n`,
  );
  await harness.state('analyze outbox');
});
afterAll(() => harness.close());
beforeEach(async () => {
  await harness.state(`update destination set state = 'active', reason = null; update definition set state = 'active'`);
});

const pause = (ms: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, ms));

function heap(): number {
  setFlagsFromString('--expose-gc');
  (runInNewContext('gc') as () => void)();
  return process.memoryUsage().heapUsed;
}

/** What each of the daemon's sessions has cost the database so far, in seconds of a processor; empty where nobody tells. */
async function sessionSeconds(): Promise<Map<unknown, number>> {
  const sessions = await harness.state(
    `select pid from pg_stat_activity where datname = current_database() and application_name like 'personas-sync%'`,
  );
  const seconds = new Map<unknown, number>();
  for (const { pid } of sessions) {
    try {
      const fields =
        readFileSync(`/proc/${String(pid)}/stat`, 'utf8')
          .split(') ')[1]
          ?.split(' ') ?? [];
      seconds.set(pid, (Number(fields[11]) + Number(fields[12])) / 100);
    } catch {
      continue;
    }
  }
  return seconds;
}

interface Cost {
  queriesPerSecond: number;
  processShare: number;
  databaseShare: number;
}

/** What a leading daemon costs once `isQuiet`: statements a second, and shares of a processor. */
async function measure(isQuiet: () => Promise<boolean> | boolean = () => true): Promise<Cost> {
  const stopping = new AbortController();
  const { source, state } = harness.opened.databases;
  let queries = 0;
  const count = (): void => {
    queries += 1;
  };
  const running = new Promise<void>((resolve, reject) => {
    const daemon = runDaemon(harness.opened, stopping.signal, () => resolve());
    stop = () => daemon;
    daemon.catch(reject);
  });
  await running;
  try {
    await expect.poll(isQuiet, SOON).toBe(true);
    await pause(SETTLING_MS);
    for (const pool of [source, state.pool]) pool.on('acquire', count);
    const began = performance.now();
    const cpu = process.cpuUsage();
    const before = await sessionSeconds();
    await pause(MEASURED_MS);
    const seconds = (performance.now() - began) / 1000;
    const { user, system } = process.cpuUsage(cpu);
    const after = await sessionSeconds();
    const spent = [...after].reduce((sum, [pid, now]) => sum + now - (before.get(pid) ?? 0), 0);
    return {
      queriesPerSecond: queries / seconds,
      processShare: (user + system) / 1e6 / seconds,
      databaseShare: spent / seconds,
    };
  } finally {
    for (const pool of [source, state.pool]) pool.off('acquire', count);
    stopping.abort();
    await stop();
  }
}
let stop: () => Promise<void> = () => Promise.resolve();

function expectIdle(cost: Cost): void {
  if (process.env['SHOW_COST'] !== undefined) console.log(expect.getState().currentTestName, cost);
  expect(cost.queriesPerSecond).toBeLessThan(25);
  expect(cost.processShare).toBeLessThan(0.15);
  expect(cost.databaseShare).toBeLessThan(0.3);
}

const change = (assignments: string, condition = 'true'): Promise<unknown> =>
  harness.state(`update outbox set ${assignments} where ${condition}`);

describe('the daemon is idle', () => {
  it('while all calls wait for their time', async () => {
    expectIdle(await measure());
  });

  it('while events wait behind marks that wait for their time', async () => {
    await harness.state(
      `insert into outbox (kind, destination_id, definition_id, priority, recipient, event, message_id, occurred_at, properties)
       select 'e', destination_id, definition_id, 1, recipient, 'Entered', 'personas_' || id, now(), '{}' from outbox`,
    );
    expectIdle(await measure());
    await harness.state(`delete from outbox where kind = 'e'`);
  });

  it('while many events of one person wait behind a mark that waits for an exit of that person', async () => {
    await change(`exit_of = 'p'`, `recipient = 'u:1'`);
    await change(`follows = 'p', due_at = now(), attempts = 0`, `recipient = 'u:2'`);
    await harness.state(
      `insert into outbox (kind, destination_id, definition_id, priority, recipient, event, message_id, occurred_at, properties)
       select 'e', destination_id, definition_id, 1, recipient, 'Entered', 'personas_' || n, now(), '{}'
       from outbox, generate_series(1, 25) as n where recipient = 'u:2'`,
    );
    expectIdle(await measure());
    await harness.state(`delete from outbox where kind = 'e'`);
    await change('exit_of = null, follows = null', 'exit_of is not null or follows is not null');
  });

  it('while the destination is paused', async () => {
    await change('due_at = now(), attempts = 0');
    await harness.state(`update destination set state = 'paused'`);
    expectIdle(await measure());
  });

  it('while the definition is paused', async () => {
    await harness.state(`update definition set state = 'paused'`);
    await change('attempts = 3', 'id % 2 = 0');
    expectIdle(await measure());
  });

  it('while the destination is told to wait', async () => {
    await change('attempts = 0');
    harness.simulator.faults.failRandomly({
      share: 1,
      seed: 1,
      status: 429,
      body: { code: 'RateLimitExceeded', params: { rateLimitReset: 60 } },
    });
    expectIdle(await measure(() => harness.simulator.stats.count('users/bulkUpdate', 429) > 0));
    harness.simulator.faults.clear();
  });

  it('while the destination is away', async () => {
    harness.simulator.faults.failRandomly({ share: 1, seed: 1, status: 503 });
    const before = harness.simulator.stats.count(undefined, 503);
    const failed = (): number => harness.simulator.stats.count(undefined, 503) - before;
    expectIdle(await measure(() => failed() >= 4));
    expect(failed()).toBeLessThan(20);
    harness.simulator.faults.clear();
  });

  it('and holds none of what waits in memory', async () => {
    await change(`due_at = now() + interval '1 hour', attempts = 3`);
    await measure();
    expect(heap() - heapBefore).toBeLessThan(15e6);
  });
});
