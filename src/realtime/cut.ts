import { withoutEnd } from '../core/moments.js';
import { quoteIdentifier } from '../db/connect.js';
import type { Grouping, NamedTable } from './reads.js';
import type { Part, Relation, Sources } from './sources.js';

/**
 * A text as it would run if its tables held some of their rows and no others. Each table becomes a CTE with those rows,
 * each view one with its text, and where they are named in a text, at any depth, stands the name of the CTE. The alias
 * stays, so that columns are found as before. A CTE has no primary key: where a GROUP BY has a whole one, the table's
 * other columns, which depend on it, are added.
 */
export type Cut =
  { kind: 'cut'; /** WITH …, or nothing. */ ctes: string; text: string } | { kind: 'whole'; because: string };

/** The rows of `relation` that stay are those for which `rowsOf` holds, SQL over `personas_row`; null where none can be told. */
export function cutTables(sources: Sources, rowsOf: (relation: Relation) => string | null): Cut {
  const [reader] = sources.readers;
  if (reader !== undefined) {
    return { kind: 'whole', because: `it calls \`${reader.written}\`, which reads \`${reader.table}\`` };
  }
  const ctes: string[] = [];
  const names = new Map<string, string>();
  const add = (key: string, materialized: string, query: string): string => {
    const name = `personas_cut_${names.size}`;
    names.set(key, name);
    ctes.push(`${name} as ${materialized}(${query}\n)`);
    return name;
  };
  const nameFor = (relation: Relation, { only }: NamedTable): string | null => {
    const key = relation.isView ? relation.oid : `${relation.oid} ${only}`;
    const known = names.get(key);
    if (known !== undefined || relation.isView) return known ?? null;
    const rows = rowsOf(relation);
    const query = `select personas_row.* from ${only ? 'only ' : ''}${relation.name} as personas_row where ${rows ?? 'false'}`;
    return rows === null ? null : add(key, 'materialized ', query);
  };

  for (const { relation, part } of sources.views) {
    const cut = cutPart(part, nameFor);
    if (cut.kind === 'whole') return cut;
    add(relation.oid, '', withoutEnd(cut.text));
  }
  const cut = cutPart(sources.text, nameFor);
  if (cut.kind === 'whole') return cut;
  return { ...cut, ctes: ctes.length === 0 ? '' : `with ${ctes.join(',\n')}\n` };
}

function cutPart(part: Part, nameFor: (relation: Relation, table: NamedTable) => string | null): Cut {
  const edits: Edit[] = [];
  for (const table of part.reads.tables) {
    const relation = part.relationOf(table);
    const name = relation === null ? null : nameFor(relation, table);
    if (table.span === null || name === null) return { kind: 'whole', because: `\`${table.name}\` can't be cut down` };
    edits.push({ ...table.span, text: table.isNamed ? name : `${name} as ${quoteIdentifier(table.name)}` });
  }
  for (const grouping of part.reads.groupings) {
    const columns = dependentColumns(part, grouping);
    if (columns.length > 0) edits.push({ from: grouping.at, to: grouping.at, text: `${columns.join(', ')}, ` });
  }
  // What has an alias of its own can't be named by its schema.
  for (const { name, span } of part.reads.qualified) edits.push({ ...span, text: quoteIdentifier(name) });
  return { kind: 'cut', ctes: '', text: applyEdits(part.sql, edits) };
}

/** The columns that depend on those of a GROUP BY, a primary key being among them. */
function dependentColumns({ reads, relationOf }: Part, { columns, tables }: Grouping): readonly string[] {
  return tables.flatMap(({ alias, table }) => {
    // What has the name of a CTE is no table.
    const isTable = reads.tables.some(({ span }) => span !== null && span.from === table.span?.from);
    const relation = isTable ? relationOf(table) : null;
    if (relation === null || relation.key.length === 0) return [];
    const isGrouped = (column: string): boolean =>
      columns.some(({ qualifier, name }) => name === column && (qualifier === alias || qualifier === null));
    if (!relation.key.every(isGrouped)) return [];
    const rest = relation.columns.filter((column) => !relation.key.includes(column));
    return rest.map((column) => `${quoteIdentifier(alias)}.${quoteIdentifier(column)}`);
  });
}

export interface Edit {
  from: number;
  to: number;
  text: string;
}

/** The text with each span replaced; spans don't overlap. */
export function applyEdits(text: string, edits: readonly Edit[]): string {
  return [...edits]
    .sort((a, b) => b.from - a.from)
    .reduce((result, edit) => `${result.slice(0, edit.from)}${edit.text}${result.slice(edit.to)}`, text);
}
