import type { Change } from '../core/definition.js';
import { findMoments, hasName } from '../core/moments.js';
import { quoteColumn, quoteTable } from './values.js';
import { quoted } from './wording.js';
import type { Path, Report, YamlFile } from './yaml.js';

/**
 * What `changes` may say: tables, and for each how its rows lead to profiles. That is the column that holds the profile,
 * or a SELECT that finds profiles from `changed`, the rows that have changed.
 */

/** What a column's name can't begin with, a space being in it then. */
const SQL = /^\s*(?:select|with)\s/i;

/**
 * The `changes` of the part at `path`, whose `fields` are those that are text; mistakes are reported and left out.
 * Whether a table is there, and what its SQL gives, only the database can say.
 */
export function readChanges(
  source: YamlFile,
  path: Path,
  fields: Readonly<Record<string, string>> | undefined,
  report: Report,
): readonly Change[] {
  if (fields === undefined) return [];
  const at = [...path, 'changes'];
  const named = path[0] === 'profiles' ? 'profiles.changes' : 'changes';
  if (Object.keys(fields).length === 0) {
    const message = `\`${named}\` names no table: write one with its profile column, such as \`changes: { orders: customer_id }\`.`;
    report({ place: source.placeOf(at), message });
  }
  const changes = new Map<string, Change>();
  for (const [written, value] of Object.entries(fields)) {
    const place = source.keyPlaceOf([...at, written]);
    const table = quoteTable(written);
    if (table === null) {
      const message = `The key ${quoted(written)} of \`${named}\` must be a table with its schema, such as \`public.orders\`, or the name of a table alone.`;
      report({ place, message });
    } else if (changes.has(table)) {
      report({ place, message: `\`${named}\` names the table ${quoted(written)} twice: keep one.` });
    } else {
      const way = readWay(source, [...at, written], `${named}.${written}`, value, report);
      if (way !== undefined) changes.set(table, { table, written, place, way });
    }
  }
  return [...changes.values()];
}

function readWay(
  source: YamlFile,
  path: Path,
  named: string,
  value: string,
  report: Report,
): Change['way'] | undefined {
  const text = SQL.test(value) ? source.textAt(path) : null;
  if (text === null) {
    const column = quoteColumn(value);
    if (column !== null) return { kind: 'column', column };
    const message = `${quoted(named)} must be a column, such as \`customer_id\`, or a SELECT that finds profiles from the rows in \`changed\`.`;
    report({ place: source.placeOf(path), message });
    return undefined;
  }
  if (!hasName(text.sql, 'changed')) {
    const message = `The SQL of ${quoted(named)} reads nothing from \`changed\`, the rows that have changed: join it.`;
    report({ place: text.placeOf(0), message });
  }
  for (const { name, at } of findMoments(text.sql)) {
    const message = `\`${name}\` has no meaning in \`changes\`: it only finds whose rows have changed.`;
    report({ place: text.placeOf(at), message });
  }
  return { kind: 'sql', text };
}
