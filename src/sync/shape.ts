import type { Definition, ProjectKey, SqlText } from '../core/definition.js';
import { refuseFieldName, type FieldType } from '../core/field.js';
import { bindMoments, secondStatement, withoutEnd } from '../core/moments.js';
import type { Client } from '../db/connect.js';
import { describeStatement } from '../db/describe.js';
import { databaseFailure, isUnreachable } from '../db/failure.js';
import { OperatorError } from '../lib/errors.js';

/**
 * What a definition's SQL gives, learned without running it: which column knows the person, which columns are fields,
 * which ride along, and the type that each has in PostgreSQL and in Iterable. A text that isn't one balanced statement
 * fails here, alone, before it is ever put into another.
 */
export interface Column {
  name: string;
  /** The trait that it fills; null for a column that only rides along. */
  field: string | null;
  type: FieldType;
  /** How the value becomes JSON; see `statement.ts`. */
  form: 'float' | 'numeric' | 'numbers' | 'date' | 'timestamp' | 'timestamptz' | 'plain' | 'json';
}

export interface Shape {
  /** Whether rows name a profile, or a recipient directly. */
  person: { by: 'profile'; type: string } | { by: 'identifier'; email: boolean; userId: boolean };
  columns: readonly Column[];
  /** The type of `valid_until`, the moment at which a profile has to be looked at again; null: no such column. */
  validUntil: 'timestamptz' | 'timestamp' | null;
  /** Whether rows say by `member` who is one; the others only have a `valid_until`. */
  member: boolean;
}

export interface PeopleShape {
  key: ProjectKey;
  email: boolean;
  userId: boolean;
  /** The type of `profile_id`, as PostgreSQL writes it. */
  profileType: string;
}

interface SqlType {
  name: string;
  category: string;
  isArray: boolean;
}

const IDENTITY = new Set(['profile_id', 'email', 'user_id']);
const RESERVED_FOR_WINDOWS = new Set(['valid_until', 'member']);

/** The moments that a run is computed for, as SQL literals. */
export interface Moments {
  now: string;
  lookback: string;
}

async function typesOf(client: Client, oids: readonly number[]): Promise<ReadonlyMap<number, SqlType>> {
  const result = await client.query<{ oid: number; name: string; category: string; element: boolean }>(
    `select t.oid::int8::int4 as oid, format_type(coalesce(nullif(t.typbasetype, 0), t.oid), null) as name,
            t.typcategory::text as category, t.typcategory = 'A' as element
     from pg_type t where t.oid::int8 = any($1::int8[])`,
    [oids],
  );
  return new Map(result.rows.map((row) => [row.oid, { name: row.name, category: row.category, isArray: row.element }]));
}

function elementType(name: string): string {
  return name.replace(/\[\]$/, '');
}

function fieldType({ name, category, isArray }: SqlType): FieldType {
  const element = isArray ? elementType(name) : name;
  if (element === 'boolean') return 'boolean';
  if (['smallint', 'integer', 'bigint', 'oid'].includes(element)) return 'long';
  if (['numeric', 'real', 'double precision'].includes(element)) return 'double';
  if (element === 'date' || element.startsWith('timestamp')) return 'date';
  if (element === 'json' || element === 'jsonb' || (category === 'C' && !isArray)) return 'object';
  return 'string';
}

function formOf({ name, category, isArray }: SqlType): Column['form'] {
  if (isArray && ['numeric', 'real', 'double precision'].includes(elementType(name))) return 'numbers';
  if (isArray || name === 'json' || name === 'jsonb' || category === 'C') return 'json';
  if (name === 'real' || name === 'double precision') return 'float';
  if (name === 'numeric') return 'numeric';
  if (name === 'date') return 'date';
  if (name === 'timestamp without time zone') return 'timestamp';
  if (name === 'timestamp with time zone') return 'timestamptz';
  return 'plain';
}

