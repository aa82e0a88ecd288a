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
import { countOf, createOutput, formatCount, formatDuration, formatTable, plain, type Output } from './output.js';
import { captureOwn } from './realtime.js';
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
    `First sync: ${countOf(most, 'call')} for everyone who is in, in ${formatDuration(performance.now() - began)}.`,
  );
  return most;
}

/** How long Iterable may take to know of an order before nobody waits for it any more. */
const PATIENCE_MS = 2_000;

/** Places an order that makes somebody a big spender; returns how long after its commit Iterable knew, null: not yet. */
async function timeOrder(
  { databases }: Opened,
  simulator: Simulator,
): Promise<{ account: string; ms: number | null } | null> {
  const { placeLargeOrder } = await import('../demo/shop.js');
  const account = await placeLargeOrder(databases.source);
  const committed = performance.now();
  if (account === null) return null;
  for (;;) {
    const ms = performance.now() - committed;
    if (simulator.user(account)?.fields['big_spenders'] === 'true') return { account, ms };
    if (ms > PATIENCE_MS) return { account, ms: null };
    await new Promise((resolve) => setTimeout(resolve, 1));
  }
}

interface Traded {
  deals: number;
  /** From the commit of an order to Iterable, in milliseconds. */
  took: readonly number[];
}

async function trading(
  opened: Opened,
  output: Output,
  simulator: Simulator,
  seconds: number,
  signal: AbortSignal,
): Promise<Traded> {
  const { trade } = await import('../demo/shop.js');
  // A signal of `AbortSignal.timeout` that only `AbortSignal.any` knows can be collected before it fires (Node 20).
  const over = new AbortController();
  void until(seconds * 1_000, signal).then(() => over.abort());
  const trading = trade(opened.databases.source, { signal: over.signal, pauseMs: 60 });
  let since = new Date().toISOString();
  const took: number[] = [];
  try {
    while (!over.signal.aborted) {
      await new Promise((resolve) => setTimeout(resolve, 1_000));
      since = await showMoves(opened, output, since);
      const order = await timeOrder(opened, simulator);
      if (order?.ms === undefined || order.ms === null) continue;
      took.push(order.ms);
      output.line(
        `  ${pc.cyan('ordered')} ${plain(order.account).padEnd(30)} Iterable knew ${Math.ceil(order.ms)} ms after the commit`,
      );
    }
  } finally {
    over.abort();
    await trading;
  }
  return { deals: await trading, took };
}

const medianOf = (values: readonly number[]): number | null =>
  [...values].sort((a, b) => a - b)[Math.floor(values.length / 2)] ?? null;

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
      `A shop with ${countOf(options.customers, 'customer')} in the embedded PostgreSQL, and the Iterable simulator beside it: nothing leaves this machine.`,
    );
    await captureOwn(opened, controller.signal);
    const lease = await tryLead(opened.databases.state.pool);
    if (lease === null) throw new Error('A database that has just been made has a leader.');
    leadership = await lead(opened, lease, { scheduled: true, delivers: true, confirmRemovals: false, kept: null });
    await firstSync(opened, output, controller.signal);
    const [simulator] = simulators;
    if (simulator === undefined) throw new Error('The simulator has not been started.');
    output.line(`The shop trades for ${options.seconds} s; what depends on its tables alone follows each commit:`);
    const { deals, took } = await trading(opened, output, simulator, options.seconds, controller.signal);
    const median = medianOf(took);
    if (median !== null) {
      output.line(`From the commit of an order to Iterable: ${Math.ceil(median)} ms, the median of ${took.length}.`);
      output.line(
        pc.dim(
          'Who was sent in bulk stays in bulk for a minute, at five requests a second; later a change goes singly.',
        ),
      );
    }
    output.line(
      `${countOf(deals, 'deal')} ${deals === 1 ? 'was' : 'were'} made. One last sync, and the comparison with the truth:`,
    );
    await act(opened, {
      kind: 'sync',
      args: { keys: [], confirmRemovals: false },
      signal: controller.signal,
      onProgress: () => undefined,
      afterwards: async (acted) => {
        await watchDelivery(opened, acted, controller.signal, () => undefined);
      },
    });
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
