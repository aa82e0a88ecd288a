import type { BatchVerdict, Refusal, Verdict } from '../../core/verdict.js';
import { failedWith, inRange, readObject, readRetryAfter, scrubAnswer, unanswered, unreadable } from '../answer.js';
import type { Answer, Read } from '../carrier.js';

/**
 * What Iterable's answer to a single call means. Judged by the HTTP status first: `Success` has been seen in the body of
 * an error. Codes: https://api.iterable.com/api/docs (components, IterableApiResponse). An error's body may be JSON, HTML
 * or plain text.
 */
/** What each code of a refusal concerns; a code that isn't here concerns the content, and under 409 a conflict. */
const ABOUT: Readonly<Record<string, Refusal>> = {
  DatabaseError: 'trouble',
  EmailAlreadyExists: 'conflict',
  ExternalKeyConflict: 'conflict',
  UserIdAlreadyExists: 'conflict',
  ForgottenUserError: 'person',
  GenericError: 'trouble',
  InvalidEmailAddressError: 'person',
  InvalidUserIdError: 'person',
  QueueEmailError: 'trouble',
  UnknownEmailError: 'unknown',
  UnknownUserIdError: 'unknown',
};
const CREDENTIALS = new Set([
  'BadApiKey',
  'BadAuthorizationHeader',
  'Forbidden',
  'InvalidJwtPayload',
  'JwtUserIdentifiersMismatched',
  'Unauthorized',
]);

interface Body {
  code: string | null;
  message: string;
  params: Readonly<Record<string, unknown>>;
}

function readBody(text: string): Body | null {
  const object = readObject(text);
  if (object === null) return null;
  const { code, msg, params } = object;
  return {
    // A code is kept and shown: nothing but a word may pass for one.
    code: typeof code === 'string' && /^[A-Za-z]{1,64}$/.test(code) ? code : null,
    message: typeof msg === 'string' ? msg : '',
    params: typeof params === 'object' && params !== null ? (params as Record<string, unknown>) : {},
  };
}

/** The wait that a 429 asks for, in milliseconds; null where it says nothing of use. */
function waitOf(body: Body | null, retryAfter: string | null, now: number): number | null {
  const reset = body?.params['rateLimitReset'];
  const seconds = typeof reset === 'number' || typeof reset === 'string' ? Number(reset) : NaN;
  return (Number.isFinite(seconds) ? inRange(seconds * 1000) : null) ?? readRetryAfter(retryAfter, now);
}

/** The one of `fields` that a refusal names, in its message or its params, itself or by a nested path. */
function namedField({ message, params }: Body, fields: readonly string[]): string | null {
  const said = `${message} ${JSON.stringify(params)} `;
  const named = fields.filter((field) => {
    const name = field.replaceAll(/[.*+?^${}()|[\]\\]/g, '\\$&');
    return new RegExp(`["'\`]${name}(?:\\.[^"'\`]*)?\\\\?["'\`]|dataFields\\.${name}(?![\\w-])`).test(said);
  });
  return named.length === 1 ? (named[0] ?? null) : null;
}

/** Judges the answer to a call that carried `fields`; `now` is its arrival, in milliseconds since 1970. */
export function judgeAnswer(answer: Answer, fields: readonly string[], now: number): Verdict {
  if (answer.kind === 'lost') return unanswered(answer);
  const { status, body: text, retryAfter } = answer;
  const body = readBody(text);
  const code = body?.code ?? null;
  const refused = (about: Refusal, reason: string, field: string | null = null): Verdict => ({
    kind: 'refused',
    about,
    reason,
    field,
    answer: scrubAnswer(text),
  });

  if (status >= 200 && status < 300) {
    return body === null ? unreadable(text) : { kind: 'acknowledged' };
  }
  if (status === 429) return { kind: 'slower', waitMs: waitOf(body, retryAfter, now) };
  if (status === 401 || status === 403) {
    return {
      kind: 'stop',
      reason: `Iterable refused the API key (HTTP ${status}${code === null ? '' : `, ${code}`}).`,
    };
  }
  if (status >= 500 || status === 408) return failedWith(status, text, readRetryAfter(retryAfter, now));
  if (status < 400) {
    const reason = `Iterable answered with a redirect (HTTP ${status}), which is not followed; look at \`region\`.`;
    return { kind: 'stop', reason };
  }
  if (status === 413) return refused('content', 'BatchTooLarge');
  if (status === 404 && (code === null || code === 'NotFound')) {
    return { kind: 'stop', reason: 'Iterable does not know the endpoint (HTTP 404); look at `region`.' };
  }
  if (code !== null && CREDENTIALS.has(code)) {
    return { kind: 'stop', reason: `Iterable refused the API key (HTTP ${status}, ${code}).` };
  }
  if (code === 'RateLimitExceeded') return { kind: 'slower', waitMs: waitOf(body, retryAfter, now) };
  const field = body === null ? null : namedField(body, fields);
  return refused(ABOUT[code ?? ''] ?? (status === 409 ? 'conflict' : 'content'), code ?? `HTTP ${status}`, field);
}

/** Whether a user who was asked for is there: an unknown one is answered with an empty object. */
export function isUserThere({ body }: Read): boolean {
  const user = readObject(body)?.['user'];
  return typeof user === 'object' && user !== null;
}

/**
 * Judges the answer to a request for one user: a read, where it says whether they are there. Somebody whom Iterable calls
 * unknown is not.
 */
export function judgeUser(answer: Answer, now: number): BatchVerdict<Verdict | Read> {
  const object = answer.kind === 'answered' && answer.status === 200 ? readObject(answer.body) : null;
  if (answer.kind === 'answered' && object !== null && ('user' in object || Object.keys(object).length === 0)) {
    return each({ kind: 'read', body: answer.body });
  }
  const verdict = judgeAnswer(answer, [], now);
  if (verdict.kind === 'refused' && verdict.about === 'unknown') return each({ kind: 'read', body: '{}' });
  return judgeOne(answer, verdict);
}

const each = <R>(verdict: R): BatchVerdict<R> => ({ kind: 'each', verdicts: [verdict], dropped: [] });

/** Whether the destination failed at a request, by its own word: it can be sent once more, or in parts. */
export const hasFailed = (answer: Answer, verdict: Verdict): boolean =>
  answer.kind === 'answered' &&
  answer.status >= 400 &&
  ((verdict.kind === 'again' && !verdict.late) || (verdict.kind === 'refused' && verdict.about === 'trouble'));

/** The verdict on a request that carries a single call. */
export function judgeOne(answer: Answer, verdict: Verdict): BatchVerdict {
  if (hasFailed(answer, verdict)) return { kind: 'failed', verdict };
  return verdict.kind === 'refused' || verdict.kind === 'acknowledged' ? each(verdict) : { kind: 'whole', verdict };
}

/** Judges the answer to an event: one whose name the project bars is answered with success, and has no id. */
export function judgeTrack(answer: Answer, now: number): Verdict {
  const verdict = judgeAnswer(answer, [], now);
  if (verdict.kind !== 'acknowledged' || answer.kind === 'lost') return verdict;
  const body = readBody(answer.body);
  if (body === null || 'id' in body.params || !/\bdisallowed\b/.test(body.message)) return verdict;
  return { ...DISALLOWED, answer: scrubAnswer(answer.body) };
}

export const DISALLOWED = { kind: 'refused', about: 'content', reason: 'DisallowedEventName', field: null } as const;
