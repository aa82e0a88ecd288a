import { readdirSync, readFileSync, statSync } from 'node:fs';
import type { Dirent } from 'node:fs';
import { join, parse, sep } from 'node:path';

/** Reading files that a person wrote, and finding them by patterns. */

export type FileText = { kind: 'text'; text: string } | { kind: 'unreadable'; reason: string };

/** UTF-8, without a byte order mark. */
export function readText(file: string): FileText {
  try {
    return { kind: 'text', text: readFileSync(file, 'utf8').replace(/^\uFEFF/, '') };
  } catch (error) {
    return { kind: 'unreadable', reason: describeReadError(error) };
  }
}

function describeReadError(error: unknown): string {
  const code = error instanceof Error && 'code' in error ? String(error.code) : 'unknown error';
  switch (code) {
    case 'ENOENT':
    case 'ENOTDIR':
      return 'there is no such file';
    case 'EACCES':
    case 'EPERM':
      return 'its permissions forbid it';
    case 'EISDIR':
      return 'it is a folder';
    default:
      return code;
  }
}

export function isPattern(path: string): boolean {
  return /[*?]/.test(path);
}

/**
 * The files that an absolute pattern means, in alphabetical order. `*` and `?` stand for characters of one
 * name, `**` for any folders; a name that begins with a dot is found only where the pattern has the dot.
 */
export function findFiles(pattern: string): string[] {
  const { root } = parse(pattern);
  const found = expand(root, pattern.slice(root.length).split(sep)).filter(isFile);
  return [...new Set(found)].sort();
}

function expand(folder: string, [segment, ...rest]: readonly string[]): string[] {
  if (segment === undefined) return [folder];
  if (segment === '**') {
    const below = list(folder).filter((entry) => entry.isDirectory() && !entry.name.startsWith('.'));
    return [...expand(folder, rest), ...below.flatMap(({ name }) => expand(join(folder, name), [segment, ...rest]))];
  }
  if (!isPattern(segment)) return expand(join(folder, segment), rest);
  const names = list(folder)
    .map(({ name }) => name)
    .filter((name) => matches(name, segment));
  return names.flatMap((name) => expand(join(folder, name), rest));
}

function matches(name: string, segment: string): boolean {
  if (name.startsWith('.') && !segment.startsWith('.')) return false;
  const source = segment
    .replace(/[.+^${}()|[\]\\]/g, '\\$&')
    .replaceAll('*', '.*')
    .replaceAll('?', '.');
  return new RegExp(`^${source}$`, 's').test(name);
}

/** A folder that is missing or closed holds nothing that could be found. */
function list(folder: string): Dirent[] {
  try {
    return readdirSync(folder, { withFileTypes: true });
  } catch (error) {
    if (error instanceof Error && 'code' in error) return [];
    throw error;
  }
}

function isFile(path: string): boolean {
  return statSync(path, { throwIfNoEntry: false })?.isFile() ?? false;
}
