import { isAlias, isMap, isScalar, isSeq, parseDocument, visit } from 'yaml';
import type { Document, Node, Scalar, YAMLError } from 'yaml';
import type { SqlText } from '../core/definition.js';
import type { Place, Problem } from '../lib/errors.js';
import type { Substitute } from './environment.js';

/**
 * YAML with the way back to the file: what stands at a path, where it stands, and which character of the file a
 * character of a text came from. Variables are replaced in every scalar but those that are or may be SQL: below `sql`
 * and `changes`. The parser's own messages quote the file and so might quote a secret: each of its error codes has a
 * sentence of ours.
 */

export type Path = readonly (string | number)[];

export type Report = (problem: Problem) => void;

export interface YamlFile {
  file: string;
  /** What the path leads to; undefined where there is nothing. Null for an empty file. */
  at: (path: Path) => unknown;
  /** Where the value is; where it is missing or empty, the key or entry above it. */
  placeOf: (path: Path) => Place;
  keyPlaceOf: (path: Path) => Place;
  /** Whether a variable of this scalar could not be replaced, which has been reported. */
  isUnresolved: (path: Path) => boolean;
  /** The text at the path, with the place of each of its characters; null where there is no text. */
  textAt: (path: Path) => SqlText | null;
}

type Aliases = ReadonlyMap<Node, Node>;

/** More uses of anchors than a person writes by hand; what multiplies beyond it is refused. */
const MAX_ALIASES = 10_000;

const SYNTAX: Record<YAMLError['code'], string> = {
  ALIAS_PROPS: 'An alias such as `*name` takes no anchor or tag: leave it out.',
  BAD_ALIAS: 'An alias is written as `*name`, an anchor as `&name`; put a text that begins with * or & in quotes.',
  BAD_COLLECTION_TYPE: 'A tag does not fit what it stands before: leave it out.',
  BAD_DIRECTIVE: 'A line that begins with % is a directive, which is not used here: leave it out, or put it in quotes.',
  BAD_DQ_ESCAPE: 'A backslash in double quotes begins an escape, and this one does not exist: use single quotes.',
  BAD_INDENT:
    'The indentation is wrong, or a bracket before it is open: indent what belongs together by the same spaces.',
  BAD_PROP_ORDER: 'An anchor or tag stands in the wrong place: put it right before the value.',
  BAD_SCALAR_START: "A text can't begin with this character: put it in quotes.",
  BLOCK_AS_IMPLICIT_KEY: "A second `key: value` can't stand on this line: put the value in quotes, or below `|`.",
  BLOCK_IN_FLOW: "Between [ ] or { } a value can't be written in lines of its own: put it in quotes.",
  DUPLICATE_KEY: 'This key was given before in the same mapping: keep one of the two.',
  IMPOSSIBLE: 'This is not YAML.',
  KEY_OVER_1024_CHARS: 'The colon comes too far behind the beginning of its key: put a long text in quotes.',
  MISSING_CHAR: 'Something is missing here: a closing quote or bracket, a comma, or the space behind a colon.',
  MULTILINE_IMPLICIT_KEY: 'A key must stand on one line, with its colon: put a text of several lines in quotes.',
  MULTIPLE_ANCHORS: 'A value can have one anchor: leave the other out.',
  MULTIPLE_DOCS:
    'A file holds one document: leave out the line `---` and what follows it, or make it a file of its own.',
  MULTIPLE_TAGS: 'A value can have one tag: leave the other out.',
  NON_STRING_KEY: 'A key must be text: put it in quotes.',
  RESOURCE_EXHAUSTION: 'This is nested too deeply to be read: write it with fewer levels.',
  TAB_AS_INDENT: 'YAML is indented by spaces: replace the tab.',
  TAG_RESOLVE_FAILED:
    'Tags such as `!name` are not known here: leave it out, or put a text that begins with ! in quotes.',
  UNEXPECTED_TOKEN:
    'This does not belong here: look for a missing quote, a stray bracket, or an indentation that is off.',
};

const UNQUOTED_VARIABLE = 'Between { } a variable needs quotes, "${NAME}"; or write the value in a line of its own.';

