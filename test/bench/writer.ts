import { execFile, spawn } from 'node:child_process';
import { once } from 'node:events';
import { access, mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { promisify } from 'node:util';
import pg from 'pg';
import { runCommand } from './daemon.js';
import { median, type Report } from './figures.js';
import { fillOrders, FOLLOWED } from './orders.js';
import type { BenchDatabase, BenchServer } from './server.js';
import { settle } from './shop.js';
import { writeConfig } from './site.js';

/**
 * What the triggers cost whoever writes: the same statements on a table with triggers and on one without, in turns, by
 * pgbench where there is one. Nobody takes what is captured, and it is emptied between the turns.
 */
const CLIENTS = 8;
const TURNS = 11;
const TURN_SECONDS = 3;
const WARM_UPS = 1;
const CUSTOMERS = 50_000;
const BULK = 100_000;
const BULK_TURNS = 9;
const MOST_SINGLE = 1.3;
const MOST_BULK = 1.4;
/** As on a disk in a network. */
const SLOW_FLUSH = [
  ['commit_delay', 2_000],
  ['commit_siblings', 0],
] as const;
const PGBENCHES = ['pgbench', ...[18, 17, 16, 15, 14].map((version) => `/usr/lib/postgresql/${version}/bin/pgbench`)];

const insertInto = (table: string): string => `insert into ${table} (customer_id, total) values ($1, 25)`;

/** Transactions a second of one kind of writer, with and without triggers. */
type Load = (table: string) => Promise<number>;

async function findPgbench(): Promise<string | null> {
  for (const program of PGBENCHES) {
    try {
      if (program.includes('/')) await access(program);
      await promisify(execFile)(program, ['--version']);
      return program;
    } catch {
      // The next place.
    }
  }
  return null;
}

/** Many clients of pgbench, each with one order after the other. */
function byPgbench(program: string, folder: string, { url }: BenchDatabase): Load {
  return async (table) => {
    const script = join(folder, `${table}.sql`);
    await writeFile(
      script,
      `\\set customer random(1, ${CUSTOMERS})\n${insertInto(table).replace('$1', ':customer')};\n`,
    );
    const child = spawn(
      program,
      ['-n', '-M', 'prepared', '-c', String(CLIENTS), '-j', '1', '-T', String(TURN_SECONDS), '-f', script, url],
      { stdio: ['ignore', 'pipe', 'pipe'] },
    );
    let said = '';
    child.stdout.setEncoding('utf8').on('data', (text: string) => (said += text));
    child.stderr.setEncoding('utf8').on('data', (text: string) => (said += text));
    await once(child, 'close');
    const perSecond = Number(/tps = ([0-9.]+)/.exec(said)?.[1]);
    if (!(perSecond > 0)) throw new Error(`pgbench says:\n${said}`);
    return perSecond;
  };
}

/** The same by this process, which takes a good part of the processor itself. */
function byClients({ url }: BenchDatabase): Load {
  return async (table) => {
    const clients = Array.from({ length: CLIENTS }, () => new pg.Client({ connectionString: url }));
    await Promise.all(clients.map((client) => client.connect()));
    const began = performance.now();
    let written = 0;
    await Promise.all(
      clients.map(async (client) => {
        while (performance.now() - began < TURN_SECONDS * 1_000) {
          const customer = 1 + Math.floor(Math.random() * CUSTOMERS);
          await client.query({ name: table, text: insertInto(table), values: [customer] });
          written += 1;
        }
      }),
    );
    const perSecond = (written * 1_000) / (performance.now() - began);
    await Promise.all(clients.map((client) => client.end()));
    return perSecond;
  };
}

const empty = async ({ client }: BenchDatabase): Promise<void> => {
  await client.query('truncate personas_capture.capture');
  await client.query('checkpoint');
};

/** How often the time without triggers the work takes with them, turn by turn. */
async function measurePairs(
  name: string,
  { turns, most, database }: { turns: number; most: number; database: BenchDatabase },
  costOf: (table: 'orders' | 'bare_orders') => Promise<number>,
  report: Report,
): Promise<void> {
  const ratios: number[] = [];
  for (let turn = -WARM_UPS; turn < turns; turn += 1) {
    // Whichever is first has the colder caches.
    const isOursFirst = turn % 2 === 0;
    const cost = { orders: 0, bare_orders: 0 };
    for (const table of isOursFirst ? (['orders', 'bare_orders'] as const) : (['bare_orders', 'orders'] as const)) {
      await empty(database);
      cost[table] = await costOf(table);
    }
    if (turn >= 0) ratios.push(cost.orders / cost.bare_orders);
  }
  const middle = median(ratios);
  const all = [...ratios].sort((a, b) => a - b).map((ratio) => ratio.toFixed(2));
  report.add({
    name,
    measured: `${middle.toFixed(2)} times (${all[0]} to ${all.at(-1)})`,
    bound: `at most ${most}`,
    holds: middle <= most,
  });
}

export async function measureWriters(server: BenchServer, report: Report): Promise<void> {
  const database = await server.createDatabase('writers');
  const folder = await mkdtemp(join(tmpdir(), 'personas-bench-'));
  try {
    report.say('What the triggers cost a writer');
    await fillOrders(database.client, CUSTOMERS);
    await database.client.query(
      `create table bare_orders (like orders including all); insert into bare_orders (customer_id, total) select customer_id, total from orders`,
    );
    await settle(database.client);
    const config = await writeConfig(folder, { source: database, state: database, ...FOLLOWED });
    for (const words of [['migrate'], ['realtime', 'install']]) {
      if ((await runCommand(...words, '--config', config)) !== 0) throw new Error(`\`${words.join(' ')}\` failed.`);
    }
    const program = await findPgbench();
    const load = program === null ? byClients(database) : byPgbench(program, folder, database);
    const how = `${CLIENTS} clients${program === null ? ' of Node' : ' of pgbench'}`;
    const single = (where: string): Promise<void> =>
      measurePairs(
        `an order by each of ${how}${where}: with / without triggers`,
        { turns: TURNS, most: MOST_SINGLE, database },
        async (table) => 1 / (await load(table)),
        report,
      );
    await single('');
    for (const [name, value] of SLOW_FLUSH) await database.client.query(`alter system set ${name} = ${value}`);
    await database.client.query('select pg_reload_conf()');
    await single(', where a flush takes 2 ms more');
    for (const [name] of SLOW_FLUSH) await database.client.query(`alter system reset ${name}`);
    await database.client.query('select pg_reload_conf()');
    await measurePairs(
      `${BULK} orders in one statement: with / without triggers`,
      { turns: BULK_TURNS, most: MOST_BULK, database },
      async (table) => {
        const began = performance.now();
        await database.client.query(
          `insert into ${table} (customer_id, total) select n % ${CUSTOMERS} + 1, 25 from generate_series(1, ${BULK}) as n`,
        );
        return performance.now() - began;
      },
      report,
    );
  } finally {
    await rm(folder, { recursive: true, force: true });
    await database.drop();
  }
}