/** An error of a person's SQL as a problem with the place in their file; anything else is passed on. */
export function explainSqlError(
  error: unknown,
  subject: string,
  text: SqlText,
  original?: (offset: number) => number,
): unknown {
  if (isUnreachable(error)) return error;
  const failure = databaseFailure(error);
  if (failure === null) return error;
  const position = failure.position === null || original === undefined ? 0 : Math.max(0, original(failure.position));
  return new OperatorError(
    [{ place: text.placeOf(Math.min(position, text.sql.length)), message: `${subject} ${failure.sentence}.` }],
    {
      cause: error,
    },
  );
}

/** A person's SQL as a sub-query; the newline ends a comment that is left open. */
export function asSubquery(sql: string): string {
  return `(${withoutEnd(sql)}\n)`;
}

/** Refuses what gives rows but can't be a sub-query, such as DELETE … RETURNING or SHOW. */
async function refuseOtherThanQuery(client: Client, subject: string, text: SqlText, bound: string): Promise<void> {
  try {
    await describeStatement(client, `select from ${asSubquery(bound)} as q`);
  } catch (error) {
    if (!['0A000', '42601'].includes(databaseFailure(error)?.sqlstate ?? '')) throw error;
    const message = `${subject} is not a query that only reads; write a SELECT.`;
    throw new OperatorError([{ place: text.placeOf(0), message }], { cause: error });
  }
}

async function describeText(
  client: Client,
  subject: string,
  text: SqlText,
  moments: Moments,
): Promise<readonly { name: string; type: SqlType }[]> {
  const second = secondStatement(text.sql);
  if (second !== null) {
    const message = `${subject} has more than one statement; write one SELECT.`;
    throw new OperatorError([{ place: text.placeOf(second), message }]);
  }
  const bound = bindMoments(text.sql, moments);
  try {
    const { columns } = await describeStatement(client, bound.text);
    if (columns.length > 0) await refuseOtherThanQuery(client, subject, text, bound.text);
    const types = await typesOf(
      client,
      columns.map((column) => column.typeOid),
    );
    return columns.map(({ name, typeOid }) => ({
      name,
      type: types.get(typeOid) ?? { name: 'text', category: 'S', isArray: false },
    }));
  } catch (error) {
    throw explainSqlError(error, subject, text, bound.originalOffset);
  }
}

function refuse(text: SqlText, messages: readonly string[]): void {
  if (messages.length === 0) return;
  throw new OperatorError(messages.map((message) => ({ place: text.placeOf(0), message })));
}

/** What `profiles` gives. Throws an OperatorError where it lacks a column. */
export async function describePeople(
  client: Client,
  text: SqlText,
  key: ProjectKey,
  moments: Moments,
): Promise<PeopleShape> {
  const columns = await describeText(client, '`profiles`', text, moments);
  const named = (name: string): SqlType | undefined => columns.find((column) => column.name === name)?.type;
  const profile = named('profile_id');
  const email = named('email') !== undefined;
  const userId = named('user_id') !== undefined;
  const problems: string[] = [];
  if (profile === undefined)
    problems.push('`profiles` gives no column `profile_id`; name it: SELECT id AS profile_id, …');
  if (key === 'email' && !email) problems.push('`profiles` gives no column `email`, which `key: email` needs.');
  if (key === 'user_id' && !userId) problems.push('`profiles` gives no column `user_id`, which `key: user_id` needs.');
  if (key === 'hybrid' && !email && !userId)
    problems.push('`profiles` gives neither `user_id` nor `email`; `key: hybrid` needs one of them.');
  refuse(text, problems);
  return { key, email, userId, profileType: profile?.name ?? 'text' };
}

function duplicates(names: readonly string[]): readonly string[] {
  return [...new Set(names.filter((name, index) => names.indexOf(name) !== index))];
}

function traitField(definition: Definition, column: string): string {
  return column === 'value' ? definition.key : `${definition.prefix}${column}`;
}

