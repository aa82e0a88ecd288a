import { rm } from 'node:fs/promises';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import pc from 'picocolors';
import { lead, type Leadership } from '../daemon.js';
import { tryLead } from '../db/lease.js';
import type { Simulator } from '../demo/simulator/server.js';
import { until } from '../lib/until.js';
import { act, watchDelivery } from './act.js';
import { openResources, type Opened } from './open.js';
import { createOutput, formatCount, formatDuration, formatTable, plain, type Output } from './output.js';
import { startProgress } from './progress.js';

/**
 * `demo`: the sample shop from nothing, in a database and a simulator of its own. Everyone is sent once, the shop trades,
 * people enter and exit, and at the end what Iterable holds is compared with the truth.
 */
export interface DemoOptions {
  seconds: number;
  customers: number;
}

const FOLDER = join('.personas', 'demo');
const SHOWN_AT_ONCE = 4;

interface Moved {
  /** In PostgreSQL's own writing, to the microsecond. */
  at: string;
  key: string;
  kind: string;
  recipient: string;
}

async function showMoves(opened: Opened, output: Output, since: string): Promise<string> {
  const { rows } = await opened.databases.state.pool.query<Moved>(
    `select t.at::text as at, d.key, t.kind, t.recipient from transition as t join definition as d on d.id = t.definition_id
     where t.at > $1 and t.kind <> 'c' order by t.at desc, t.definition_id limit 200`,
    [since],
  );
  for (const { key, kind, recipient } of rows.slice(0, SHOWN_AT_ONCE).reverse()) {
    const word = kind === 'e' ? pc.green('entered') : pc.red('exited ');
    output.line(`  ${word} ${key.padEnd(30)} ${plain(recipient.slice(2))}`);
  }
  if (rows.length > SHOWN_AT_ONCE) output.line(pc.dim(`  … and ${formatCount(rows.length - SHOWN_AT_ONCE)} more`));
  return rows[0]?.at ?? since;
}

async function firstSync(opened: Opened, output: Output, signal: AbortSignal): Promise<number> {
  const began = performance.now();
  const progress = startProgress('First sync', output.json);
  let most = 0;
  await act(opened, {
    kind: 'sync',
    args: { keys: [], confirmRemovals: false },
    signal,
    onProgress: () => undefined,
    afterwards: async (acted) => {
      await watchDelivery(opened, acted, signal, ({ waiting, ahead }) => {
        most = Math.max(most, waiting + ahead);
        progress.update(most - waiting - ahead, most);
      });
    },
  });
  progress.end();
  output.line(
    `First sync: ${formatCount(most)} calls for everyone who is in, in ${formatDuration(performance.now() - began)}.`,
  );
  return most;
}

async function trading(opened: Opened, output: Output, seconds: number, signal: AbortSignal): Promise<number> {
  const { trade } = await import('../demo/shop.js');
  // A signal of `AbortSignal.timeout` that only `AbortSignal.any` knows can be collected before it fires (Node 20).
  const over = new AbortController();
  void until(seconds * 1_000, signal).then(() => over.abort());
  const deals = trade(opened.databases.source, { signal: over.signal, pauseMs: 60 });
  let since = new Date().toISOString();
  while (!over.signal.aborted) {
    await new Promise((resolve) => setTimeout(resolve, 1_000));
    since = await showMoves(opened, output, since);
  }
  return deals;
}

async function compare(opened: Opened, output: Output, simulator: Simulator): Promise<number> {
  const { compareWithTruth } = await import('../demo/truth.js');
  const { source, state } = opened.databases;
  const comparisons = await compareWithTruth(source, state.pool, opened.config, simulator);
  const rows = comparisons.map(({ definition, truth, iterable, differing }) => [
    definition,
    formatCount(truth),
    formatCount(iterable),
    differing === 0 ? pc.green('equal') : pc.red(`${formatCount(differing)} differ`),
  ]);
  output.line();
  output.line(
    formatTable(
      [
        { title: 'definition' },
        { title: 'the database says', align: 'right' },
        { title: 'Iterable has', align: 'right' },
        { title: '' },
      ],
      rows,
    ),
  );
  output.object({ comparisons });
  return comparisons.reduce((sum, { differing }) => sum + differing, 0);
}

export async function demo(options: DemoOptions, json: boolean): Promise<number> {
  const output = createOutput(json);
  const controller = new AbortController();
  process.once('SIGINT', () => controller.abort());
  process.once('SIGTERM', () => controller.abort());
  await rm(FOLDER, { recursive: true, force: true });
  const simulators: Simulator[] = [];
  let leadership: Leadership | null = null;
  const opened = await openResources({
    configFile: fileURLToPath(new URL('../../config/personas.yaml', import.meta.url)),
    environment: {},
    onNote: () => undefined,
    migrations: 'apply',
    readOnly: false,
    logLevel: 'error',
    folder: FOLDER,
    customers: options.customers,
    onSimulator: (simulator) => simulators.push(simulator),
  });
  try {
    output.line(
      `A shop with ${formatCount(options.customers)} customers in the embedded PostgreSQL, and the Iterable simulator beside it: nothing leaves this machine.`,
    );
    const lease = await tryLead(opened.databases.state.pool);
    if (lease === null) throw new Error('A database that has just been made has a leader.');
    leadership = await lead(opened, lease, { scheduled: true, delivers: true, confirmRemovals: false });
    await firstSync(opened, output, controller.signal);
    output.line(`The shop trades for ${options.seconds} s; its definitions are computed every 5 s:`);
    const deals = await trading(opened, output, options.seconds, controller.signal);
    output.line(`${formatCount(deals)} deals were made. One last sync, and the comparison with the truth:`);
    await act(opened, {
      kind: 'sync',
      args: { keys: [], confirmRemovals: false },
      signal: controller.signal,
      onProgress: () => undefined,
      afterwards: async (acted) => {
        await watchDelivery(opened, acted, controller.signal, () => undefined);
      },
    });
    const [simulator] = simulators;
    if (simulator === undefined) throw new Error('The simulator has not been started.');
    const differing = await compare(opened, output, simulator);
    output.line();
    output.line(
      differing === 0
        ? 'Iterable is true to the database. With your own: see the README, or `personas-sync --help`.'
        : pc.red('Iterable is not true to the database.'),
    );
    return differing === 0 ? 0 : 1;
  } finally {
    await leadership?.stop();
    await opened.close();
    await rm(FOLDER, { recursive: true, force: true });
  }
}
