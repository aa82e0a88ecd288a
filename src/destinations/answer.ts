import type { Verdict } from '../core/verdict.js';
import { hideAddresses } from '../lib/logger.js';
import type { Answer } from './carrier.js';

/** What answers of any destination have in common: what of them may be kept, and how long they ask to wait. */
const ANSWER_BYTES = 2_000;
/** A request without an answer may still be applied late; what follows it must come after. */
const LATE_MS = 60_000;
/** No quota takes longer to refill; a longer wait would be a mistake of whoever asks for it. */
const LONGEST_WAIT_MS = 10 * 60_000;

/** A JSON object; null where the text is anything else. */
export function readObject(text: string): Readonly<Record<string, unknown>> | null {
  try {
    const parsed: unknown = JSON.parse(text);
    const isObject = typeof parsed === 'object' && parsed !== null && !Array.isArray(parsed);
    return isObject ? (parsed as Record<string, unknown>) : null;
  } catch {
    return null;
  }
}

/** An answer as it may be kept: 2,000 bytes at most, without addresses of people, and text that PostgreSQL takes. */
export function scrubAnswer(text: string): string {
  const start = text.slice(0, 2 * ANSWER_BYTES);
  // An address that is cut in two would no longer look like one.
  const whole = start.length < text.length ? start.replace(/[^\s"',;:<>]{1,320}$/, '') : start;
  // Control characters: NUL is refused by PostgreSQL.
  const plain = hideAddresses(whole).replaceAll(/[^\P{Cc}\n\r\t]/gu, '\uFFFD');
  const bytes = Buffer.from(plain);
  if (bytes.length <= ANSWER_BYTES) return plain;
  let end = ANSWER_BYTES;
  while (((bytes[end] ?? 0) & 0xc0) === 0x80) end -= 1;
  return bytes.subarray(0, end).toString();
}

type Again = Extract<Verdict, { kind: 'again' }>;

/** No answer came; where the request may have been applied all the same, what follows waits. */
export const unanswered = ({ because, reached }: Extract<Answer, { kind: 'lost' }>): Again => ({
  kind: 'again',
  waitMs: reached ? LATE_MS : null,
  late: reached,
  reason: 'NoAnswer',
  answer: `No answer came (${because}).`,
});

/** A gateway that has given up waiting says nothing of what it waited for. */
const GAVE_UP_WAITING = 504;

/** The destination failed, by its own word. */
export const failedWith = (status: number, body: string, waitMs: number | null): Again => ({
  kind: 'again',
  waitMs: status === GAVE_UP_WAITING ? LATE_MS : waitMs,
  late: status === GAVE_UP_WAITING,
  reason: `HTTP ${status}`,
  answer: scrubAnswer(body),
});

/** A success that isn't told in the destination's own words may be a proxy's: sending again is harmless. */
export const unreadable = (body: string): Again => ({
  kind: 'again',
  waitMs: null,
  late: false,
  reason: 'UnreadableAnswer',
  answer: scrubAnswer(body),
});

export const inRange = (ms: number): number | null => (ms > 0 ? Math.min(ms, LONGEST_WAIT_MS) : null);

/** `Retry-After` in milliseconds from `now`: seconds, or a date. */
export function readRetryAfter(text: string | null, now: number): number | null {
  if (text === null) return null;
  if (/^\s*\d+\s*$/.test(text)) return inRange(Number(text) * 1000);
  const date = Date.parse(text);
  return Number.isFinite(date) ? inRange(date - now) : null;
}
