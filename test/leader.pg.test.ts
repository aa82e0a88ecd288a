import { afterEach, describe, expect, it } from 'vitest';
import type { Opened } from '../src/cli/open.js';
import { runDaemon, type Leadership } from '../src/daemon.js';
import { LEASE_MS, findLeader, tryLead } from '../src/db/lease.js';
import { lockRegistry } from '../src/db/locks.js';
import { runDefinition } from '../src/sync/run.js';
import { abandonRuns } from '../src/sync/scheduler.js';
import { createDatabase } from './support/database.js';
import { holdDefinition } from './support/lock.js';
import { createHarness, type Harness, type HarnessOptions } from './support/harness.js';
import { until } from './support/until.js';

/** Who acts: one instance at a time, and what happens to what was under way when that changes. */
const TABLES = `
  create table people (id bigint primary key, user_id text, email text, vip boolean not null default true, big boolean not null default true);
  insert into people (id, user_id) select n, 'u' || n from generate_series(1, 6) as n`;
const VIP = { name: 'VIP', sql: 'SELECT id AS profile_id FROM people WHERE vip', poll: '1 second', send: 'both' };
const BIG = { name: 'Big', sql: 'SELECT id AS profile_id FROM people WHERE big', poll: '1 second', send: 'both' };
const SOON = { timeout: 8_000, interval: 20 };
const STRANGER = '00000000-0000-0000-0000-000000000001';

let harness: Harness;
const closers: (() => Promise<unknown>)[] = [];
afterEach(async () => {
  for (const close of closers.splice(0).reverse()) await close();
  await harness.close();
});

async function begin(options: Partial<HarnessOptions> = {}): Promise<void> {
  harness = await createHarness({
    tables: TABLES,
    audiences: [VIP, BIG],
    simulator: { keepRequests: 10_000 },
    ...options,
  });
}

const pool = (): Opened['databases']['state']['pool'] => harness.opened.databases.state.pool;

interface Daemon {
  stop: () => Promise<void>;
  /** What it leads by; null while it stands by, as far as it has come to lead once. */
  leadership: () => Leadership | null;
}

/** One more instance, with connections of its own. */
async function startDaemon(): Promise<Daemon> {
  const opened = await harness.openAnother();
  const stopping = new AbortController();
  let leadership: Leadership | null = null;
  const running = runDaemon(opened, stopping.signal, (next) => {
    leadership = next;
    void next.lost.then(() => (leadership = null));
  });
  const stop = async (): Promise<void> => {
    stopping.abort();
    await running;
  };
  closers.push(async () => {
    await stop();
    await opened.close();
  });
  return { stop, leadership: () => leadership };
}

async function startLeading(): Promise<Daemon> {
  const daemon = await startDaemon();
  await expect.poll(daemon.leadership, SOON).not.toBeNull();
  return daemon;
}

const waiting = async (): Promise<number> =>
  Number((await harness.state('select count(*) as n from outbox'))[0]?.['n']);
/** What a test may do in place of waiting until a leader that is gone has lost its lease. */
const bury = (): Promise<unknown> =>
  harness.state(`update leader set holder = null, expires_at = '-infinity', quiet_until = '-infinity'`);

