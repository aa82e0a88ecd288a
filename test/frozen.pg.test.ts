import { afterEach, expect, it } from 'vitest';
import { createSite, type Site } from './support/cli.js';
import { mostWithin, startGate, type Gate, type Passage } from './support/gate.js';
import { startProgram, type Program } from './support/program.js';
import { expectTruth } from './support/truth.js';
import { endWaits } from './support/waits.js';

/** A leader that stands still for longer than anything lasts that it has begun: its lease, its requests, its quota. */
const PEOPLE = 150;
const TABLES = `
  create table people (id bigint primary key, user_id text, email text, vip boolean not null, spent int not null);
  insert into people select n, 'u' || n, 'p' || n || '@example.com', n % 2 = 0, n from generate_series(1, ${PEOPLE}) as n`;
const FREELY = { guard: 'off', poll: '1 hour' };
const SECTIONS = {
  audiences: [{ name: 'VIP', sql: 'SELECT id AS profile_id FROM people WHERE vip', send: 'both', ...FREELY }],
  traits: [{ name: 'Spent', sql: 'SELECT id AS profile_id, spent AS value FROM people', ...FREELY }],
};
const PER_SECOND = 30;
const QUOTAS = { users_update: PER_SECOND, events_track: PER_SECOND };
const UPDATE = '/api/users/update';
const TRACK = '/api/events/track';
const FROZEN_MS = 61_000;
/** What had been written to a socket before its process stood still arrives within this. */
const ON_THE_WAY_MS = 500;
/** What is sent evenly may come closer together by so much, where a machine is busy. */
const COMES_TOGETHER_S = 0.5;
/** Requests that begin within the few milliseconds that a write to a socket takes. */
const BEGUN_AT_MOST = 10;
const SOON = { timeout: 30_000, interval: 20 };
const LATER = { timeout: 70_000, interval: 100 };

let site: Site;
let gate: Gate;
const programs: Program[] = [];
afterEach(async () => {
  for (const program of programs.splice(0)) {
    program.process.kill('SIGKILL');
    await program.ended;
  }
  await gate.close();
  await site.close();
});

/** A daemon that is known by its key at the gate. */
function start(key: string): Program {
  const environment = { DATABASE_URL: site.database.url, ITERABLE_API_KEY: key };
  const program = startProgram(['--config', 'personas.yaml', 'start'], { cwd: site.folder, environment });
  programs.push(program);
  return program;
}

const now = (): number => performance.timeOrigin + performance.now();
const count = async (query: string): Promise<number> => Number((await site.sql(query))[0]?.['n']);
const waiting = (): Promise<number> => count('select count(*) as n from personas.outbox');
const leaderPid = async (): Promise<unknown> => (await site.sql('select pid from personas.leader'))[0]?.['pid'];
const changeAll = async (): Promise<void> => {
  await site.sql('update people set vip = not vip, spent = spent + 1000');
  await site.sql('update personas.definition set due_at = now()');
};
const sentBy = (key: string, from = -Infinity, to = Infinity): Passage[] =>
  gate.passages().filter(({ apiKey, at }) => apiKey === key && at > from && at < to);
const open = (): Passage[] => gate.passages().filter(({ end }) => end === undefined);
/** Whether a request is made up of what was known when everybody had changed once. */
const isOfFirstChange = ({ body, path }: Passage, until: number): boolean => {
  const { dataFields, createdAt } = JSON.parse(body) as { dataFields: { spent?: number }; createdAt?: number };
  return path === UPDATE ? Math.floor((dataFields.spent ?? 0) / 1000) === 1 : (createdAt ?? Infinity) * 1000 <= until;
};
const usersIn = (passages: readonly Passage[]): string[] => [
  ...new Set(passages.map(({ body }) => `u:${(JSON.parse(body) as { userId: string }).userId}`)),
];

