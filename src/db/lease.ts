import { randomUUID } from 'node:crypto';
import { hostname } from 'node:os';
import { performance } from 'node:perf_hooks';
import { BULK_REQUEST_MS, SINGLE_REQUEST_MS } from '../core/timeouts.js';
import type { Pool, Queryable, Runner } from './connect.js';

/**
 * The leader's lease: one row with an expiry, kept by PostgreSQL's clock. Whoever holds it acts; the others stand by.
 *
 * What must hold: the holder counts the time since its last renewal began by the larger of the monotonic and the wall
 * clock (the first stands still while a machine sleeps, the second can be set back), so it stops believing in its lease
 * no later than the database does. `quiet_until` is written with each renewal: the latest moment at which a request
 * begun under this lease or an earlier one can still be open; a successor sends nothing before it. A release, which is for a holder that
 * has nothing open any more, gives back what it found there, or what is left of the second for which a quota is given;
 * a lease that was lost isn't released.
 */
export const LEASE_MS = 8_000;
const RENEW_MS = 2_000;
/** How long after the last request in bulk the shorter time counts again: that request has ended, and its recipients are free. */
const BULK_LASTS_MS = 65_000;

export interface Lease {
  holder: string;
  /** Milliseconds that are surely left; 0 once the lease is lost. */
  remainingMs: () => number;
  /** Resolves when the lease has been lost; never after a release. */
  lost: Promise<void>;
  /**
   * Whether requests in bulk may begin. They may be open for longer, which the database has to know before: the first
   * call asks for that and says false. Each call that says true is taken for a request that begins.
   */
  allowsBulk: () => boolean;
  /** Has the next holder send nothing for `quietMs`. Does nothing where the lease was lost. */
  release: (quietMs?: number) => Promise<void>;
}

/** A lease, and what its last holder may have left. */
export interface Taken extends Lease {
  /** How long requests of it can still be open. */
  quietForMs: number;
  /** How long ago a request in bulk of it took effect at the latest; below 0: one still may. */
  bulkAgoMs: number;
}

interface Clocks {
  monotonic: number;
  wall: number;
}

const readClocks = (): Clocks => ({ monotonic: performance.now(), wall: Date.now() });
const elapsedMs = (since: Clocks): number => Math.max(performance.now() - since.monotonic, Date.now() - since.wall);

