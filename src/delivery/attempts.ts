import type { Refusal, Verdict } from '../core/verdict.js';
import { backoffMs } from '../lib/backoff.js';
import type { WaitingRow } from '../outbox/queue.js';
import type { Settlement } from '../outbox/settle.js';

/**
 * When a call that failed is tried again, and when it is given up. `attempts` counts a hundred for each answer that may be
 * another in some minutes, and one for each failure since:
 *
 *   failed ──▶ again, after 1 s … 10 min ──5 failures──▶ each column by itself ──24 failures──▶ refused
 *
 * Only what says something of the call itself is counted: neither an outage nor a neighbour in the same request does. So who
 * has failed so often is to blame, and whatever of it can be delivered has been.
 */
type Again = Extract<Verdict, { kind: 'again' }>;
export type Refused = Extract<Verdict, { kind: 'refused' }>;
export type PutOff = Extract<Settlement, { kind: 'again' }>;
type Tried = Pick<WaitingRow, 'id' | 'version' | 'attempts'>;

const RETRY = { firstMs: 1_000, longestMs: 10 * 60_000 };
/**
 * Iterable is asynchronous: a user whom an update has just made may be unknown to a track for a while. Its own trouble with
 * a call may pass as well.
 */
const WAITED_FOR: ReadonlySet<Refusal> = new Set(['unknown', 'trouble']);
/** How long Iterable may take until it knows of a user. */
const ASYNCHRONOUS_MS = 60_000;
const WAITS_MS = [60_000, 120_000, 300_000];
const WAIT_STEP = 100;
/** Half a minute of failures: what is well in the same update shall wait no longer for what isn't. */
const DOUBTFUL_FROM = 5;
/** An hour or two by the back-off; longer where the destination asks to wait longer. */
const GIVEN_UP_AT = 24;

const failuresOf = ({ attempts }: Pick<Tried, 'attempts'>): number => Math.min(attempts % WAIT_STEP, WAIT_STEP - 2);

/** Whether it has failed so often that its columns are sent one by one. */
export const isDoubtful = (row: Pick<Tried, 'attempts'>): boolean => failuresOf(row) >= DOUBTFUL_FROM;

/** Whether one failure more is the last. */
const isAtItsEnd = (row: Pick<Tried, 'attempts'>): boolean => failuresOf(row) + 1 >= GIVEN_UP_AT;

/** A refusal that may pass by itself within a day. */
export const mayPass = (about: Refusal): boolean => WAITED_FOR.has(about);

/** The refusal that a failure comes to where these calls have failed too often; null where they are tried again. */
export function giveUp(rows: readonly Tried[], { isBlameless, reason, answer }: Again): Refused | null {
  if (isBlameless === true || !rows.every(isAtItsEnd)) return null;
  return { kind: 'refused', about: 'trouble', reason, field: null, answer };
}

/** One more failure. */
export function again(row: Tried, { waitMs, late, isBlameless = false }: Again): PutOff {
  const { id, version, attempts } = row;
  const failures = failuresOf(row);
  const backoff = backoffMs(failures + 1, RETRY, Math.random());
  // A batch that isn't answered isn't to meet again as it was: one of them may be to blame.
  const apart = late && attempts > 0 ? 1 + Math.random() : 1;
  return {
    kind: 'again',
    id,
    version,
    afterMs: isBlameless ? (waitMs === null ? backoff : waitMs * apart) : Math.max(waitMs ?? 0, backoff),
    // What waits for its time is found by its attempts: it has one.
    attempts: isBlameless ? Math.max(1, attempts) : attempts - (attempts % WAIT_STEP) + failures + 1,
    lateMs: late ? waitMs : null,
  };
}

/** One more answer that may be another in some minutes; null where that has been waited for long enough. */
export function waitFor(row: Tried, about: Refusal): PutOff | null {
  const waits = Math.floor(row.attempts / WAIT_STEP);
  const afterMs = mayPass(about) && !isAtItsEnd(row) ? WAITS_MS[waits] : undefined;
  const { id, version } = row;
  return afterMs === undefined
    ? null
    : { kind: 'again', id, version, afterMs, attempts: (waits + 1) * WAIT_STEP, lateMs: null };
}

/** Who isn't there is asked for once more: that is no failure. */
export function askLater({ id, version, attempts }: Tried): PutOff {
  return { kind: 'again', id, version, afterMs: ASYNCHRONOUS_MS, attempts, confirmStage: 2, lateMs: null };
}
