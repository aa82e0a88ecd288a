import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import pg from 'pg';
import { openPool } from '../../src/db/connect.js';
import { Secret } from '../../src/lib/secret.js';
import { keepReader, readQueue, START, type Position } from '../../src/outbox/reader.js';
import { runCommand, startDaemon, until, type Daemon } from './daemon.js';
import { limit, median, ratio, seconds, timed, type Report } from './figures.js';
import { measurePacing } from './pacing.js';
import { startReceiver, type Receiver } from './receiver.js';
import type { BenchDatabase, BenchServer } from './server.js';
import { AUDIENCE, fillShop, settle } from './shop.js';
import { writeConfig } from './site.js';

/**
 * Delivery as a whole, from the tables to a receiver with 50 ms of latency and Iterable's quotas: a first sync of a
 * million by bulk with live changes meanwhile, what merging saves, and how a queue is read over dead rows.
 */
const LATENCY_MS = 50;
const TOLERANCE = 0.03;
/** What a quota of five requests of a thousand a second allows, and 7 % more. */
const PER_SECOND = 4_651;
const MOST_MB = 200;
const MOST_LIVE_MS = 1_000;
const LIVE_MEMBERS = 2_000;

/** Members are given by their userIds, so that nobody has to be looked up. */
const NOBODY = 'create table customers (id bigint, email text)';

interface Bench {
  database: BenchDatabase;
  receiver: Receiver;
  folder: string;
}

async function withBench<T>(server: BenchServer, work: (bench: Bench) => Promise<T>): Promise<T> {
  const database = await server.createDatabase('delivery');
  const receiver = await startReceiver({ projectType: 'hybrid', latencyMs: LATENCY_MS, tolerance: TOLERANCE });
  const folder = await mkdtemp(join(tmpdir(), 'personas-bench-'));
  try {
    return await work({ database, receiver, folder });
  } finally {
    await rm(folder, { recursive: true, force: true });
    await receiver.stop();
    await database.drop();
  }
}

const one = async <T extends pg.QueryResultRow>({ client }: BenchDatabase, text: string): Promise<T | undefined> =>
  (await client.query<T>(text)).rows[0];

const waitsFor = async (database: BenchDatabase): Promise<number> =>
  (
    await one<{ n: number }>(
      database,
      `select ((select count(*) from personas.outbox) + (select coalesce(sum(greatest(0, backfill_total - backfill_done)), 0)
       from personas.definition_destination where backfill is not null))::int as n`,
    )
  )?.n ?? 0;

/** Marks one live change after the other until stopped; gives how long each took to be acknowledged. */
async function changeLive(database: BenchDatabase, isOver: () => boolean): Promise<number[]> {
  const client = new pg.Client({ connectionString: database.url });
  await client.connect();
  const latencies: number[] = [];
  try {
    const { rows } = await client.query<{ id: number }>(`select id from personas.definition where key = 'live'`);
    const definition = rows[0]?.id;
    for (let turn = 0; !isOver(); turn += 1) {
      const began = performance.now();
      const raised = await client.query<{ id: string }>(
        `insert into personas.outbox (kind, destination_id, definition_id, priority, recipient, columns)
         values ('m', 1, $1, 0, $2, array['live'])
         on conflict (recipient, destination_id, definition_id) where kind = 'm' do nothing returning id`,
        [definition, `u:live${(turn % LIVE_MEMBERS) + 1}`],
      );
      const id = raised.rows[0]?.id;
      // One that waits already is not another change.
      if (id === undefined) continue;
      for (;;) {
        const { rowCount } = await client.query('select from personas.outbox where id = $1', [id]);
        if (rowCount === 0) break;
        await new Promise((resolve) => setTimeout(resolve, 10));
      }
      latencies.push(performance.now() - began);
      await new Promise((resolve) => setTimeout(resolve, 50));
    }
  } finally {
    await client.end();
  }
  return latencies;
}

