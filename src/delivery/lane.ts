import { performance } from 'node:perf_hooks';
import type { BatchVerdict, Verdict } from '../core/verdict.js';
import type { Answer, Carrier, Item, Transmit } from '../destinations/carrier.js';
import { backoffMs } from '../lib/backoff.js';
import { createMeter } from './meter.js';
import { createPace } from './pace.js';

/**
 * One way into a destination: it gathers calls, cuts them into requests, paces those, and gives each call its verdict.
 * A lane for single calls is one whose requests carry one each.
 *
 *   open ──too many requests in a row fail──▶ closed for a while ──▶ trying: one request at a time ──answered──▶ open
 *     └──told to wait (429)──▶ closed so long ──▶ open                   └──failed──▶ closed, for longer
 *
 * A request that has to be divided becomes several `Unit`s, which go before anything larger or new: apart by the column that
 * the answer names (where all carry it beside others, by their sender), else in halves, until the guilty call is alone. One
 * that the destination fails at is sent once more; when that fails, too, it is divided as well, unless nothing gets through.
 *
 * A call that isn't sent within its patience, or meets a quota, is given back as it was (null): it must be built from
 * values as of the moment when it is sent, and what waits belongs into the outbox. One whose request failed may be given
 * back, too, and then goes again.
 */
export interface Lane<R = Verdict> {
  name: string;
  /** Null where the call is given back: it goes again. Urgent ones are at the head of the next request. */
  send: (item: Item, urgent: boolean) => Promise<R | Verdict | null>;
  /** Gives back what carries one of these columns and isn't open. */
  withdraw: (fields: readonly string[]) => void;
  state: () => 'open' | 'trying' | 'closed';
  /** How many more calls can be sent within their patience; none while those are too few to be looked for. */
  room: () => number;
  /** How long an urgent call would wait until it is sent. */
  waitMs: () => number;
  /** Why the lane isn't open, in a sentence; null where it is. */
  trouble: () => string | null;
  /** For how long the last request still counts for the quota. */
  quietMs: () => number;
  figures: () => LaneFigures;
}

export interface LaneFigures {
  name: string;
  /** Requests a second: the quota, and what is let through at present. */
  quota: number;
  allowed: number;
  /** Over the last ten seconds. */
  requestsPerSecond: number;
  callsPerSecond: number;
  /** Requests since the start, those refused for the quota, and the calls of those that were accepted. */
  requests: number;
  throttled: number;
  calls: number;
  pausedMs: number;
}

const PATIENCE_MS = 1_000;
/** How long the first call of a request that could hold more waits for others. */
const GATHER_MS = 100;
const ONCE_MORE_AFTER_MS = 1_000;
/** More than bad luck where every third request fails; in bulk a batch that failed twice, and one of its halves, are not enough. */
const FAILURES_BEFORE_PAUSE = { single: 10, bulk: 4 };
/** A destination that is back is used again within seconds. */
const FAILED_PAUSE = { firstMs: 500, longestMs: 5_000 };
const THROTTLED_PAUSE = { firstMs: 1_000, longestMs: 30_000 };
/** Requests that are open at once: enough for the full quota at a tenth of a second of latency. */
const MOST_OPEN = 300;
/** Of the room for calls, so much has to be left that more are asked for. */
const WORTHWHILE = 0.25;
const TOO_LARGE = {
  kind: 'refused',
  about: 'content',
  reason: 'TooLarge',
  field: null,
  answer: 'Not sent: the destination takes no call of this size.',
} as const;

interface Entry<R> {
  item: Item;
  bytes: number;
  resolve: (verdict: R | Verdict | null) => void;
  reject: (error: unknown) => void;
  leavesAt: number;
}

/** Calls that go together, again. */
interface Unit<R> {
  entries: readonly Entry<R>[];
  notBefore: number;
  /** How often the destination has failed at them, and since when. */
  failures: number;
  failedAt: number;
}

/** What went wrong with a request, in a few words. */
const describeFailure = (answer: Answer): string => (answer.kind === 'lost' ? answer.because : `HTTP ${answer.status}`);

export interface LaneOptions<R> {
  carrier: Carrier<R>;
  transmit: Transmit;
  /** Whether a request may begin now: the lease isn't about to end, and the next leader knows how long it may be open. */
  mayBegin: () => boolean;
  onFree: () => void;
  onLeftOut: (fields: readonly string[]) => void;
}