describe('the lease', () => {
  it('is held by one at a time, and passes on at once when it is given back', async () => {
    await begin();
    const lease = await tryLead(pool());
    expect(lease).toMatchObject({ quietForMs: 0 });
    expect(lease?.remainingMs()).toBeGreaterThan(LEASE_MS - 1_000);
    expect(await tryLead(pool())).toBeNull();
    expect(await findLeader(pool())).toMatchObject({ holder: lease?.holder, pid: process.pid });
    await lease?.release();
    expect(lease?.remainingMs()).toBe(0);
    expect(await findLeader(pool())).toBeNull();
    const next = await tryLead(pool());
    expect(next).toMatchObject({ quietForMs: 0 });
    await next?.release();
  });

  it('of one that died is free when it has run out; its requests may be open for a while longer', async () => {
    await begin();
    await harness.state(
      `update leader set holder = $1, expires_at = now() - interval '1 ms', quiet_until = now() + interval '9 seconds'`,
      [STRANGER],
    );
    const lease = await tryLead(pool());
    expect(lease?.quietForMs).toBeGreaterThan(8_000);
    expect(lease?.quietForMs).toBeLessThanOrEqual(9_000);
    await lease?.release();
    // Whoever leads next still has to wait for the one that died.
    const next = await tryLead(pool());
    expect(next?.quietForMs).toBeGreaterThan(7_000);
    await next?.release();
  });

  it('tells how long ago what was sent in bulk under an earlier one may have taken effect', async () => {
    await begin();
    const lease = await tryLead(pool());
    expect(lease?.bulkAgoMs).toBeGreaterThan(60_000);
    await until(() => Promise.resolve(lease?.allowsBulk() === true));
    await lease?.release();
    // A request may take effect long after it was begun.
    const next = await tryLead(pool());
    expect(next?.bulkAgoMs).toBeLessThanOrEqual(0);
    await next?.release();
    await harness.state(`update leader set bulk_until = clock_timestamp() - interval '50 seconds'`);
    const last = await tryLead(pool());
    expect(last?.bulkAgoMs).toBeGreaterThanOrEqual(20_000);
    expect(last?.bulkAgoMs).toBeLessThan(50_000);
    await last?.release();
  });

  it('that is renewed shortens no time for which requests of an earlier leader can be open', async () => {
    await begin();
    await harness.state(
      `update leader set holder = $1, expires_at = now() - interval '1 ms', quiet_until = now() + interval '36 seconds'`,
      [STRANGER],
    );
    const lease = await tryLead(pool());
    const expiry = async (): Promise<unknown> =>
      (await harness.state('select expires_at::text as at from leader'))[0]?.['at'];
    const taken = await expiry();
    await expect.poll(expiry, SOON).not.toBe(taken);
    expect(
      await harness.state(`select quiet_until > clock_timestamp() + interval '28 seconds' as kept from leader`),
    ).toEqual([{ kept: true }]);
    await lease?.release();
  });

  it('is lost when another has taken it, and isn’t given back any more', async () => {
    await begin();
    const lease = await tryLead(pool());
    await harness.state('update leader set holder = $1', [STRANGER]);
    await lease?.lost;
    expect(lease?.remainingMs()).toBe(0);
    await lease?.release();
    expect(await findLeader(pool())).toMatchObject({ holder: STRANGER });
  });

  it('that has run out in the database is not renewed, though nobody has taken it', async () => {
    await begin();
    const lease = await tryLead(pool());
    await harness.state(`update leader set expires_at = now() - interval '1 ms'`);
    await lease?.lost;
    expect(await findLeader(pool())).toBeNull();
    // Requests that were begun under it may still be open.
    await lease?.release();
    expect((await tryLead(pool()))?.quietForMs).toBeGreaterThan(10_000);
  });
});

