import { resolve } from 'node:path';
import type { Definition } from '../core/definition.js';
import { findLookback } from '../core/moments.js';
import { OperatorError } from '../lib/errors.js';
import type { Place, Problem } from '../lib/errors.js';
import { Secret } from '../lib/secret.js';
import { readChanges } from './changes.js';
import { definitionPaths, readDefinition } from './definitions.js';
import type { Surroundings } from './definitions.js';
import { readDestinations } from './destinations.js';
import { createSubstitute } from './environment.js';
import type { Substitute } from './environment.js';
import { readText } from './files.js';
import { readIncludes } from './includes.js';
import { readPart } from './parts.js';
import { sections } from './schema.js';
import { readSqlText } from './sql-text.js';
import type { Config } from './types.js';
import { quoted, sentence, unknownWord } from './wording.js';
import { readYaml } from './yaml.js';
import type { Report, YamlFile } from './yaml.js';

const HOUR_MS = 3_600_000;

/**
 * Reads the configuration: the main file, the files that it includes, the SQL files that they name, and the variables
 * of `environment`. Throws an `OperatorError` with every problem of all the files, each with its place; a file that
 * can't be read, or whose YAML is broken, keeps none of the others from being read. No message repeats a value that may
 * be secret.
 */
export function loadConfig(file: string, environment: NodeJS.ProcessEnv): Config {
  const main = resolve(file);
  const content = readText(main);
  if (content.kind === 'unreadable') {
    throw new OperatorError(`The configuration ${main} can't be read: ${content.reason}.`);
  }
  const problems: Problem[] = [];
  const report: Report = (problem) => problems.push(problem);
  const substitute = createSubstitute(environment);
  const source = readYaml(main, content.text, substitute, report);
  const config = source === null ? undefined : readMain(source, substitute, report);
  if (config === undefined || problems.length > 0) throw new OperatorError(inOrder(problems, main));
  return config;
}

/** Undefined only where a problem has been reported. */
function readMain(source: YamlFile, substitute: Substitute, report: Report): Config | undefined {
  const content = source.at([]);
  if (!isMapping(content)) {
    const message = 'The configuration must be a mapping with sections such as `profiles:` and `destinations:`.';
    report({ place: source.placeOf([]), message });
    return undefined;
  }
  for (const name of Object.keys(content)) {
    if (Object.hasOwn(sections, name)) continue;
    const message = sentence(`${quoted(name)} ${unknownWord(name, Object.keys(sections), 'section')}`);
    report({ place: source.keyPlaceOf([name]), message });
  }
  const database = readPart(source, ['source'], sections.source, report) ?? {};
  const state = readPart(source, ['state'], sections.state, report) ?? {};
  const runs = readPart(source, ['runs'], sections.runs, report) ?? {};
  const logging = readPart(source, ['logging'], sections.logging, report) ?? {};
  const http = readPart(source, ['http'], sections.http, report);
  const isOff = [false, 'off'].some((off) => source.at(['http']) === off);
  readPart(source, ['events'], sections.events, report);
  const sourceUrl = secret(database.url);
  const directUrl = secret(database.direct_url);
  const urlIsMissing = (source.at(['source', 'url']) ?? '') === '' && !source.isUnresolved(['source', 'url']);
  if (directUrl !== null && urlIsMissing) {
    const message = '`source.direct_url` is a way past the pooler of `source.url`: set `source.url` too.';
    report({ place: source.placeOf(['source', 'direct_url']), message });
  }

  const files = new Set([source.file]);
  const profiles = readProfiles(source, files, report);
  const { names, listed, destinations } = readDestinations(source, report);
  const included = readIncludes(source, substitute, report);
  for (const path of included.paths) files.add(path);
  const sources = [source, ...included.files];
  const remarks: string[] = [];
  const surroundings: Surroundings = {
    destinations: { known: names, listed },
    profilesFollowed: source.at(['profiles', 'changes']) !== undefined,
    keys: new Map<string, Place>(),
    files,
    report,
    remark: (remark) => remarks.push(remark),
  };
  const definitions = sources.flatMap((each) =>
    definitionPaths(each, report).map(({ kind, path }) => readDefinition(each, path, kind, surroundings)),
  );
  refuseSharedLists(
    definitions.filter((definition) => definition !== undefined),
    report,
  );
  if (profiles === undefined) return undefined;
  return {
    file: source.file,
    source: { url: sourceUrl, directUrl },
    state: {
      url: state.url === database.url ? null : secret(state.url),
      schema: state.schema ?? 'personas',
      migrate: state.migrate ?? 'auto',
    },
    profiles,
    destinations,
    definitions: definitions.filter((definition) => definition !== undefined),
    runs: { parallel: runs.parallel ?? 2, memoryMb: runs.memory ?? 256, timeoutMs: runs.timeout ?? HOUR_MS },
    http: isOff ? null : { host: http?.host?.trim() ?? '127.0.0.1', port: http?.port ?? 8080 },
    logging: { level: logging.level ?? 'info', format: logging.format ?? 'auto' },
    remarks: [
      ...included.unmatched.map((pattern) => `The include ${quoted(pattern)} matches no file.`),
      ...idle(source),
      ...remarks,
    ],
    unmatched: included.unmatched,
    files: [...files],
  };
}

