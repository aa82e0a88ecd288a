import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as wait } from 'node:timers/promises';
import pg from 'pg';
import { cpuSecondsOf, runCommand, startDaemon, until, type Daemon } from './daemon.js';
import { limit, seconds, timed, type Report } from './figures.js';
import { createChanges, fillOrders, FOLLOWED, type Change } from './orders.js';
import { startReceiver, type Arrival, type Receiver } from './receiver.js';
import type { BenchDatabase, BenchServer } from './server.js';
import { settle } from './shop.js';
import { writeConfig, type Definitions } from './site.js';

/**
 * Real time as a whole, from the commit in a shop to the request at a receiver, with five definitions that follow the
 * orders: alone, beside very many members, and while a run in full goes on; how much a second is kept up with; how long
 * very large transactions take; and what it costs when nothing happens.
 */
const LATENCY_MS = 50;
const MOST_MIDDLE_MS = 15;
const MOST_P99_MS = 60;
const PER_SECOND = 100;
/** Of whom single changes are made; each one again after so many others. */
const CHANGED = 5_000;
const LOAD_PER_SECOND = 1_000;
const LOAD_CUSTOMERS = 50_000;
const LOAD_CLIENTS = 8;
const LARGE = 100_000;
const MOST_LARGE_MS = 10_000;
const BULK = 2_000_000;
const MOST_BULK_MS = 60_000;
const IDLE_MS = 60_000;
const MOST_IDLE = 0.01;

export interface Bench {
  database: BenchDatabase;
  receiver: Receiver;
  daemon: Daemon;
}

export const count = async ({ client }: BenchDatabase, text: string): Promise<number> =>
  Number((await client.query<{ n: string }>(`select (${text})::bigint as n`)).rows[0]?.n);

/** What a shop has, and what is followed of it. */
export interface Shop {
  fill: (client: pg.Client) => Promise<void>;
  /** Of the configuration. */
  sections: Definitions & Record<string, unknown>;
}

const ordersOf = (customers: number): Shop => ({
  fill: (client) => fillOrders(client, customers),
  sections: FOLLOWED,
});

/** A shop and a daemon that follows it; `work` begins when nothing is left to be done. */
export async function withFollowed<T>(
  server: BenchServer,
  { fill, sections }: Shop,
  work: (bench: Bench) => Promise<T>,
): Promise<T> {
  const database = await server.createDatabase('realtime');
  const receiver = await startReceiver({
    projectType: 'hybrid',
    latencyMs: LATENCY_MS,
    tolerance: 0.03,
    keepsArrivals: true,
  });
  const folder = await mkdtemp(join(tmpdir(), 'personas-bench-'));
  try {
    // A queue lives on being vacuumed, as any server does by itself.
    await setAutovacuum(database, 'on');
    await fill(database.client);
    const config = await writeConfig(folder, {
      source: database,
      state: database,
      destination: receiver.url,
      ...sections,
    });
    const run = async (...words: string[]): Promise<void> => {
      const code = await runCommand(...words, '--config', config);
      if (code !== 0) throw new Error(`\`${words.join(' ')}\` ended with ${code}.`);
    };
    await run('migrate');
    await run('realtime', 'install');
    const daemon = startDaemon(folder, config);
    try {
      const { audiences = [], traits = [] } = sections;
      await untilQuiet({ database, daemon }, audiences.length + traits.length);
      await settle(database.client);
      return await work({ database, receiver, daemon });
    } finally {
      await daemon.stop();
    }
  } finally {
    await rm(folder, { recursive: true, force: true });
    await receiver.stop();
    await setAutovacuum(database, 'off');
    await database.drop();
  }
}

async function setAutovacuum({ client }: BenchDatabase, value: 'on' | 'off'): Promise<void> {
  await client.query(`alter system set autovacuum = ${value}`);
  await client.query('select pg_reload_conf()');
}

const DEFINITIONS = FOLLOWED.audiences.length + FOLLOWED.traits.length;

/** Whether nothing is captured or due. */
export const isEvaluated = async (database: BenchDatabase): Promise<true | null> => {
  const waiting = `select (select count(*) from personas_capture.capture) + (select count(*) from personas.due)`;
  return (await count(database, waiting)) === 0 ? true : null;
};

/** Resolves when everything is followed, and nothing is captured, due, or wanted in full. */
async function untilQuiet(
  { database, daemon }: Pick<Bench, 'database' | 'daemon'>,
  definitions = DEFINITIONS,
): Promise<void> {
  await until(daemon, async () => {
    const live = await count(
      database,
      `select count(*) from personas.definition where tracking = 'live' and first_run_at is not null and full_wanted = full_done`,
    );
    return live < definitions ? null : isEvaluated(database);
  });
}

