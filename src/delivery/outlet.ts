import { performance } from 'node:perf_hooks';
import type { ExpectedValue, ListChange, TrackCall, UserFound, UserUpdate } from '../core/call.js';
import type { Verdict } from '../core/verdict.js';
import { unreadable } from '../destinations/answer.js';
import type { Carrier, Port, Way } from '../destinations/carrier.js';
import { createLane, type Lane, type LaneFigures } from './lane.js';
import { createRecency, type Pipeline, type Recency } from './recency.js';

/** now: live, each by itself · soon: at the head of the next request · later: when its turn comes */
export type Urgency = 'now' | 'soon' | 'later';

/**
 * All lanes of one destination, and which of them a call takes. Where users or events have a single and a bulk way in,
 * the destination's pipeline decides; live calls go singly where they can. Recipients who were sent something within the
 * last minute stay in the pipeline that they are in, since the two are handled apart.
 */
export interface Outlet {
  /** Null where the call is given back, and goes again: its turn didn't come in time, it may not begin, the quota was met. */
  update: (calls: UserUpdate, urgency: Urgency) => Promise<Verdict | null>;
  track: (call: TrackCall, urgency: Urgency) => Promise<Verdict | null>;
  /** Gives back updates with one of these columns that aren't open. */
  withdraw: (fields: readonly string[]) => void;
  /** Whether the recipient is known there. */
  find: (recipient: string) => Promise<{ kind: 'there' } | { kind: 'absent' } | Verdict | null>;
  /** What a recipient has there; 'later' where it can't be read now, 'never' where the read is refused. */
  compare: (recipient: string, expected: readonly ExpectedValue[]) => Promise<UserFound | 'later' | 'never'>;
  list: (change: ListChange, urgency: Urgency) => Promise<Verdict | null>;
  /** The id of the list of that name, which is made where there is none. */
  listOf: (name: string) => Promise<{ kind: 'list'; id: number } | Verdict | null>;
  setPipeline: (pipeline: Pipeline) => void;
  pipeline: () => Pipeline;
  /** How many more calls of each kind can be sent in time: none where their lane is closed. */
  room: () => { marks: number; lists: number; events: number; asks: number };
  /** Whether more is sent than could go singly. */
  isBusy: () => boolean;
  /** No lane for users and events is open: those that aren't closed try one request at a time. */
  isTrying: () => boolean;
  trouble: () => string | null;
  quietMs: () => number;
  figures: () => readonly LaneFigures[];
}

export interface OutletOptions {
  port: Port;
  /** Whether a request may begin now that can be open for so long. */
  mayBegin: (timeoutMs: number) => boolean;
  memory: Memory;
  onFree: () => void;
  /** The destination has left these fields out of what it was sent. */
  onLeftOut: (fields: readonly string[]) => void;
}

/** Five requests of a thousand users a second, and ten of events, for a minute; a third more, so that it is seldom full. */
const MOST_USERS = 390_000;
const MOST_EVENTS = 780_000;
/** The share of the quota for single requests beyond which calls go on in bulk. */
const BUSY = 0.8;

interface Lanes {
  single: Lane;
  bulk: Lane | null;
  recency: Recency;
}

/** Which pipelines a destination's users and events were in; it outlives an outlet. */
export interface Memory {
  users: Recency;
  events: Recency;
}

/** `bulkAgoMs` is how long ago something that an earlier leader sent in bulk may have taken effect. */
export function createMemory(bulkAgoMs: number): Memory {
  const now = performance.now();
  const create = (most: number): Recency => {
    const recency = createRecency(most, now);
    recency.assumeBulk(now - bulkAgoMs);
    return recency;
  };
  return { users: create(MOST_USERS), events: create(MOST_EVENTS) };
}

