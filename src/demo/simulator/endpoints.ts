/** Which paths there are, what each does, and how often it may be called. */
import type { Answer } from './answer.js';
import type { Quota } from './bucket.js';
import type { Call } from './call.js';
import { trackPurchase, updateCart } from './commerce.js';
import { eventsByEmail, eventsByUserId, track, trackBulk } from './events.js';
import { createList, deleteList, getListSize, getLists, getListUsers, subscribe, unsubscribe } from './lists.js';
import type { Project } from './project.js';
import * as users from './users.js';

/** Named by their paths; what is read or deleted by an email has one name with what is by a userId, and one quota. */
export type Endpoint =
  | 'users/update'
  | 'users/bulkUpdate'
  | 'users/updateEmail'
  | 'users/delete'
  | 'users/forget'
  | 'users/get'
  | 'users/getFields'
  | 'events/track'
  | 'events/trackBulk'
  | 'events/get'
  | 'commerce/trackPurchase'
  | 'commerce/updateCart'
  | 'lists/get'
  | 'lists/create'
  | 'lists/delete'
  | 'lists/subscribe'
  | 'lists/unsubscribe'
  | 'lists/getUsers'
  | 'lists/size';

type Operation = (project: Project, call: Call) => Answer;

export interface Route {
  endpoint: Endpoint;
  run: Operation;
  /** The decoded variable part of the path. */
  argument: string;
}

interface Pattern {
  method: string;
  pattern: RegExp;
  endpoint: Endpoint;
  run: Operation;
}

const SECOND = 1_000;
const MINUTE = 60_000;

/** Iterable's published quotas; the others are unknown. */
export const QUOTAS: ReadonlyMap<Endpoint, Quota> = new Map<Endpoint, Quota>([
  ['users/update', { requests: 500, windowMs: SECOND }],
  ['users/bulkUpdate', { requests: 5, windowMs: SECOND }],
  ['users/get', { requests: 100, windowMs: SECOND }],
  ['users/getFields', { requests: 3, windowMs: SECOND }],
  ['events/track', { requests: 2_000, windowMs: SECOND }],
  ['events/trackBulk', { requests: 10, windowMs: SECOND }],
  ['events/get', { requests: 100, windowMs: SECOND }],
  ['lists/get', { requests: 100, windowMs: SECOND }],
  ['lists/getUsers', { requests: 5, windowMs: MINUTE }],
  ['lists/size', { requests: 5, windowMs: MINUTE }],
]);

const FIXED = new Map<string, { endpoint: Endpoint; run: Operation }>([
  ['POST /api/users/update', { endpoint: 'users/update', run: users.updateUser }],
  ['POST /api/users/bulkUpdate', { endpoint: 'users/bulkUpdate', run: users.bulkUpdateUsers }],
  ['POST /api/users/updateEmail', { endpoint: 'users/updateEmail', run: users.updateEmail }],
  ['POST /api/users/forget', { endpoint: 'users/forget', run: users.forget }],
  ['GET /api/users/getFields', { endpoint: 'users/getFields', run: users.getFields }],
  ['GET /api/users/getByEmail', { endpoint: 'users/get', run: users.getByEmail }],
  ['GET /api/users/byUserId', { endpoint: 'users/get', run: users.getByUserId }],
  ['POST /api/events/track', { endpoint: 'events/track', run: track }],
  ['POST /api/events/trackBulk', { endpoint: 'events/trackBulk', run: trackBulk }],
  ['POST /api/commerce/trackPurchase', { endpoint: 'commerce/trackPurchase', run: trackPurchase }],
  ['POST /api/commerce/updateCart', { endpoint: 'commerce/updateCart', run: updateCart }],
  ['GET /api/lists', { endpoint: 'lists/get', run: getLists }],
  ['POST /api/lists', { endpoint: 'lists/create', run: createList }],
  ['POST /api/lists/subscribe', { endpoint: 'lists/subscribe', run: subscribe }],
  ['POST /api/lists/unsubscribe', { endpoint: 'lists/unsubscribe', run: unsubscribe }],
  ['GET /api/lists/getUsers', { endpoint: 'lists/getUsers', run: getListUsers }],
]);

const VARIABLE: readonly Pattern[] = [
  { method: 'GET', pattern: /^\/api\/users\/byUserId\/([^/]+)$/, endpoint: 'users/get', run: users.getByUserId },
  { method: 'GET', pattern: /^\/api\/users\/([^/]+)$/, endpoint: 'users/get', run: users.getByEmail },
  {
    method: 'DELETE',
    pattern: /^\/api\/users\/byUserId\/([^/]+)$/,
    endpoint: 'users/delete',
    run: users.deleteByUserId,
  },
  { method: 'DELETE', pattern: /^\/api\/users\/([^/]+)$/, endpoint: 'users/delete', run: users.deleteByEmail },
  { method: 'GET', pattern: /^\/api\/events\/byUserId\/([^/]+)$/, endpoint: 'events/get', run: eventsByUserId },
  { method: 'GET', pattern: /^\/api\/events\/([^/]+)$/, endpoint: 'events/get', run: eventsByEmail },
  { method: 'GET', pattern: /^\/api\/lists\/(\d+)\/size$/, endpoint: 'lists/size', run: getListSize },
  { method: 'DELETE', pattern: /^\/api\/lists\/(\d+)$/, endpoint: 'lists/delete', run: deleteList },
];

/** What a request asks for; undefined where there is no such path. */
export function findRoute(method: string, path: string): Route | undefined {
  const fixed = FIXED.get(`${method} ${path}`);
  if (fixed !== undefined) return { ...fixed, argument: '' };
  for (const { pattern, endpoint, run, ...candidate } of VARIABLE) {
    const part = candidate.method === method ? pattern.exec(path)?.[1] : undefined;
    const argument = part === undefined ? undefined : decode(part);
    if (argument !== undefined) return { endpoint, run, argument };
  }
  return undefined;
}

function decode(part: string): string | undefined {
  try {
    return decodeURIComponent(part);
  } catch (error) {
    if (error instanceof URIError) return undefined;
    throw error;
  }
}
