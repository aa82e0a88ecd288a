import type { IterableDestination } from '../../config/types.js';
import type { ProjectKey } from '../../core/definition.js';
import { BULK_REQUEST_MS, SINGLE_REQUEST_MS } from '../../core/timeouts.js';
import type { BatchVerdict, Verdict } from '../../core/verdict.js';
import type { Secret } from '../../lib/secret.js';
import { readObject } from '../answer.js';
import { plain, type Answer, type Carrier, type HttpRequest, type Item, type Port, type Read } from '../carrier.js';
import { createHttpClient } from '../client.js';
import { judgeBulk } from './bulk.js';
import { compareUser } from './compare.js';
import { addresseeOf, eventText, namesOf, subscriberText, updateText, userPath } from './requests.js';
import { isUserThere, judgeAnswer, judgeOne, judgeTrack, judgeUser } from './verdict.js';

/**
 * Iterable's endpoints as carriers. Single and bulk calls of one kind are two ways in, each with its own quota
 * (https://support.iterable.com/hc/en-us/articles/204780579).
 */
export type IterableQuotas = IterableDestination['quotas'];

export interface IterablePortOptions {
  /** Without `/api`. */
  baseUrl: string;
  apiKey: Secret;
  projectKey: ProjectKey;
  quotas: IterableQuotas;
}

/** Iterable gives no count; this is what integrators use. */
const MOST = 1_000;
const MOST_BYTES = 4_000_000;

const post = (path: string, body: string, timeoutMs = SINGLE_REQUEST_MS): HttpRequest => ({
  method: 'POST',
  path,
  body,
  timeoutMs,
});
const get = (path: string): HttpRequest => ({ method: 'GET', path, body: null, timeoutMs: SINGLE_REQUEST_MS });
const textOf = (items: readonly Item[]): string => items.map(({ text }) => text).join(',');

function single(
  name: string,
  perSecond: number,
  path: string,
  judge: (answer: Answer, item: Item | undefined, now: number) => Verdict,
): Carrier {
  return {
    name,
    perSecond,
    most: 1,
    bytes: MOST_BYTES,
    overhead: 0,
    timeoutMs: SINGLE_REQUEST_MS,
    request: (items) => ({ ...post(path, textOf(items)), isFrequent: true }),
    judge: (answer, [item], now) => judgeOne(answer, judge(answer, item, now)),
  };
}

function bulk(name: string, perSecond: number, path: string, member: string): Carrier {
  const wrap = (text: string): string => `{"${member}":[${text}]}`;
  return {
    name,
    perSecond,
    most: MOST,
    bytes: MOST_BYTES,
    overhead: wrap('').length,
    timeoutMs: BULK_REQUEST_MS,
    request: (items) => post(path, wrap(textOf(items)), BULK_REQUEST_MS),
    judge: judgeBulk,
  };
}

/** What a group of list calls does: they share one lane, since nobody says that they don't share a quota. */
type ListGroup = { kind: 'subscribe'; listId: number; existingOnly: boolean } | { kind: 'unsubscribe'; listId: number };
const CREATE = 'create ';

function listRequest(items: readonly Item[]): HttpRequest {
  const [first] = items;
  if (first === undefined || first.group.startsWith(CREATE)) return post('/api/lists', first?.text ?? '');
  const group = JSON.parse(first.group) as ListGroup;
  // `channelUnsubscribe: true` would unsubscribe people from everything.
  const more =
    group.kind === 'unsubscribe'
      ? ',"channelUnsubscribe":false'
      : group.existingOnly
        ? ',"updateExistingUsersOnly":true'
        : '';
  const body = `{"listId":${group.listId},"subscribers":[${textOf(items)}]${more}}`;
  return post(`/api/lists/${group.kind}`, body);
}

/** Whatever the body is: an endpoint that isn't there shows in the other lanes, too. */
const isListGone = (answer: Answer): boolean => answer.kind === 'answered' && answer.status === 404;

function judgeList(answer: Answer, items: readonly Item[], now: number): BatchVerdict<Verdict | Read> {
  const [first] = items;
  if (first?.group.startsWith(CREATE)) return judgeRead(answer, now);
  if (isListGone(answer)) {
    const { listId } = JSON.parse(first?.group ?? '{}') as ListGroup;
    return { kind: 'whole', verdict: { kind: 'gone', reason: `The list ${listId} is no longer in Iterable.` } };
  }
  return judgeBulk(answer, items, now, first?.group.includes('"unsubscribe"'));
}

