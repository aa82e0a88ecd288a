import { afterEach, describe, expect, it } from 'vitest';
import type { Endpoint } from '../src/demo/simulator/endpoints.js';
import type { SeenRequest } from '../src/demo/simulator/traffic.js';
import { createSite, type Site } from './support/cli.js';
import type { Program } from './support/program.js';
import { expectTruth } from './support/truth.js';

/**
 * Two daemons as processes of their own over one database: who sends when the first is stopped, killed or frozen. The
 * time of a lease is waited for as it is, and requests in bulk may be open for longer.
 */
interface Pipeline {
  people: number;
  update: Endpoint;
  track: Endpoint;
  /** So many requests are open when the first is stopped. */
  open: number;
}
const SINGLE: Pipeline = { people: 400, update: 'users/update', track: 'events/track', open: 100 };
const BULK: Pipeline = { people: 6_000, update: 'users/bulkUpdate', track: 'events/trackBulk', open: 4 };
const tablesFor = ({ people }: Pipeline): string => `
  create table people (id bigint primary key, user_id text, email text, vip boolean not null, spent numeric not null);
  insert into people select n, 'u' || n, 'p' || n || '@example.com', n % 2 = 0, n from generate_series(1, ${people}) as n`;
const FREELY = { guard: 'off', poll: '1 second' };
const DEFINITIONS = {
  audiences: [{ name: 'VIP', sql: 'SELECT id AS profile_id FROM people WHERE vip', send: 'both', ...FREELY }],
  traits: [{ name: 'Spent', sql: 'SELECT id AS profile_id, spent AS value FROM people', ...FREELY }],
};
const SOON = { timeout: 20_000, interval: 20 };
/** What is left of a lease, and a request that may be open. */
const AFTER_QUIET = { timeout: 70_000, interval: 100 };
/** What had been written to a socket before its process stood still arrives within this. */
const ON_THE_WAY_MS = 500;
/** Far fewer than had been gathered for sending, far more than begin within the few milliseconds that a write takes. */
const BEGUN_AT_MOST = 50;

let site: Site;
const programs: Program[] = [];
afterEach(async () => {
  for (const program of programs.splice(0)) {
    program.process.kill('SIGKILL');
    await program.ended;
  }
  await site.close();
});

function start(): Program {
  const program = site.start('start');
  programs.push(program);
  return program;
}

