import { performance } from 'node:perf_hooks';
import type { BatchVerdict, Verdict } from '../core/verdict.js';
import type { Answer, Carrier, Item, Transmit } from '../destinations/carrier.js';
import { backoffMs } from '../lib/backoff.js';
import { createLine, type Entry, type Unit } from './line.js';
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
  /** The calls a second of requests that were answered with success, whatever was said of each. */
  takenPerSecond: () => number;
  /** For how long the last request still counts for the quota. */
  quietMs: () => number;
  figures: () => LaneFigures;
}

export interface LaneFigures {
  name: string;
  /** Requests a second: the quota, and what is let through at present. */
  quota: number;
  allowed: number;
  /** Requests, and calls that were accepted, over the last ten seconds. */
  requestsPerSecond: number;
  callsPerSecond: number;
  /** Requests since the start, those refused for the quota, and the calls that were accepted. */
  requests: number;
  throttled: number;
  calls: number;
  pausedMs: number;
}

const PATIENCE_MS = 1_000;
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

/** What went wrong with a request, in a few words. */
const describeFailure = (answer: Answer): string => (answer.kind === 'lost' ? answer.because : `HTTP ${answer.status}`);

/** What is told while nothing gets through: who finds that out doesn't wait the longer for it when it is over. */
function toldOfTrouble(verdict: Verdict): Verdict {
  if (verdict.kind === 'again') return { ...verdict, waitMs: verdict.waitMs ?? FAILED_PAUSE.longestMs };
  if (verdict.kind !== 'refused' || verdict.about !== 'trouble') return verdict;
  const { reason, answer } = verdict;
  return { kind: 'again', waitMs: FAILED_PAUSE.longestMs, late: false, reason, answer };
}

/** How many of a request's calls were accepted, or answered what they asked. */
function acceptedOf(judged: BatchVerdict<Concluded>, calls: number): number {
  if (judged.kind !== 'each') return judged.kind === 'whole' && judged.verdict.kind === 'acknowledged' ? calls : 0;
  let accepted = 0;
  for (const { kind } of judged.verdicts) if (kind === 'acknowledged' || kind === 'read') accepted += 1;
  return accepted;
}

/** A verdict, or what was read. */
interface Concluded {
  kind: string;
}

export interface LaneOptions<R> {
  carrier: Carrier<R>;
  transmit: Transmit;
  /** Whether a request may begin now: the lease isn't about to end, and the next leader knows how long it may be open. */
  mayBegin: () => boolean;
  onFree: () => void;
  onLeftOut: (fields: readonly string[]) => void;
}