/** Whoever leaves one of two audiences that fill a list would be taken off it, though they are still in the other. */
function refuseSharedLists(definitions: readonly Definition[], report: Report): void {
  const filledBy = new Map<string, string>();
  for (const { key, sends, place } of definitions) {
    for (const [destination, { list }] of sends) {
      const name = JSON.stringify([destination, list?.name]);
      const other = filledBy.get(name);
      if (list === null) continue;
      if (other !== undefined) {
        report({
          place,
          message: `${quoted(key)} and ${quoted(other)} fill one list, ${quoted(list.name)}: give one of them another \`list\`.`,
        });
      }
      filledBy.set(name, key);
    }
  }
}

function readProfiles(source: YamlFile, files: Set<string>, report: Report): Config['profiles'] | undefined {
  const path = ['profiles'];
  const section = source.at(path) ?? null;
  if (section === null) {
    const message = '`profiles` is missing: say who people are, such as `profiles: { table: customers, key: hybrid }`.';
    report({ place: source.placeOf(path), message });
    return undefined;
  }
  const fields = readPart(source, path, sections.profiles, report);
  if (!isMapping(section)) return undefined;
  const text = readSqlText(source, path, fields ?? {}, files, report);
  const changes = readChanges(source, path, fields?.changes, report);
  if (fields === undefined || text === undefined) return undefined;
  const asked = findLookback(text.sql);
  if (asked === null) return { text, key: fields.key, changes };
  const message = '`:lookback` belongs to a definition: `profiles` are the same people for all of them.';
  report({ place: text.placeOf(asked), message });
  return undefined;
}

/** Sentences about what is written in the main file and has no effect in this version. */
function idle(main: YamlFile): string[] {
  return isMapping(main.at(['events']))
    ? ['`events` has no effect in this version: definitions are written in SQL.']
    : [];
}

function secret(value: string | null | undefined): Secret | null {
  return value === undefined || value === null || value === '' ? null : new Secret(value);
}

function isMapping(value: unknown): value is object {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}

/** The main file first, then by file, line and column. */
function inOrder(problems: readonly Problem[], main: string): Problem[] {
  const rank = ({ place }: Problem) => (place === undefined || place.file === main ? '' : place.file);
  return [...problems].sort((a, b) => {
    if (rank(a) !== rank(b)) return rank(a) < rank(b) ? -1 : 1;
    return (a.place?.line ?? 0) - (b.place?.line ?? 0) || (a.place?.column ?? 0) - (b.place?.column ?? 0);
  });
}