/** One daemon that leads and has sent everybody once, and one that stands by. */
async function startTwo(pipeline: Pipeline): Promise<{ first: Program; second: Program }> {
  site = await createSite(tablesFor(pipeline), DEFINITIONS, { keepRequests: 100_000 });
  const first = start();
  await first.said(/"Leading\./);
  const second = start();
  await second.said(/"Another instance leads; standing by/);
  await expect.poll(() => site.simulator.userCount, SOON).toBe(pipeline.people);
  await expect.poll(() => site.simulator.events().length, SOON).toBe(pipeline.people / 2);
  await expect.poll(waiting, SOON).toBe(0);
  expect(await leaderPid()).toBe(first.process.pid);
  return { first, second };
}

const changeAll = async (): Promise<void> => {
  await site.sql('update people set vip = not vip, spent = spent + 1');
  await site.sql('update personas.definition set due_at = now()');
};

/** Changes everybody, and waits until both definitions have raised calls and the leader has many requests open. */
async function beginDelivering({ open }: Pipeline): Promise<void> {
  site.simulator.setLatency(1_500);
  await changeAll();
  const raised = async (): Promise<unknown> =>
    (await site.sql('select count(distinct (kind, definition_id))::int4 as n from personas.outbox'))[0]?.['n'];
  await expect.poll(raised, SOON).toBe(3);
  await expect.poll(() => openRequests().length, SOON).toBeGreaterThan(open);
}

/** Those that have arrived and have not been answered yet. */
const openRequests = (): SeenRequest[] => site.simulator.requests().filter(({ outcome }) => outcome === undefined);
const arrivedIn = (from: number, to: number): SeenRequest[] =>
  site.simulator.requests().filter(({ at }) => at > from && at < to);
/** Whom requests tell of, once for each call. */
const usersIn = (requests: readonly SeenRequest[]): string[] =>
  requests.flatMap(({ body }) => {
    const sent = JSON.parse(body) as { users?: { userId: string }[]; events?: { userId: string }[]; userId: string };
    return (sent.users ?? sent.events ?? [sent]).map(({ userId }) => userId);
  });
const waiting = async (): Promise<number> =>
  Number((await site.sql('select count(*) as n from personas.outbox'))[0]?.['n']);
const leaderPid = async (): Promise<unknown> => (await site.sql('select pid from personas.leader'))[0]?.['pid'];

/** The clock by which requests arrive. */
const now = (): number => performance.timeOrigin + performance.now();

/** By that clock, the moment until which a request of whoever holds the lease can be open. */
async function readQuietUntil(): Promise<number> {
  const at = now();
  const [row] = await site.sql(
    'select (extract(epoch from quiet_until - clock_timestamp()) * 1000)::float8 as ms from personas.leader',
  );
  return at + Number(row?.['ms']);
}

async function expectTrue({ update, track }: Pipeline): Promise<void> {
  await expectTruth(site);
  const requests = site.simulator.requests();
  expect(new Set(requests.map(({ endpoint }) => endpoint))).toContain(update);
  expect(new Set(requests.map(({ endpoint }) => endpoint))).toContain(track);
  const { duplicateInBatch, mixedPipelines } = site.simulator.violations;
  expect(duplicateInBatch).toBe(0);
  // A new leader knows when something was last sent in bulk, and not who was sent singly.
  if (update === SINGLE.update) expect(mixedPipelines).toBe(0);
}

const PIPELINES: readonly [name: string, pipeline: Pipeline][] = [
  ['singly', SINGLE],
  ['in bulk', BULK],
];

describe('a daemon that stands by', () => {
  it('sends nothing while another leads, and within two seconds of its stop leads and sends', async () => {
    const { first, second } = await startTwo(SINGLE);
    const before = site.simulator.requests().length;
    await site.sql('update people set spent = spent + 1 where id <= 50');
    await expect.poll(() => site.simulator.user('u50')?.fields['spent'], SOON).toBe('51.0');
    await expect.poll(waiting, SOON).toBe(0);
    expect(site.simulator.requests()).toHaveLength(before + 50);
    expect(await leaderPid()).toBe(first.process.pid);
    expect(await site.sql('select count(distinct leader)::int4 as n from personas.run')).toEqual([{ n: 1 }]);

    first.process.kill('SIGTERM');
    expect((await first.ended).code).toBe(0);
    const endedAt = now();
    await changeAll();
    const sent = (): SeenRequest[] => arrivedIn(endedAt, Infinity);
    await expect.poll(() => sent().length, SOON).toBeGreaterThan(0);
    expect((sent()[0]?.at ?? Infinity) - endedAt).toBeLessThan(2_000);
    expect(await leaderPid()).toBe(second.process.pid);
    await expect
      .poll(() => sent().filter(({ endpoint }) => endpoint === SINGLE.track).length, SOON)
      .toBe(SINGLE.people);
    await expect.poll(waiting, SOON).toBe(0);
    await expectTrue(SINGLE);
  }, 120_000);

  it.each(PIPELINES)(
    'leads within ten seconds of the death of one that sent %s, and sends when no request of that one can be open',
    async (_, pipeline) => {
      const { first, second } = await startTwo(pipeline);
      await beginDelivering(pipeline);
      first.process.kill('SIGKILL');
      const killedAt = now();
      expect((await first.ended).code).toBeNull();
      expect(await leaderPid()).toBe(first.process.pid);
      const quietUntil = await readQuietUntil();
      const stillFrom = now() + ON_THE_WAY_MS;
      site.simulator.setLatency(0);
      await second.said(/"Leading; sending begins/);
      expect(now() - killedAt).toBeLessThan(10_000);
      expect(await leaderPid()).toBe(second.process.pid);

      await expect.poll(waiting, AFTER_QUIET).toBe(0);
      expect(arrivedIn(stillFrom, quietUntil)).toEqual([]);
      expect(usersIn(arrivedIn(quietUntil, Infinity)).length).toBeGreaterThanOrEqual(pipeline.people);
      await expectTrue(pipeline);
    },
    150_000,
  );

  it.each(PIPELINES)(
    'takes over from one that froze while it sent %s; that one, when it wakes, settles nothing any more and stands by',
    async (_, pipeline) => {
      const { first, second } = await startTwo(pipeline);
      await beginDelivering(pipeline);
      first.process.kill('SIGSTOP');
      const open = openRequests().filter(({ endpoint }) => endpoint === pipeline.update);
      const users = usersIn(open);
      const quietUntil = await readQuietUntil();
      const stillFrom = now() + ON_THE_WAY_MS;
      expect(await leaderPid()).toBe(first.process.pid);
      site.simulator.setLatency(0);

      // Some of what it has open is kept until it wakes: the rest is sent by the other, some of it with newer values.
      const kept = await site.sql(
        `update personas.outbox set due_at = now() + interval '1 hour' where recipient = any(
           select recipient from personas.outbox where kind = 'e' and substr(recipient, 3) = any($1) order by id limit 10)
         returning id, kind, substr(recipient, 3) as user_id`,
        [users],
      );
      expect(kept.filter(({ kind }) => kind === 'e')).toHaveLength(10);
      const readKept = (): Promise<Record<string, unknown>[]> =>
        site.sql(
          `select id, kind, case kind when 'e' then version end as version from personas.outbox where id = any($1) order by id`,
          [kept.map(({ id }) => id)],
        );
      const asSent = await readKept();
      await second.said(/"Leading; sending begins/);
      expect(await leaderPid()).toBe(second.process.pid);
      await site.sql('update people set spent = spent + 1 where id % 3 = 0 and user_id <> all ($1)', [
        kept.map(({ user_id }) => user_id),
      ]);
      await expect.poll(waiting, AFTER_QUIET).toBe(kept.length);
      expect(arrivedIn(stillFrom, quietUntil)).toEqual([]);
      expect(usersIn(arrivedIn(quietUntil, Infinity)).length).toBeGreaterThan(users.length);

      const wokenAt = now();
      first.process.kill('SIGCONT');
      await first.said(/"Another instance leads; standing by/);
      // What had begun when it was frozen, and waited for its socket, still goes out; it is overwritten below.
      expect(arrivedIn(wokenAt, Infinity).length).toBeLessThan(BEGUN_AT_MOST);
      expect(await leaderPid()).toBe(second.process.pid);
      expect(await readKept()).toEqual(asSent);
      // What it had open may have been applied last: so all of that is sent once more.
      const [anew] = await site.sql(
        `select count(distinct recipient)::int4 as n from personas.outbox where kind = 'm' and attempts = 1
           and due_at > now() and due_at <= now() + interval '60 seconds' and substr(recipient, 3) = any($1)`,
        [users],
      );
      expect(anew?.['n']).toBe(new Set(users).size);

      await site.sql('update personas.outbox set due_at = now()');
      await expect.poll(waiting, SOON).toBe(0);
      await expectTrue(pipeline);
      expect(await leaderPid()).toBe(second.process.pid);
      expect(first.process.exitCode).toBeNull();
    },
    150_000,
  );
});