interface Made extends Change {
  /** When the writer heard that it was committed, in milliseconds since 1970. */
  at: number;
}

/** Makes single changes at a steady rate, each a transaction of its own, one after the other. */
export async function makeChanges(
  { database }: Bench,
  { next, perSecond, forMs }: { next: () => Change; perSecond: number; forMs: number },
): Promise<readonly Made[]> {
  const client = new pg.Client({ connectionString: database.url });
  await client.connect();
  const made: Made[] = [];
  try {
    const began = performance.now();
    for (let n = 0; (n * 1_000) / perSecond < forMs; n += 1) {
      const restMs = began + (n * 1_000) / perSecond - performance.now();
      if (restMs > 0) await wait(restMs);
      const change = next();
      await client.query({
        name: 'order',
        text: 'insert into orders (customer_id, total) values ($1, $2)',
        values: [change.customer, change.total],
      });
      made.push({ ...change, at: performance.timeOrigin + performance.now() });
    }
  } finally {
    await client.end();
  }
  return made;
}

interface Latencies {
  /** Until the first request that tells of anything of a change, and until all of it has been told. */
  first: readonly number[];
  all: readonly number[];
  /** Fields that were never told. */
  missing: number;
}

/** How long it took until changes arrived, by the first request after each that has a field as it had become. */
export function latenciesOf(made: readonly Made[], arrivals: readonly Arrival[]): Latencies {
  const byUser = new Map<string, Arrival[]>();
  for (const arrival of arrivals) {
    const known = byUser.get(arrival[1]);
    if (known === undefined) byUser.set(arrival[1], [arrival]);
    else known.push(arrival);
  }
  const first: number[] = [];
  const all: number[] = [];
  let missing = 0;
  for (const { customer, fields, at } of made) {
    const own = byUser.get(String(customer)) ?? [];
    const took = Object.entries(fields).flatMap(([field, value]) => {
      // The answer to the writer may have been read after the request had arrived.
      const found = own.find(([arrived, , told]) => arrived > at - LATENCY_MS && told[field] === value);
      return found === undefined ? [] : [found[0] - at];
    });
    missing += Object.keys(fields).length - took.length;
    if (took.length === 0) continue;
    first.push(Math.min(...took));
    all.push(Math.max(...took));
  }
  return { first, all, missing };
}

const share = (values: readonly number[], of: number): number =>
  [...values].sort((a, b) => a - b)[Math.min(values.length - 1, Math.floor(values.length * of))] ?? Infinity;
export const milliseconds = (values: readonly number[]): string =>
  `${share(values, 0.5).toFixed(1)} ms, 99 %: ${share(values, 0.99).toFixed(1)} ms`;

function reportLatencies(name: string, { first, all, missing }: Latencies, report: Report): void {
  report.add({
    name: `${name}: commit to request, ${first.length} changes`,
    measured: milliseconds(first),
    bound: `at most ${MOST_MIDDLE_MS} ms, 99 %: ${MOST_P99_MS} ms`,
    holds: share(first, 0.5) <= MOST_MIDDLE_MS && share(first, 0.99) <= MOST_P99_MS,
  });
  report.add({ name: '… until all definitions have told', measured: milliseconds(all), bound: '', holds: null });
  report.add(limit('… fields that were not told', missing, 0, String));
}

async function measureLatency(
  name: string,
  bench: Bench,
  next: () => Change,
  forMs: number,
  report: Report,
): Promise<void> {
  const { database, daemon, receiver } = bench;
  await makeChanges(bench, { next, perSecond: PER_SECOND, forMs: 5_000 });
  await until(daemon, () => isEvaluated(database));
  await wait(1_000);
  await receiver.arrivals();
  const made = await withProcessor(
    '… processor for one',
    bench,
    () => makeChanges(bench, { next, perSecond: PER_SECOND, forMs }),
    report,
  );
  await wait(2 * LATENCY_MS + 1_000);
  reportLatencies(name, latenciesOf(made, await receiver.arrivals()), report);
}

/** What the daemon and its sessions in PostgreSQL use for each of the changes until they have been evaluated. */
async function withProcessor(
  name: string,
  { database, daemon }: Bench,
  work: () => Promise<readonly Made[]>,
  report: Report,
): Promise<readonly Made[]> {
  const read = async (): Promise<readonly [daemon: number, sessions: number] | null> => {
    const { rows } = await database.client.query<{ pid: number }>(
      `select pid from pg_stat_activity where application_name like 'personas-sync %'`,
    );
    const own = await daemon.cpuSeconds();
    const sessions = await Promise.all(rows.map(({ pid }) => cpuSecondsOf(pid)));
    return own === null ? null : [own, sessions.reduce<number>((sum, used) => sum + (used ?? 0), 0)];
  };
  const before = await read();
  const made = await work();
  await until(daemon, () => isEvaluated(database));
  const after = await read();
  if (before !== null && after !== null) {
    const each = (used: number): string => `${((used * 1_000) / made.length).toFixed(1)} ms`;
    report.add({
      name,
      measured: `daemon ${each(after[0] - before[0])}, PostgreSQL ${each(after[1] - before[1])}`,
      bound: '',
      holds: null,
    });
  }
  return made;
}