describe('a leader', () => {
  it('sends nothing within the second for which its predecessor has used the quota', async () => {
    await begin();
    await harness.sync();
    await harness.sql('update people set vip = false');
    const arrivals = (): number[] => [
      ...harness.simulator.stats.arrivals('users/update'),
      ...harness.simulator.stats.arrivals('events/track'),
    ];
    const before = arrivals();
    await harness.sync();
    const after = arrivals().filter((at) => !before.includes(at));
    expect(after.length).toBeGreaterThanOrEqual(12);
    expect(Math.min(...after) - Math.max(...before)).toBeGreaterThanOrEqual(1_000);
  });

  it('that was frozen in the middle of a run writes nothing of it once another has led', async () => {
    await begin({ audiences: [{ ...VIP, poll: '1 hour' }] });
    await harness.sync();
    await harness.sql('update people set vip = false where id = 1');
    const { databases, config } = harness.opened;
    const [definition] = config.definitions;
    if (definition === undefined) throw new Error('There is no definition.');
    // Holds the run before it applies what it has computed.
    const gate = await holdDefinition(databases.state.pool);
    const request = { trigger: 'sync', approves: null, nextDueMs: () => null } as const;
    const running = runDefinition({ databases, config, leader: STRANGER }, definition, request);
    await expect
      .poll(
        async () => (await harness.state(`select from pg_locks where locktype = 'advisory' and not granted`)).length,
        SOON,
      )
      .toBe(1);

    await abandonRuns({ databases, config, leader: '00000000-0000-0000-0000-000000000002' });
    await gate.release();
    expect(await running).toMatchObject({ outcome: 'abandoned' });
    expect(await harness.state('select count(*) as n from snapshot')).toEqual([{ n: 6 }]);
    expect(await harness.state('select from outbox')).toEqual([]);
    expect(await harness.state('select outcome from run order by id')).toEqual([
      { outcome: 'succeeded' },
      { outcome: 'abandoned' },
    ]);
  });

  it('that finds its lease lost settles nothing more, and marks anew what it had under way', async () => {
    await begin();
    const daemon = await startLeading();
    await expect.poll(() => harness.simulator.events().length, SOON).toBe(12);
    await expect.poll(waiting, SOON).toBe(0);

    harness.simulator.setLatency(600);
    const before = harness.simulator.requests().length;
    await harness.sql('update people set vip = false, big = false');
    await expect.poll(() => harness.simulator.requests().length, SOON).toBeGreaterThanOrEqual(before + 6);
    await harness.state(`update leader set holder = $1, expires_at = now() + interval '1 hour'`, [STRANGER]);
    const rows = async (): Promise<Record<string, unknown>[]> =>
      harness.state(
        `select recipient, kind, definition_id, version, due_at > now() + interval '50 seconds' as later from outbox order by id`,
      );
    const late = async (): Promise<number> => (await rows()).filter(({ kind, later }) => kind === 'm' && later).length;
    await expect.poll(late, SOON).toBeGreaterThanOrEqual(6);
    await expect.poll(daemon.leadership, SOON).toBeNull();

    // All that was under way has been answered, and marked anew.
    const sent = harness.simulator.requests().length;
    let kept: Record<string, unknown>[] = [];
    const isStill = async (): Promise<boolean> => {
      const before = JSON.stringify(kept);
      kept = await rows();
      return harness.simulator.stats.count() === sent && JSON.stringify(kept) === before;
    };
    await expect.poll(isStill, { timeout: 8_000, interval: 300 }).toBe(true);
    await harness.sql('update people set vip = true');
    expect(await tryLead(pool())).toBeNull();
    expect(await rows()).toEqual(kept);
    expect(harness.simulator.requests()).toHaveLength(sent);
    expect(kept.filter(({ kind }) => kind === 'e').length).toBeGreaterThanOrEqual(6);

    harness.simulator.setLatency(0);
    await bury();
    await expect.poll(daemon.leadership, SOON).not.toBeNull();
    await harness.state('update outbox set due_at = now()');
    await expect.poll(waiting, SOON).toBe(0);
    await expect.poll(() => harness.simulator.user('u1')?.fields, SOON).toEqual({ vip: 'true', big: 'false' });
  });

  /** Has another lead while whoever `begins` applies the configuration; then nobody. Returns who led before. */
  async function loseWhileApplying<T>(begins: () => T): Promise<{ begun: T; first: string | undefined }> {
    const gate = await pool().connect();
    await gate.query('begin');
    await lockRegistry(gate);
    const begun = begins();
    const isApplying = `select from pg_locks where locktype = 'advisory' and not granted`;
    await expect.poll(async () => (await harness.state(isApplying)).length, SOON).toBeGreaterThan(0);
    const first = await findLeader(pool());
    await harness.state(
      `update leader set holder = $1, expires_at = now() + interval '1 hour' from (select from leader for update) as before`,
      [STRANGER],
    );
    await gate.query('commit');
    gate.release();
    const isCarriedOut = 'select from request where outcome is null and taken_by is not null';
    await expect.poll(async () => (await harness.state(isCarriedOut)).length, SOON).toBe(0);
    await bury();
    return { begun, first: first?.holder };
  }

  it('that loses its lease before it has begun to lead stands by, and leads when it can', async () => {
    await begin();
    const { begun, first } = await loseWhileApplying(startDaemon);
    const daemon = await begun;
    await expect.poll(daemon.leadership, SOON).not.toBeNull();
    expect(daemon.leadership()?.leader).not.toBe(first);
  });

  it.each([true, false])(
    'that loses its lease while it applies a configuration leaves the command to the next (a daemon: %s)',
    async (isDaemon) => {
      await begin();
      if (isDaemon) await startLeading();
      const { begun } = await loseWhileApplying(() => harness.request('sync', { keys: [], confirmRemovals: false }));
      expect(await begun).toMatchObject({ outcome: 'done', delivery: { ahead: 0, waiting: 0 } });
    },
  );

  it('outlives a database that is away for longer than its lease', async () => {
    await begin();
    const daemon = await startLeading();
    const { leader } = daemon.leadership() ?? {};
    await expect.poll(() => harness.simulator.events().length, SOON).toBe(12);
    const name = new URL(harness.database.url).pathname.slice(1);
    const other = await createDatabase();
    closers.push(other.drop);
    await other.pool.query(`alter database ${name} allow_connections false`);
    await other.pool.query('select pg_terminate_backend(pid) from pg_stat_activity where datname = $1', [name]);
    await expect.poll(daemon.leadership, { timeout: 15_000 }).toBeNull();
    await other.pool.query(`alter database ${name} allow_connections true`);
    await bury();
    await expect.poll(daemon.leadership, SOON).not.toBeNull();
    expect(daemon.leadership()?.leader).not.toBe(leader);
    await harness.sql('update people set vip = false where id = 1');
    await expect.poll(() => harness.simulator.user('u1')?.fields['vip'], SOON).toBe('false');
  });

  it('goes on where it was when its connections are cut, in the middle of whatever', async () => {
    const sql = `${VIP.sql} and (select pg_sleep(0.3)) is not null`;
    await begin({ audiences: [{ name: 'VIP', sql, send: 'both', schedule: 'manual' }] });
    await startLeading();
    await harness.sync();
    const terminate = async (condition: string): Promise<number> => {
      const [row] = await harness.sql(
        `select count(*)::int4 as n from (select pg_terminate_backend(pid) from pg_stat_activity
         where datname = current_database() and pid <> pg_backend_pid() and state = 'active' and ${condition}) as t`,
      );
      return Number(row?.['n']);
    };

    // A run, in its transaction.
    await harness.sql('update people set vip = false where id = 1');
    const failing = harness.sync();
    await expect.poll(() => terminate(`wait_event = 'PgSleep'`), SOON).toBe(1);
    expect((await failing).progress.runs).toMatchObject([{ outcome: 'failed', unavailable: true }]);
    expect(await waiting()).toBe(0);
    await harness.sync();
    expect(harness.simulator.user('u1')?.fields['vip']).toBe('false');

    // A settlement, which waits for a table that somebody else has locked.
    await harness.state(`update destination set state = 'paused'`);
    await harness.sql('update people set vip = false where id = 2');
    await harness.sync();
    const locker = await harness.database.pool.connect();
    await locker.query('begin; lock table personas.dead_call in access exclusive mode');
    await harness.state(`update destination set state = 'active'`);
    await expect
      .poll(() => terminate(`wait_event_type = 'Lock' and query like '%delete from outbox where id = any%'`), SOON)
      .toBe(1);
    await locker.query('rollback');
    locker.release();
    await expect.poll(waiting, SOON).toBe(0);
    expect(harness.simulator.events('u2').map(({ name }) => name)).toEqual(['Audience Entered', 'Audience Exited']);
    // It stayed under way until that was written down, and so wasn't sent again.
    expect(harness.simulator.requests().filter(({ body }) => body.includes('"u2"'))).toHaveLength(4);
  });
});

