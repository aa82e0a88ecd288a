import { createFlush } from '../db/flush.js';
import { LeaseLostError } from '../db/lease.js';
import type { State } from '../db/state.js';
import type { Port } from '../destinations/carrier.js';
import { backoffMs } from '../lib/backoff.js';
import type { Logger } from '../lib/logger.js';
import { LIST, loadWaiting, type WaitingRow } from '../outbox/queue.js';
import { createSettler, holdBack, markAnew, type Settlement, type Settler } from '../outbox/settle.js';
import { noteLeftOut, noteList, noteStreaks, readStreaks, stopCalls, stopDestination } from '../outbox/noted.js';
import { isMoreWaiting, keepReader, readQueue, type QueueRead, type Room } from '../outbox/reader.js';
import { createBookmark, isShut, LOOK_EVERY_MS } from './bookmark.js';
import type { LaneFigures } from './lane.js';
import { createLeftOut } from './left-out.js';
import { createLists } from './lists.js';
import { createMeter } from './meter.js';
import { createOutlet, type Memory, type Outlet } from './outlet.js';
import { deliverRecipient, type Delivered, type Desk } from './recipient.js';
import { createSignal } from '../lib/signal.js';
import { createSlots } from './slots.js';
import { createStops } from './stops.js';
import { createUnderWay } from './under-way.js';
import { allWritten, createWriter, openReceipt, type Writer } from './writer.js';

/**
 * Takes what waits for one destination out of the outbox and sends it. A recipient is under way from the moment when its
 * rows are read until all that became of them has been written, and for a while longer where a request may still be
 * applied: so nothing is in flight twice at once.
 *
 * The queue is read on from where it was left, every quarter of a second, or second where nothing is expected. Reading goes
 * back when somebody says that there is something new, and begins anew when something comes to be sendable that was passed
 * over, and every ten seconds.
 *
 * While many recipients wait, users and events go in bulk; how many are under way at once follows.
 */
export interface Dispatcher {
  /** Something may have come into the outbox, with this id or a higher one; left out: any. */
  nudge: (lowestId?: number) => void;
  /** Takes nothing new, waits for what is under way. */
  stop: () => Promise<void>;
  /** Writes down what has been noticed: what is refused, and what the destination leaves out. */
  note: () => Promise<void>;
  lanes: () => readonly LaneFigures[];
  /** Marks and events that were acknowledged, a second. */
  acknowledgedPerSecond: () => number;
  /** For how long the last request still counts for a quota. */
  quietMs: () => number;
  /** Null where its users can't be read. */
  compare: Outlet['compare'] | null;
  /** Why nothing is being sent at present, in a sentence; null otherwise. */
  trouble: () => string | null;
}

export interface DispatcherOptions {
  state: State;
  leader: string;
  destinationId: number;
  destinationName: string;
  /** Whether a user may have a userId and an address, and be found by either. */
  isHybrid: boolean;
  port: Port;
  /** Whether a request may begin now that can be open for so long: the lease isn't about to end, and knows of it. */
  mayBegin: (timeoutMs: number) => boolean;
  /** Whether requests in bulk may begin; if not, asks that they soon may. */
  prepareBulk: () => boolean;
  /** Which pipelines recipients were in lately. */
  memory: Memory;
  /** How long to wait before looking again where nothing is expected; `deafMs` unless a command is heard. */
  lookMs: (deafMs: number) => number;
  onLeaseLost: () => void;
  log: Logger;
}

/** How many recipients are under way at once, how many are taken together, and fewer than what are not worth a look. */
const SIZES = {
  single: { most: 300, take: 60, atLeast: 20 },
  bulk: { most: 4_000, take: 1_000, atLeast: 250 },
} as const;
/** More recipients than this make requests in bulk worth their while. */
const BULK_FROM = 2_000;
const COUNT_EVERY_MS = 500;
const LIVE_EVERY_MS = 50;
const MOST_LIVE = 500;
const SOON_MS = 10;
/** Higher than any id. */
const NOTHING = Infinity;
const AFTER_ERROR = { firstMs: 1_000, longestMs: 10_000 };
/** How long a recipient rests whose delivery broke off for a reason that nobody has thought of. */
const AFTER_BUG_MS = 60_000;
/** A request of a lease that was lost may still be applied for so long. */
const LATE_MS = 60_000;

