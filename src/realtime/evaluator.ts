import type { Definition } from '../core/definition.js';
import { learnSpeed, tooSlowMs, UNKNOWN_SPEED, type Speed } from '../core/speed.js';
import type { Pool } from '../db/connect.js';
import { isUnreachable } from '../db/failure.js';
import { backoffMs } from '../lib/backoff.js';
import { UnavailableError } from '../lib/errors.js';
import type { Logger } from '../lib/logger.js';
import { createSignal } from '../lib/signal.js';
import { togetherMs } from '../lib/together.js';
import type { BatchOptions, BatchResult } from '../sync/batch.js';
import { wantFull } from '../sync/due.js';
import { markStuck, readFollowed, retryParked } from '../sync/waiting.js';
import { divide } from './divide.js';
import { judgeTrouble, type Trouble } from './trouble.js';
import type { Worker } from './worker.js';

/**
 * Has what is due evaluated: by some workers at once, a definition by one of them at a time.
 *
 *   quiet ──something is due──▶ ready ──a worker is free──▶ running ─┬─ nothing more ──▶ quiet
 *             (said by the mover,  ▲                                 ├─ more ─────────▶ ready
 *              or seen each second)│                                 └─ may not, fails ▶ resting ─┐
 *                                  └──────────────────────── its rest is over ────────────────────┘
 *
 * Nothing is gathered: what comes while a batch runs is the next one. Each definition fails by itself, and what fails stays
 * due; how it goes on is decided by `trouble.ts`.
 */
export interface Evaluator {
  /** Something has become due for these definitions. */
  notify: (definitionIds: readonly number[]) => void;
  /** What a profile of the definition takes within a batch of many, as was last seen. */
  perProfileMs: (definitionId: number) => number;
  /** Evaluates all that is due of a definition when this is called; false where some of it stays. */
  drain: (key: string) => Promise<boolean>;
  /** Begins no batch any more, and waits for those that are under way. */
  stop: () => Promise<void>;
}

export interface EvaluatorOptions {
  state: Pool;
  /** Those of now; one that isn't among them waits. */
  definitions: () => readonly Definition[];
  openWorker: () => Promise<Worker>;
  /** False: evaluates only what `drain` asks for. */
  follows: boolean;
  /** Something is to be told of, with this id in the outbox or a higher one. Must not throw. */
  onRaised: (lowestId: number) => void;
  /** A definition can't be followed at once: evaluating its profiles takes too long. */
  onTooSlow: (definitionId: number, sentence: string) => Promise<void>;
  log: Logger;
}

const WORKERS = 4;
const LOOK_MS = 1_000;
const RETRY_PARKED_MS = 60_000;
const LIMIT = 500;
/** Where more waits than fits, batches grow up to this. */
const BACKLOG_LIMIT = 2_000;
const AGAIN = { firstMs: 20, longestMs: 5_000 };
const STUCK = { firstMs: 1_000, longestMs: 30_000 };
const REST_MS = { waits: 1_000, holds: 5_000, slow: 1_000 };
/** So many failures in a row ask for a run in full, which tells a person where it fails; so many time-outs are too slow. */
const OFTEN = 5;

/** A definition that follows changes. */
interface Work {
  id: number;
  key: string;
  /** Since when something is due; null: nothing is, as far as is known. */
  readyAt: number | null;
  isRunning: boolean;
  restsUntil: number;
  isStuck: boolean;
  /** How often in a row, for each kind of trouble. */
  failed: { again: number; slow: number; stuck: number };
  limit: number;
  speed: Speed;
  /** Who waits until nothing is due. */
  draining: ((isDrained: boolean) => void)[];
}

const NEVER_FAILED = { again: 0, slow: 0, stuck: 0 };

/** How it is with what is due of a definition after a batch: there is more of it, nothing is due, or it can't be evaluated now. */
type Next = 'goes on' | 'is done' | 'stays';

interface Place {
  index: number;
  worker: Worker | null;
  isFree: boolean;
}

