import type { SqlText } from '../core/definition.js';
import { quoteIdentifier, type Client } from '../db/connect.js';
import { describeStatement, type Description } from '../db/describe.js';
import { databaseFailure } from '../db/failure.js';
import { OperatorError } from '../lib/errors.js';
import { asSubquery, explainSqlError } from '../sync/shape.js';
import type { SourceColumn } from './trigger-sql.js';

/**
 * Which columns of `changed` an SQL way uses, and the statement that finds profiles by their values. Nothing is parsed
 * here but by PostgreSQL: a text is described once as it is, and then once for each column with that column there twice.
 * Whoever names such a column is refused (SQLSTATE 42702), also where a table around it has a column of that name, which
 * would be taken in silence if the column were missing. Whatever else comes out differently counts as used, too.
 */

/** Describing takes milliseconds; more is a lock that somebody else holds. */
const PATIENCE_MS = 30_000;
/** What makes a value of a whole row shows no difference when a column is there twice. */
const TAKES_WHOLE_ROWS = /\b(row_to_json|to_jsonb?|jsonb?_agg|hstore|record_out|changed\s*::)/i;

/** `changed` with each of the columns, or one of them twice, in front of the text. */
function withChanged(columns: readonly SourceColumn[], twice: SourceColumn | null, sql: string): string {
  const list = [...columns, ...(twice === null ? [] : [twice])]
    .map(({ name, type }) => ` null::${type} as ${quoteIdentifier(name)}`)
    .join(',');
  return `with changed as (select${list}) select * from `.concat(asSubquery(sql), ' as q');
}

async function describeAlone(client: Client, text: string): Promise<Description> {
  await client.query(`begin transaction read only; set local statement_timeout = ${PATIENCE_MS}`);
  try {
    return await describeStatement(client, text);
  } finally {
    await client.query('rollback');
  }
}

/** Whether the text comes out the same; what isn't an error of the text is thrown on. */
async function isSame(client: Client, text: string, expected: Description): Promise<boolean> {
  try {
    const { columns } = await describeAlone(client, text);
    return columns.length === expected.columns.length && columns[0]?.typeOid === expected.columns[0]?.typeOid;
  } catch (error) {
    if (databaseFailure(error)?.sqlstate.startsWith('42') === true) return false;
    throw error;
  }
}

/**
 * The columns, in their order, that the SQL of `subject` needs to be kept of a row that changes. Throws an OperatorError
 * where the SQL is wrong or doesn't give one column.
 */
export async function findKeyColumns(
  client: Client,
  subject: string,
  text: SqlText,
  columns: readonly SourceColumn[],
): Promise<{ used: readonly SourceColumn[]; typeOid: number }> {
  const whole = withChanged(columns, null, text.sql);
  const before = Array.from(withChanged(columns, null, '')).length - Array.from(`\n) as q`).length;
  let described: Description;
  try {
    described = await describeAlone(client, whole);
  } catch (error) {
    throw explainSqlError(error, subject, text, (offset) => offset - before);
  }
  const [column, ...others] = described.columns;
  if (column === undefined || others.length > 0) {
    const message = `${subject} gives ${described.columns.length} columns; it must give one, the profile_id.`;
    throw new OperatorError([{ place: text.placeOf(0), message }]);
  }
  if (TAKES_WHOLE_ROWS.test(text.sql)) return { used: columns, typeOid: column.typeOid };
  const used: SourceColumn[] = [];
  for (const each of columns) {
    if (!(await isSame(client, withChanged(columns, each, text.sql), described))) used.push(each);
  }
  return { used, typeOid: column.typeOid };
}

/** Whether values of one type can be cast to another. */
export async function canBeCast(client: Client, from: string, to: string): Promise<boolean> {
  try {
    await describeAlone(client, `select null::${from}::${to}`);
    return true;
  } catch (error) {
    if (databaseFailure(error) === null) throw error;
    return false;
  }
}

/** Profiles, as text, for the keys `$1` of a watch by one column whose values aren't yet of the type of profiles. */
export function castStatement(column: SourceColumn, profileType: string): string {
  return `select distinct (k::${column.type})::${profileType}::text as profile_id from unnest($1::text[]) as k`;
}

/** Profiles, as text, for the keys `$1` of a watch by the columns that the SQL uses. */
export function lookUpStatement(sql: string, used: readonly SourceColumn[], profileType: string): string {
  const [only, ...more] = used;
  const columns =
    only !== undefined && more.length === 0
      ? ` k::${only.type} as ${quoteIdentifier(only.name)}`
      : used.map(({ name, type }, index) => ` (k::jsonb ->> ${index})::${type} as ${quoteIdentifier(name)}`).join(',');
  return `with changed as (select${columns} from unnest($1::text[]) as k)
select distinct q.profile_id::${profileType}::text as profile_id from ${asSubquery(sql)} as q (profile_id) where q.profile_id is not null`;
}
