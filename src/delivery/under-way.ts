import { performance } from 'node:perf_hooks';
import { MOST_EVENTS, type WaitingRow } from '../outbox/queue.js';

/**
 * The recipients of whom something is under way: from when their rows are read until all that became of them has been
 * written, and longer where a request may still be applied (they rest). What else is seen of them meanwhile is noted, so
 * that it is read when they are free. They are as many as the lanes need, and fewer where their values are large.
 */
export interface UnderWay {
  has: (recipient: string) => boolean;
  begin: (recipient: string, rows: readonly WaitingRow[]) => void;
  rest: (recipient: string, ms: number) => void;
  /** The lowest id of what else there is of the recipient by now: 0 where it may be any, infinite where there is nothing. */
  end: (recipient: string) => number;
  /** Of those that were read, who may begin, and who rests, for so long. */
  sort: (seen: readonly Seen[]) => {
    free: readonly string[];
    resting: readonly { recipient: string; forMs: number }[];
  };
  /** How many more may begin without too much memory. */
  room: () => number;
}

export interface Seen {
  id: number;
  version: number;
  recipient: string;
}

/** Values are held a few times over, as rows, as calls and as requests. */
const MOST_BYTES = 16_000_000;
const SMALL_BYTES = 200;

interface Entry {
  /** The versions of the rows that were loaded. */
  loaded: readonly number[];
  /** The lowest id of what else was seen in the queue. */
  moreFrom: number;
  /** When its rest is over, by the monotonic clock; 0 while requests are made. */
  restsUntil: number;
  bytes: number;
}

function sizeOf(row: WaitingRow): number {
  if (row.kind === 'e') return row.properties.length;
  let size = 0;
  for (const { field, json } of row.values) size += field.length + json.length;
  return size;
}

export function createUnderWay(): UnderWay {
  const entries = new Map<string, Entry>();
  let bytes = 0;
  /** What one takes, as of late; the first few tell. */
  let average = SMALL_BYTES;
  const set = (recipient: string, entry: Entry): void => {
    bytes += entry.bytes - (entries.get(recipient)?.bytes ?? 0);
    entries.set(recipient, entry);
  };
  return {
    has: (recipient) => entries.has(recipient),
    begin: (recipient, rows) => {
      let size = SMALL_BYTES;
      for (const row of rows) size += sizeOf(row);
      average += (size - average) / 50;
      const events = rows.length < MOST_EVENTS ? [] : rows.filter(({ kind }) => kind === 'e');
      // There may be more events than are loaded at once.
      const moreFrom = events.length >= MOST_EVENTS ? (events[0]?.id ?? 0) : Infinity;
      set(recipient, { loaded: rows.map(({ version }) => version), moreFrom, restsUntil: 0, bytes: size });
    },
    rest: (recipient, ms) => {
      set(recipient, { loaded: [], moreFrom: 0, restsUntil: performance.now() + ms, bytes: 0 });
    },
    end: (recipient) => {
      const entry = entries.get(recipient);
      entries.delete(recipient);
      bytes -= entry?.bytes ?? 0;
      return entry?.moreFrom ?? Infinity;
    },
    sort: (seen) => {
      const now = performance.now();
      const free = new Set<string>();
      const resting = new Map<string, number>();
      for (const { id, recipient, version } of seen) {
        const known = entries.get(recipient);
        if (known === undefined) free.add(recipient);
        else if (known.restsUntil > 0) resting.set(recipient, Math.max(0, known.restsUntil - now));
        else if (!known.loaded.includes(version)) known.moreFrom = Math.min(known.moreFrom, id);
      }
      return { free: [...free], resting: [...resting].map(([recipient, forMs]) => ({ recipient, forMs })) };
    },
    room: () => Math.max(1, Math.floor((MOST_BYTES - bytes) / average)),
  };
}
