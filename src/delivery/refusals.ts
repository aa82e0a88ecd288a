import type { Refusal } from '../core/verdict.js';
import { FIELD_STOPPED } from '../outbox/dead.js';
import type { WaitingRow } from '../outbox/queue.js';
import type { Settlement } from '../outbox/settle.js';
import { mayPass, type Refused } from './attempts.js';

/**
 * How a refusal is written down: whether it is tried again by itself, and whether the destination takes no more calls for
 * this person. And the refusals of what isn't sent, since the answer is known.
 */
/** A refusal of an identifier or a full project may pass; one of the content won't by itself. */
const PASSING_RETRY_MS = 24 * 3_600_000;
const PROJECT_IS_FULL = 'UniqueFieldsLimitExceeded';
/** Iterable erases people on request, and then takes no call for them. */
const FORGOTTEN = 'ForgottenUserError';

const unsent = (about: Refusal, reason: string, because: string): Refused => ({
  kind: 'refused',
  about,
  reason,
  field: null,
  answer: `Not sent: ${because}`,
});

export const KNOWN_TO_BE_FORGOTTEN = unsent(
  'person',
  FORGOTTEN,
  'an earlier call was refused because the destination has forgotten this person.',
);
/** What is refused for everybody isn't sent again and again. */
export const LEFT_OUT = unsent('content', FIELD_STOPPED, 'this field was refused a hundred times in a row.');

/** `columns` null: all of a mark's, or the event. */
export function refusalOf(
  { id, version }: Pick<WaitingRow, 'id' | 'version'>,
  columns: readonly string[] | null,
  { about, reason, answer }: Refused,
  recipient: string,
): Settlement {
  const retryAfterMs = mayPass(about) || reason === PROJECT_IS_FULL ? PASSING_RETRY_MS : null;
  const forgotten = reason === FORGOTTEN ? recipient : null;
  return { kind: 'refused', id, version, columns, reason, answer, retryAfterMs, forgotten };
}