const describeField = (field: string | null): string => (field === LIST ? 'The list' : `The field "${field}"`);
const hasLive = (rows: readonly WaitingRow[]): boolean => rows.some(({ priority }) => priority === 0);

export function startDispatcher(options: DispatcherOptions): Dispatcher {
  const { state, leader, destinationId, destinationName, isHybrid, port, onLeaseLost, log } = options;
  const destination = { destination: destinationName };
  const signal = createSignal();
  const slots = createSlots(SIZES.single.most, signal.notify);
  const acknowledged = createMeter();
  const underWay = createUnderWay();
  const reader = keepReader(state.pool);
  const flush = createFlush(state.pool);
  let stopping = false;
  let isLeaseLost = false;
  let destinationState: QueueRead['state'] = 'active';
  let destinationReason: string | null = null;
  /** The definitions that were paused when the queue was last read. */
  let paused: readonly number[] = [];
  /** The destination refuses everything, which has yet to be written down. */
  let refusal: string | null = null;
  let isDatabaseAway = false;
  let errors = 0;

  const mayBegin = (timeoutMs: number): boolean =>
    !stopping && refusal === null && destinationState === 'active' && options.mayBegin(timeoutMs);
  const leftOut = createLeftOut({
    write: (fields) => noteLeftOut(state, leader, destinationId, fields),
    onNew: (fields) => log.warn(`Fields of what is sent are left out there: ${fields.join(', ')}.`, destination),
  });
  const outlet = createOutlet({
    port,
    mayBegin,
    memory: options.memory,
    onFree: signal.notify,
    onLeftOut: leftOut.hear,
  });

  let countedAt = -Infinity;
  let liveReadAt = -Infinity;
  const bookmark = createBookmark();
  const hear = (lowestId: number): void => {
    bookmark.hear(lowestId);
    signal.notify();
  };

  const openWriter = (settler: Settler): Writer =>
    createWriter({
      commit: async (settlements) => {
        const { left, released } = await settler.settle(settlements);
        isDatabaseAway = false;
        // That may be far behind the bookmark.
        if (released) bookmark.leave(0);
        return left;
      },
      // One more try tells whether another leads by now: then what was under way has to be sent anew.
      givesUp: (error, failures) => error instanceof LeaseLostError || (stopping && failures > 1),
      onFailure: (error) => {
        if (!isDatabaseAway)
          log.failure('What became of some calls cannot be written; trying again', error, destination);
        isDatabaseAway = true;
      },
    });
  /** What became of live calls isn't written behind a thousand others. */
  const openSettler = (): Settler => createSettler(state, leader, { isHybrid });
  const settlers = { live: openSettler(), others: openSettler() };
  const writers = { live: openWriter(settlers.live), others: openWriter(settlers.others) };

  /** What this instance had under way may have come after what the new leader sends. */
  const yieldTo = async (
    recipient: string,
    rows: readonly WaitingRow[],
    settled: readonly Settlement[],
  ): Promise<void> => {
    if (!isLeaseLost) onLeaseLost();
    isLeaseLost = true;
    const sent = new Set(settled.map(({ id }) => id));
    const marks = rows.flatMap((row) => (row.kind === 'm' && sent.has(row.id) ? [row] : []));
    await markAnew(state, destinationId, recipient, marks, LATE_MS);
  };

  const lists = createLists({
    find: (name) => outlet.listOf(name),
    note: (list) => noteList(state, leader, { destinationId, ...list }),
  });

  const stops = createStops({
    read: () => readStreaks(state, destinationId),
    note: (streaks) => noteStreaks(state, leader, destinationId, streaks),
    write: async (stop) => {
      const { key, stopped } = await stopCalls(state, leader, destinationId, stop);
      const what =
        stopped === 'field'
          ? `${describeField(stop.field)} of "${key}" is not sent any more`
          : `The calls of "${key}" wait`;
      log.error(`${what}, until a person resumes it: ${stop.reason}`, destination);
      return stopped;
    },
    onStop: ({ field }) => {
      // Those that are being taken apart for it would have the lane for long.
      if (field !== null) outlet.withdraw([field]);
      signal.notify();
    },
  });
  const desk: Desk = {
    outlet,
    stop: (reason) => {
      if (destinationState === 'active') refusal ??= reason;
      signal.notify();
    },
    listOf: lists.of,
    stopDefinition: (definitionId, reason) => {
      lists.forget(definitionId);
      stops.listGone(definitionId, reason);
    },
    passed: stops.passed,
    refused: stops.refused,
    leavesOut: stops.leavesOut,
  };

  const release = (recipient: string, lowestLeft: number, hasMoved = true): void => {
    const moreFrom = underWay.end(recipient);
    if (moreFrom < NOTHING && hasMoved) hear(moreFrom);
    // Where nothing became of what was taken, nothing would of what comes after it: not at once.
    bookmark.leave(hasMoved ? lowestLeft : Math.min(lowestLeft, moreFrom));
  };
  const end = (
    recipient: string,
    rows: readonly WaitingRow[],
    { lookAgain, restMs }: Delivered,
    hasMoved = true,
  ): void => {
    if (restMs === 0) {
      // The first row has the lowest id.
      const ownFrom = rows[0]?.id ?? NOTHING;
      release(recipient, lookAgain ? ownFrom : NOTHING, hasMoved);
      return;
    }
    underWay.rest(recipient, restMs);
    setTimeout(() => release(recipient, 0), restMs).unref();
  };

  const brokeOff = (error: unknown): void =>
    log.failure('A delivery broke off; its calls stay in the outbox', error, destination);

  /** Delivers to one recipient, who is under way until it is written down what became of it. */
  const deliver = async (recipient: string, rows: readonly WaitingRow[]): Promise<void> => {
    const settled: Settlement[] = [];
    const receipt = openReceipt();
    const writer = hasLive(rows) ? writers.live : writers.others;
    const settle = (settlement: Settlement): void => {
      settled.push(settlement);
      if (settlement.kind === 'acknowledged') acknowledged.count(1, performance.now());
      writer.write(settlement, receipt);
    };
    try {
      const delivered = await deliverRecipient(desk, settle, recipient, rows);
      await allWritten(receipt);
      end(recipient, rows, delivered, settled.length > 0);
    } catch (error) {
      await allWritten(receipt).catch(() => undefined);
      if (error instanceof LeaseLostError) await yieldTo(recipient, rows, settled).catch(brokeOff);
      else if (!stopping) brokeOff(error);
      end(recipient, rows, { lookAgain: true, restMs: AFTER_BUG_MS });
    }
  };

  /** Takes recipients of whom nothing is under way, as they wait now. */
  const take = async (seen: QueueRead['rows']): Promise<void> => {
    const { free, resting } = underWay.sort(seen);
    if (resting.length > 0) await holdBack(state.pool, destinationId, resting);
    if (free.length === 0) return;
    const waiting = await reader.use((client) => loadWaiting(client, destinationId, free));
    // Nothing is told that a crash could take back.
    await flush();
    const isLive = (recipient: string): boolean => hasLive(waiting.get(recipient) ?? []);
    for (const recipient of free) underWay.begin(recipient, waiting.get(recipient) ?? []);
    const begin = (recipient: string): Promise<void> => deliver(recipient, waiting.get(recipient) ?? []);
    slots.runNow(free.filter(isLive), begin);
    slots.run(
      free.filter((recipient) => !isLive(recipient)),
      begin,
    );
  };

  const stopForRefusal = async (reason: string): Promise<void> => {
    await stopDestination(state, leader, destinationId, reason);
    [destinationState, destinationReason, refusal] = ['stopped', reason, null];
    log.error(reason, destination);
  };

  /**
   * Bulk while very many recipients wait. Looked at whenever there is more than what was just read; false where it can't
   * be said yet.
   */
  const choosePipeline = async (isMore: boolean): Promise<boolean> => {
    const isBulk = outlet.pipeline() === 'bulk';
    if ((port.update.bulk === null && port.track.bulk === null) || (!isBulk && !isMore)) return true;
    if (performance.now() - countedAt < COUNT_EVERY_MS) return true;
    countedAt = performance.now();
    // What is under way waits, too, until it is settled.
    const recipients = BULK_FROM - slots.taken();
    const waits = { position: bookmark.unread(), recipients };
    const more = outlet.isBusy() || recipients < 0 || (await isMoreWaiting(state.pool, destinationId, waits));
    if (more && !options.prepareBulk()) {
      countedAt = -Infinity;
      setTimeout(signal.notify, SOON_MS);
      return false;
    }
    outlet.setPipeline(more ? 'bulk' : 'single');
    slots.resize(SIZES[outlet.pipeline()].most);
    return true;
  };

  /** Live calls don't wait for a place: those that have arisen are taken beyond what is under way. */
  const takeLive = async (room: Room): Promise<void> => {
    if (slots.spare() === 0 || performance.now() - liveReadAt < LIVE_EVERY_MS) return;
    liveReadAt = performance.now();
    const behind = { position: bookmark.live(), room, limit: MOST_LIVE };
    const read = await reader.use((client) => readQueue(client, destinationId, behind));
    await take(read.rows.filter(({ recipient }) => !underWay.has(recipient)).slice(0, slots.spare()));
  };

  /** How many more calls can be sent in time, beyond those that are about to begin. */
  const roomNow = (): Room => {
    const room = outlet.room();
    const left = (calls: number): number => Math.max(0, calls - slots.waiting());
    return { marks: left(room.marks), lists: left(room.lists), events: left(room.events), asks: left(room.asks) };
  };

  /** Reads the queue once; for how long there is nothing more to do unless something happens. */
  const turn = async (): Promise<number> => {
    if (refusal !== null) await stopForRefusal(refusal);
    await stops.flush();
    const room = roomNow();
    if (!options.mayBegin(0) || isShut(room)) return LOOK_EVERY_MS;
    const { take: most, atLeast } = SIZES[outlet.pipeline()];
    const isFull = slots.free() < atLeast && slots.taken() > 0;
    // Loading a thousand recipients takes a while, too.
    if (isFull || outlet.pipeline() === 'bulk') await takeLive(room);
    if (isFull) {
      await choosePipeline(true);
      return slots.free() < atLeast ? LOOK_EVERY_MS : 0;
    }

    const position = bookmark.next(room, performance.now());
    if (position === null) return bookmark.restMs(performance.now());
    const limit = outlet.isTrying() ? 1 : Math.min(most, slots.free(), underWay.room());
    const read = await reader.use((client) => readQueue(client, destinationId, { position, room, limit }));
    if ((read.state === 'active' && destinationState !== 'active') || String(read.paused) !== String(paused))
      bookmark.hear(0);
    [destinationState, destinationReason, paused] = [read.state, read.reason, read.paused];
    stops.heed({ definitions: paused, fields: read.stoppedFields });
    if (!(await choosePipeline(!read.isEnd))) return LOOK_EVERY_MS;
    await take(read.rows);
    isDatabaseAway = false;
    bookmark.advance(read, slots.taken() === 0 ? options.lookMs(LOOK_EVERY_MS) : LOOK_EVERY_MS);
    return bookmark.restMs(performance.now());
  };

  const loop = async (): Promise<void> => {
    while (!stopping) {
      try {
        const restMs = await turn();
        errors = 0;
        if (restMs > 0) await signal.wait(Math.ceil(restMs));
      } catch (error) {
        bookmark.hear(0);
        if (error instanceof LeaseLostError) {
          await signal.wait(LOOK_EVERY_MS);
          continue;
        }
        if (errors === 0) log.failure('The outbox cannot be read; trying again', error, destination);
        errors += 1;
        isDatabaseAway = true;
        await signal.wait(backoffMs(errors, AFTER_ERROR, Math.random()));
      }
    }
  };
  const looping = loop();

  return {
    nudge: (lowestId = 0) => hear(lowestId),
    stop: async () => {
      stopping = true;
      signal.notify();
      await looping;
      reader.close();
      while (slots.taken() > 0) await signal.wait(LOOK_EVERY_MS);
      for (const settler of Object.values(settlers)) settler.close();
    },
    note: async () => {
      await stops.note();
      await leftOut.note();
    },
    lanes: outlet.figures,
    acknowledgedPerSecond: () => acknowledged.perSecond(performance.now()),
    quietMs: outlet.quietMs,
    compare: port.users === null ? null : outlet.compare,
    trouble: () => {
      if (isDatabaseAway) return 'The state database is out of reach.';
      if (destinationState === 'paused') return 'The destination is paused.';
      if (destinationState === 'stopped') return destinationReason;
      return outlet.trouble();
    },
  };
}
