import { afterEach, expect, it } from 'vitest';
import { createSite, type Site } from './support/cli.js';
import { startProgram, type Program } from './support/program.js';
import { expectTruth } from './support/truth.js';

/**
 * A destination that is away while very much changes: the outbox grows, and the sender, a process of its own, doesn't.
 */
const PEOPLE = 70_000;
/** One in so many has changed when the outbox is small. */
const FEW = 20;
const TABLES = `
  create table people (id bigint primary key, user_id text, email text, vip boolean not null, spent int not null);
  insert into people select n, 'u' || n, 'p' || n || '@example.com', n % 2 = 0, n from generate_series(1, ${PEOPLE}) as n`;
const FREELY = { guard: 'off', poll: '1 hour', initial: 'skip' };
const SECTIONS = {
  audiences: [{ name: 'VIP', sql: 'SELECT id AS profile_id FROM people WHERE vip', send: 'both', ...FREELY }],
  traits: [{ name: 'Spent', sql: 'SELECT id AS profile_id, spent AS value FROM people', ...FREELY }],
};
const QUOTAS = { users_bulk_update: 100, events_track_bulk: 100 };
/** What more there may be of whatever else a process has: far less than 100 bytes for each of the calls that have been added. */
const MOST_MORE_BYTES = 5e6;
const PATIENTLY = { timeout: 90_000, interval: 100 };

/** Has a program say, whenever it gets SIGUSR2, how many bytes it holds once what it doesn't need is gone. */
const TELL_HEAP = `
  import { setFlagsFromString } from 'node:v8';
  import { runInNewContext } from 'node:vm';
  setFlagsFromString('--expose-gc');
  const collect = runInNewContext('gc');
  process.on('SIGUSR2', () => {
    collect();
    const { heapUsed, external } = process.memoryUsage();
    console.log('holds ' + (heapUsed + external) + ' bytes');
  });`;

let site: Site;
let program: Program;
afterEach(async () => {
  program.process.kill('SIGKILL');
  await program.ended;
  await site.close();
});

async function readHeld(): Promise<number> {
  const { stdout } = program.process;
  if (stdout === null) throw new Error('Its output is not read.');
  const told = new Promise<number>((resolve) => {
    let text = '';
    const read = (chunk: Buffer): void => {
      text += chunk.toString();
      const bytes = /holds (\d+) bytes/.exec(text)?.[1];
      if (bytes === undefined) return;
      stdout.off('data', read);
      resolve(Number(bytes));
    };
    stdout.on('data', read);
  });
  program.process.kill('SIGUSR2');
  return told;
}

const count = async (query: string): Promise<number> => Number((await site.sql(query))[0]?.['n']);
const waiting = (): Promise<number> => count('select count(*) as n from personas.outbox');
const runs = (): Promise<number> => count(`select count(*) as n from personas.run where outcome = 'succeeded'`);

/** Changes people, and has everything run and the destination tried until nobody is kept who was sent together; what is held then. */
async function change(condition: string): Promise<number> {
  const before = await runs();
  await site.sql(`update people set vip = not vip, spent = spent + 1 where ${condition}`);
  await site.sql('update personas.definition set due_at = now()');
  await expect.poll(runs, PATIENTLY).toBe(before + 2);
  const failed = (): number => site.simulator.stats.count(undefined, 503);
  const tried = failed();
  await expect.poll(failed, PATIENTLY).toBeGreaterThanOrEqual(tried + 7);
  return readHeld();
}

it('twenty times as much that waits for a destination takes no more memory, and all of it is delivered by itself', async () => {
  site = await createSite(TABLES, SECTIONS, { keepRequests: 0 });
  const { simulator } = site;
  const destination = { type: 'iterable', api_key: 'test-key', region: simulator.url, quotas: QUOTAS };
  await site.configure({ ...SECTIONS, destinations: { iterable: destination } });
  simulator.faults.failRandomly({ share: 1, seed: 1, status: 503 });
  program = startProgram(['--config', 'personas.yaml', 'start'], {
    cwd: site.folder,
    environment: {
      DATABASE_URL: site.database.url,
      NODE_OPTIONS: `--import=data:text/javascript,${encodeURIComponent(TELL_HEAP)}`,
    },
  });
  await program.said(/"Leading\./);
  await expect.poll(runs, PATIENTLY).toBe(2);

  const few = await change(`id % ${FEW} = 0`);
  const waited = await waiting();
  expect(waited).toBe((3 * PEOPLE) / FEW);
  const many = await change(`id % ${FEW} <> 0`);
  expect(await waiting()).toBe(FEW * waited);
  expect(many - few).toBeLessThan(MOST_MORE_BYTES);

  simulator.faults.clear();
  await expect.poll(waiting, PATIENTLY).toBe(0);
  expect(simulator.eventHistory).toHaveLength(PEOPLE);
  expect(simulator.violations).toEqual({ duplicateInBatch: 0, mixedPipelines: 0 });
  await expectTruth(site, { areFirstTold: false });
}, 240_000);
