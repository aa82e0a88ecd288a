import { dirname, resolve } from 'node:path';
import type { Substitute } from './environment.js';
import { findFiles, isPattern, readText } from './files.js';
import { readPart } from './parts.js';
import { lists, sections } from './schema.js';
import { quoted, sentence, unknownWord } from './wording.js';
import { readYaml } from './yaml.js';
import type { Report, YamlFile } from './yaml.js';

export interface Included {
  files: readonly YamlFile[];
  /** What was looked at, absolute: each file, and each pattern with its folder. */
  paths: readonly string[];
  /** Patterns that no file matches, as they are written. */
  unmatched: readonly string[];
}

/** The files that the main file's `include` means, each once and never the main file itself; mistakes are reported. */
export function readIncludes(main: YamlFile, substitute: Substitute, report: Report): Included {
  readPart(main, ['include'], sections.include, report);
  const entries: unknown = main.at(['include']);
  const files: YamlFile[] = [];
  const unmatched: string[] = [];
  const paths = new Set<string>();
  for (const [index, entry] of (Array.isArray(entries) ? entries : []).entries()) {
    if (typeof entry !== 'string' || entry.trim() === '') continue;
    const path = resolve(dirname(main.file), entry);
    const matches = isPattern(entry) ? findFiles(path) : [path];
    if (matches.length === 0) unmatched.push(entry);
    if (isPattern(entry)) paths.add(path);
    for (const file of matches) {
      if (file === main.file || paths.has(file)) continue;
      paths.add(file);
      const content = readText(file);
      if (content.kind === 'unreadable') {
        const message = `The file ${file} can't be read: ${content.reason}.`;
        report({ place: main.placeOf(['include', index]), message });
        continue;
      }
      const source = readYaml(file, content.text, substitute, report);
      if (source !== null && hasDefinitions(source, report)) files.push(source);
    }
  }
  return { files, paths: [...paths], unmatched };
}

/** Whether it has the form of an included file: `audiences` and `traits`, or nothing. */
function hasDefinitions(source: YamlFile, report: Report): boolean {
  const content = source.at([]);
  if (content === null || content === undefined) return false;
  const place = source.placeOf([]);
  if (Array.isArray(content)) {
    report({ place, message: 'A list alone does not say what it holds: put it below `audiences:` or `traits:`.' });
    return false;
  }
  if (typeof content !== 'object') {
    report({ place, message: 'An included file must be a mapping with `audiences:` and `traits:`.' });
    return false;
  }
  const names = Object.keys(content);
  const definitionKeys = ['name', 'key', 'sql', 'sql_file', 'table', 'query'];
  if (!names.some((name) => name in lists) && names.some((name) => definitionKeys.includes(name))) {
    report({
      place,
      message: 'A single definition is put into the list below `audiences:` or `traits:`, after a dash.',
    });
    return false;
  }
  for (const name of names) {
    if (Object.hasOwn(lists, name)) continue;
    const predicate = Object.hasOwn(sections, name)
      ? 'belongs in the main file: included files hold `audiences` and `traits`.'
      : unknownWord(name, Object.keys(lists), 'section of an included file');
    report({ place: source.keyPlaceOf([name]), message: sentence(`${quoted(name)} ${predicate}`) });
  }
  return true;
}
