import { databaseFailure, isUnreachable } from '../db/failure.js';
import type { Settlement } from '../outbox/settle.js';

/**
 * Writes down what became of calls, those of a few milliseconds in one transaction, one transaction after the other.
 *
 * A call that was sent stays under way until that is written: else it could be sent again while the first request may
 * still be applied. So a write that fails for what time may mend is repeated, until it gets through or there is no more
 * point in it (the lease is lost, this instance stops).
 */
export interface Writer {
  /** `receipt` hears when it is committed, or given up. */
  write: (settlement: Settlement, receipt: Receipt) => void;
}

/** Settlements that are waited for together: a promise for each would be a good part of what a recipient takes. */
export interface Receipt {
  /** How many have yet to be written. */
  left: number;
  /** Why the first of them was given up. */
  failure: { error: unknown } | null;
  waiter: { resolve: () => void; reject: (error: unknown) => void } | null;
}

export const openReceipt = (): Receipt => ({ left: 0, failure: null, waiter: null });

/** Resolves when nothing is left to be written; rejects then, if something was given up. */
export const allWritten = (receipt: Receipt): Promise<void> =>
  new Promise((resolve, reject) => {
    receipt.waiter = { resolve, reject };
    tell(receipt);
  });

function tell({ left, failure, waiter }: Receipt): void {
  if (left > 0 || waiter === null) return;
  if (failure === null) waiter.resolve();
  else waiter.reject(failure.error);
}

function end({ receipt }: Entry, failure: Receipt['failure']): void {
  receipt.left -= 1;
  receipt.failure ??= failure;
  tell(receipt);
}

export interface WriterOptions {
  /** All or nothing, but for those that it returns: they can't be written yet. May be repeated. */
  commit: (settlements: readonly Settlement[]) => Promise<ReadonlySet<Settlement>>;
  /** Whether what has failed so often is given up rather than repeated. */
  givesUp: (error: unknown, failures: number) => boolean;
  onFailure: (error: unknown) => void;
}

const GATHER_MS = 15;
const MOST = 1_000;
const AGAIN_AFTER_MS = 500;
const LATER_MS = 50;

interface Entry {
  settlement: Settlement;
  receipt: Receipt;
}

/** Whether the same write may succeed later: the database was away, busy, or chose this transaction as a victim. */
function mayPass(error: unknown): boolean {
  return isUnreachable(error) || /^(40|53|55|57)/.test(databaseFailure(error)?.sqlstate ?? '');
}

export function createWriter({ commit, givesUp, onFailure }: WriterOptions): Writer {
  let gathered: Entry[] = [];
  let timer: NodeJS.Timeout | null = null;
  let writing: Promise<void> = Promise.resolve();

  /** Before whatever comes after them. */
  const writeLater = (entries: readonly Entry[]): void => {
    gathered.unshift(...entries);
    if (timer !== null) clearTimeout(timer);
    timer = setTimeout(flush, LATER_MS);
  };

  const writeAll = async (entries: readonly Entry[]): Promise<void> => {
    for (let failures = 1; ; failures += 1) {
      try {
        const left = await commit(entries.map(({ settlement }) => settlement));
        for (const entry of entries) if (!left.has(entry.settlement)) end(entry, null);
        if (left.size > 0) writeLater(entries.filter(({ settlement }) => left.has(settlement)));
        return;
      } catch (error) {
        if (givesUp(error, failures) || (!mayPass(error) && entries.length === 1)) {
          for (const entry of entries) end(entry, { error });
          return;
        }
        if (!mayPass(error)) break;
        onFailure(error);
        await new Promise((resolve) => setTimeout(resolve, AGAIN_AFTER_MS));
      }
    }
    // One of them can't be written: the others must not wait for it.
    for (const entry of entries) await writeAll([entry]);
  };

  function flush(): void {
    if (timer !== null) clearTimeout(timer);
    timer = null;
    const entries = gathered;
    gathered = [];
    writing = writing.then(() => writeAll(entries));
  }

  return {
    write: (settlement, receipt) => {
      receipt.left += 1;
      gathered.push({ settlement, receipt });
      if (gathered.length >= MOST) flush();
      else timer ??= setTimeout(flush, GATHER_MS);
    },
  };
}