/** What a definition gives. Throws an OperatorError that names every column that is missing or may not be. */
export async function describeDefinition(client: Client, definition: Definition, moments: Moments): Promise<Shape> {
  const { text, kind, key } = definition;
  const columns = await describeText(client, `The SQL of "${key}"`, text, moments);
  const names = columns.map((column) => column.name);
  const problems = duplicates(names).map((name) => `"${key}" gives the column \`${name}\` twice.`);
  if (columns.length === 0) problems.push(`The SQL of "${key}" gives no rows; write a SELECT.`);
  else if (!names.some((name) => IDENTITY.has(name))) {
    problems.push(
      `"${key}" gives no column \`profile_id\` (nor \`email\` or \`user_id\`); name it: SELECT customer_id AS profile_id, …`,
    );
  }
  const byProfile = names.includes('profile_id');
  const typeOf = (name: string): string | null => columns.find((column) => column.name === name)?.type.name ?? null;
  const isIdentity = (name: string): boolean => (byProfile ? name === 'profile_id' : IDENTITY.has(name));
  for (const name of definition.properties.filter((property) => !names.includes(property))) {
    problems.push(`"${key}" has \`${name}\` under \`properties\` but gives no such column.`);
  }
  const rest = columns.filter(({ name }) => !isIdentity(name) && !RESERVED_FOR_WINDOWS.has(name));
  const fields = kind === 'trait' ? rest.filter(({ name }) => !definition.properties.includes(name)) : [];
  if (kind === 'trait' && fields.length === 0 && columns.length > 0) {
    problems.push(`"${key}" gives no column \`value\` (nor any other to send); name it: SELECT …, sum(total) AS value`);
  }
  for (const { name } of fields) {
    const refusal = refuseFieldName(traitField(definition, name));
    if (refusal !== null) problems.push(`The field \`${traitField(definition, name)}\` of "${key}" ${refusal}.`);
  }
  for (const name of duplicates(fields.map(({ name: column }) => traitField(definition, column)))) {
    problems.push(`"${key}" fills the field \`${name}\` twice.`);
  }
  const ridersNamedAsFields = rest
    .filter(({ name }) => definition.properties.includes(name))
    .filter(({ name }) => fields.some((column) => traitField(definition, column.name) === name));
  for (const { name } of ridersNamedAsFields) {
    problems.push(`The column \`${name}\` of "${key}" rides along under the name of a field; give it another name.`);
  }
  const validUntil = typeOf('valid_until');
  if (validUntil !== null && !validUntil.startsWith('timestamp')) {
    problems.push(
      `"${key}" gives \`valid_until\` as ${validUntil}; it must be a timestamptz, the moment at which a profile has to be looked at again.`,
    );
  }
  const member = typeOf('member');
  if (member !== null && member !== 'boolean') {
    problems.push(`"${key}" gives \`member\` as ${member}; it must be a boolean: whether the profile is one now.`);
  }
  if (!byProfile && (validUntil !== null || member !== null)) {
    problems.push(
      `"${key}" gives \`${validUntil === null ? 'member' : 'valid_until'}\` without \`profile_id\`: only profiles are looked at again.`,
    );
  }
  refuse(text, problems);
  const describe =
    (field: string | null) =>
    ({ name, type }: { name: string; type: SqlType }): Column => ({
      name,
      field,
      type: fieldType(type),
      form: formOf(type),
    });
  return {
    person: byProfile
      ? { by: 'profile', type: columns.find(({ name }) => name === 'profile_id')?.type.name ?? 'text' }
      : { by: 'identifier', email: names.includes('email'), userId: names.includes('user_id') },
    columns: [
      ...fields.map((column) => describe(traitField(definition, column.name))(column)),
      ...rest.filter(({ name }) => definition.properties.includes(name)).map(describe(null)),
    ],
    validUntil: validUntil === null ? null : validUntil.endsWith('without time zone') ? 'timestamp' : 'timestamptz',
    member: member !== null,
  };
}