/** The same with nothing sent: from the capture to the outbox. */
async function measureEvaluating(bench: Bench, next: () => Change, forMs: number, report: Report): Promise<void> {
  const setState = (state: 'paused' | 'active'): Promise<unknown> =>
    bench.database.client.query('update personas.destination set state = $1', [state]);
  await setState('paused');
  await wait(1_000);
  await withProcessor(
    '… of that until it is marked',
    bench,
    () => makeChanges(bench, { next, perSecond: PER_SECOND, forMs }),
    report,
  );
  await setState('active');
}

async function measureIdle({ daemon }: Bench, report: Report): Promise<void> {
  // It falls asleep after a second.
  await wait(3_000);
  const before = await daemon.cpuSeconds();
  await wait(IDLE_MS);
  const after = await daemon.cpuSeconds();
  if (before === null || after === null) {
    report.say('This system does not say how much processor a process has used.');
    return;
  }
  const used = ((after - before) * 1_000) / IDLE_MS;
  report.add(limit('an idle daemon, of a core', used, MOST_IDLE, (value) => `${(value * 100).toFixed(2)} %`));
}

/** Keeps one definition being run in full for as long as `work` takes. */
async function besideFullRuns<T>({ database }: Bench, work: () => Promise<T>): Promise<T> {
  const over = new AbortController();
  const client = new pg.Client({ connectionString: database.url });
  await client.connect();
  const isDone = async (): Promise<boolean> => {
    const { rows } = await client.query<{ done: boolean }>(
      `select full_wanted = full_done as done from personas.definition where key = 'regulars'`,
    );
    return rows[0]?.done === true;
  };
  const isOver = (): boolean => over.signal.aborted;
  const keepRunning = async (): Promise<void> => {
    while (!isOver()) {
      await client.query(
        `update personas.definition set full_wanted = nextval('personas.version'), due_at = now() where key = 'regulars'`,
      );
      while (!isOver() && !(await isDone())) await wait(100);
    }
  };
  const running = keepRunning();
  try {
    return await work();
  } finally {
    over.abort();
    await running;
    await client.end();
  }
}

export async function measureLatencies(
  server: BenchServer,
  { members, forSeconds }: { members: number; forSeconds: number },
  report: Report,
): Promise<void> {
  const forMs = forSeconds * 1_000;
  report.say('Single changes of a small shop');
  await withFollowed(server, ordersOf(CHANGED), async (bench) => {
    await measureIdle(bench, report);
    const next = createChanges(CHANGED);
    await measureLatency(`${PER_SECOND} changes a second`, bench, next, forMs, report);
    await measureEvaluating(bench, next, forMs, report);
  });
  report.say(`Single changes beside ${members} members`);
  await withFollowed(server, ordersOf(members + CHANGED), async (bench) => {
    const next = createChanges(CHANGED);
    await measureLatency(`beside ${members} members`, bench, next, forMs, report);
    await besideFullRuns(bench, () => measureLatency('while runs in full go on', bench, next, forMs, report));
  });
}

/** What waits, looked at twice a second until `isOver`. */
async function watchBacklog(
  database: BenchDatabase,
  isOver: () => boolean,
): Promise<readonly { due: number; outbox: number }[]> {
  const seen: { due: number; outbox: number }[] = [];
  while (!isOver()) {
    seen.push({
      due: await count(
        database,
        `select (select count(*) from personas.due) + (select count(*) from personas_capture.capture)`,
      ),
      outbox: await count(database, 'select count(*) from personas.outbox'),
    });
    await wait(500);
  }
  return seen;
}