/** Any object that comes with a success is what was asked for. */
function judgeRead(answer: Answer, now: number): BatchVerdict<Verdict | Read> {
  const verdict = judgeAnswer(answer, [], now);
  return verdict.kind === 'acknowledged' && answer.kind === 'answered'
    ? { kind: 'each', verdicts: [{ kind: 'read', body: answer.body }], dropped: [] }
    : judgeOne(answer, verdict);
}

/** Reads share a lane: a user, or all lists. */
function readsOf(perSecond: number, judge: Carrier<Verdict | Read>['judge']): Carrier<Verdict | Read> {
  return {
    name: 'reads',
    perSecond,
    most: 1,
    bytes: MOST_BYTES,
    overhead: 0,
    timeoutMs: SINGLE_REQUEST_MS,
    request: (items) => get(textOf(items)),
    judge,
  };
}

const LISTS_PATH = '/api/lists';
function listsOf(read: Read): readonly { id: number; name: string }[] {
  const lists = readObject(read.body)?.['lists'];
  return (Array.isArray(lists) ? (lists as unknown[]) : []).filter(
    (each): each is { id: number; name: string } =>
      typeof each === 'object' && each !== null && 'id' in each && typeof each.id === 'number' && 'name' in each,
  );
}

export function createIterablePort({ baseUrl, apiKey, projectKey, quotas }: IterablePortOptions): Port {
  const client = createHttpClient({
    baseUrl,
    key: apiKey,
    authorise: (key) => ({ 'api-key': key }),
  });
  const reads = readsOf(quotas.reads, (answer, [item], now) =>
    item?.text === LISTS_PATH ? judgeRead(answer, now) : judgeUser(answer, now),
  );
  return {
    update: {
      item: (calls) => ({
        text: updateText(calls, projectKey),
        names: namesOf(addresseeOf(calls)),
        fields: calls.flatMap(({ traits }) => traits.map(({ field }) => field)),
        event: null,
        group: '',
      }),
      single: single('users_update', quotas.usersUpdate, '/api/users/update', (answer, item, now) =>
        judgeAnswer(answer, item?.fields ?? [], now),
      ),
      bulk: bulk('users_bulk_update', quotas.usersBulkUpdate, '/api/users/bulkUpdate', 'users'),
    },
    track: {
      item: (call) => ({
        text: eventText(call, projectKey),
        names: namesOf(call),
        fields: [],
        event: call.event,
        group: '',
      }),
      single: single('events_track', quotas.eventsTrack, '/api/events/track', (answer, _, now) =>
        judgeTrack(answer, now),
      ),
      bulk: bulk('events_track_bulk', quotas.eventsTrackBulk, '/api/events/trackBulk', 'events'),
    },
    users: {
      item: (recipient) => plain(userPath(recipient)),
      carrier: reads,
      isThere: isUserThere,
      compare: compareUser,
    },
    lists: {
      change: (change) => {
        const { recipient, listId, member, existingOnly } = change;
        const group: ListGroup = member ? { kind: 'subscribe', listId, existingOnly } : { kind: 'unsubscribe', listId };
        return {
          text: subscriberText(change, projectKey),
          names: namesOf({ recipient, beside: null }),
          fields: [],
          event: null,
          group: JSON.stringify(group),
        };
      },
      create: (name) => plain(JSON.stringify({ name }), `${CREATE}${name}`),
      carrier: {
        name: 'lists',
        perSecond: quotas.lists,
        most: MOST,
        bytes: MOST_BYTES,
        overhead: 200,
        timeoutMs: SINGLE_REQUEST_MS,
        request: listRequest,
        judge: judgeList,
      },
      all: plain(LISTS_PATH),
      reads,
      find: (read, name) =>
        listsOf(read)
          .filter((list) => list.name === name)
          .reduce<number | null>((least, { id }) => (least === null || id < least ? id : least), null),
      made: (read) => {
        const id = readObject(read.body)?.['listId'];
        return typeof id === 'number' ? id : null;
      },
    },
    transmit: client.send,
    close: client.close,
  };
}

/** The types that the project's fields have, for a check before anything is sent. */
export const FIELDS_REQUEST: HttpRequest = get('/api/users/getFields');
