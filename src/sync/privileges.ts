import type { Definition } from '../core/definition.js';
import { quoteIdentifier, type Pool } from '../db/connect.js';
import { databaseFailure } from '../db/failure.js';
import { OperatorError } from '../lib/errors.js';
import { explainSqlError } from './shape.js';

/** SQLSTATE insufficient_privilege; PostgreSQL says of what only in the text of its message. */
const LACKS_PRIVILEGE = '42501';

/** GRANTs for what the texts name and the role may not read; none where the role lacks something else. */
async function findGrants(source: Pool, texts: readonly string[]): Promise<readonly string[]> {
  const { rows } = await source.query<{ role: string; kind: 'schema' | 'table'; name: string }>(
    `with relation as (
       select c.oid, n.oid as schema, n.nspname, c.relname from pg_class as c join pg_namespace as n on n.oid = c.relnamespace
       where c.relkind in ('r', 'p', 'v', 'm', 'f') and n.nspname not like 'pg\\_%' and n.nspname <> 'information_schema'
         and exists (select from unnest($1::text[]) as t
           where t ~* ('\\m' || regexp_replace(c.relname, '(\\W)', '\\\\\\1', 'g') || '\\M')))
     select current_user as role, 'schema' as kind, quote_ident(nspname) as name from relation
     where not has_schema_privilege(schema, 'USAGE')
     union select current_user, 'table', format('%I.%I', nspname, relname) from relation
     where not has_table_privilege(oid, 'SELECT') and not has_any_column_privilege(oid, 'SELECT')
     order by 2, 3`,
    [texts],
  );
  return rows.map(({ role, kind, name }) =>
    kind === 'schema'
      ? `GRANT USAGE ON SCHEMA ${name} TO ${quoteIdentifier(role)}`
      : `GRANT SELECT ON ${name} TO ${quoteIdentifier(role)}`,
  );
}

/**
 * An error of computing a definition as one of its SQL, where it is the database's; where the role may not read what the
 * SQL or `profiles` names, with the GRANTs that are missing.
 */
export async function explainRunError(
  source: Pool,
  error: unknown,
  definition: Definition,
  profiles: string,
): Promise<unknown> {
  const explained = explainSqlError(error, `The SQL of "${definition.key}"`, definition.text);
  if (!(explained instanceof OperatorError) || databaseFailure(error)?.sqlstate !== LACKS_PRIVILEGE) return explained;
  const grants = await findGrants(source, [definition.text.sql, profiles]).catch(() => []);
  const remedy = grants.length > 0 ? `${grants.join('; ')}.` : '`personas-sync check` says more.';
  return new OperatorError(
    explained.problems.map(({ message, ...rest }) => ({ ...rest, message: `${message} ${remedy}` })),
    { cause: error },
  );
}
