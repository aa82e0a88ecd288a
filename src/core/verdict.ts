/**
 * What an answer says of a call, and so what becomes of the call:
 *
 *   acknowledged   leaves the outbox
 *   again          an attempt failed: it is due after a wait (null: the back-off); `late` where it may still be applied. Where
 *                  it fails so very often, it is given up for this `reason`. `isBlameless`: nothing else gets through
 *                  either, or others were in the request: that says nothing of this call, and was no attempt
 *   slower         the quota: the lane waits (null: the back-off); the call stays as it was, since this was no attempt
 *   refused        dead, with the answer kept; `about` says whom the refusal concerns, since a merged request may be
 *                  taken apart and a person unknown today may be known in a minute
 *   gone           what the call goes to is there no more: the definition's calls to this destination wait for a person
 *   stop           the destination stops; nothing is lost
 */
export type Verdict =
  | { kind: 'acknowledged' }
  | { kind: 'again'; waitMs: number | null; late: boolean; reason: string; answer: string; isBlameless?: boolean }
  | { kind: 'slower'; waitMs: number | null }
  | { kind: 'refused'; about: Refusal; reason: string; field: string | null; answer: string }
  | { kind: 'gone'; reason: string }
  | { kind: 'stop'; reason: string };

/**
 * content: the values or the event · person: this identifier, for good · conflict: the two identifiers belong to two
 * users · unknown: nobody is known by the identifier, yet · trouble: the destination's own, with this call
 */
export type Refusal = 'content' | 'person' | 'conflict' | 'unknown' | 'trouble';

/**
 * What an answer says of a request that carries several calls:
 *
 *   each     something of each of them, in their order; `dropped` are fields that the destination has left out
 *   whole    the same of all of them
 *   divide   one of them, or their number, is to blame: they go again in parts, those with `field` apart from the others.
 *            One that is alone gets the verdict.
 *   failed   the destination failed, by itself or by one of them. Whoever sends finds out which.
 */
export type BatchVerdict<R = Verdict> =
  | { kind: 'each'; verdicts: readonly R[]; dropped: readonly string[] }
  | { kind: 'whole'; verdict: Verdict }
  | { kind: 'divide'; verdict: Verdict; field: string | null }
  | { kind: 'failed'; verdict: Verdict };
