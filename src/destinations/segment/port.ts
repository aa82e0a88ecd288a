import { formatCall } from '../../core/call.js';
import { SINGLE_REQUEST_MS } from '../../core/timeouts.js';
import type { BatchVerdict } from '../../core/verdict.js';
import type { Secret } from '../../lib/secret.js';
import { failedWith, readRetryAfter, scrubAnswer, unanswered } from '../answer.js';
import { plain, type Answer, type Carrier, type Item, type Port } from '../carrier.js';
import { createHttpClient } from '../client.js';

/**
 * Segment's HTTP tracking API (https://segment.com/docs/connections/sources/catalog/libraries/server/http-api/), which
 * RudderStack and Jitsu take as well: calls of every kind in one batch of at most 500 KB, each of at most 32 KB. A batch
 * is answered as a whole, and whatever it says in a success, its calls are accepted.
 */
export interface SegmentPortOptions {
  /** Without `/v1`. */
  baseUrl: string;
  writeKey: Secret;
  /** Tells one installation's calls from another's. */
  namespace: string;
  quotas: { batch: number };
}

const MOST = 500;
const MOST_BYTES = 500_000;
const MOST_CALL_BYTES = 32_000;
const EMPTY = '{"batch":[]}';

export function judgeSegment(answer: Answer, _: readonly Item[], now: number): BatchVerdict {
  if (answer.kind === 'lost') return { kind: 'whole', verdict: unanswered(answer) };
  const { status, body, retryAfter } = answer;
  const waitMs = readRetryAfter(retryAfter, now);
  if (status >= 200 && status < 300) return { kind: 'whole', verdict: { kind: 'acknowledged' } };
  if (status === 429) return { kind: 'whole', verdict: { kind: 'slower', waitMs } };
  if (status >= 500 || status === 408) {
    const verdict = failedWith(status, body, waitMs);
    return { kind: verdict.late ? 'whole' : 'failed', verdict };
  }
  if (status < 400 || status === 401 || status === 403 || status === 404) {
    const what =
      status < 400 ? 'a redirect, which is not followed' : status === 404 ? 'no such endpoint' : 'no to the write key';
    return { kind: 'whole', verdict: { kind: 'stop', reason: `The destination says ${what} (HTTP ${status}).` } };
  }
  const verdict = { kind: 'refused', about: 'content', reason: `HTTP ${status}`, field: null } as const;
  return { kind: 'divide', verdict: { ...verdict, answer: scrubAnswer(body) }, field: null };
}

export function createSegmentPort({ baseUrl, writeKey, namespace, quotas }: SegmentPortOptions): Port {
  const client = createHttpClient({
    baseUrl,
    key: writeKey,
    authorise: (key) => ({ authorization: `Basic ${Buffer.from(`${key}:`).toString('base64')}` }),
  });
  const carrier: Carrier = {
    name: 'batch',
    perSecond: quotas.batch,
    most: MOST,
    bytes: MOST_BYTES,
    overhead: EMPTY.length,
    timeoutMs: SINGLE_REQUEST_MS,
    request: (items) => ({
      method: 'POST',
      path: '/v1/batch',
      body: `{"batch":[${items.map(({ text }) => text).join(',')}]}`,
      timeoutMs: SINGLE_REQUEST_MS,
    }),
    judge: judgeSegment,
  };
  const write = (call: Parameters<typeof formatCall>[0]): string => formatCall(call, namespace, { anonymous: true });
  const itemOf = (calls: readonly Parameters<typeof formatCall>[0][]): Item => {
    const texts = calls.map(write);
    const text = texts.join(',');
    // All that one recipient is told at once may be too much for a batch of its own.
    const isTooLarge =
      texts.some((each) => Buffer.byteLength(each) > MOST_CALL_BYTES) ||
      EMPTY.length + Buffer.byteLength(text) > MOST_BYTES;
    return { ...plain(text), isTooLarge };
  };
  return {
    update: { item: itemOf, single: carrier, bulk: null },
    track: { item: (call) => itemOf([call]), single: carrier, bulk: null },
    users: null,
    lists: null,
    transmit: client.send,
    close: client.close,
  };
}
