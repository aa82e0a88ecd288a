import { z } from 'zod';
import { parseDuration, parseInterval } from '../lib/duration.js';
import { isCron } from './cron.js';
import type { IterableRegion } from './types.js';
import { listed, nearest, quoted, unknownWord } from './wording.js';

/**
 * The kinds of value that the configuration has: what a person may write, what it becomes, and what a message says of
 * anything else. Messages are predicates to be put behind the name of the value, and never repeat the value itself,
 * which may have come from a secret. A number or a yes and no may also be text, since variables are.
 */

/** A mapping with these keys and no others; `hints` says what to do about some that are not among them. */
export function mapping<S extends z.core.$ZodShape>(
  shape: S,
  what: string,
  hints: Readonly<Record<string, string>> = {},
) {
  const known = Object.keys(shape);
  const describe = (key: string) =>
    Object.hasOwn(hints, key) ? (hints[key] ?? '') : unknownWord(key, known, `key ${what}`);
  return z.strictObject(shape, {
    error: (issue) =>
      issue.code === 'unrecognized_keys'
        ? issue.keys.map(describe).join('\n')
        : `must be a mapping with keys such as ${listed(known.slice(0, 3), 'and')}`,
  });
}

export function text(example: string) {
  const message = `must be text, such as ${quoted(example)}`;
  return z.string(`${message} (put it in quotes if it looks like a number)`).regex(/\S/, `is empty: it ${message}`);
}

export function choice<const T extends readonly string[]>(values: T, hints: Readonly<Record<string, string>> = {}) {
  return z.enum(values, { error: ({ input }) => describeChoice(values, input, hints) });
}

export function describeChoice(
  values: readonly string[],
  input: unknown,
  hints: Readonly<Record<string, string>> = {},
  others = '',
): string {
  if (typeof input === 'string' && Object.hasOwn(hints, input)) return hints[input] ?? '';
  const near = typeof input === 'string' && values.length > 1 ? nearest(input, values) : undefined;
  const must = `must be ${listed(values)}${others === '' ? '' : `, ${others}`}`;
  return near === undefined ? must : `${must}: did you mean ${quoted(near)}?`;
}

export function yesOrNo() {
  return z
    .union([z.boolean(), z.enum(['true', 'false'])], 'must be `true` or `false`')
    .transform((value) => value === true || value === 'true');
}

export function wholeNumber(min: number, max: number) {
  const message = `must be a whole number from ${min} to ${max}`;
  return z
    .union([z.int(message).min(min, message).max(max, message), z.string().regex(/^\d+$/, message)], message)
    .transform(Number)
    .refine((value) => value >= min && value <= max, message);
}

export function duration(example: string, minMs: number, maxMs: number, range: string) {
  const message = `must be a length of time ${range}, such as ${quoted(example)}`;
  return converted(z.string(message), message, (value) => {
    const ms = parseDuration(value);
    return ms !== null && ms >= minMs && ms <= maxMs ? ms : null;
  });
}

export function interval() {
  const message = 'must be a length of time, such as `30 days`, `12 hours` or `1 month`';
  return converted(z.string(message), message, parseInterval);
}

/** Megabytes. */
export function memory() {
  const message = 'must be an amount of memory from 1 MB to 1024 GB, such as `256 MB`';
  return converted(z.string(message), message, (value) => {
    const [, digits, unit] = /^\s*(\d{1,7})\s*(mb|gb)\s*$/i.exec(value) ?? [];
    const mb = Number(digits) * (unit?.toLowerCase() === 'gb' ? 1024 : 1);
    return mb >= 1 && mb <= 1024 * 1024 ? mb : null;
  });
}

/** A share of one, written `30%` or 0.3. A plain number above `most` is refused: it was meant as a percentage. */
export function share(example: string, most: number) {
  const message = `must be a share, such as ${quoted(example)}${most === 1 ? ', and at most `100%`' : ''}`;
  return converted(z.union([z.number(), z.string()], message), message, (value) => {
    const [, digits, percent] = /^\s*(\d{1,6}(?:\.\d{1,9})?)\s*(%?)\s*$/.exec(String(value)) ?? [];
    if (digits === undefined) return null;
    const amount = Number(percent === '%' ? `${digits}e-2` : digits);
    return amount <= most ? amount : null;
  });
}

/** `off`, which older YAML reads as false; becomes null. */
export function off() {
  return z.union([z.enum(['off']), z.literal(false)], 'must be `off`').transform(() => null);
}