describe('two daemons', () => {
  it('have one leader between them, who carries out what commands ask for; no two requests for a person are open at once', async () => {
    await begin();
    harness.simulator.setLatency(40);
    const daemons = await Promise.all([startDaemon(), startDaemon()]);
    const leaders = (): Daemon[] => daemons.filter((daemon) => daemon.leadership() !== null);
    await expect.poll(() => leaders().length, SOON).toBe(1);
    const [first] = leaders();
    const leader = first?.leadership()?.leader;
    expect(await findLeader(pool())).toMatchObject({ holder: leader });
    await expect.poll(() => harness.simulator.events().length, SOON).toBe(12);

    await harness.sql('update people set vip = false');
    expect(await harness.sync('vip')).toMatchObject({ outcome: 'done', delivery: { waiting: 0, refused: 0 } });
    expect(await harness.state('select distinct leader from run')).toEqual([{ leader }]);
    expect(await harness.state('select taken_by from request')).toEqual([{ taken_by: leader }]);

    // The one that leads is stopped in the middle of delivering; the other takes over.
    await harness.sql('update people set vip = true, big = false');
    await expect.poll(waiting, SOON).toBeGreaterThan(0);
    await first?.stop();
    await expect.poll(() => leaders().length, SOON).toBe(2);
    expect((await findLeader(pool()))?.holder).not.toBe(leader);
    await expect.poll(() => harness.simulator.user('u6')?.fields, SOON).toEqual({ vip: 'true', big: 'false' });
    await expect.poll(waiting, SOON).toBe(0);

    for (let id = 1; id <= 6; id += 1) {
      const requests = harness.simulator.requests().filter(({ body }) => body.includes(`"u${id}"`));
      const gaps = requests.slice(1).map(({ at }, index) => at - (requests[index]?.at ?? 0));
      expect(Math.min(...gaps)).toBeGreaterThanOrEqual(39);
    }
    expect(harness.simulator.events().every(({ applications }) => applications === 1)).toBe(true);
  });
});
