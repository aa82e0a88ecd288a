import { dirname, resolve } from 'node:path';
import type { SqlText } from '../core/definition.js';
import { readText } from './files.js';
import { listed } from './wording.js';
import { placeIn } from './yaml.js';
import type { Path, Report, YamlFile } from './yaml.js';

interface SqlFields {
  sql?: string | undefined;
  sql_file?: string | undefined;
  table?: string | undefined;
}

const WAYS = ['sql', 'sql_file', 'table'] as const;

/**
 * The SQL of a part that has exactly one of `sql`, `sql_file` and `table`, with the place of each character. `fields`
 * are those of the part that are right; `files` gets the path of the file that was read.
 */
export function readSqlText(
  source: YamlFile,
  path: Path,
  fields: SqlFields,
  files: Set<string>,
  report: Report,
): SqlText | undefined {
  const given = WAYS.filter((way) => source.at([...path, way]) !== undefined);
  const [first, second] = given;
  if (second !== undefined) {
    report({
      place: source.keyPlaceOf([...path, second]),
      message: `Only one of ${listed(given, 'and')} can stand here: keep one.`,
    });
    return undefined;
  }
  if (first === undefined) {
    // `query` has been refused by name already.
    if (source.at([...path, 'query']) !== undefined) return undefined;
    report({
      place: source.placeOf(path),
      message: `One of ${listed(WAYS)} is missing here: write what selects the rows.`,
    });
    return undefined;
  }
  const { sql, sql_file: file, table } = fields;
  if (sql !== undefined) return source.textAt([...path, 'sql']) ?? undefined;
  const place = source.placeOf([...path, first]);
  if (table !== undefined) return { sql: `SELECT * FROM ${table}`, placeOf: () => place };
  if (file === undefined) return undefined;

  const absolute = resolve(dirname(source.file), file);
  files.add(absolute);
  const content = readText(absolute);
  if (content.kind === 'unreadable') {
    report({ place, message: `The file ${absolute} can't be read: ${content.reason}.` });
    return undefined;
  }
  if (content.text.trim() === '') {
    report({ place, message: `The file ${absolute} is empty: write a SELECT statement into it.` });
    return undefined;
  }
  const { text } = content;
  return { sql: text, placeOf: (offset) => placeIn(absolute, text, Array.from(text).slice(0, offset).join('').length) };
}