async function measureLoad(bench: Bench, forMs: number, report: Report): Promise<void> {
  const { database, daemon } = bench;
  let isOver = false;
  const watching = watchBacklog(database, () => isOver);
  const usedBefore = await daemon.cpuSeconds();
  const { ms, result } = await timed(() =>
    Promise.all(
      Array.from({ length: LOAD_CLIENTS }, (_, index) => {
        const draw = createChanges(LOAD_CUSTOMERS / LOAD_CLIENTS);
        const next = (): Change => {
          const change = draw();
          return { ...change, customer: change.customer + (index * LOAD_CUSTOMERS) / LOAD_CLIENTS };
        };
        return makeChanges(bench, { next, perSecond: LOAD_PER_SECOND / LOAD_CLIENTS, forMs });
      }),
    ),
  );
  isOver = true;
  const used = await daemon.cpuSeconds();
  const seen = await watching;
  const made = result.reduce((sum, each) => sum + each.length, 0);
  const reached = Math.round((made * 1_000) / ms);
  // A backlog that grows is larger in the last third than in the second.
  const third = Math.floor(seen.length / 3);
  const mean = (from: number, of: 'due' | 'outbox'): number =>
    Math.round(seen.slice(from, from + third).reduce((sum, each) => sum + each[of], 0) / Math.max(1, third));
  report.add({
    name: `${LOAD_PER_SECOND} changes a second for ${Math.round(ms / 1_000)} s`,
    measured: `${reached}/s`,
    bound: `at least ${LOAD_PER_SECOND * 0.95}/s`,
    holds: reached >= LOAD_PER_SECOND * 0.95,
  });
  for (const of of ['due', 'outbox'] as const) {
    const [second, last] = [mean(third, of), mean(2 * third, of)];
    const most = Math.max(LOAD_PER_SECOND * DEFINITIONS, second * 1.25);
    report.add({
      name:
        of === 'due' ? '… profiles that waited, second and last third' : '… marks that waited, second and last third',
      measured: `${second}, ${last}`,
      bound: `at most ${Math.round(most)}`,
      holds: last <= most,
    });
  }
  if (used !== null && usedBefore !== null) {
    const cores = ((used - usedBefore) * 1_000) / ms;
    report.add({ name: '… processor of the daemon, cores', measured: cores.toFixed(2), bound: '', holds: null });
  }
  const { ms: restMs } = await timed(() => untilQuiet(bench));
  report.add({ name: '… until nothing is due any more', measured: seconds(restMs), bound: '', holds: null });
}

/** The members and values of the snapshots that aren't as the orders say. */
const UNTRUE = `select sum(n) from (
  ${FOLLOWED.audiences
    .map(
      ({ key, sql }) => `select count(*) as n from (${sql}) as t full join (
        select s.profile_id from personas.snapshot as s join personas.definition as d on d.id = s.definition_id where d.key = '${key}'
      ) as s on s.profile_id = t.profile_id::text where s.profile_id is null or t.profile_id is null`,
    )
    .join(' union all ')} union all
  ${FOLLOWED.traits
    .map(
      ({ key, sql }) => `select count(*) as n from (${sql}) as t full join (
        select s.profile_id, (s.value ->> '${key}')::numeric as value from personas.snapshot as s
        join personas.definition as d on d.id = s.definition_id where d.key = '${key}'
      ) as s on s.profile_id = t.profile_id::text
      where s.profile_id is null or t.profile_id is null or s.value <> t.value`,
    )
    .join(' union all ')}) as untrue`;

async function measureLarge(bench: Bench, customers: number, report: Report): Promise<void> {
  const { database, daemon } = bench;
  // What is sent meanwhile would not be counted.
  await database.client.query(`update personas.destination set state = 'paused'`);
  await wait(1_000);
  const before = await count(database, 'select count(*) from personas.outbox');
  await database.client.query(
    `insert into orders (customer_id, total) select n, 30 from generate_series(1, ${LARGE}) as n`,
  );
  const { ms } = await timed(() =>
    until(daemon, async () => {
      const marks = await count(database, `select count(*) from personas.outbox where kind = 'm'`);
      return marks - before >= LARGE * FOLLOWED.traits.length ? true : null;
    }),
  );
  report.add(limit(`a transaction that changes ${LARGE} profiles: until all is marked`, ms, MOST_LARGE_MS, seconds));
  await untilQuiet(bench);
  report.add(limit('… what is not true then', await count(database, UNTRUE), 0, String));
  const { ms: bulkMs } = await timed(async () => {
    await database.client.query(
      `insert into orders (customer_id, total) select n % ${customers} + 1, 1 + n % 7 from generate_series(1, ${BULK}) as n`,
    );
    await untilQuiet(bench);
  });
  report.add(limit(`${BULK} rows loaded: until the snapshots are true`, bulkMs, MOST_BULK_MS, seconds));
  report.add(limit('… what is not true then', await count(database, UNTRUE), 0, String));
}

export async function measureLoads(server: BenchServer, forSeconds: number, report: Report): Promise<void> {
  report.say(`${LOAD_PER_SECOND} changes a second`);
  await withFollowed(server, ordersOf(LOAD_CUSTOMERS), (bench) => measureLoad(bench, forSeconds * 1_000, report));
  report.say('Large transactions');
  await withFollowed(server, ordersOf(2 * LARGE), (bench) => measureLarge(bench, 2 * LARGE, report));
}