export function createLane<R extends Concluded = Verdict>({
  carrier,
  transmit,
  mayBegin,
  onFree,
  onLeftOut,
}: LaneOptions<R>): Lane<R> {
  const pace = createPace(carrier.perSecond);
  const patienceMs = Math.max(PATIENCE_MS, 2_000 / carrier.perSecond);
  const failuresBeforePause = FAILURES_BEFORE_PAUSE[carrier.most === 1 ? 'single' : 'bulk'];
  const line = createLine<R>({ ...carrier, patienceMs });
  const now = (): number => performance.now();
  let timer: NodeJS.Timeout | null = null;
  let failures = 0;
  let lastFailure = '';
  let pauses = 0;
  let passedAt = -Infinity;
  let probes = 0;
  let open = 0;
  const counts = { requests: 0, throttled: 0, calls: 0 };
  const meters = { requests: createMeter(), calls: createMeter(), taken: createMeter() };

  const isTroubled = (): boolean => failures >= failuresBeforePause;
  /** Closes the lane for so long; without a length, for one that grows with each pause until a success. */
  const pause = (ms: number | null, limits: typeof FAILED_PAUSE): void => {
    const at = now();
    // Those that were under way when the lane closed say nothing new.
    if (ms === null && pace.pausedMs(at) > 0) return;
    if (ms === null) pauses += 1;
    pace.pauseFor(ms ?? backoffMs(pauses, limits, Math.random()), at);
    // Their turn won't come in time: what waits belongs into the outbox.
    if (pace.pausedMs(at) > patienceMs) line.giveBack();
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
    line.addAgain(
      parts.map((part) => ({ ...unit, notBefore: 0, entries: part.map((entry) => ({ ...entry, leavesAt })) })),
      'first',
    );
  };

  /** Whether all carry the named column beside others. */
  const isMerged = (entries: readonly Entry<R>[], field: string | null): boolean =>
    field !== null && entries.every(({ item }) => item.fields.length > 1 && item.fields.includes(field));

  const end = ({ entries }: Unit<R>, verdict: Verdict): void => {
    const told = isTroubled() ? toldOfTrouble(verdict) : verdict;
    // Of one among others nothing was said; and where nothing has got through yet, nothing might.
    const isBlameless = entries.length > 1 || isTroubled() || passedAt === -Infinity;
    const concluded = told.kind === 'again' && isBlameless ? { ...told, isBlameless } : told;
    for (const { resolve } of entries) resolve(concluded.kind === 'slower' ? null : concluded);
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
          line.addAgain([{ ...failed, entries: kept, notBefore: at + ONCE_MORE_AFTER_MS }], 'last');
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
    const accepted = acceptedOf(judged, calls);
    counts.calls += accepted;
    meters.calls.count(accepted, at);
    meters.taken.count(calls, at);
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
      line.dismiss(at);
      if (line.isEmpty()) return;
      const isFull = probes > 0 || open >= MOST_OPEN;
      const opening = isFull ? Infinity : Math.max(pace.opensAt(), line.readyAt());
      if (opening > at) {
        lookAt(Math.min(opening, line.leavesAt()), at);
        return;
      }
      if (!mayBegin()) {
        line.giveBack();
        return;
      }
      void begin(line.take(at));
    }
  }

  return {
    name: carrier.name,
    send: (item, isUrgent) =>
      new Promise((resolve, reject) => {
        const at = now();
        const bytes = Buffer.byteLength(item.text);
        if (item.isTooLarge === true || carrier.overhead + bytes > carrier.bytes) {
          resolve(TOO_LARGE);
          return;
        }
        const isIdle = line.isEmpty();
        // One finds out whether a failing destination is back; the others needn't wait for that here.
        const isHopeless = pace.pausedMs(at) > patienceMs || (isTroubled() && (probes > 0 || !isIdle));
        if (isHopeless) {
          resolve(null);
          return;
        }
        if (isIdle) pace.rest(at);
        // With what parts it from the next.
        line.add({ item, bytes: bytes + 1, resolve, reject, leavesAt: at + patienceMs }, isUrgent);
        // Who comes later waits with those for whom a look is planned, unless the request is full by now.
        const queued = line.fresh();
        if (queued === 1 || queued === carrier.most) look();
      }),
    withdraw: (fields) => line.giveBack((item) => item.fields.some((field) => fields.includes(field))),
    state: () => {
      if (pace.pausedMs(now()) > 0 || probes > 0) return 'closed';
      return isTroubled() ? 'trying' : 'open';
    },
    room: () => {
      const sendable = isTroubled() ? 1 : pace.perSecond(now()) * carrier.most * (patienceMs / 1000) * 0.8;
      const most = Math.max(1, Math.floor(sendable));
      const left = most - line.size();
      return left < most * WORTHWHILE ? 0 : left;
    },
    waitMs: () => {
      const at = now();
      const queuesMs = (line.turns() * 1_000) / pace.perSecond(at);
      return Math.max(0, line.gathersMs(at), pace.opensAt() - at) + queuesMs;
    },
    trouble: () => {
      if (isTroubled()) return `The destination does not answer as it should (${lastFailure}).`;
      return pace.pausedMs(now()) > 0 ? 'The destination asks to wait (HTTP 429).' : null;
    },
    takenPerSecond: () => meters.taken.perSecond(now()),
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
