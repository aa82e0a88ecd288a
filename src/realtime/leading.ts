import type { Change } from '../core/definition.js';
import { quoteIdentifier } from '../db/connect.js';
import { asSubquery } from '../sync/shape.js';
import { applyEdits } from './cut.js';
import { readsOf, type NamedTable, type Reads } from './reads.js';

/**
 * Which rows of a table lead to some profiles: its way of finding profiles turned round. `profiles` is what can stand
 * behind `=`, such as `any($1::bigint[])`; the condition is about a row called `personas_row`. Null where the SQL of the
 * way can't be followed.
 */
export async function rowsLeadingTo(profiles: string, change: Change): Promise<string | null> {
  if (change.way.kind === 'column') return `personas_row.${change.way.column} = ${profiles}`;
  const { sql } = change.way.text;
  const reads = await readsOf(sql);
  if (reads === null) return null;
  return allAtOnce(profiles, change.table, sql, reads) ?? oneByOne(profiles, sql, reads);
}

const isChanged = ({ schema, name }: NamedTable): boolean => schema === null && name === 'changed';

/** The way is run once, from the profiles to the rows, and says which row each profile comes from. */
function allAtOnce(profiles: string, table: string, sql: string, { tables, plain }: Reads): string | null {
  const changed = plain?.tables.find((each) => isChanged(each.table));
  const span = changed?.table.span ?? null;
  if (plain === null || changed === undefined || span === null || tables.filter(isChanged).length > 1) return null;
  const rows = `(select personas_row.*, personas_row.tableoid as personas_table, personas_row.ctid as personas_place from ${table} as personas_row)`;
  const alias = quoteIdentifier(changed.alias);
  const marked = applyEdits(sql, [
    { ...span, text: changed.table.isNamed ? rows : `${rows} as changed` },
    { from: plain.at, to: plain.at, text: `${alias}.personas_table, ${alias}.personas_place, ` },
  ]);
  return `(personas_row.tableoid, personas_row.ctid) in (
    select way.row_table, way.row_place from ${asSubquery(marked)} as way(row_table, row_place, profile_id) where way.profile_id = ${profiles})`;
}

/** The way is run for each row. */
function oneByOne(profiles: string, sql: string, { tables }: Reads): string | null {
  const edits = tables.filter(isChanged).flatMap(({ span, isNamed }) => {
    const row = '(select personas_row.*)';
    return span === null ? [] : [{ ...span, text: isNamed ? row : `${row} as changed` }];
  });
  if (edits.length === 0) return null;
  return `exists (select from ${asSubquery(applyEdits(sql, edits))} as way(profile_id) where way.profile_id = ${profiles})`;
}
