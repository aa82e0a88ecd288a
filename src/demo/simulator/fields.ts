/**
 * The fields of users and events. The first value fixes a field's type for ever, and a value of another type is refused
 * with the field's name: `10` makes a long for which `10.5` is wrong, `10.0` makes a double which takes both. An array is
 * judged by its elements, a nested field by its own path (`address.city`). What a request may write is worked out in a
 * draft, so that a refused request leaves no field behind.
 */
import type { RawJson } from './json.js';
import { detach, rawObject, rawString, scanRaw } from './json.js';

export type FieldType = 'string' | 'long' | 'double' | 'boolean' | 'date' | 'object';

/** Field path to type. */
export type Schema = Map<string, FieldType>;

/** Fields that every project has. They don't count towards its limit. */
export const SYSTEM_FIELDS: ReadonlyMap<string, FieldType> = new Map<string, FieldType>([
  ['email', 'string'],
  ['userId', 'string'],
  ['phoneNumber', 'string'],
  ['signupDate', 'date'],
  ['signupSource', 'string'],
  ['profileUpdatedAt', 'date'],
  ['shoppingCartItems', 'object'],
  ['emailListIds', 'long'],
  ['unsubscribedChannelIds', 'long'],
  ['unsubscribedMessageTypeIds', 'long'],
  ['subscribedMessageTypeIds', 'long'],
  ['itblInternal', 'object'],
]);

/** Fields that Iterable keeps for itself: a write that names one is refused. */
const RESERVED = new Set([
  'itblInternal',
  'itblDS',
  'itblUserId',
  'signupSource',
  'devices',
  'browserTokens',
  'emailListIds',
  'userListIds',
  'unsubscribedChannelIds',
  'unsubscribedMessageTypeIds',
  'subscribedMessageTypeIds',
]);

const USER_FIELDS = 1_000;
const EVENT_FIELDS = 8_000;
const LONGEST_VALUE = 32_000;
const DATE =
  /^(\d{4})-(\d\d)-(\d\d)(?: (\d\d):(\d\d):(\d\d)(?: [+-]\d\d:\d\d)?|T(\d\d):(\d\d):(\d\d)(?:\.\d{1,9})?(?:Z|[+-]\d\d:\d\d))?$/;
const UTC_WITH_T = /^(\d{4}-\d\d-\d\d)T(\d\d:\d\d:\d\d)(?:\.0+)?(?:Z|\+00:00)$/;

export interface Mismatch {
  expected: FieldType;
  incoming: readonly string[];
  /** The refused value as JSON text. */
  raw: string;
}

/** What one request would do to a schema. */
export interface Draft {
  category: 'user' | 'customEvent';
  schema: Schema;
  createNew: boolean;
  added: Schema;
  filtered: Set<string>;
  mismatches: Map<string, Mismatch>;
}

export type Admitted =
  | { kind: 'fields'; fields: ReadonlyMap<string, RawJson> }
  | { kind: 'invalid'; code: 'BadParams' | 'ForbiddenParamsError'; msg: string };

export function openDraft(category: Draft['category'], schema: Schema, createNew: boolean): Draft {
  return { category, schema, createNew, added: new Map(), filtered: new Set(), mismatches: new Map() };
}

/**
 * Checks the fields of one user or event against the draft and notes new fields and mismatches in it. Fields that the
 * project doesn't know are left out where the request asks for that (`createNewFields: false`).
 */
export function admitFields(draft: Draft, fields: ReadonlyMap<string, RawJson>): Admitted {
  const admitted = new Map<string, RawJson>();
  for (const [name, value] of fields) {
    const wrong = findFault(draft, name, value);
    if (wrong !== undefined) return wrong;
    const unknown: string[] = [];
    observePath(draft, name, value, unknown);
    if (unknown.length === 0) admitted.set(name, normaliseDate(value));
    for (const path of unknown) draft.filtered.add(detach(path));
  }
  return { kind: 'fields', fields: admitted };
}

/** Whether the draft's new fields would be more than a project (users) or an event name may have. */
export function exceedsFieldLimit({ category, schema, added }: Draft): boolean {
  if (added.size === 0) return false;
  return schema.size + added.size > (category === 'user' ? USER_FIELDS + SYSTEM_FIELDS.size : EVENT_FIELDS);
}

/**
 * The text of a user's fields after a write: `null` removes, an object replaces the whole object unless `mergeNested`,
 * and a name with a `.` addresses one nested field.
 */
export function mergeFields(current: string, update: ReadonlyMap<string, RawJson>, mergeNested: boolean): string {
  const members = fieldsOf(current);
  for (const [name, value] of update) {
    const old = members.get(name);
    if (name.includes('.')) setPath(members, name.split('.'), value);
    else if (mergeNested && value.kind === 'object' && old?.kind === 'object') {
      const merged = new Map(old.members);
      for (const [inner, nested] of value.members) setPath(merged, [inner], nested);
      members.set(name, rawObject(merged));
    } else setPath(members, [name], value);
  }
  return rawObject(members).raw;
}

