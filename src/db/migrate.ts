import { readdir, readFile } from 'node:fs/promises';
import { Kysely, Migrator, PostgresDialect, sql, type Migration } from 'kysely';
import { OperatorError } from '../lib/errors.js';
import { quoteIdentifier, type Pool } from './connect.js';

/**
 * Brings the state's tables to the version of this program: plain SQL files, applied in the order of their names by
 * Kysely's Migrator, which is safe with several processes at once. All that is pending commits in one transaction.
 * A schema with a migration that this program doesn't know was made by a newer one, and is refused.
 */
const FOLDER = new URL('../../migrations/', import.meta.url);

export interface MigrationPlan {
  applied: readonly string[];
  pending: readonly string[];
}

async function loadMigrations(schema: string): Promise<Record<string, Migration>> {
  const files = (await readdir(FOLDER)).filter((name) => name.endsWith('.sql')).sort();
  const entries = files.map((file) => {
    const up: Migration['up'] = async (db) => {
      const text = await readFile(new URL(file, FOLDER), 'utf8');
      await sql`select set_config('search_path', ${quoteIdentifier(schema)}, true)`.execute(db);
      await sql.raw(text).execute(db);
    };
    return [file.slice(0, -'.sql'.length), { up }] as const;
  });
  return Object.fromEntries(entries);
}

function newer(schema: string, unknown: readonly string[]): OperatorError {
  return new OperatorError(
    `The schema "${schema}" was made by a newer version of personas-sync (${unknown.join(', ')}). Install that version or a newer one.`,
  );
}

/** What is applied and what is pending; writes nothing. Throws an OperatorError where the schema is newer. */
export async function planMigrations(pool: Pool, schema: string): Promise<MigrationPlan> {
  const known = Object.keys(await loadMigrations(schema));
  const exists = await pool.query<{ there: boolean }>('select to_regclass($1) is not null as there', [
    `${quoteIdentifier(schema)}.migration`,
  ]);
  if (exists.rows[0]?.there !== true) return { applied: [], pending: known };
  const rows = await pool.query<{ name: string }>(
    `select name from ${quoteIdentifier(schema)}.migration order by name`,
  );
  const applied = rows.rows.map((row) => row.name);
  const unknown = applied.filter((name) => !known.includes(name));
  if (unknown.length > 0) throw newer(schema, unknown);
  return { applied, pending: known.filter((name) => !applied.includes(name)) };
}

/** Applies what is pending and returns its names. */
export async function migrate(pool: Pool, schema: string): Promise<readonly string[]> {
  const { pending } = await planMigrations(pool, schema);
  if (pending.length === 0) return [];
  const migrations = await loadMigrations(schema);
  const migrator = new Migrator({
    db: new Kysely<Record<string, never>>({ dialect: new PostgresDialect({ pool }) }),
    provider: { getMigrations: () => Promise.resolve(migrations) },
    migrationTableSchema: schema,
    migrationTableName: 'migration',
    migrationLockTableName: 'migration_lock',
  });
  const { error, results } = await migrator.migrateToLatest();
  if (error !== undefined) throw error instanceof Error ? error : new Error('A migration failed.', { cause: error });
  return (results ?? []).filter((result) => result.status === 'Success').map((result) => result.migrationName);
}
