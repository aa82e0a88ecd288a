import { goBack, liveOnly, START, type Position, type QueueRead, type Room } from '../outbox/reader.js';

/**
 * How far the queue has been read, and from where to read on. Pure: times are milliseconds of one clock that never goes
 * back.
 *
 *   all read, nothing new ──▶ looked at again when something is due, after a quarter of a second at the earliest
 *   something new, given back, or seen of somebody under way ──▶ back to its id
 *   passed over for want of room ──▶ back to there when there is room
 *   every ten seconds ──▶ from the start: transactions commit out of order
 */
export interface Bookmark {
  /** There is something new with this id or a higher one; 0: any; Infinity: nothing, but it is to be looked at again. */
  hear: (lowestId: number) => void;
  /** Something that is due was given back: it is looked at a little later. */
  leave: (lowestId: number) => void;
  /** Where to read on, with so much room; null where nothing can be found. */
  next: (room: Room, now: number) => Position | null;
  /** So far it has been read; after `mostMs` it is looked at again even if nothing is expected. */
  advance: (read: Pick<QueueRead, 'position' | 'isEnd' | 'nextMs'>, mostMs: number) => void;
  /** For how long nothing can be found unless something is heard of, or there is room again. */
  restMs: (now: number) => number;
  /** The live calls that have yet to be read. */
  live: () => Position;
  /** What has yet to be read, all told. */
  unread: () => Position;
}

export const LOOK_EVERY_MS = 250;
const REREAD_EVERY_MS = 10_000;
/** Higher than any id. */
const NOTHING = Infinity;
const WAYS = ['marks', 'lists', 'events', 'asks'] as const;

/** Whether nothing can be sent at all. */
export const isShut = (room: Room): boolean => WAYS.every((way) => room[way] === 0);

export function createBookmark(): Bookmark {
  let position = START;
  let isAtEnd = false;
  let readAt = -Infinity;
  let stalesMs = 0;
  let readAllAt = -Infinity;
  let newFrom = 0;
  let leftFrom = NOTHING;
  let leftReadAt = -Infinity;
  let roomRead: Room = { marks: 0, lists: 0, events: 0, asks: 0 };
  /** From where on there is what was passed over, since there was no room for it. */
  let passedFrom: Position | null = null;

  const restMs = (now: number): number => {
    if (!isAtEnd || newFrom < NOTHING) return 0;
    return Math.max(0, readAt + (leftFrom < NOTHING ? LOOK_EVERY_MS : stalesMs) - now);
  };

  return {
    hear: (lowestId) => {
      newFrom = Math.min(newFrom, lowestId);
      if (lowestId === NOTHING) readAt = -Infinity;
    },
    leave: (lowestId) => {
      leftFrom = Math.min(leftFrom, lowestId);
    },
    next: (room, now) => {
      const isOpened = WAYS.some((way) => room[way] > 0 && roomRead[way] === 0);
      const isAll = now - readAllAt > REREAD_EVERY_MS;
      const isLeftDue = isAll || (leftFrom < NOTHING && now - leftReadAt > LOOK_EVERY_MS);
      if (restMs(now) > 0 && !isOpened && !isLeftDue) return null;

      const from = isAll ? 0 : Math.min(newFrom, isLeftDue ? leftFrom : NOTHING);
      newFrom = NOTHING;
      if (isLeftDue) [leftFrom, leftReadAt] = [NOTHING, now];
      position = goBack(isOpened && passedFrom !== null ? passedFrom : position, from);
      if (isOpened) passedFrom = null;
      if (WAYS.some((way) => room[way] === 0)) passedFrom = goBack(passedFrom ?? position, from);
      if (position === START) readAllAt = now;
      [roomRead, readAt, isAtEnd] = [room, now, false];
      return position;
    },
    advance: (read, mostMs) => {
      ({ position, isEnd: isAtEnd } = read);
      stalesMs = Math.min(mostMs, Math.max(LOOK_EVERY_MS, read.nextMs));
    },
    restMs,
    live: () => liveOnly(goBack(position, newFrom)),
    unread: () => goBack(passedFrom ?? position, newFrom),
  };
}
