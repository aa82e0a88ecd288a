import { quoteIdentifier } from '../db/connect.js';
import type { Problem } from '../lib/errors.js';
import type { Opened } from './open.js';

/** What the role lacks for what a sync does with the state's schema, which needn't be there yet. */
export async function findLackingForState(databases: Opened['databases']): Promise<readonly Problem[]> {
  const { pool, schema } = databases.state;
  const { rows } = await pool.query<{
    role: string;
    database: string;
    temporary: boolean;
    makes: boolean;
    owns: boolean;
  }>(
    `select current_user as role, current_database() as database,
       has_database_privilege(current_database(), 'TEMPORARY') as temporary,
       coalesce(has_schema_privilege(to_regnamespace($1)::oid, 'CREATE'), has_database_privilege(current_database(), 'CREATE')) as makes,
       coalesce((select pg_has_role(relowner, 'USAGE') from pg_class where oid = to_regclass('snapshot')), true) as owns`,
    [quoteIdentifier(schema)],
  );
  const { role = '', database = '', temporary = false, makes = false, owns = false } = rows[0] ?? {};
  const grant = (right: string, on: string): string =>
    `GRANT ${right} ON ${on} TO ${quoteIdentifier(role)}, or another database under \`state.url\`.`;
  const onDatabase = `DATABASE ${quoteIdentifier(database)}`;
  const messages = [
    ...(temporary
      ? []
      : [`The role may not make temporary tables, in which runs are compared: ${grant('TEMPORARY', onDatabase)}`]),
    ...(makes
      ? []
      : [`The role may not make the state's tables in the schema "${schema}": ${grant('CREATE', onDatabase)}`]),
    ...(owns ? [] : [`The tables in the schema "${schema}" belong to another role; use the role that made them.`]),
  ];
  return messages.map((message) => ({ message }));
}
