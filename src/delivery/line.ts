import type { Verdict } from '../core/verdict.js';
import type { Item } from '../destinations/carrier.js';

/**
 * What waits in a lane, and what of it is the next request: what goes again in the units that are told, before all else;
 * then what is new, the urgent ones first, as many as fit, nobody twice, those of one group. The first of a request that
 * could hold more waits for others for a moment. Who has waited beyond their patience is given back.
 */
export interface Entry<R> {
  item: Item;
  bytes: number;
  resolve: (verdict: R | Verdict | null) => void;
  reject: (error: unknown) => void;
  leavesAt: number;
}

/** Calls that go together, again. */
export interface Unit<R> {
  entries: readonly Entry<R>[];
  notBefore: number;
  /** How often the destination has failed at them, and since when. */
  failures: number;
  failedAt: number;
}

export interface Line<R> {
  isEmpty: () => boolean;
  /** How many wait: those that are new, and all. */
  fresh: () => number;
  size: () => number;
  /** How many requests go before that of an urgent call that comes now. */
  turns: () => number;
  /** For how long an urgent call that comes now would wait for others. */
  gathersMs: (at: number) => number;
  add: (entry: Entry<R>, isUrgent: boolean) => void;
  /** They go again: before anything larger, or after what goes again already. */
  addAgain: (units: readonly Unit<R>[], place: 'first' | 'last') => void;
  /** Gives back those that are meant. */
  giveBack: (isMeant?: (item: Item) => boolean) => void;
  /** Gives back whoever has waited too long. */
  dismiss: (at: number) => void;
  /** When the first of them will have waited too long. */
  leavesAt: () => number;
  /** When the next request could be made up of what waits; infinite where nothing does. */
  readyAt: () => number;
  /** The calls of the next request, at a time when it is ready. */
  take: (at: number) => Unit<R>;
}

export interface LineOptions {
  /** The most calls of a request, the most bytes of its body, and those of a body without calls. */
  most: number;
  bytes: number;
  overhead: number;
  patienceMs: number;
}

/** How long the first call of a request that could hold more waits for others. */
const GATHER_MS = 100;

export function createLine<R>({ most, bytes: mostBytes, overhead, patienceMs }: LineOptions): Line<R> {
  let urgent: Entry<R>[] = [];
  let plain: Entry<R>[] = [];
  let units: Unit<R>[] = [];

  const resent = (): number => units.reduce((sum, { entries }) => sum + entries.length, 0);
  const keepInUnits = (stays: (entry: Entry<R>) => boolean): void => {
    units = units
      .map((unit) => ({ ...unit, entries: unit.entries.filter(stays) }))
      .filter(({ entries }) => entries.length > 0);
  };

  const cut = (): readonly Entry<R>[] => {
    const taken: Entry<R>[] = [];
    const names = new Set<string>();
    let bytes = overhead;
    let isFull = false as boolean;
    const takeFrom = (queue: Entry<R>[]): void => {
      const left: Entry<R>[] = [];
      let at = 0;
      for (; at < queue.length && !isFull; at += 1) {
        const entry = queue[at];
        if (entry === undefined) break;
        const { item } = entry;
        const [first] = taken;
        isFull = first !== undefined && bytes + entry.bytes > mostBytes;
        if (isFull) break;
        if (first !== undefined && (item.group !== first.item.group || item.names.some((name) => names.has(name)))) {
          left.push(entry);
          continue;
        }
        taken.push(entry);
        for (const name of item.names) names.add(name);
        bytes += entry.bytes;
        isFull = taken.length >= most;
      }
      queue.splice(0, at, ...left);
    };
    takeFrom(urgent);
    if (!isFull) takeFrom(plain);
    return taken;
  };

  const readyAt = (): number => {
    const again = Math.min(...units.map(({ notBefore }) => notBefore));
    const first = Math.min(urgent[0]?.leavesAt ?? Infinity, plain[0]?.leavesAt ?? Infinity);
    const isWorthwhile = urgent.length + plain.length >= most || most === 1;
    return Math.min(again, isWorthwhile ? -Infinity : first - patienceMs + GATHER_MS);
  };

  return {
    isEmpty: () => urgent.length + plain.length + units.length === 0,
    fresh: () => urgent.length + plain.length,
    size: () => urgent.length + plain.length + resent(),
    turns: () => Math.floor((urgent.length + units.length) / most),
    gathersMs: (at) => {
      if (urgent.length + plain.length > 0) return readyAt() - at;
      return most > 1 ? GATHER_MS : 0;
    },
    add: (entry, isUrgent) => {
      (isUrgent ? urgent : plain).push(entry);
    },
    addAgain: (again, place) => {
      units = place === 'first' ? [...again, ...units] : [...units, ...again];
    },
    giveBack: (isMeant = () => true) => {
      const waiting = [...urgent, ...plain, ...units.flatMap(({ entries }) => entries)];
      const stays = ({ item }: Entry<R>): boolean => !isMeant(item);
      [urgent, plain] = [urgent.filter(stays), plain.filter(stays)];
      keepInUnits(stays);
      for (const { item, resolve } of waiting) if (isMeant(item)) resolve(null);
    },
    dismiss: (at) => {
      for (const queue of [urgent, plain]) {
        let gone = 0;
        while ((queue[gone]?.leavesAt ?? Infinity) <= at) gone += 1;
        for (const { resolve } of queue.splice(0, gone)) resolve(null);
      }
      if (units.every(({ entries }) => entries.every(({ leavesAt }) => leavesAt > at))) return;
      for (const { entries } of units) for (const { leavesAt, resolve } of entries) if (leavesAt <= at) resolve(null);
      keepInUnits(({ leavesAt }) => leavesAt > at);
    },
    leavesAt: () => {
      const heads = [urgent[0], plain[0], ...units.flatMap(({ entries }) => entries[0] ?? [])];
      return Math.min(...heads.map((entry) => entry?.leavesAt ?? Infinity));
    },
    readyAt,
    take: (at) => {
      const index = units.findIndex(({ notBefore }) => notBefore <= at);
      const [again] = index < 0 ? [] : units.splice(index, 1);
      return again ?? { entries: cut(), notBefore: 0, failures: 0, failedAt: Infinity };
    },
  };
}
