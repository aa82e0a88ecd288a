import { describe, expect, it } from 'vitest';
import { createBookmark, isShut, type Bookmark } from '../src/delivery/bookmark.js';
import { START, type Position, type Room } from '../src/outbox/reader.js';

const OPEN: Room = { marks: 10, lists: 10, events: 10, asks: 10 };
const NO_MARKS: Room = { ...OPEN, marks: 0 };

const at = (live: number, scheduled: number, backfill: number): Position => ({
  new: [live, scheduled, backfill],
  waited: { dueAt: '2026-11-01 00:00:00+00', id: 1 },
});

/** A bookmark at the end of a queue that has been read at 0 ms, up to `position`. */
function readToTheEnd(position: Position, nextMs = Infinity, mostMs = 250): Bookmark {
  const bookmark = createBookmark();
  bookmark.next(OPEN, 0);
  bookmark.advance({ position, isEnd: true, nextMs }, mostMs);
  return bookmark;
}

describe('the queue is read', () => {
  it('from its start at first', () => {
    expect(createBookmark().next(OPEN, 0)).toBe(START);
  });

  it('on from where it was read to, at once, while there is more', () => {
    const bookmark = createBookmark();
    bookmark.next(OPEN, 0);
    bookmark.advance({ position: at(3, 2, 1), isEnd: false, nextMs: Infinity }, 250);
    expect(bookmark.restMs(1)).toBe(0);
    expect(bookmark.next(OPEN, 1)).toEqual(at(3, 2, 1));
  });

  it('not again once it was read to its end, for a quarter of a second', () => {
    const bookmark = readToTheEnd(at(9, 9, 9));
    expect(bookmark.next(OPEN, 100)).toBeNull();
    expect(bookmark.restMs(100)).toBe(150);
    expect(bookmark.next(OPEN, 250)).toEqual(at(9, 9, 9));
  });

  it('later where nothing is expected, but when something is due', () => {
    expect(readToTheEnd(at(9, 9, 9), Infinity, 1_000).restMs(0)).toBe(1_000);
    expect(readToTheEnd(at(9, 9, 9), 600, 1_000).restMs(0)).toBe(600);
    expect(readToTheEnd(at(9, 9, 9), 10, 1_000).restMs(0)).toBe(250);
  });

  it('after a quarter of a second where something was given back, whatever else is expected', () => {
    const bookmark = readToTheEnd(at(9, 9, 9), Infinity, 1_000);
    bookmark.leave(3);
    expect(bookmark.restMs(0)).toBe(250);
    expect(bookmark.next(OPEN, 251)).toEqual(at(2, 2, 2));
  });

  it('at once where somebody says so, though nothing is new', () => {
    const bookmark = readToTheEnd(at(9, 9, 9), Infinity, 1_000);
    bookmark.hear(Infinity);
    expect(bookmark.restMs(1)).toBe(0);
    expect(bookmark.next(OPEN, 1)).toEqual(at(9, 9, 9));
    bookmark.advance({ position: at(9, 9, 9), isEnd: true, nextMs: Infinity }, 1_000);
    expect(bookmark.next(OPEN, 2)).toBeNull();
  });

  it('at once from what is new', () => {
    const bookmark = readToTheEnd(at(9, 9, 9));
    bookmark.hear(8);
    bookmark.hear(5);
    expect(bookmark.restMs(1)).toBe(0);
    expect(bookmark.next(OPEN, 1)).toEqual(at(4, 4, 4));
  });

  it('no further back than it was', () => {
    const bookmark = readToTheEnd(at(9, 2, 9));
    bookmark.hear(6);
    expect(bookmark.next(OPEN, 1)).toEqual(at(5, 2, 5));
  });

  it('from its start where anything may be new, and every ten seconds', () => {
    const bookmark = readToTheEnd(at(9, 9, 9));
    bookmark.hear(0);
    expect(bookmark.next(OPEN, 1)).toBe(START);
    bookmark.advance({ position: at(9, 9, 9), isEnd: true, nextMs: Infinity }, 250);
    expect(bookmark.next(OPEN, 10_001)).toEqual(at(9, 9, 9));
    expect(bookmark.next(OPEN, 10_002)).toBe(START);
  });

  it('a quarter of a second later from what was given back', () => {
    const bookmark = createBookmark();
    bookmark.next(OPEN, 0);
    bookmark.advance({ position: at(9, 9, 9), isEnd: false, nextMs: Infinity }, 250);
    bookmark.leave(4);
    expect(bookmark.next(OPEN, 200)).toEqual(at(9, 9, 9));
    bookmark.advance({ position: at(9, 9, 9), isEnd: false, nextMs: Infinity }, 250);
    expect(bookmark.next(OPEN, 251)).toEqual(at(3, 3, 3));
    bookmark.advance({ position: at(9, 9, 9), isEnd: false, nextMs: Infinity }, 250);
    expect(bookmark.next(OPEN, 502)).toEqual(at(9, 9, 9));
  });
});