export function createLane<R = Verdict>({ carrier, transmit, mayBegin, onFree, onLeftOut }: LaneOptions<R>): Lane<R> {
  const pace = createPace(carrier.perSecond);
  const patienceMs = Math.max(PATIENCE_MS, 2_000 / carrier.perSecond);
  const failuresBeforePause = FAILURES_BEFORE_PAUSE[carrier.most === 1 ? 'single' : 'bulk'];
  const now = (): number => performance.now();
  let urgent: Entry<R>[] = [];
  let plain: Entry<R>[] = [];
  let units: Unit<R>[] = [];
  let timer: NodeJS.Timeout | null = null;
  let failures = 0;
  let lastFailure = '';
  let pauses = 0;
  let passedAt = -Infinity;
  let probes = 0;
  let open = 0;
  const counts = { requests: 0, throttled: 0, calls: 0 };
  const meters = { requests: createMeter(), calls: createMeter() };

  const isTroubled = (): boolean => failures >= failuresBeforePause;
  /** Closes the lane for so long; without a length, for one that grows with each pause until a success. */
  const pause = (ms: number | null, limits: typeof FAILED_PAUSE): void => {
    const at = now();
    // Those that were under way when the lane closed say nothing new.
    if (ms === null && pace.pausedMs(at) > 0) return;
    if (ms === null) pauses += 1;
    pace.pauseFor(ms ?? backoffMs(pauses, limits, Math.random()), at);
    // Their turn won't come in time: what waits belongs into the outbox.
    if (pace.pausedMs(at) > patienceMs) giveBack();
  };

  const giveBack = (isMeant: (item: Item) => boolean = () => true): void => {
    const waiting = [...urgent, ...plain, ...units.flatMap(({ entries }) => entries)];
    const stay = (entries: readonly Entry<R>[]): Entry<R>[] => entries.filter(({ item }) => !isMeant(item));
    [urgent, plain] = [stay(urgent), stay(plain)];
    units = units.map((unit) => ({ ...unit, entries: stay(unit.entries) })).filter(({ entries }) => entries.length > 0);
    for (const { item, resolve } of waiting) if (isMeant(item)) resolve(null);
  };

  /** Gives back whoever has waited too long. */
  const dismiss = (at: number): void => {
    for (const queue of [urgent, plain]) {
      let gone = 0;
      while ((queue[gone]?.leavesAt ?? Infinity) <= at) gone += 1;
      for (const { resolve } of queue.splice(0, gone)) resolve(null);
    }
    if (units.every(({ entries }) => entries.every(({ leavesAt }) => leavesAt > at))) return;
    for (const { entries } of units) for (const { leavesAt, resolve } of entries) if (leavesAt <= at) resolve(null);
    units = units
      .map((unit) => ({ ...unit, entries: unit.entries.filter(({ leavesAt }) => leavesAt > at) }))
      .filter(({ entries }) => entries.length > 0);
  };

  /** The next request out of what is new: as many as fit, nobody twice, those of one group. */
  const cut = (): readonly Entry<R>[] => {
    const taken: Entry<R>[] = [];
    const names = new Set<string>();
    let bytes = carrier.overhead;
    let isFull = false as boolean;
    const takeFrom = (queue: Entry<R>[]): void => {
      const left: Entry<R>[] = [];
      let at = 0;
      for (; at < queue.length && !isFull; at += 1) {
        const entry = queue[at];
        if (entry === undefined) break;
        const { item } = entry;
        const [first] = taken;
        isFull = first !== undefined && bytes + entry.bytes > carrier.bytes;
        if (isFull) break;
        if (first !== undefined && (item.group !== first.item.group || item.names.some((name) => names.has(name)))) {
          left.push(entry);
          continue;
        }
        taken.push(entry);
        for (const name of item.names) names.add(name);
        bytes += entry.bytes;
        isFull = taken.length >= carrier.most;
      }
      queue.splice(0, at, ...left);
    };
    takeFrom(urgent);
    if (!isFull) takeFrom(plain);
    return taken;
  };

  /** When the next request could be made up of what waits; infinite where nothing does. */
  const readyAt = (): number => {
    const resent = Math.min(...units.map(({ notBefore }) => notBefore));
    const first = Math.min(urgent[0]?.leavesAt ?? Infinity, plain[0]?.leavesAt ?? Infinity);
    const isWorthwhile = urgent.length + plain.length >= carrier.most || carrier.most === 1;
    return Math.min(resent, isWorthwhile ? -Infinity : first - patienceMs + GATHER_MS);
  };

  const divide = ({ entries, ...unit }: Unit<R>, field: string | null): void => {
    const carries = ({ item }: Entry<R>): boolean => field !== null && item.fields.includes(field);
    const named = entries.filter(carries);
    const half = Math.ceil(entries.length / 2);
    const parts =
      named.length > 0 && named.length < entries.length
        ? [entries.filter((entry) => !carries(entry)), named]
        : [entries.slice(0, half), entries.slice(half)];
    const leavesAt = now() + patienceMs + ONCE_MORE_AFTER_MS;
    // Parts before anything larger: the guilty call is found before the patience of the others ends.
    units.unshift(
      ...parts.map((part) => ({ ...unit, notBefore: 0, entries: part.map((entry) => ({ ...entry, leavesAt })) })),
    );
  };

  /** Whether all carry the named column beside others. */
  const isMerged = (entries: readonly Entry<R>[], field: string | null): boolean =>
    field !== null && entries.every(({ item }) => item.fields.length > 1 && item.fields.includes(field));

  const end = ({ entries }: Unit<R>, verdict: Verdict): void => {
    // Whoever finds out that a destination is away doesn't wait the longer for it when it is back.
    const isAway = verdict.kind === 'again' && isTroubled();
    const told = isAway ? { ...verdict, waitMs: verdict.waitMs ?? FAILED_PAUSE.longestMs } : verdict;
    for (const { resolve } of entries) resolve(told.kind === 'slower' ? null : told);
  };

  const conclude = (unit: Unit<R>, judged: BatchVerdict<R>): void => {
    const { entries } = unit;
    switch (judged.kind) {
      case 'each':
        if (judged.dropped.length > 0) onLeftOut(judged.dropped);
        entries.forEach(({ resolve }, index) => resolve(judged.verdicts[index] ?? null));
        return;
      case 'whole':
        if (judged.verdict.kind === 'slower') {
          counts.throttled += 1;
          pace.slowDown(now());
          pause(judged.verdict.waitMs, THROTTLED_PAUSE);
        }
        end(unit, judged.verdict);
        return;
      case 'divide':
        if (entries.length === 1 || isMerged(entries, judged.field)) end(unit, judged.verdict);
        else divide(unit, judged.field);
        return;
      case 'failed': {
        if (entries.length === 1) {
          end(unit, judged.verdict);
          return;
        }
        const at = now();
        const failed = { ...unit, failures: unit.failures + 1, failedAt: unit.failures === 0 ? at : unit.failedAt };
        if (failed.failures === 1) {
          const leavesAt = at + ONCE_MORE_AFTER_MS + patienceMs;
          const kept = entries.map((entry) => ({ ...entry, leavesAt }));
          units.push({ ...failed, entries: kept, notBefore: at + ONCE_MORE_AFTER_MS });
        } else if (passedAt > failed.failedAt || !isTroubled()) divide({ ...failed, failures: 0 }, null);
        else end(unit, judged.verdict);
      }
    }
  };

  /** What an answer says of the lane. */
  const heed = (answer: Answer, judged: BatchVerdict<R>, calls: number): void => {
    const at = now();
    // A success without a word of the destination's own may be a proxy's.
    const isFailed = judged.kind === 'failed' || (judged.kind === 'whole' && judged.verdict.kind === 'again');
    if (answer.kind === 'lost' || isFailed) {
      failures += 1;
      lastFailure = describeFailure(answer);
      if (isTroubled()) pause(null, FAILED_PAUSE);
      return;
    }
    failures = 0;
    if (judged.kind === 'whole' && judged.verdict.kind === 'slower') return;
    pauses = 0;
    passedAt = at;
    if (answer.status >= 400) return;
    counts.calls += calls;
    meters.calls.count(calls, at);
  };

  const begin = async (unit: Unit<R>): Promise<void> => {
    const items = unit.entries.map(({ item }) => item);
    const isProbe = isTroubled();
    if (isProbe) probes += 1;
    open += 1;
    counts.requests += 1;
    try {
      const request = carrier.request(items);
      // Putting a large body together takes some milliseconds: the request begins now.
      const at = now();
      pace.take(at);
      meters.requests.count(1, at);
      const answer = await transmit(request);
      const judged = carrier.judge(answer, items, Date.now());
      heed(answer, judged, items.length);
      conclude(unit, judged);
    } catch (error) {
      // A bug: whoever sent these hears of it.
      for (const { reject } of unit.entries) reject(error);
    } finally {
      if (isProbe) probes -= 1;
      open -= 1;
    }
    look();
    onFree();
  };

  const lookAt = (at: number, from: number): void => {
    if (timer !== null) clearTimeout(timer);
    timer = setTimeout(look, Math.max(1, Math.ceil(at - from)));
  };

  function look(): void {
    for (;;) {
      const at = now();
      dismiss(at);
      if (units.length + urgent.length + plain.length === 0) return;
      const waits = [urgent[0], plain[0], ...units.flatMap(({ entries }) => entries[0] ?? [])];
      const leaving = Math.min(...waits.map((entry) => entry?.leavesAt ?? Infinity));
      const isFull = probes > 0 || open >= MOST_OPEN;
      const opening = isFull ? Infinity : Math.max(pace.opensAt(), readyAt());
      if (opening > at) {
        lookAt(Math.min(opening, leaving), at);
        return;
      }
      if (!mayBegin()) {
        giveBack();
        return;
      }
      const index = units.findIndex(({ notBefore }) => notBefore <= at);
      const [again] = index < 0 ? [] : units.splice(index, 1);
      void begin(again ?? { entries: cut(), notBefore: 0, failures: 0, failedAt: Infinity });
    }
  }

  return {
    name: carrier.name,
    send: (item, isUrgent) =>
      new Promise((resolve, reject) => {
        const at = now();
        if (item.isTooLarge === true) {
          resolve(TOO_LARGE);
          return;
        }
        const isIdle = urgent.length + plain.length + units.length === 0;
        // One finds out whether a failing destination is back; the others needn't wait for that here.
        const isHopeless = pace.pausedMs(at) > patienceMs || (isTroubled() && (probes > 0 || !isIdle));
        if (isHopeless) {
          resolve(null);
          return;
        }
        if (isIdle) pace.rest(at);
        const bytes = Buffer.byteLength(item.text) + 1;
        (isUrgent ? urgent : plain).push({ item, bytes, resolve, reject, leavesAt: at + patienceMs });
        // Who comes later waits with those for whom a look is planned, unless the request is full by now.
        const queued = urgent.length + plain.length;
        if (queued === 1 || queued === carrier.most) look();
      }),
    withdraw: (fields) => giveBack((item) => item.fields.some((field) => fields.includes(field))),
    state: () => {
      if (pace.pausedMs(now()) > 0 || probes > 0) return 'closed';
      return isTroubled() ? 'trying' : 'open';
    },
    room: () => {
      const resent = units.reduce((sum, { entries }) => sum + entries.length, 0);
      const sendable = isTroubled() ? 1 : pace.perSecond(now()) * carrier.most * (patienceMs / 1000) * 0.8;
      const most = Math.max(1, Math.floor(sendable));
      const left = most - urgent.length - plain.length - resent;
      return left < most * WORTHWHILE ? 0 : left;
    },
    waitMs: () => {
      const at = now();
      const isGathering = urgent.length + plain.length > 0;
      const gathersMs = isGathering ? readyAt() - at : carrier.most > 1 ? GATHER_MS : 0;
      const turns = Math.floor((urgent.length + units.length) / carrier.most);
      return Math.max(0, gathersMs, pace.opensAt() - at) + (turns * 1_000) / pace.perSecond(at);
    },
    trouble: () => {
      if (isTroubled()) return `The destination does not answer as it should (${lastFailure}).`;
      return pace.pausedMs(now()) > 0 ? 'The destination asks to wait (HTTP 429).' : null;
    },
    quietMs: () => Math.max(0, pace.busyUntil() - now()),
    figures: () => {
      const at = now();
      return {
        name: carrier.name,
        quota: carrier.perSecond,
        allowed: pace.perSecond(at),
        requestsPerSecond: meters.requests.perSecond(at),
        callsPerSecond: meters.calls.perSecond(at),
        ...counts,
        pausedMs: pace.pausedMs(at),
      };
    },
  };
}
