import type { z } from 'zod';
import { quoted, sentence } from './wording.js';
import type { Path, Report, YamlFile } from './yaml.js';

/**
 * Reads a part of a file by its schema. The messages of the schemas are predicates ("must be text, such as …"), which
 * here get their subject and their place. A part with mistakes is read without them, so that what is right in it can
 * still be compared with the rest.
 */

interface Finding {
  path: Path;
  message: string;
  /** The mistake is the key, not what it stands for. */
  atKey: boolean;
}

/**
 * What the schema makes of the value at the path, mistakes reported and left out; undefined where nothing sensible is
 * left. Messages name the value by the path below `named`.
 */
export function readPart<T>(
  source: YamlFile,
  path: Path,
  schema: z.ZodType<T>,
  report: Report,
  named: Path = [],
): T | undefined {
  const value = source.at(path);
  const read = schema.safeParse(value, { error: describeByDefault });
  if (read.success) return read.data;
  const findings = read.error.issues.flatMap((issue) => findingsOf(issue, []));
  for (const finding of findings) {
    const full = [...path, ...finding.path];
    if (source.isUnresolved(full)) continue;
    const subject = describePath(full, named);
    const missing = !finding.atKey && source.at(full) === undefined;
    report({
      place: finding.atKey ? source.keyPlaceOf(full) : source.placeOf(full),
      message: sentence(missing ? `${subject} is missing: it ${finding.message}` : `${subject} ${finding.message}`),
    });
  }
  if (typeof value !== 'object' || value === null || Array.isArray(value)) return undefined;
  const bad = new Set(findings.map(({ path: [key] }) => key));
  const rest = Object.fromEntries(Object.entries(value).filter(([key]) => !bad.has(key)));
  return schema.safeParse(rest).data;
}

/** `destinations.iterable.region`, or entry 2 of `properties`, leaving out what the path has in common with `named`. */
function describePath(path: Path, named: Path = []): string {
  const shown = path.length > named.length ? path.slice(named.length) : path;
  const last = shown.at(-1);
  if (typeof last !== 'number') return quoted(shown.join('.'));
  return `entry ${last + 1} of ${describePath(shown.slice(0, -1))}`;
}

function describeByDefault(issue: z.core.$ZodRawIssue): string {
  if (issue.code !== 'invalid_type') return 'is not what belongs here';
  switch (issue.expected) {
    case 'array':
      return 'must be a list';
    case 'object':
    case 'record':
      return 'must be a mapping of names and values';
    default:
      return 'must be something else';
  }
}

/** Of a choice's branches the one whose shape fits tells what is wrong inside; where none fits, the choice itself. */
function findingsOf(issue: z.core.$ZodIssue, above: Path): Finding[] {
  const path = [...above, ...issue.path.map((key) => (typeof key === 'symbol' ? String(key) : key))];
  if (issue.code === 'unrecognized_keys') {
    const messages = issue.message.split('\n');
    return issue.keys.map((key, index) => ({ path: [...path, key], message: messages[index] ?? '', atKey: true }));
  }
  const inside = fittingBranch(issue);
  if (inside !== undefined) return inside.flatMap((inner) => findingsOf(inner, path));
  return [{ path, message: issue.message, atKey: false }];
}

function fittingBranch(issue: z.core.$ZodIssue): z.core.$ZodIssue[] | undefined {
  if (issue.code !== 'invalid_union') return undefined;
  return issue.errors.find((branch) => branch.length > 0 && branch.every(isInside));
}

function isInside(issue: z.core.$ZodIssue): boolean {
  return issue.path.length > 0 || issue.code === 'unrecognized_keys' || fittingBranch(issue) !== undefined;
}
