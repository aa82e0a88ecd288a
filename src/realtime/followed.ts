import type { Change } from '../core/definition.js';
import type { Client } from '../db/connect.js';
import { sourcesOf, type Relation } from './sources.js';

/**
 * Which `changes` follow a table: those that name it, and those that name what it is a part of or inherits from, since
 * each table below a followed one is followed with it.
 */
export type Following = (relation: Pick<Relation, 'oid'>) => readonly Change[];

export async function followingOf(
  client: Client,
  relations: readonly Pick<Relation, 'oid'>[],
  changes: readonly Change[],
): Promise<Following> {
  const above = await lineageOf(client, relations);
  const { rows } = await client.query<{ written: string; oid: string }>(
    'select w.written, to_regclass(w.written)::oid::text as oid from unnest($1::text[]) as w(written)',
    [[...new Set(changes.map(({ table }) => table))]],
  );
  const oids = new Map(rows.map(({ written, oid }) => [written, oid]));
  return (relation) => changes.filter(({ table }) => above(relation).includes(oids.get(table) ?? ''));
}

/** What each table is a part of or inherits from, itself among it. */
export async function lineageOf(
  client: Client,
  relations: readonly Pick<Relation, 'oid'>[],
): Promise<(relation: Pick<Relation, 'oid'>) => readonly string[]> {
  const { rows } = await client.query<{ oid: string; above: string }>(
    `with recursive lineage (oid, above) as (
       select oid, oid from unnest($1::oid[]) as r(oid)
       union select l.oid, i.inhparent from lineage as l join pg_inherits as i on i.inhrelid = l.above)
     select oid::text, above::text from lineage`,
    [relations.map(({ oid }) => oid)],
  );
  return ({ oid }) => rows.filter((row) => row.oid === oid).map(({ above }) => above);
}

/**
 * Tables that the SQL of some `changes` reads on the way to profiles and that nothing follows: a row there may move while
 * the way is looked up. `all` are all changes that count, `changes` among them.
 */
export async function unfollowedOnTheWay(
  client: Client,
  changes: readonly Change[],
  all: readonly Change[],
): Promise<readonly { change: Change; table: string }[]> {
  const missing: { change: Change; table: string }[] = [];
  for (const change of changes) {
    if (change.way.kind !== 'sql') continue;
    const sources = await sourcesOf(client, change.way.text.sql, ['changed']);
    if (sources.kind === 'unreadable') continue;
    const following = await followingOf(client, sources.tables, all);
    const tables = sources.tables.filter((table) => following(table).length === 0);
    missing.push(...tables.map(({ shown }) => ({ change, table: shown })));
  }
  return missing;
}