async function measureBackfill(server: BenchServer, members: number, report: Report): Promise<void> {
  await withBench(server, async ({ database, receiver, folder }) => {
    // A queue lives on being vacuumed, as any server does by itself.
    await database.client.query('alter system set autovacuum = on');
    await database.client.query('select pg_reload_conf()');
    report.say(`A first sync of ${members} members`);
    await fillShop(database.client, members);
    await database.client.query(
      `create table live as select 'live' || n as user_id from generate_series(1, ${LIVE_MEMBERS}) as n`,
    );
    await settle(database.client);
    const audiences = [
      { key: 'live', name: 'Live', sql: 'SELECT user_id FROM live', initial: 'skip', schedule: 'manual' },
      { key: 'spenders', name: 'Spenders', sql: AUDIENCE, schedule: 'manual' },
    ];
    const config = await writeConfig(folder, {
      source: database,
      state: database,
      destination: receiver.url,
      audiences,
    });
    await runCommand('sync', 'live', '--config', config);
    const daemon = startDaemon(folder, config);
    try {
      await until(daemon, async () =>
        (await one(database, 'select from personas.leader where holder is not null')) === undefined ? null : true,
      );
      await database.client.query(
        `insert into personas.request (kind, arguments) values ('sync', '{"keys": ["spenders"], "confirmRemovals": false}')`,
      );
      const isBegun = async (): Promise<true | null> =>
        (await receiver.ask('users/bulkUpdate')).requests > 0 ? true : null;
      await until(daemon, isBegun);
      const usedBefore = await daemon.cpuSeconds();
      let isOver = false;
      const { ms, result: live } = await timed(async () => {
        const changing = changeLive(database, () => isOver);
        await until(daemon, async () => {
          await new Promise((resolve) => setTimeout(resolve, 250));
          return (await receiver.ask('users/bulkUpdate')).users >= members ? true : null;
        });
        isOver = true;
        return changing;
      });
      await until(daemon, async () => ((await waitsFor(database)) === 0 ? true : null));
      const used = await daemon.cpuSeconds();
      const bulk = await receiver.ask('users/bulkUpdate');
      report.add(limit(`a first sync of ${members} members by bulk`, ms, (members / PER_SECOND) * 1_000, seconds));
      report.add(limit('… answered with 429', bulk.throttled, 0, String));
      reportLive(live, report);
      if (used !== null && usedBefore !== null) {
        const each = ((used - usedBefore) / members) * 100_000;
        report.add({
          name: '… processor of the daemon for 100,000 of them',
          measured: seconds(each * 1_000),
          bound: '',
          holds: null,
        });
      }
      await reportMemory(daemon, report);
    } finally {
      await daemon.stop();
      await database.client.query('alter system set autovacuum = off');
      await database.client.query('select pg_reload_conf()');
    }
  });
}

function reportLive(latencies: readonly number[], report: Report): void {
  const sorted = [...latencies].sort((a, b) => a - b);
  const p99 = sorted[Math.floor(sorted.length * 0.99)] ?? Infinity;
  const middle = Math.round(median(sorted));
  report.add({
    name: `… ${sorted.length} live changes meanwhile, until acknowledged`,
    measured: `${middle} ms, 99 %: ${Math.round(p99)} ms`,
    bound: `99 %: at most ${MOST_LIVE_MS} ms`,
    holds: p99 <= MOST_LIVE_MS,
  });
}

async function reportMemory(daemon: Daemon, report: Report): Promise<void> {
  const peak = await daemon.peakMb();
  if (peak === null) report.say('This system does not say how much memory a process had.');
  else report.add(limit('… memory of the daemon', peak, MOST_MB, (value) => `${Math.round(value)} MB`));
}

const AUDIENCES = 20;
const PEOPLE = 10_000;

