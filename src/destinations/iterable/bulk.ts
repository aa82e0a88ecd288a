import type { BatchVerdict, Refusal, Verdict } from '../../core/verdict.js';
import { readObject, scrubAnswer, unreadable } from '../answer.js';
import type { Answer, Item } from '../carrier.js';
import { DISALLOWED, hasFailed, judgeAnswer } from './verdict.js';

/**
 * What the answer to a bulk request says of each of its calls (https://api.iterable.com/api/docs, BulkUserUpdateResponse
 * and TrackBulkEventsResponse). HTTP 200 says nothing: those that failed are named by their identifiers, and only the
 * counts tell whether all of them were. An answer that doesn't add up, or that names somebody who wasn't sent, says
 * nothing of anybody: the calls go again in halves.
 */
interface Kind {
  about: Refusal;
  reason: (by: 'email' | 'userId') => string;
}

/** The lists of `failedUpdates`, without their ending `Emails` or `UserIds`, and the codes that single calls get. */
const KINDS: Readonly<Record<string, Kind>> = {
  invalid: { about: 'person', reason: (by) => (by === 'email' ? 'InvalidEmailAddressError' : 'InvalidUserIdError') },
  notFound: { about: 'unknown', reason: (by) => (by === 'email' ? 'UnknownEmailError' : 'UnknownUserIdError') },
  invalidData: { about: 'content', reason: () => 'InvalidData' },
  conflict: { about: 'conflict', reason: () => 'ExternalKeyConflict' },
  forgotten: { about: 'person', reason: () => 'ForgottenUserError' },
};
const ENDINGS = [
  ['email', 'Emails'],
  ['userId', 'UserIds'],
] as const;

const ACKNOWLEDGED: Verdict = { kind: 'acknowledged' };

const texts = (value: unknown): readonly string[] =>
  Array.isArray(value) ? value.filter((each) => typeof each === 'string') : [];

const asObject = (value: unknown): Readonly<Record<string, unknown>> =>
  typeof value === 'object' && value !== null ? (value as Record<string, unknown>) : {};

/** Names as an item has them, with what is said of them. */
function failuresOf(
  body: Readonly<Record<string, unknown>>,
): ReadonlyMap<string, { kind: Kind; by: 'email' | 'userId' }> {
  const failed = asObject(body['failedUpdates']);
  const failures = new Map<string, { kind: Kind; by: 'email' | 'userId' }>();
  for (const [name, kind] of Object.entries(KINDS)) {
    for (const [by, ending] of ENDINGS) {
      const list = `${name}${ending}`;
      // The invalid ones stand at the top, too; older answers have them there alone.
      for (const identifier of [...texts(failed[list]), ...texts(body[list])]) {
        failures.set(by === 'email' ? `e:${identifier.toLowerCase()}` : `u:${identifier}`, { kind, by });
      }
    }
  }
  return failures;
}

/** `isLeft`: of an unsubscription, whoever isn't known is on no list. */
function judgeEach(
  body: Readonly<Record<string, unknown>>,
  items: readonly Item[],
  isLeft: boolean,
): BatchVerdict | null {
  const { successCount, failCount } = body;
  if (typeof successCount !== 'number') return null;
  const failures = failuresOf(body);
  const disallowed = new Set(texts(body['disallowedEventNames']));
  const named = new Set<string>();
  let [failed, barred] = [0, 0];
  // What is kept of an answer is what it says of this one call: the others are other people.
  const verdicts = items.map(({ names, event }): Verdict => {
    if (failures.size === 0 && disallowed.size === 0) return ACKNOWLEDGED;
    const name = names.find((each) => failures.has(each));
    const failure = name === undefined ? undefined : failures.get(name);
    if (name !== undefined && failure !== undefined) {
      failed += 1;
      named.add(name);
      const reason = failure.kind.reason(failure.by);
      if (isLeft && failure.kind.about === 'unknown') return ACKNOWLEDGED;
      return { kind: 'refused', about: failure.kind.about, reason, field: null, answer: scrubAnswer(reason) };
    }
    if (event !== null && disallowed.has(event)) {
      barred += 1;
      return { ...DISALLOWED, answer: scrubAnswer(`disallowedEventNames: ${event}`) };
    }
    return ACKNOWLEDGED;
  });
  const strangers = [...failures.keys()].filter((name) => !named.has(name));
  const isCounted =
    successCount === items.length - failed - barred &&
    (typeof failCount !== 'number' || failCount === failed || failCount === failed + barred);
  // Two names of one call may both be told: the second is no stranger.
  if (!isCounted || strangers.some((name) => !items.some(({ names }) => names.includes(name)))) return null;
  return { kind: 'each', verdicts, dropped: texts(body['filteredOutFields']) };
}

/** Judges the answer to a request that carries `items`; `now` is its arrival, in milliseconds since 1970. */
export function judgeBulk(answer: Answer, items: readonly Item[], now: number, isLeft = false): BatchVerdict {
  const verdict = judgeAnswer(answer, [...new Set(items.flatMap(({ fields }) => fields))], now);
  if (hasFailed(answer, verdict)) return { kind: 'failed', verdict };
  switch (verdict.kind) {
    case 'refused':
      return { kind: 'divide', verdict, field: verdict.field };
    case 'again':
    case 'slower':
    case 'gone':
    case 'stop':
      return { kind: 'whole', verdict };
    case 'acknowledged': {
      const text = answer.kind === 'answered' ? answer.body : '';
      const body = readObject(text);
      const judged = body === null ? null : judgeEach(body, items, isLeft);
      return judged ?? { kind: 'divide', verdict: unreadable(text), field: null };
    }
  }
}