/** The members of a stored text, each with its own text. */
export function fieldsOf(text: string): Map<string, RawJson> {
  const value = text === '{}' ? undefined : scanRaw(text);
  return value?.kind === 'object' ? value.members : new Map<string, RawJson>();
}

function findFault(draft: Draft, name: string, value: RawJson): Admitted | undefined {
  if (draft.category === 'user' && RESERVED.has(name.split('.')[0] ?? '')) {
    return { kind: 'invalid', code: 'ForbiddenParamsError', msg: `Field '${name}' is reserved` };
  }
  if (name.split('.').includes('')) {
    return { kind: 'invalid', code: 'BadParams', msg: `Field name '${name}' has an empty part` };
  }
  if (hasLongValue(value)) {
    return { kind: 'invalid', code: 'BadParams', msg: `The value of '${name}' is over ${LONGEST_VALUE} characters` };
  }
  return undefined;
}

function hasLongValue(value: RawJson): boolean {
  if (value.raw.length <= LONGEST_VALUE) return false;
  if (value.kind === 'array') return value.items.some(hasLongValue);
  if (value.kind === 'object') return [...value.members.values()].some(hasLongValue);
  return value.kind === 'string' ? value.text.length > LONGEST_VALUE : true;
}

function observePath(draft: Draft, name: string, value: RawJson, unknown: string[]): void {
  if (value.kind !== 'null') {
    for (let dot = name.indexOf('.'); dot !== -1; dot = name.indexOf('.', dot + 1)) {
      noteType(draft, name.slice(0, dot), 'object', value, unknown);
    }
  }
  observe(draft, name, value, unknown);
}

function observe(draft: Draft, path: string, value: RawJson, unknown: string[]): void {
  if (value.kind === 'null') return;
  if (value.kind === 'array') {
    for (const item of value.items) observe(draft, path, item, unknown);
    return;
  }
  noteType(draft, path, typeOf(value), value, unknown);
  if (value.kind !== 'object') return;
  for (const [name, member] of value.members) observe(draft, `${path}.${name}`, member, unknown);
}

function noteType(draft: Draft, path: string, type: FieldType, value: RawJson, unknown: string[]): void {
  const known = draft.schema.get(path) ?? draft.added.get(path);
  if (known === undefined && !draft.createNew) unknown.push(path);
  else if (!isInRange(type, value) || (known !== undefined && !fits(known, type))) {
    const mismatch = { expected: known ?? type, incoming: possibleTypes(type), raw: detach(value.raw) };
    draft.mismatches.set(detach(path), mismatch);
  } else if (known === undefined) draft.added.set(detach(path), type);
}

function typeOf(value: Exclude<RawJson, { kind: 'array' }>): FieldType {
  if (value.kind === 'boolean' || value.kind === 'object') return value.kind;
  if (value.kind === 'string') return isDate(value.text) ? 'date' : 'string';
  return /[.eE]/.test(value.raw) ? 'double' : 'long';
}

/** A string field takes any text, and a double field whole numbers too: no JavaScript client could send `10.0`. */
function fits(known: FieldType, incoming: FieldType): boolean {
  return (
    known === incoming || (known === 'double' && incoming === 'long') || (known === 'string' && incoming === 'date')
  );
}

function isInRange(type: FieldType, value: RawJson): boolean {
  if (type === 'double') return Number.isFinite(Number(value.raw));
  return type !== 'long' || value.raw.length < 19 || BigInt(value.raw) === BigInt.asIntN(64, BigInt(value.raw));
}

function possibleTypes(type: FieldType): string[] {
  if (type === 'string') return ['string', 'keyword'];
  return type === 'date' ? ['date', 'string', 'keyword'] : [type];
}

function isDate(text: string): boolean {
  if (text.length < 10 || text.charAt(4) !== '-') return false;
  const match = DATE.exec(text);
  if (match === null) return false;
  const [year = 0, month = 0, day = 0] = match.slice(1, 4).map(Number);
  const [hour = 0, minute = 0, second = 0] = (match[4] === undefined ? match.slice(7) : match.slice(4)).map(Number);
  const inMonth = new Date(Date.UTC(year, month - 1, day)).getUTCMonth() === month - 1 && day > 0;
  return inMonth && !(hour > 23 || minute > 59 || second > 59);
}

/** A date in UTC comes back as `yyyy-MM-dd HH:mm:ss +00:00` however it was sent. */
function normaliseDate(value: RawJson): RawJson {
  if (value.kind !== 'string' || value.text.charAt(10) !== 'T' || !isDate(value.text)) return value;
  return UTC_WITH_T.test(value.text) ? rawString(value.text.replace(UTC_WITH_T, '$1 $2 +00:00')) : value;
}

function setPath(members: Map<string, RawJson>, [name = '', ...rest]: string[], value: RawJson): void {
  if (rest.length === 0) {
    if (value.kind === 'null') members.delete(name);
    else members.set(name, value);
    return;
  }
  const old = members.get(name);
  const inner = new Map(old?.kind === 'object' ? old.members : []);
  setPath(inner, rest, value);
  if (old !== undefined || value.kind !== 'null') members.set(name, rawObject(inner));
}
