/**
 * By which pipeline a recipient's last call went, for a minute: Iterable handles single and bulk calls apart, so that two
 * of one user within a short time may take effect in either order (https://api.iterable.com/api/docs#users_bulkUpdateUser).
 *
 * An open-addressed table of 64-bit hashes, twelve bytes a place: two recipients in some billions share a hash, and what
 * comes of that is that one of them takes the other pipeline. It grows with what it holds, up to `most`; beyond that the
 * oldest are forgotten first.
 */
export type Pipeline = 'single' | 'bulk';

export interface Recency {
  note: (recipient: string, pipeline: Pipeline, now: number) => void;
  /** Null where the recipient has not been sent anything for a minute. */
  pipelineOf: (recipient: string, now: number) => Pipeline | null;
  /** For what is left of a minute from `since`, whoever isn't known was sent by bulk: an earlier leader may have done so. */
  assumeBulk: (since: number) => void;
}

const STAYS_MS = 60_000;
const SMALLEST = 4_096;
/** Of the places, so many may be taken. */
const FULL = 0.75;
/** Times are kept in ticks of 4 ms; the lowest bit tells the pipeline. Zero is an empty place. */
const TICK_MS = 4;
const TICKS = 2 ** 31 - 1;

/** Two 32-bit hashes of one text: FNV-1a, and a multiplication with another prime, each mixed at the end. */
let high = 0;
let low = 0;
function hash(text: string): void {
  let a = 0x811c9dc5;
  let b = 0x9747b28c;
  for (let at = 0; at < text.length; at += 1) {
    const code = text.charCodeAt(at);
    a = Math.imul(a ^ code, 0x01000193);
    b = Math.imul(b ^ code, 0x5bd1e995) ^ (b >>> 15);
  }
  a = Math.imul(a ^ (a >>> 16), 0x85ebca6b);
  b = Math.imul(b ^ (b >>> 13), 0xc2b2ae35);
  high = (a ^ (a >>> 13)) >>> 0;
  low = (b ^ (b >>> 16)) >>> 0;
}

interface Table {
  size: number;
  highs: Uint32Array;
  lows: Uint32Array;
  /** (tick + 1) × 2, and one more for bulk. */
  stamps: Uint32Array;
  count: number;
}

const createTable = (size: number): Table => ({
  size,
  highs: new Uint32Array(size),
  lows: new Uint32Array(size),
  stamps: new Uint32Array(size),
  count: 0,
});

/** The place of the hashed text, or the empty one where it belongs. */
function placeOf({ size, highs, lows, stamps }: Table, a: number, b: number): number {
  let at = a & (size - 1);
  while (stamps[at] !== 0 && (highs[at] !== a || lows[at] !== b)) at = (at + 1) & (size - 1);
  return at;
}

function put(table: Table, a: number, b: number, stamp: number): void {
  const at = placeOf(table, a, b);
  if (table.stamps[at] === 0) table.count += 1;
  table.highs[at] = a;
  table.lows[at] = b;
  table.stamps[at] = stamp;
}

export function createRecency(most: number, start: number): Recency {
  let table = createTable(SMALLEST);
  let assumedUntil = -Infinity;
  // Counted round: after three months the ticks begin anew.
  const tickOf = (now: number): number => Math.floor((now - start) / TICK_MS) % TICKS;
  const stampOf = (now: number, pipeline: Pipeline): number => (tickOf(now) + 1) * 2 + (pipeline === 'bulk' ? 1 : 0);
  const isYounger = (stamp: number, ms: number, now: number): boolean =>
    stamp !== 0 && ((tickOf(now) - ((stamp >>> 1) - 1) + TICKS) % TICKS) * TICK_MS < ms;

  /** Leaves out what is too old, and what is not yet where there is too much; grows where most of it is still needed. */
  const rebuild = (now: number): void => {
    const old = table;
    const countYounger = (ms: number): number =>
      old.stamps.reduce((sum, stamp) => sum + (isYounger(stamp, ms, now) ? 1 : 0), 0);
    let stays = STAYS_MS;
    let count = countYounger(stays);
    while (count >= most) {
      stays /= 2;
      count = countYounger(stays);
    }
    let size = SMALLEST;
    while (count > size * FULL * 0.8) size *= 2;
    table = createTable(size);
    old.stamps.forEach((stamp, at) => {
      if (isYounger(stamp, stays, now)) put(table, old.highs[at] ?? 0, old.lows[at] ?? 0, stamp);
    });
  };

  return {
    note: (recipient, pipeline, now) => {
      if (table.count >= Math.min(table.size * FULL, most)) rebuild(now);
      hash(recipient);
      put(table, high, low, stampOf(now, pipeline));
    },
    pipelineOf: (recipient, now) => {
      hash(recipient);
      const stamp = table.stamps[placeOf(table, high, low)] ?? 0;
      if (isYounger(stamp, STAYS_MS, now)) return (stamp & 1) === 1 ? 'bulk' : 'single';
      return now < assumedUntil ? 'bulk' : null;
    },
    assumeBulk: (since) => {
      assumedUntil = since + STAYS_MS;
    },
  };
}
