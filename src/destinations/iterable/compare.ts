import type { ExpectedValue, UserFound } from '../../core/call.js';
import { readObject } from '../answer.js';
import type { Read } from '../carrier.js';
import { dateText } from './requests.js';

/**
 * Whether a user in Iterable has what was sent. Iterable gives numbers as it likes (10 for 10.0) and dates in its own
 * form; digits beyond those of a double can't be told apart. Who isn't there is in no audience, and has no traits.
 */
const CLOSE = 1e-9;

function isSame(a: unknown, b: unknown): boolean {
  if (typeof a === 'number' && typeof b === 'number') {
    return a === b || Math.abs(a - b) <= CLOSE * Math.max(Math.abs(a), Math.abs(b));
  }
  if (typeof a !== 'object' || typeof b !== 'object' || a === null || b === null) return a === b;
  if (Array.isArray(a) !== Array.isArray(b)) return false;
  const [left, right] = [Object.entries(a), new Map(Object.entries(b))];
  return left.length === right.size && left.every(([name, value]) => right.has(name) && isSame(value, right.get(name)));
}

/** `null` was sent to remove a field; whoever has never been a member needn't have one that says false. */
function isAsExpected(found: unknown, { json, type }: ExpectedValue): boolean {
  const sent: unknown = JSON.parse(type === 'date' ? dateText(json) : json);
  if (found === undefined || found === null) return sent === null || sent === false;
  return isSame(sent, found);
}

export function compareUser({ body }: Read, expected: readonly ExpectedValue[]): UserFound {
  const user = readObject(body)?.['user'];
  const fields = typeof user === 'object' && user !== null && 'dataFields' in user ? user.dataFields : {};
  const held = new Map<string, unknown>(Object.entries(typeof fields === 'object' && fields !== null ? fields : {}));
  const lists = held.get('emailListIds');
  const isThere = typeof user === 'object' && user !== null;
  const differing = expected.flatMap((each) => {
    if (each.listId !== null && each.existingOnly && !isThere) return [];
    const found = each.listId === null ? held.get(each.field) : Array.isArray(lists) && lists.includes(each.listId);
    if (isAsExpected(found, each)) return [];
    return [{ field: each.field, found: found === undefined ? null : JSON.stringify(found) }];
  });
  return { names: namesOf(user), differing };
}

function namesOf(user: unknown): readonly string[] {
  if (typeof user !== 'object' || user === null) return [];
  const { userId, email } = user as { userId?: unknown; email?: unknown };
  return [
    ...(typeof userId === 'string' ? [`u:${userId}`] : []),
    ...(typeof email === 'string' ? [`e:${email.toLowerCase()}`] : []),
  ];
}