it('a leader that was frozen for a minute finds another in its place, sends nothing more and spoils nothing', async () => {
  site = await createSite(TABLES, SECTIONS, { keepRequests: 100_000 });
  const { simulator } = site;
  gate = await startGate(simulator.url);
  const destination = { type: 'iterable', api_key: '${ITERABLE_API_KEY}', region: gate.url, quotas: QUOTAS };
  await site.configure({ ...SECTIONS, destinations: { iterable: destination } });
  const first = start('first');
  await first.said(/"Leading\./);
  const second = start('second');
  await second.said(/"Another instance leads; standing by/);
  await expect.poll(() => simulator.events().length, SOON).toBe(PEOPLE / 2);
  await expect.poll(waiting, SOON).toBe(0);

  simulator.setLatency(1_000);
  await changeAll();
  const areBothOpen = (): boolean => [UPDATE, TRACK].every((path) => open().some((each) => each.path === path));
  await expect.poll(areBothOpen, SOON).toBe(true);
  first.process.kill('SIGSTOP');
  const frozenAt = now();
  const underWay = usersIn(open().filter(({ path }) => path === UPDATE));
  expect(underWay.length).toBeGreaterThan(10);
  expect(await leaderPid()).toBe(first.process.pid);
  const quietMs = await count(
    'select (extract(epoch from quiet_until - clock_timestamp()) * 1000)::float8 as n from personas.leader',
  );
  const quietUntil = frozenAt + quietMs;
  simulator.setLatency(0);

  await second.said(/"Leading; sending begins/);
  expect(await leaderPid()).toBe(second.process.pid);
  await expect.poll(waiting, LATER).toBe(0);
  await changeAll();
  await expect.poll(() => now() - frozenAt, LATER).toBeGreaterThan(FROZEN_MS);
  await expect.poll(waiting, SOON).toBe(0);
  // Nothing was sent before all of the first had ended, and then all by the second.
  expect(gate.passages().filter(({ at }) => at > frozenAt + ON_THE_WAY_MS && at < quietUntil)).toEqual([]);
  expect(usersIn(sentBy('second', quietUntil))).toHaveLength(PEOPLE);

  // The first wakes while the second uses all of the quota.
  await changeAll();
  const changedAt = now();
  await expect.poll(() => sentBy('second', changedAt).length, SOON).toBeGreaterThan(PER_SECOND / 2);
  const wokenAt = now();
  first.process.kill('SIGCONT');
  await first.said(/"Another instance leads; standing by/);
  // What it had open may have been applied last: that is marked anew.
  const anew = async (): Promise<unknown[]> => {
    const marks = await site.sql(
      `select recipient from personas.outbox where kind = 'm' and attempts = 1 and due_at > now()`,
    );
    return marks.map(({ recipient }) => recipient);
  };
  await expect.poll(anew, SOON).toEqual(expect.arrayContaining(underWay));
  await expect.poll(() => open().length, SOON).toBe(0);
  const left = async (): Promise<number> => {
    await endWaits(site.sql);
    return waiting();
  };
  await expect.poll(left, SOON).toBe(0);

  expect(sentBy('first', frozenAt + ON_THE_WAY_MS, wokenAt)).toEqual([]);
  const sentAwake = sentBy('first', wokenAt);
  expect(sentAwake.length).toBeLessThan(BEGUN_AT_MOST);
  expect(sentAwake.filter((each) => !isOfFirstChange(each, frozenAt))).toEqual([]);
  for (const path of [UPDATE, TRACK]) {
    const times = gate.passages().flatMap((each) => (each.path === path && !sentAwake.includes(each) ? [each.at] : []));
    for (const seconds of [1, 5]) {
      expect(mostWithin(times, 1000 * (seconds - COMES_TOGETHER_S))).toBeLessThanOrEqual(seconds * PER_SECOND);
    }
  }
  expect(await leaderPid()).toBe(second.process.pid);
  expect(first.process.exitCode).toBeNull();
  await expectTruth(site);
}, 180_000);