export function startEvaluator(options: EvaluatorOptions): Evaluator {
  const { state, definitions, openWorker, follows, onRaised, onTooSlow, log } = options;
  const works = new Map<number, Work>();
  const places: readonly Place[] = Array.from({ length: WORKERS }, (_, index) => ({
    index,
    worker: null,
    isFree: true,
  }));
  const underWay = new Set<Promise<void>>();
  const signal = createSignal();
  let isStopping = false;
  let alarm: NodeJS.Timeout | undefined;

  const markReady = (work: Work): void => {
    work.readyAt ??= performance.now();
  };
  const rest = (work: Work, ms: number): void => {
    markReady(work);
    work.restsUntil = performance.now() + ms;
  };
  const answer = (work: Work, count: number, isDrained: boolean): void => {
    for (const resolve of work.draining.splice(0, count)) resolve(isDrained);
  };

  const isWaiting = ({ readyAt, isRunning, draining }: Work): boolean =>
    readyAt !== null && !isRunning && (follows || draining.length > 0);

  /** Gives free places to definitions that are ready, the longest waiting first, each by preference to that which knows it. */
  const assign = (): void => {
    clearTimeout(alarm);
    if (isStopping) return;
    const now = performance.now();
    const waiting = [...works.values()].filter(isWaiting);
    const ready = waiting.filter(({ restsUntil }) => restsUntil <= now);
    ready.sort((a, b) => (a.readyAt ?? 0) - (b.readyAt ?? 0));
    for (const work of ready) {
      const definition = definitions().find(({ key }) => key === work.key);
      const preferred = places[work.id % WORKERS];
      const place = preferred?.isFree === true ? preferred : places.find(({ isFree }) => isFree);
      if (place === undefined) return;
      if (definition === undefined) work.readyAt = null;
      else start(place, work, definition);
    }
    const next = Math.min(...waiting.map(({ restsUntil }) => restsUntil).filter((until) => until > now));
    if (next !== Infinity) alarm = setTimeout(assign, Math.ceil(next - now));
  };

  const start = (place: Place, work: Work, definition: Definition): void => {
    [place.isFree, work.isRunning, work.readyAt] = [false, true, null];
    const running = run(place, work, definition).finally(() => {
      [place.isFree, work.isRunning] = [true, false];
      underWay.delete(running);
      assign();
    });
    underWay.add(running);
  };

  const run = async (place: Place, work: Work, definition: Definition): Promise<void> => {
    const asked = work.draining.length;
    try {
      const next = await evaluate(place, work, definition);
      if (next !== 'goes on') answer(work, asked, next === 'is done');
    } catch (error) {
      // What was to be written down about a failure could not be; where the state is out of reach, others say so.
      if (!isUnreachable(error)) log.failure(`What has changed of "${work.key}" cannot be evaluated`, error);
      if ((await fail(place, work, { kind: 'again', isLost: false })) !== 'goes on') answer(work, asked, false);
    }
  };

  /** One batch and what follows from it; throws where that can't be written down. */
  const evaluate = async (place: Place, work: Work, definition: Definition): Promise<Next> => {
    try {
      return await settle(work, await evaluateOnce(place, work, definition, { limit: work.limit }));
    } catch (error) {
      const trouble = judgeTrouble(error);
      if (trouble.kind !== 'data') return fail(place, work, trouble);
      try {
        const { limit } = work;
        const only = (ids: readonly number[]): Promise<BatchResult> =>
          evaluateOnce(place, work, definition, { limit: ids.length, only: ids });
        return await settle(work, await divide({ state, definitionId: work.id, limit, evaluate: only }));
      } catch (second) {
        const again = judgeTrouble(second);
        return await fail(place, work, again.kind === 'data' ? { ...again, kind: 'stuck', cause: null } : again);
      }
    }
  };

  const evaluateOnce = async (
    place: Place,
    work: Work,
    definition: Definition,
    batch: BatchOptions,
  ): Promise<BatchResult> => {
    if (isStopping) throw new UnavailableError('Stopped.');
    if (place.worker?.isOpen() === false) leave(place);
    place.worker ??= await openWorker();
    const began = performance.now();
    const result = await place.worker.evaluate(definition, work.id, batch);
    if (result.kind === 'written') {
      const now = performance.now();
      work.speed = learnSpeed(work.speed, { profiles: result.profiles, tookMs: now - began }, now);
      if (result.raisedFrom !== null) onRaised(result.raisedFrom);
    }
    return result;
  };

  const settle = async (work: Work, result: BatchResult): Promise<Next> => {
    switch (result.kind) {
      case 'waits':
        rest(work, REST_MS.waits);
        return 'stays';
      case 'holds':
        rest(work, REST_MS.holds);
        if (work.isStuck) return 'stays';
        work.isStuck = true;
        await markStuck(state, work.id, `Its guard holds what has changed: ${result.because}.`);
        await wantFull(state, [work.key], { dropDue: false });
        return 'stays';
      case 'nothing':
      case 'written': {
        const more = result.kind === 'written' && result.more;
        [work.failed, work.limit] = [NEVER_FAILED, Math.min(work.limit * 2, more ? BACKLOG_LIMIT : LIMIT)];
        if (more) markReady(work);
        if (work.isStuck) await markStuck(state, work.id, null);
        work.isStuck = false;
        const slowMs = tooSlowMs(work.speed, performance.now());
        if (slowMs !== null) await giveUp(work, `takes ${Math.round(slowMs)} ms for a single profile`);
        return more ? 'goes on' : 'is done';
      }
    }
  };

  const leave = (place: Place): void => {
    place.worker?.close();
    place.worker = null;
  };

  const giveUp = async (work: Work, why: string): Promise<void> => {
    [work.speed, work.failed] = [UNKNOWN_SPEED, NEVER_FAILED];
    await onTooSlow(work.id, `Evaluating what has changed ${why}.`);
  };

  const fail = async (place: Place, work: Work, trouble: Exclude<Trouble, { kind: 'data' }>): Promise<Next> => {
    const times = work.failed[trouble.kind] + 1;
    work.failed = { ...work.failed, [trouble.kind]: times };
    switch (trouble.kind) {
      case 'again':
        if (trouble.isLost) leave(place);
        rest(work, backoffMs(times, AGAIN, Math.random()));
        return times < OFTEN ? 'goes on' : 'stays';
      case 'slow':
        work.limit = Math.max(1, Math.floor(work.limit / 4));
        rest(work, REST_MS.slow);
        if (times >= OFTEN) await giveUp(work, 'takes longer than the time allowed');
        return 'stays';
      case 'stuck': {
        const { sentence, cause } = trouble;
        rest(work, backoffMs(times, STUCK, Math.random()));
        if (!work.isStuck && cause === null) log.warn(`What has changed of "${work.key}" waits: ${sentence}`);
        if (!work.isStuck && cause !== null) log.failure(`What has changed of "${work.key}" waits`, cause);
        work.isStuck = true;
        // What it has prepared may no longer fit the tables.
        leave(place);
        await markStuck(state, work.id, sentence);
        if (times === OFTEN) await wantFull(state, [work.key], { dropDue: false });
        return 'stays';
      }
    }
  };

  const look = async (): Promise<void> => {
    const followed = await readFollowed(state);
    for (const { id, key, isReady, isStuck } of followed) {
      const work = works.get(id) ?? newWork(id, key);
      works.set(id, work);
      work.isStuck ||= isStuck;
      if (isReady && follows) markReady(work);
    }
    const known = new Set(followed.map(({ id }) => id));
    for (const work of works.values()) {
      if (known.has(work.id) || work.isRunning) continue;
      works.delete(work.id);
      answer(work, work.draining.length, true);
    }
    assign();
  };

  const loop = async (): Promise<void> => {
    let retriedAt = -Infinity;
    let hasFailed = false;
    while (!isStopping) {
      try {
        if (performance.now() - retriedAt >= RETRY_PARKED_MS) {
          await retryParked(state);
          retriedAt = performance.now();
        }
        await look();
        hasFailed = false;
      } catch (error) {
        if (!hasFailed) log.failure('What waits to be evaluated cannot be read; trying again', error);
        hasFailed = true;
      }
      await signal.wait(togetherMs(LOOK_MS));
    }
  };
  const looping = follows ? loop() : Promise.resolve();

  return {
    notify: (definitionIds) => {
      if (!follows) return;
      for (const id of definitionIds) {
        const work = works.get(id);
        if (work === undefined) signal.notify();
        else markReady(work);
      }
      assign();
    },
    perProfileMs: (definitionId) => (works.get(definitionId)?.speed ?? UNKNOWN_SPEED).perProfileMs,
    drain: async (key) => {
      await look();
      const work = [...works.values()].find((each) => each.key === key);
      if (work === undefined) return true;
      if (isStopping || !definitions().some((each) => each.key === key)) return false;
      return new Promise((resolve) => {
        work.draining.push(resolve);
        [work.readyAt, work.restsUntil] = [work.readyAt ?? performance.now(), 0];
        assign();
      });
    },
    stop: async () => {
      isStopping = true;
      clearTimeout(alarm);
      signal.notify();
      await looping;
      await Promise.all(underWay);
      for (const work of works.values()) answer(work, work.draining.length, false);
      for (const { worker } of places) worker?.close();
    },
  };
}

function newWork(id: number, key: string): Work {
  return {
    id,
    key,
    readyAt: null,
    isRunning: false,
    restsUntil: 0,
    isStuck: false,
    failed: NEVER_FAILED,
    limit: LIMIT,
    speed: UNKNOWN_SPEED,
    draining: [],
  };
}