export function createOutlet({ port, mayBegin, memory, onFree, onLeftOut }: OutletOptions): Outlet {
  const now = (): number => performance.now();
  const lanes = new Map<Carrier<unknown>, Lane<unknown>>();
  const laneOf = <R extends { kind: string }>(carrier: Carrier<R>): Lane<R> => {
    const known = lanes.get(carrier);
    if (known !== undefined) return known as Lane<R>;
    const { timeoutMs } = carrier;
    const { transmit } = port;
    const lane = createLane({ carrier, transmit, mayBegin: () => mayBegin(timeoutMs), onFree, onLeftOut });
    lanes.set(carrier, lane);
    return lane;
  };
  let pipeline: Pipeline = 'single';

  const open = <C>({ single, bulk }: Way<C>, recency: Recency): Lanes => {
    return { single: laneOf(single), bulk: bulk === null ? null : laneOf(bulk), recency };
  };
  const updates = open(port.update, memory.users);
  const tracks = open(port.track, memory.events);
  const asks = port.users === null ? null : { ...port.users, lane: laneOf(port.users.carrier) };
  const lists =
    port.lists === null ? null : { ...port.lists, lane: laneOf(port.lists.carrier), read: laneOf(port.lists.reads) };

  const roomOf = (lane: Lane<unknown>): number => (lane.state() === 'closed' ? 0 : lane.room());
  const currentOf = ({ single, bulk }: Lanes): Lane => (pipeline === 'bulk' && bulk !== null ? bulk : single);
  const send = <C>(
    way: Way<C>,
    { single, bulk, recency }: Lanes,
    { call, recipient, urgency }: { call: C; recipient: string; urgency: Urgency },
  ): Promise<Verdict | null> => {
    const urgent = urgency !== 'later';
    if (bulk === null) return single.send(way.item(call), urgent);
    // The quota for single requests is idle while others go in bulk: live calls go by whichever is sooner.
    const current = urgency === 'now' && roomOf(single) > 0 && single.waitMs() <= bulk.waitMs() ? 'single' : pipeline;
    const taken = recency.pipelineOf(recipient, now()) ?? current;
    // From now on: a call that is given back may have been sent, and to have failed.
    recency.note(recipient, taken, now());
    // Not awaited, which would hold the call itself until then, for thousands of recipients.
    return (taken === 'bulk' ? bulk : single).send(way.item(call), urgent).then((verdict) => {
      if (verdict !== null) recency.note(recipient, taken, now());
      return verdict;
    });
  };

  const isBusy = ({ single, bulk }: Lanes): boolean => {
    if (bulk === null) return false;
    return single.takenPerSecond() + bulk.takenPerSecond() > BUSY * single.figures().allowed;
  };

  const all = (): readonly Lane<unknown>[] => [...lanes.values()];

  return {
    update: (calls, urgency) => send(port.update, updates, { call: calls, recipient: calls[0].recipient, urgency }),
    track: (call, urgency) => send(port.track, tracks, { call, recipient: call.recipient, urgency }),
    withdraw: (fields) => {
      for (const lane of [updates.single, updates.bulk]) lane?.withdraw(fields);
    },
    find: async (recipient) => {
      if (asks === null) return { kind: 'there' };
      const read = await asks.lane.send(asks.item(recipient), false);
      return read?.kind === 'read' ? { kind: asks.isThere(read) ? 'there' : 'absent' } : read;
    },
    compare: async (recipient, expected) => {
      if (asks === null) return 'never';
      const read = await asks.lane.send(asks.item(recipient), false);
      if (read?.kind === 'read') return asks.compare(read, expected);
      return read === null || read.kind === 'again' || read.kind === 'slower' ? 'later' : 'never';
    },
    list: async (change, urgency) => {
      if (lists === null) throw new Error('This destination has no lists.');
      const verdict = await lists.lane.send(lists.change(change), urgency !== 'later');
      return verdict?.kind === 'read' ? null : verdict;
    },
    listOf: async (name) => {
      if (lists === null) throw new Error('This destination has no lists.');
      const read = await lists.read.send(lists.all, false);
      if (read?.kind !== 'read') return read;
      const known = lists.find(read, name);
      if (known !== null) return { kind: 'list', id: known };
      const made = await lists.lane.send(lists.create(name), false);
      if (made?.kind !== 'read') return made;
      const id = lists.made(made);
      return id === null ? unreadable(made.body) : { kind: 'list', id };
    },
    setPipeline: (next) => {
      pipeline = next;
    },
    pipeline: () => pipeline,
    room: () => ({
      marks: roomOf(currentOf(updates)),
      events: roomOf(currentOf(tracks)),
      lists: lists === null ? Infinity : roomOf(lists.lane),
      asks: asks === null ? Infinity : roomOf(asks.lane),
    }),
    isBusy: () => pipeline === 'bulk' && [updates, tracks].some(isBusy),
    isTrying: () => [updates, tracks].every((lanes) => currentOf(lanes).state() !== 'open'),
    trouble: () => all().reduce<string | null>((found, lane) => found ?? lane.trouble(), null),
    quietMs: () => Math.max(...all().map((lane) => lane.quietMs())),
    figures: () => all().map((lane) => lane.figures()),
  };
}
