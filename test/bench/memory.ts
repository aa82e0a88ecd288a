import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { startSimulator } from '../../src/demo/simulator/server.js';
import { startDaemon, until } from './daemon.js';
import { limit, type Report } from './figures.js';
import type { BenchDatabase, BenchServer } from './server.js';
import { AUDIENCE, fillShop, moveMembers } from './shop.js';
import { writeConfig } from './site.js';

/**
 * The most memory that the daemon ever has, by the kernel's own count: over a first run and a run with 1 % churn in two
 * databases, where every row passes through it, and while a first sync delivers.
 */
const FEW = 100_000;
const MOST_MB = 150;
/** In bulk, thousands of recipients are under way at once. */
const MOST_DELIVERING_MB = 200;
const MOST_GROWTH = 1.2;
/** The cursor of a first sync feeds the outbox up to 50,000 marks. */
const WAITING = 45_000;
const DELIVERED = 20_000;

const megabytes = (value: number): string => `${Math.round(value)} MB`;

export async function measureMemory(server: BenchServer, members: number, report: Report): Promise<void> {
  const few = await peakOfRuns(server, Math.min(FEW, members), report);
  const many = await peakOfRuns(server, members, report);
  const delivering = await peakOfDelivery(server, report);
  if (few === null || many === null || delivering === null) {
    report.say('This system does not say how much memory a process had.');
    return;
  }
  report.add(limit(`memory, runs of ${FEW} in two databases`, few, MOST_MB, megabytes));
  limitMemory(many, members, report);
  report.add(limit(`memory, ${members} / ${FEW}`, many / few, MOST_GROWTH, (value) => value.toFixed(2)));
  report.add(limit('memory, delivering a first sync', delivering, MOST_DELIVERING_MB, megabytes));
}

export function limitMemory(peakMb: number | null, members: number, report: Report): void {
  if (peakMb !== null) report.add(limit(`memory, runs of ${members} in two databases`, peakMb, MOST_MB, megabytes));
}

interface Shop {
  source: BenchDatabase;
  state: BenchDatabase;
  folder: string;
}

async function withShop<T>(server: BenchServer, members: number, work: (shop: Shop) => Promise<T>): Promise<T> {
  const source = await server.createDatabase('memory_shop');
  const state = await server.createDatabase('memory_state');
  const folder = await mkdtemp(join(tmpdir(), 'personas-bench-'));
  try {
    await fillShop(source.client, members);
    return await work({ source, state, folder });
  } finally {
    await rm(folder, { recursive: true, force: true });
    await state.drop();
    await source.drop();
  }
}

/** The runs of the one definition that have ended well. */
async function countRuns({ client }: BenchDatabase): Promise<number> {
  const there = await client.query<{ there: boolean }>(`select to_regclass('personas.run') is not null as there`);
  if (there.rows[0]?.there !== true) return 0;
  const { rows } = await client.query<{ runs: number; bad: number }>(
    `select count(*) filter (where outcome = 'succeeded')::int as runs,
       count(*) filter (where outcome <> 'succeeded')::int as bad from personas.run`,
  );
  if (rows[0]?.bad !== 0) throw new Error('A run has not succeeded.');
  return rows[0].runs;
}

/** The peak of a daemon that runs a definition of so many members twice, in two databases; null where nobody says. */
export async function peakOfRuns(server: BenchServer, members: number, report: Report): Promise<number | null> {
  return withShop(server, members, async ({ source, state, folder }) => {
    report.say(`A daemon over ${members} members in two databases`);
    const audience = { key: 'spenders', name: 'Spenders', sql: AUDIENCE, initial: 'skip', poll: '1 hour' };
    const daemon = startDaemon(folder, await writeConfig(folder, { source, state, audiences: [audience] }));
    try {
      await until(daemon, async () => ((await countRuns(state)) === 1 ? true : null));
      await moveMembers(source.client, 1);
      await state.client.query('update personas.definition set due_at = now()');
      await until(daemon, async () => ((await countRuns(state)) === 2 ? true : null));
      return await daemon.peakMb();
    } finally {
      await daemon.stop();
    }
  });
}

async function peakOfDelivery(server: BenchServer, report: Report): Promise<number | null> {
  const simulator = await startSimulator({ projectType: 'hybrid', quotas: 'off' });
  try {
    return await withShop(server, FEW, async ({ source, state, folder }) => {
      report.say('A daemon that delivers a first sync');
      const audience = { key: 'spenders', name: 'Spenders', sql: AUDIENCE };
      const config = { source, state, destination: simulator.url, audiences: [audience] };
      const daemon = startDaemon(folder, await writeConfig(folder, config));
      try {
        await until(daemon, async () => ((await countRuns(state)) > 0 ? true : null));
        await until(daemon, async () => {
          const { rows } = await state.client.query<{ waiting: number }>(
            'select count(*)::int as waiting from personas.outbox',
          );
          return (rows[0]?.waiting ?? 0) >= WAITING ? true : null;
        });
        await until(daemon, () => Promise.resolve(simulator.userCount >= DELIVERED ? true : null));
        return await daemon.peakMb();
      } finally {
        await daemon.stop();
      }
    });
  } finally {
    await simulator.close();
  }
}