describe('what there is no room for', () => {
  it('is passed over, and read from there on when there is room again', () => {
    const bookmark = readToTheEnd(at(1, 1, 1));
    bookmark.hear(2);
    expect(bookmark.next(NO_MARKS, 1)).toEqual(at(1, 1, 1));
    bookmark.advance({ position: at(7, 7, 7), isEnd: true, nextMs: Infinity }, 250);
    expect(bookmark.unread()).toEqual(at(1, 1, 1));
    expect(bookmark.next(OPEN, 2)).toEqual(at(1, 1, 1));
    bookmark.advance({ position: at(7, 7, 7), isEnd: true, nextMs: Infinity }, 250);
    expect(bookmark.next(OPEN, 3)).toBeNull();
    expect(bookmark.unread()).toEqual(at(7, 7, 7));
  });

  it('is not forgotten when something older comes to be new meanwhile', () => {
    const bookmark = readToTheEnd(at(5, 5, 5));
    bookmark.hear(6);
    bookmark.next(NO_MARKS, 1);
    bookmark.advance({ position: at(7, 7, 7), isEnd: true, nextMs: Infinity }, 250);
    bookmark.hear(3);
    expect(bookmark.next(NO_MARKS, 2)).toEqual(at(2, 2, 2));
    bookmark.advance({ position: at(9, 9, 9), isEnd: true, nextMs: Infinity }, 250);
    expect(bookmark.next(OPEN, 3)).toEqual(at(2, 2, 2));
  });

  it('is still passed over while another kind has room again', () => {
    const bookmark = readToTheEnd(at(5, 5, 5));
    bookmark.hear(6);
    bookmark.next({ ...NO_MARKS, events: 0 }, 1);
    bookmark.advance({ position: at(8, 8, 8), isEnd: true, nextMs: Infinity }, 250);
    expect(bookmark.next(NO_MARKS, 2)).toEqual(at(5, 5, 5));
    bookmark.advance({ position: at(8, 8, 8), isEnd: true, nextMs: Infinity }, 250);
    expect(bookmark.next(OPEN, 3)).toEqual(at(5, 5, 5));
  });
});

describe('live calls', () => {
  it('alone are looked for behind what was read, without moving on', () => {
    const bookmark = readToTheEnd(at(9, 9, 9));
    bookmark.hear(6);
    const most = Number.MAX_SAFE_INTEGER;
    expect(bookmark.live().new).toEqual([5, most, most]);
    expect(bookmark.next(OPEN, 1)).toEqual(at(5, 5, 5));
  });
});

it('nothing can be sent where there is room for no kind', () => {
  expect(isShut({ marks: 0, lists: 0, events: 0, asks: 0 })).toBe(true);
  expect(isShut({ ...NO_MARKS, lists: 0, events: 1, asks: 0 })).toBe(false);
});