/** Takes the lease if it is free or has run out; null where somebody else holds it. */
export async function tryLead(pool: Pool): Promise<Taken | null> {
  const holder = randomUUID();
  let renewed = readClocks();
  const taken = await pool.query<{ quiet_ms: number; quiet_before: string; bulk_ago_ms: number }>(
    `update leader as l
     set holder = $1, since = now(), host = $2, pid = $3,
         expires_at = clock_timestamp() + $4 * interval '1 millisecond',
         quiet_until = greatest(l.quiet_until, clock_timestamp() + ($4 + $5) * interval '1 millisecond')
     from (select quiet_until, bulk_until from leader for update) as before
     where l.expires_at < clock_timestamp()
     returning before.quiet_until::text as quiet_before,
       least(1e9, extract(epoch from clock_timestamp() - greatest(before.bulk_until, '2000-01-01')) * 1000 - $6)::int as bulk_ago_ms,
       greatest(0, extract(epoch from greatest(before.quiet_until, clock_timestamp()) - clock_timestamp()) * 1000)::int as quiet_ms`,
    [holder, hostname(), process.pid, LEASE_MS, SINGLE_REQUEST_MS, BULK_REQUEST_MS],
  );
  const row = taken.rows[0];
  if (row === undefined) return null;

  let held = true;
  let markLost: () => void = () => undefined;
  const lost = new Promise<void>((resolve) => {
    markLost = resolve;
  });
  const lose = (): void => {
    held = false;
    clearInterval(timer);
    markLost();
  };
  const remainingMs = (): number => (held ? Math.max(0, LEASE_MS - elapsedMs(renewed)) : 0);
  /** When the last request in bulk began or was asked for, and whether the database knows that there may be some. */
  let bulk = { at: -Infinity, isKnown: false };
  const sinceBulkMs = (): number => performance.now() - bulk.at;
  let renewing: Promise<void> | null = null;
  const renew = async (): Promise<void> => {
    const began = readClocks();
    const isBulk = sinceBulkMs() < BULK_LASTS_MS;
    // None begins while the shorter time is being written.
    if (!isBulk) bulk = { ...bulk, isKnown: false };
    try {
      const result = await pool.query(
        `update leader
         set expires_at = clock_timestamp() + $2 * interval '1 millisecond',
             quiet_until = greatest(quiet_until, clock_timestamp() + ($2 + $3) * interval '1 millisecond'),
             bulk_until = case when $4 then clock_timestamp() + $2 * interval '1 millisecond' else bulk_until end
         where holder = $1 and expires_at > clock_timestamp()`,
        [holder, LEASE_MS, isBulk ? BULK_REQUEST_MS : SINGLE_REQUEST_MS, isBulk],
      );
      if (result.rowCount === 0) lose();
      else if (held) [renewed, bulk] = [began, { ...bulk, isKnown: isBulk }];
    } catch {
      // The database is out of reach: the lease runs out by itself unless a later renewal gets through.
    }
    if (held && remainingMs() === 0) lose();
  };
  const renewNow = (): void => {
    renewing ??= renew().finally(() => {
      renewing = null;
    });
  };
  const timer = setInterval(() => {
    renewNow();
    if (held && remainingMs() === 0) lose();
  }, RENEW_MS);
  timer.unref();

  return {
    holder,
    quietForMs: row.quiet_ms,
    bulkAgoMs: row.bulk_ago_ms,
    remainingMs,
    lost,
    allowsBulk: () => {
      bulk = { ...bulk, at: performance.now() };
      if (!bulk.isKnown) renewNow();
      return bulk.isKnown;
    },
    release: async (quietMs = 0) => {
      clearInterval(timer);
      if (!held) return;
      await renewing;
      held = false;
      await pool.query(
        `update leader set holder = null, expires_at = '-infinity', 
           quiet_until = greatest($2::timestamptz, clock_timestamp() + $3 * interval '1 millisecond'),
           bulk_until = case when $4::float8 is null then bulk_until else clock_timestamp() - $4 * interval '1 millisecond' end
         where holder = $1`,
        [holder, row.quiet_before, quietMs, bulk.at === -Infinity ? null : sinceBulkMs()],
      );
    },
  };
}

/** Who leads now, or null. */
export async function findLeader(
  pool: Queryable,
): Promise<{ holder: string; host: string; pid: number; since: Date } | null> {
  const result = await pool.query<{ holder: string; host: string; pid: number; since: Date }>(
    'select holder, host, pid, since from leader where holder is not null and expires_at > clock_timestamp()',
  );
  return result.rows[0] ?? null;
}

const STANDS_STILL_MS = 3_000;

export class LeaseLostError extends Error {
  constructor() {
    super('This instance no longer leads.');
    this.name = 'LeaseLostError';
  }
}

/**
 * Begins what only the leader may write, in an open transaction whose bare names are those of the state. The leader's row
 * is locked until the transaction ends, and whoever would lead next waits for it: an instance that stands still here is
 * cut off by the server before long. Throws a LeaseLostError where `leader` leads no more.
 */
export async function fenceLease(client: Runner, leader: string): Promise<void> {
  const held = await client.query(
    `select set_config('idle_in_transaction_session_timeout', '${STANDS_STILL_MS}', true)
     from leader where holder = $1 and expires_at > clock_timestamp() for key share`,
    [leader],
  );
  if (held.rowCount === 0) throw new LeaseLostError();
}
