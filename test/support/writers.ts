import fc from 'fast-check';
import pg from 'pg';
import { isUnreachable } from '../../src/db/failure.js';
import { transaction, type Transaction } from './shoppers.js';

/**
 * Several who write to a database at once, for as long as a test lasts and whatever becomes of the server. One of them
 * holds each of its transactions open while the others have many.
 */
export interface Writers {
  /** Resolves when so many more transactions have been tried. */
  go: (count: number) => Promise<void>;
  /** Resolves when none is open and none will be begun until `go`. */
  rest: () => Promise<void>;
  /** How many were committed, and how many of those by the one who is late. */
  committed: () => { all: number; late: number };
  /** Throws what should not have happened. */
  stop: () => Promise<void>;
}

const WRITERS = 4;
/** The late one commits after so many of the others at most. */
const LATE_AFTER = 150;
/** Deadlocks, locks that weren't to be had, an address that somebody has: the transaction is rolled back. */
const REFUSED = new Set(['40P01', '55P03', '40001', '23505', '23503']);

/** The same ones for a seed, without an end. */
function* drawTransactions(seed: number): Generator<Transaction, never> {
  for (let drawn = 0; ; drawn += 1) yield* fc.sample(transaction, { numRuns: 2_000, seed: seed + drawn * 1_000 });
}

export function startWriters(pool: pg.Pool, seed: number): Writers {
  let tried = 0;
  let failure: Error | null = null;
  let isStopped = false;
  const committed = { all: 0, late: 0 };
  let resting: { promise: Promise<void>; end: () => void } | null = null;
  const open = new Set<Promise<void>>();
  const waiters: { at: number; resolve: () => void }[] = [];
  const count = (): void => {
    tried += 1;
    for (const waiter of waiters.filter(({ at }) => at <= tried)) {
      waiters.splice(waiters.indexOf(waiter), 1);
      waiter.resolve();
    }
  };
  const releaseAll = (): void => {
    for (const { resolve } of waiters.splice(0)) resolve();
  };
  const after = (more: number): Promise<void> =>
    new Promise((resolve) => {
      if (isStopped || failure !== null) resolve();
      else waiters.push({ at: tried + more, resolve });
    });

  const perform = async ({ steps, isRolledBack }: Transaction, hold: () => Promise<void>): Promise<boolean> => {
    const client = await pool.connect();
    let broken: Error | undefined;
    const onError = (error: Error): void => void (broken = error);
    client.on('error', onError);
    try {
      await client.query(`begin; set local lock_timeout = 300`);
      for (const { statements, isUndone } of steps) {
        await client.query('savepoint step');
        for (const statement of statements) await client.query(statement);
        if (isUndone) await client.query('rollback to savepoint step');
      }
      await hold();
      await client.query(isRolledBack ? 'rollback' : 'commit');
      return !isRolledBack;
    } catch (error) {
      broken = error instanceof Error ? error : new Error('unknown');
      throw error;
    } finally {
      client.off('error', onError);
      client.release(broken);
    }
  };

  const write = async (index: number): Promise<void> => {
    const isLate = index === WRITERS;
    const transactions = drawTransactions(seed * 10 + index);
    for (let next = 0; !isStopped && failure === null; next += 1) {
      await resting?.promise;
      // As many as a shop has, not as many as the server can take.
      await new Promise((resolve) => setTimeout(resolve, 10 + (next % 7) * 5));
      const hold = (): Promise<void> =>
        isLate && resting === null ? after(1 + ((next * 37) % LATE_AFTER)) : Promise.resolve();
      const performing = perform(transactions.next().value, hold)
        .then((isCommitted) => {
          if (isCommitted) committed[isLate ? 'late' : 'all'] += 1;
        })
        .catch((error: unknown) => {
          const isExpected =
            isUnreachable(error) || (error instanceof pg.DatabaseError && REFUSED.has(error.code ?? ''));
          if (!isExpected) failure ??= new Error('A transaction failed.', { cause: error });
        });
      open.add(performing);
      await performing;
      open.delete(performing);
      if (!isLate) count();
    }
    releaseAll();
  };
  const begin = (): void => {
    resting?.end();
    resting = null;
  };
  const restNow = (): void => {
    if (resting !== null) return;
    let end: () => void = () => undefined;
    const promise = new Promise<void>((resolve) => (end = resolve));
    resting = { promise, end };
  };
  restNow();
  const writing = Promise.all(Array.from({ length: WRITERS + 1 }, (_, index) => write(index)));

  const check = (): void => {
    if (failure !== null) throw failure;
  };
  return {
    go: async (more) => {
      begin();
      await after(more);
      check();
    },
    rest: async () => {
      restNow();
      // The late one too.
      while (open.size > 0) {
        releaseAll();
        await Promise.all(open);
      }
      check();
    },
    committed: () => ({ all: committed.all + committed.late, late: committed.late }),
    stop: async () => {
      isStopped = true;
      begin();
      releaseAll();
      await writing;
      check();
    },
  };
}
