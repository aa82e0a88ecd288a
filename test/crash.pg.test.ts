import { spawn, type ChildProcess } from 'node:child_process';
import { fileURLToPath } from 'node:url';
import { afterEach, describe, expect, it } from 'vitest';
import type { SeenRequest } from '../src/demo/simulator/traffic.js';
import { createHarness, type Harness, type HarnessOptions } from './support/harness.js';
import { expectTruth } from './support/truth.js';

/** The daemon as a process of its own, which is killed at any moment. */
const PROGRAM = fileURLToPath(new URL('../dist/cli/main.js', import.meta.url));
const ROUNDS = Number(process.env['CRASH_ROUNDS'] ?? 50);
const TABLES = `
  create table people (id bigint primary key, user_id text, email text, vip boolean not null, spent numeric not null);
  insert into people select n, 'u' || n, 'p' || n || '@example.com', n % 2 = 0, n from generate_series(1, 200) as n`;
const FREELY = { send: 'both', guard: 'off', poll: '1 second' };
const DEFINITIONS = {
  audiences: [{ name: 'VIP', sql: 'SELECT id AS profile_id FROM people WHERE vip', ...FREELY }],
  traits: [{ name: 'Spent', sql: 'SELECT id AS profile_id, spent AS value FROM people', ...FREELY, send: 'identify' }],
};
/** More than go singly. */
const IN_BULK = 5_000;
const SOON = { timeout: 15_000, interval: 20 };

interface Program {
  process: ChildProcess;
  /** What it has written to stderr so far. */
  log: () => string;
  exit: Promise<{ code: number | null; signal: string | null }>;
}

let harness: Harness;
const programs: Program[] = [];
afterEach(async () => {
  for (const program of programs.splice(0)) {
    program.process.kill('SIGKILL');
    await program.exit;
  }
  await harness.close();
});

async function begin(options: Partial<HarnessOptions> = {}): Promise<void> {
  harness = await createHarness({
    tables: TABLES,
    ...DEFINITIONS,
    simulator: { keepRequests: 100_000, latencyMs: 20 },
    ...options,
  });
}

function run(...args: string[]): Program {
  const child = spawn(process.execPath, [PROGRAM, ...args, '--config', harness.configFile], {
    env: { PATH: process.env['PATH'] },
    stdio: ['ignore', 'ignore', 'pipe'],
  });
  let log = '';
  child.stderr.on('data', (chunk: Buffer) => (log += chunk.toString()));
  const exit = new Promise<{ code: number | null; signal: string | null }>((resolve) => {
    child.once('close', (code, signal) => resolve({ code, signal }));
  });
  const program = { process: child, log: () => log, exit };
  programs.push(program);
  return program;
}

const leads = async ({ process: { pid } }: Program): Promise<boolean> =>
  (await harness.state('select from leader where pid = $1 and expires_at > now()', [pid])).length > 0;
/**
 * What a test may do in place of waiting until the lease of one that was killed has run out, and until a definition whose
 * runs died three times in a row is due again, in an hour.
 */
const bury = (): Promise<unknown> =>
  harness.state(
    `update leader set holder = null, expires_at = '-infinity', quiet_until = '-infinity';
     update definition set due_at = now() where due_at > now() + interval '1 minute'`,
  );
const waiting = async (): Promise<number> =>
  Number((await harness.state('select count(*) as n from outbox'))[0]?.['n']);

/** Always the same numbers from 0 up to 1. */
function randomNumbers(seed: number): () => number {
  let state = seed;
  return () => {
    state = (state * 1_103_515_245 + 12_345) % 2 ** 31;
    return state / 2 ** 31;
  };
}

/** A daemon whose requests in bulk stay unanswered for longer than it may take to stop. */
async function beginSlowBulk(): Promise<Program> {
  await begin({
    tables: TABLES.replace('200', String(IN_BULK)),
    simulator: { keepRequests: 100_000, latencyMs: 20_000 },
  });
  const daemon = run('start');
  await expect.poll(() => harness.simulator.requests().length, SOON).toBeGreaterThan(0);
  return daemon;
}

/** Whoever leads next sends again what was unanswered. */
async function expectSentAgain(): Promise<void> {
  harness.simulator.setLatency(0);
  await bury();
  const sync = run('sync');
  expect(await sync.exit, sync.log()).toEqual({ code: 0, signal: null });
  await expectTruth(harness);
}

