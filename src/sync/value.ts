import { quoteIdentifier, quoteLiteral } from '../db/connect.js';
import type { Column } from './shape.js';

/**
 * A row's columns as the one JSON value that the snapshot keeps and a request carries, made by PostgreSQL with its own
 * digits; and what it takes to tell two such values apart.
 *
 * A column that is absent has no key in it. One that can't be sent (NaN, infinity) is named beside it, and keeps what was
 * sent before. Floats count as different only when they are apart by more than two plans of one sum would be.
 */

/** A column's value as PostgreSQL makes JSON of it with its own digits, where it `isPresent`. */
function jsonOf({ name, form }: Column): string {
  const column = `m.${quoteIdentifier(name)}`;
  const decimal = (number: string): string => `case scale(${number}) when 0 then ${number} + 0.0 else ${number} end`;
  switch (form) {
    case 'plain':
      return column;
    case 'json':
      return `nullif(to_jsonb(${column}), 'null')`;
    case 'float':
      // The cast keeps 15 digits of a double.
      return decimal(`${column}::numeric`);
    case 'numeric':
      return decimal(column);
    case 'numbers':
      return `case when array_ndims(${column}) > 1 then to_jsonb(${column}) else coalesce(
        (select jsonb_agg(${decimal('e::numeric')} order by n) from unnest(${column}) with ordinality as u(e, n)), '[]') end`;
    case 'date':
      return `${column}::text`;
    case 'timestamp':
    case 'timestamptz': {
      const utc = form === 'timestamptz' ? `${column} at time zone 'UTC'` : column;
      const iso = `to_char(${utc}, 'YYYY-MM-DD"T"HH24:MI:SS')`;
      const fraction = `rtrim(rtrim(to_char(${utc}, '.US'), '0'), '.')`;
      return `${iso} || ${fraction} || 'Z'`;
    }
  }
}

/** Whether a column has a value that can be sent: it is there, and neither NaN nor infinity. */
function isPresent({ name, form }: Column): string {
  const column = `m.${quoteIdentifier(name)}`;
  switch (form) {
    case 'float':
      return `(${column} - ${column} = 0)`;
    case 'numeric':
      // A field of Iterable's is a double, whose range ends here; neither NaN nor infinity is below.
      return `(abs(${column}) < 1e308)`;
    case 'numbers':
      return `(${column} is not null and not exists (select from unnest(${column}) as e where not abs(e::numeric) < 1e308))`;
    case 'date':
    case 'timestamp':
    case 'timestamptz':
      return `isfinite(${column})`;
    case 'plain':
      return `(${column} is not null)`;
    case 'json':
      return `(nullif(to_jsonb(${column}), 'null') is not null)`;
  }
}

/** The name of a column within `value`: the field that it fills, or its own. */
export function valueKey(column: Column): string {
  return column.field ?? column.name;
}

export function valueOf(columns: readonly Column[]): string {
  const [first] = columns;
  if (first === undefined) return 'null::jsonb';
  // Most traits have one column, and nothing to strip.
  if (columns.length === 1 && first.form !== 'json') {
    return `case when ${isPresent(first)} then jsonb_build_object(${quoteLiteral(valueKey(first))}, ${jsonOf(first)}) end`;
  }
  const pair = (column: Column): string =>
    `${quoteLiteral(valueKey(column))}, case when ${isPresent(column)} then ${jsonOf(column)} end`;
  const scalars = withoutNulls(columns.filter(({ form }) => form !== 'json').map(pair));
  // Nulls within a JSON value are the user's own.
  const documents = columns
    .filter(({ form }) => form === 'json')
    .map(
      (column) =>
        `case when ${isPresent(column)} then jsonb_build_object(${quoteLiteral(valueKey(column))}, ${jsonOf(column)}) else '{}' end`,
    );
  return `nullif(${[...scalars, ...documents].join(' || ')}, '{}')`;
}

/** jsonb_build_object takes a hundred arguments at most. */
const PAIRS_AT_ONCE = 50;

/** Objects of (key, value) pairs without their nulls, of as many pairs as fit into a call; to be joined. */
function withoutNulls(pairs: readonly string[]): string[] {
  const calls = Math.ceil(pairs.length / PAIRS_AT_ONCE);
  return Array.from({ length: calls }, (_, call) => {
    const some = pairs.slice(call * PAIRS_AT_ONCE, (call + 1) * PAIRS_AT_ONCE);
    return `jsonb_strip_nulls(jsonb_build_object(${some.join(', ')}))`;
  });
}

/** Whether a column's type has values that can't be sent. */
export function isRisky({ form }: Column): boolean {
  return form !== 'plain' && form !== 'json';
}

/** The keys of values that are there but can't be sent (NaN, infinity); null where there is none. */
export function unsendableOf(columns: readonly Column[]): string {
  const risky = columns.filter(isRisky);
  if (risky.length === 0) return 'null::text[]';
  const isUnsendable = (column: Column): string =>
    `(m.${quoteIdentifier(column.name)} is not null and ${isPresent(column)} is not true)`;
  const keys = risky.map((column) => `case when ${isUnsendable(column)} then ${quoteLiteral(valueKey(column))} end`);
  return `case when ${risky.map(isUnsendable).join(' or ')} then array_remove(array[${keys.join(', ')}], null) end`;
}

/** A trait is in the snapshot where one of its fields has a value; what only rides along makes nobody a member. */
export function hasValue(columns: readonly Column[]): string {
  const fields = columns.filter((column) => column.field !== null);
  if (fields.length === columns.length) return '(value is not null)';
  return `coalesce(${fields.map((column) => `value ? ${quoteLiteral(valueKey(column))}`).join(' or ')}, false)`;
}

/** Beyond 1e-9 of the larger, since a sum of floats differs between two plans; as numerics, which have no range to leave. */
export function isApart(a: string, b: string): string {
  return `abs(${a} - ${b}) > 1e-9 * greatest(abs(${a}), abs(${b}))`;
}

/** Whether two values of a field differ; floats only where they are apart. */
export function differs(column: Column): string {
  const key = quoteLiteral(valueKey(column));
  const plain = `old_value -> ${key} is distinct from value -> ${key}`;
  if (column.form !== 'float') return plain;
  return `(${plain} and coalesce(${isApart(`(old_value ->> ${key})::numeric`, `(value ->> ${key})::numeric`)}, true))`;
}

/** Whether nothing differs but floats by a hair. */
export function sameValue(columns: readonly Column[]): string {
  const floats = columns.filter(({ form }) => form === 'float');
  if (floats.length === 0) return 'old_value is not distinct from value';
  const keys = floats.map((column) => quoteLiteral(valueKey(column))).join(', ');
  const close = floats.map((column) => `not ${differs(column)}`).join(' and ');
  return `(old_value is not distinct from value or (old_value - array[${keys}] is not distinct from value - array[${keys}] and ${close}))`;
}

/** The value that the snapshot is to have: a float that differs by a hair stays as it was sent, or hairs would add up. */
export function settledValue(columns: readonly Column[]): string {
  const floats = columns.filter(({ field, form }) => field !== null && form === 'float');
  if (floats.length === 0) return 'value';
  const sent = floats.map((column) => {
    const key = quoteLiteral(valueKey(column));
    return `${key}, case when not ${differs(column)} then old_value -> ${key} end`;
  });
  return `case when op in ('c', 't') then value || ${withoutNulls(sent).join(' || ')} else value end`;
}