async function measureMerging(server: BenchServer, report: Report): Promise<void> {
  await withBench(server, async ({ database, receiver, folder }) => {
    report.say(`${AUDIENCES} audiences that change for the same ${PEOPLE} people`);
    await database.client.query(
      `create table people as select n as id, 'u' || n as user_id, false as member from generate_series(1, ${PEOPLE}) as n; ${NOBODY}`,
    );
    const audiences = Array.from({ length: AUDIENCES }, (_, n) => ({
      key: `audience_${n}`,
      name: `Audience ${n}`,
      sql: 'SELECT user_id FROM people WHERE member',
      guard: 'off',
    }));
    const config = await writeConfig(folder, {
      source: database,
      state: database,
      destination: receiver.url,
      audiences,
    });
    const run = (...words: string[]): Promise<number | null> => runCommand(...words, '--config', config);
    await run('sync');
    await run('pause', 'iterable');
    await database.client.query('update people set member = true');
    await run('sync');
    const raised = (await one<{ n: number }>(database, 'select count(*)::int as n from personas.outbox'))?.n ?? 0;
    if (raised !== AUDIENCES * PEOPLE) throw new Error(`${raised} marks were raised.`);
    await run('resume', 'iterable');
    await run('sync');
    const [bulk, single] = [await receiver.ask('users/bulkUpdate'), await receiver.ask('users/update')];
    if ((await waitsFor(database)) > 0) throw new Error('Something was not delivered.');
    const updates = bulk.items + single.items;
    report.add(limit(`user updates for ${raised} marks of ${PEOPLE} people`, updates, PEOPLE, String));
  });
}

const DEAD = 250_000;
const TURNS = 15;
const MOST_SLOWER = 2;

async function measureQueue(server: BenchServer, report: Report): Promise<void> {
  await withBench(server, async ({ database, receiver, folder }) => {
    report.say(`A queue behind ${DEAD} dead rows`);
    await database.client.query(`create table people (user_id text); ${NOBODY}`);
    const audiences = [{ key: 'member', sql: 'SELECT user_id FROM people', guard: 'off' }];
    const config = await writeConfig(folder, {
      source: database,
      state: database,
      destination: receiver.url,
      audiences,
    });
    await runCommand('sync', '--config', config);
    const { client } = database;
    await client.query('set search_path to personas');
    const fill = (count: number): Promise<unknown> =>
      client.query(
        `insert into outbox (kind, destination_id, definition_id, priority, recipient, columns)
         select 'm', 1, 1, 1, 'u:' || n || clock_timestamp(), array['member'] from generate_series(1, ${count}) as n`,
      );
    const room = { marks: Infinity, lists: Infinity, events: Infinity, asks: Infinity };
    const pool = openPool({ url: new Secret(database.url), purpose: 'bench', max: 1, schema: 'personas' });
    const reader = keepReader(pool);
    const readAll = async (position: Position): Promise<number[]> => {
      const times: number[] = [];
      for (let turn = 0; turn < TURNS; turn += 1) {
        const read = timed(() => reader.use((kept) => readQueue(kept, 1, { position, room, limit: 1_000 })));
        times.push((await read).ms);
      }
      return times;
    };
    await fill(50_000);
    await client.query('analyze outbox');
    const fresh = await readAll(START);
    // Somebody's old transaction keeps every deleted row.
    const old = new pg.Client({ connectionString: database.url });
    await old.connect();
    await client.query('truncate outbox');
    await old.query('begin isolation level repeatable read; select count(*) from personas.outbox');
    await fill(DEAD);
    const dead = await client.query<{ last: string }>('select max(id) as last from outbox');
    await client.query('delete from outbox');
    await fill(50_000);
    const last = Number(dead.rows[0]?.last);
    const position: Position = { ...START, new: [last, last, last] };
    report.add(ratio(`reading behind ${DEAD} dead rows / a fresh queue`, await readAll(position), fresh, MOST_SLOWER));
    reader.close();
    await pool.end();
    await old.end();
  });
}

export async function measureDelivery(
  server: BenchServer,
  { members, pacingSeconds }: { members: number; pacingSeconds: number },
  report: Report,
): Promise<void> {
  await measurePacing(pacingSeconds, report);
  await measureQueue(server, report);
  await measureMerging(server, report);
  await measureBackfill(server, members, report);
}
