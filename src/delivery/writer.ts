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
  /** Resolves when it is committed. */
  write: (settlement: Settlement) => Promise<void>;
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
  resolve: () => void;
  reject: (error: unknown) => void;
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
        for (const { settlement, resolve } of entries) if (!left.has(settlement)) resolve();
        if (left.size > 0) writeLater(entries.filter(({ settlement }) => left.has(settlement)));
        return;
      } catch (error) {
        if (givesUp(error, failures) || (!mayPass(error) && entries.length === 1)) {
          for (const { reject } of entries) reject(error);
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
    write: (settlement) =>
      new Promise((resolve, reject) => {
        gathered.push({ settlement, resolve, reject });
        if (gathered.length >= MOST) flush();
        else timer ??= setTimeout(flush, GATHER_MS);
      }),
  };
}