/** Null where the file can't be made sense of; everything wrong with it is reported. */
export function readYaml(file: string, text: string, substitute: Substitute, report: Report): YamlFile | null {
  const placeAt = (offset: number) => placeIn(file, text, offset);
  const document = parseDocument(text, { prettyErrors: false, stringKeys: true, resolveKnownTags: false });
  const wrong = [...document.errors, ...document.warnings];
  // What doesn't belong somewhere has more not belong behind it: the first says it all.
  const stray = wrong.find(({ code }) => code === 'UNEXPECTED_TOKEN');
  for (const error of wrong) {
    const [at] = error.pos;
    const isVariable = text.startsWith('${', at - 1);
    if (error.code !== 'UNEXPECTED_TOKEN' || error === stray) {
      report({ place: placeAt(at), message: isVariable ? UNQUOTED_VARIABLE : SYNTAX[error.code] });
    }
  }
  if (wrong.some(({ code }) => code !== 'DUPLICATE_KEY')) return null;

  const refuse = (node: Node, message: string) => report({ place: placeAt(node.range?.[0] ?? 0), message });
  const unresolved = replaceVariables(document, substitute, refuse);
  const aliases = resolveAliases(document, refuse);
  if (aliases === null) return null;
  const content = expand(document, aliases, refuse);
  if (content === null) return null;

  const find = (path: Path) => findNode(document, aliases, path);
  const placeOf = (path: Path) => {
    const { node, key, depth } = find(path);
    const empty = depth < path.length || (isScalar(node) && node.value === null);
    return placeAt((empty ? (key ?? node) : node)?.range?.[0] ?? 0);
  };
  return {
    file,
    placeOf,
    at: (path) => path.reduce(step, content.value),
    keyPlaceOf: (path) => {
      const { node, key } = find(path);
      return placeAt((key ?? node)?.range?.[0] ?? 0);
    },
    isUnresolved: (path) => {
      const { node, depth } = find(path);
      return depth === path.length && isScalar(node) && unresolved.has(node);
    },
    textAt: (path) => {
      const { node, depth } = find(path);
      if (depth < path.length || !isScalar(node) || typeof node.value !== 'string') return null;
      const value = node.value;
      return { sql: value, placeOf: (offset) => placeAt(sourceOffset(text, node, value, offset)) };
    },
  };
}

/** Line and column, from 1, of a 0-based offset into a file's text. */
export function placeIn(file: string, text: string, offset: number): Place {
  const before = text.slice(0, offset);
  const lineStart = before.lastIndexOf('\n') + 1;
  return { file, line: before.split('\n').length, column: before.length - lineStart + 1 };
}

/** Puts the variables' values into the tree; returns the scalars, now empty, where that failed. */
function replaceVariables(
  document: Document,
  substitute: Substitute,
  refuse: (node: Node, message: string) => void,
): ReadonlySet<Node> {
  const unresolved = new Set<Node>();
  visit(document, {
    Pair: (_, { key, value }) => {
      const name = isScalar(key) ? key.value : null;
      return (name === 'sql' && isScalar(value)) || (name === 'changes' && isMap(value)) ? visit.SKIP : undefined;
    },
    Scalar: (key, node) => {
      if (key === 'key' || typeof node.value !== 'string') return;
      const { text, problems } = substitute(node.value);
      for (const message of problems) refuse(node, message);
      if (problems.length > 0) unresolved.add(node);
      node.value = problems.length > 0 ? '' : text;
    },
  });
  return unresolved;
}

/** What each alias stands for; null, and a report, where one has no anchor before it or stands within its own. */
function resolveAliases(document: Document, refuse: (node: Node, message: string) => void): Aliases | null {
  const anchors = new Map<string, Node>();
  const aliases = new Map<Node, Node>();
  const astray: Node[] = [];
  visit(document, {
    Node: (_, node, above) => {
      if (!isAlias(node)) {
        if (node.anchor !== undefined) anchors.set(node.anchor, node);
        return;
      }
      const target = anchors.get(node.source);
      if (target === undefined || above.some((parent) => parent === target)) astray.push(node);
      else aliases.set(node, target);
    },
  });
  for (const node of astray) {
    refuse(node, 'This alias has no anchor before it: write `&name` before the value that it repeats.');
  }
  return astray.length === 0 ? aliases : null;
}