export function schedule() {
  const message =
    'must be `realtime`, `manual` or a cron expression that names an existing time, such as `0 3 * * *` (minute, hour, day, month, weekday)';
  return z.string(message).transform((value, context) => {
    const expression = value.trim();
    if (expression === 'manual') return { kind: 'manual' as const };
    if (expression === 'realtime') return { kind: 'realtime' as const };
    if (isCron(expression)) return { kind: 'cron' as const, expression };
    context.addIssue({ code: 'custom', message });
    return z.NEVER;
  });
}

/** The name of a schema of our own, so without the need for quotes. */
export function schemaName() {
  const message = 'must be the name of a schema: lower-case letters, digits and _, not beginning with a digit or `pg_`';
  return z.string(message).regex(/^(?!pg_)[a-z_][a-z0-9_]{0,62}$/, message);
}

/** What stands before a field's name. */
export function fieldPrefix() {
  const message = 'must be letters, digits and _, such as `shop_`';
  return z.string(message).regex(/^[A-Za-z0-9_]{0,100}$/, message);
}

/** The name of a table, quoted as SQL; letters are taken as they are written. */
export function table() {
  const message = 'must be a table with its schema, such as `public.customers`, or the name of a table alone';
  return converted(text('public.customers'), message, quoteTable);
}

const NAME = /"(?:[^"]|"")+"|[^\s".]+/;
const TABLE = new RegExp(`^(${NAME.source})(?:\\.(${NAME.source}))?$`);
const COLUMN = /^(?:"(?:[^"]|"")+"|[^\s"().,;{}]+)$/;

/** The name of a table, with or without its schema, quoted as SQL; null where it is none. */
export function quoteTable(written: string): string | null {
  const [, first, second] = TABLE.exec(written.trim()) ?? [];
  if (first === undefined) return null;
  return [first, second]
    .filter((name) => name !== undefined)
    .map(quoteName)
    .join('.');
}

/** The name of a column, quoted as SQL; letters are taken as they are written. Null where it is none. */
export function quoteColumn(written: string): string | null {
  const name = written.trim();
  return COLUMN.test(name) ? quoteName(name) : null;
}

function quoteName(name: string): string {
  return name.startsWith('"') ? name : `"${name}"`;
}

/** A PostgreSQL connection string; empty and left out are the same. */
export function connection() {
  const message =
    'must be a connection string such as `postgres://user:password@host:5432/database`, with other characters than letters and digits in the password percent-encoded';
  return z
    .string(message)
    .trim()
    .nullish()
    .refine((value) => value === null || value === undefined || value === '' || isConnectionString(value), message);
}

/** What the PostgreSQL client can take apart: it quotes the whole string, password and all, where it can't. */
function isConnectionString(value: string): boolean {
  if (!/^postgres(ql)?:\/\//i.test(value)) return false;
  return URL.canParse(value) || URL.canParse(value.replace('@/', '@localhost/'));
}

export function apiKey() {
  const message = 'must be an API key, text without spaces (put it in quotes if it looks like a number)';
  return z
    .string(message)
    .trim()
    .regex(/^[\x21-\x7e]*$/, message)
    .nullish();
}

const HOSTS = { us: 'https://api.iterable.com', eu: 'https://api.eu.iterable.com' };

export function region() {
  const names = ['us', 'eu', 'simulator'] as const;
  const message =
    'must be `us`, `eu`, `simulator`, or a base URL without `/api` such as `https://api.iterable.com` (http on this machine only)';
  return converted(z.union([z.enum(names), z.string()], message), message, (value): IterableRegion | null => {
    if (value === 'simulator') return { kind: 'simulator' };
    const baseUrl = value === 'us' || value === 'eu' ? HOSTS[value] : parseBaseUrl(value);
    return baseUrl === null ? null : { kind: 'host', baseUrl };
  });
}

/** The address of a service, without a path of its own. */
export function baseUrl() {
  const message = 'must be a base URL such as `https://api.segment.io` (http on this machine only)';
  return converted(z.string(message), message, parseBaseUrl);
}

function parseBaseUrl(value: string): string | null {
  if (!URL.canParse(value)) return null;
  const url = new URL(value);
  const path = url.pathname.replace(/\/+$/, '');
  const loopback = /^(localhost|127(\.\d{1,3}){3}|\[::1\])$/.test(url.hostname);
  if (url.protocol !== 'https:' && !(url.protocol === 'http:' && loopback)) return null;
  if (url.username !== '' || url.password !== '' || url.search !== '' || url.hash !== '') return null;
  return path.endsWith('/api') ? null : `${url.origin}${path}`;
}

function converted<I extends z.ZodType, T>(input: I, message: string, convert: (value: z.output<I>) => T | null) {
  return input.transform((value, context): T => {
    const result = convert(value);
    if (result !== null) return result;
    context.addIssue({ code: 'custom', message });
    return z.NEVER;
  });
}