describe('a daemon', () => {
  it('that is killed at any moment, again and again, loses nothing and tells nothing twice', async () => {
    await begin();
    const random = randomNumbers(Number(process.env['CRASH_SEED'] ?? 1));
    for (let round = 0; round < ROUNDS; round += 1) {
      const daemon = run('start');
      await expect.poll(() => leads(daemon), SOON).toBe(true);
      // In the middle of delivering, or some time or other while runs go on.
      const moment = new Promise<void>((resolve) => {
        if (round % 2 === 1) setTimeout(resolve, random() * 1_500);
        else {
          let requests = Math.ceil(random() * 150);
          harness.simulator.faults.failRandomly({
            share: 0,
            seed: 1,
            match: () => (--requests === 0 && resolve(), false),
          });
        }
      });
      const killed = new AbortController();
      void moment.then(() => {
        daemon.process.kill('SIGKILL');
        killed.abort();
      });
      while (!killed.signal.aborted) {
        await harness.sql('update people set vip = not vip where id % 17 = $1', [Math.floor(random() * 17)]);
        await harness.sql('update people set spent = spent + 1 where id % 13 = $1', [Math.floor(random() * 13)]);
        await new Promise((resolve) => setTimeout(resolve, 100));
      }
      expect(await daemon.exit).toEqual({ code: null, signal: 'SIGKILL' });
      harness.simulator.faults.clear();
      await bury();
      // A moment whose runs have died three times waits for an hour: each round has a moment of its own.
      await harness.state('update definition set due_at = now()');
    }
    const sync = run('sync');
    expect(await sync.exit, sync.log()).toEqual({ code: 0, signal: null });
    await expectTruth(harness);
    expect(await harness.state('select count(*)::int4 as open from run where outcome is null')).toEqual([{ open: 0 }]);
  }, 400_000);

  it('that is told to stop finishes what is under way, gives the lease back and ends with 0', async () => {
    await begin({ simulator: { keepRequests: 100_000, latencyMs: 300 } });
    const daemon = run('start');
    await expect.poll(() => harness.simulator.requests().length, SOON).toBeGreaterThan(100);
    const began = performance.now();
    daemon.process.kill('SIGTERM');
    expect(await daemon.exit).toEqual({ code: 0, signal: null });
    expect(performance.now() - began).toBeLessThan(5_000);
    // Whoever leads next waits for no more than the second for which the quota is given.
    expect(
      await harness.state(
        `select holder, quiet_until < clock_timestamp() + interval '1.02 seconds' as soon from leader`,
      ),
    ).toEqual([{ holder: null, soon: true }]);
    expect(daemon.log()).not.toMatch(/"level":"(warn|error)"/);
    const answered = harness.simulator.requests().filter(({ outcome }) => outcome === 200);
    expect(answered).toHaveLength(harness.simulator.requests().length);
    expect(await waiting()).toBeGreaterThan(0);

    // What was sent was written down: the next one goes on behind it.
    harness.simulator.setLatency(0);
    const sync = run('sync');
    expect(await sync.exit, sync.log()).toEqual({ code: 0, signal: null });
    await expectTruth(harness);
    const marks = new Map<string, number>();
    for (const { body } of harness.simulator.requests() as readonly SeenRequest[])
      marks.set(body, (marks.get(body) ?? 0) + 1);
    expect([...marks].filter(([, times]) => times > 1)).toEqual([]);
  });

  it('that is told to stop ends after ten seconds even if a request in bulk is still open, and its calls are sent again', async () => {
    const daemon = await beginSlowBulk();
    daemon.process.kill('SIGTERM');
    expect(await daemon.exit).toEqual({ code: 0, signal: null });
    expect(daemon.log()).toContain(
      'Not everything under way has ended within 10 s; it is sent again at the next start.',
    );
    expect(await harness.state('select holder is not null as kept from leader')).toEqual([{ kept: true }]);
    await expectSentAgain();
  });

  it('that is told to stop twice ends at once', async () => {
    const daemon = await beginSlowBulk();
    daemon.process.kill('SIGTERM');
    await expect.poll(daemon.log, SOON).toContain('Stopping: what is under way is finished first.');
    daemon.process.kill('SIGTERM');
    const { code, signal } = await daemon.exit;
    expect({ code, signal }).toEqual({ code: 130, signal: null });
    expect(daemon.log()).not.toContain('Not everything under way');
    await expectSentAgain();
  });

  it('is asked by `sync`, and does it', async () => {
    await begin({ audiences: DEFINITIONS.audiences.map((audience) => ({ ...audience, poll: '1 hour' })), traits: [] });
    const daemon = run('start');
    await expect.poll(() => leads(daemon), SOON).toBe(true);
    await expect.poll(() => harness.simulator.events().length, SOON).toBe(100);
    await harness.sql('update people set vip = false where id <= 10');
    const sync = run('sync', 'vip');
    expect(await sync.exit, sync.log()).toEqual({ code: 0, signal: null });
    expect(harness.simulator.events().filter(({ name }) => name === 'Audience Exited')).toHaveLength(5);
    const [leader] = await harness.state('select holder, pid from leader');
    expect(leader?.['pid']).toBe(daemon.process.pid);
    expect(await harness.state('select distinct leader from run')).toEqual([{ leader: leader?.['holder'] }]);
    expect(await harness.state('select taken_by, outcome from request')).toEqual([
      { taken_by: leader?.['holder'], outcome: 'done' },
    ]);
  });
});