/** The tree as plain values; null, and a report, where its aliases multiply too far. */
function expand(
  document: Document,
  aliases: Aliases,
  refuse: (node: Node, message: string) => void,
): { value: unknown } | null {
  try {
    const value: unknown = document.toJS({ maxAliasCount: MAX_ALIASES });
    return { value };
  } catch (error) {
    const [first] = aliases.keys();
    if (!(error instanceof ReferenceError) || first === undefined) throw error;
    refuse(first, 'Aliases in this file repeat too much: write the values out.');
    return null;
  }
}

function step(value: unknown, key: string | number): unknown {
  if (Array.isArray(value)) return typeof key === 'number' ? (value as unknown[])[key] : undefined;
  if (typeof value !== 'object' || value === null || !Object.hasOwn(value, key)) return undefined;
  return Reflect.get(value, key) as unknown;
}

/** The node at the path, or the last one on the way (`depth` steps along); `key` is the nearest key above it. */
function findNode(
  document: Document,
  aliases: Aliases,
  path: Path,
): { node: Node | null; key: Node | null; depth: number } {
  const resolve = (node: unknown): Node | null => {
    if (isAlias(node)) return aliases.get(node) ?? null;
    return isScalar(node) || isMap(node) || isSeq(node) ? node : null;
  };
  let node = resolve(document.contents);
  let key: Node | null = null;
  for (const [depth, name] of path.entries()) {
    if (isMap(node)) {
      const pair = node.items.find((item) => isScalar(item.key) && item.key.value === name);
      if (pair === undefined || !isScalar(pair.key)) return { node, key, depth };
      key = pair.key;
      node = resolve(pair.value);
    } else if (isSeq(node) && typeof name === 'number' && name < node.items.length) {
      key = null;
      node = resolve(node.items[name]);
    } else {
      return { node, key, depth };
    }
  }
  return { node, key, depth: path.length };
}

/**
 * Where in the file a character of a scalar's text is. Folding, indentation and line breaks only touch white space, so
 * the other characters are counted off against the source, whatever style it is written in.
 */
function sourceOffset(text: string, node: Scalar, value: string, offset: number): number {
  const [start = 0, end = 0] = node.range ?? [];
  const body = node.type === 'BLOCK_LITERAL' || node.type === 'BLOCK_FOLDED' ? text.indexOf('\n', start) + 1 : start;
  const solid = solidOffsets(text.slice(body, end), node.type);
  const characters = Array.from(value);
  if (solid.length !== characters.filter(isSolid).length) return start;
  const index = characters.slice(0, offset).filter(isSolid).length;
  const character = characters[offset];
  const found = character !== undefined && isSolid(character) ? solid[index] : undefined;
  if (found !== undefined) return body + found;
  const last = solid[index - 1];
  return last === undefined ? body : body + last + 1;
}

function isSolid(character: string): boolean {
  return !/[ \t\r\n]/.test(character);
}

/** The offsets of the characters, white space apart, that a scalar's source stands for. */
function solidOffsets(source: string, type: Scalar['type']): number[] {
  const token =
    type === 'QUOTE_DOUBLE'
      ? /\\(?:x[\da-fA-F]{2}|u[\da-fA-F]{4}|U[\da-fA-F]{8}|\r?\n|.)|[^"]/gsu
      : type === 'QUOTE_SINGLE'
        ? /''|[^']/gu
        : /./gsu;
  return [...source.matchAll(token)].filter(([text]) => isSolid(decode(text))).map(({ index }) => index);
}

/** White space stays what it is; what any other escape stands for doesn't matter here. */
function decode(token: string): string {
  if (token.length === 1 || !token.startsWith('\\')) return token;
  if (/^\\(?:[ntr \t]|\r?\n|(?:x|u00|U000000)(?:20|0[9aAdD]))$/.test(token)) return ' ';
  return 'x';
}
