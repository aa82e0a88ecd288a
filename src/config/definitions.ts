import type { z } from 'zod';
import { keyFromName, keyProblem } from '../core/key.js';
import type { Cadence, Definition, GuardLimits } from '../core/definition.js';
import { findLookback } from '../core/moments.js';
import type { Place } from '../lib/errors.js';
import { readChanges } from './changes.js';
import { readPart } from './parts.js';
import { audienceSchema, traitSchema } from './schema.js';
import { readSends } from './sends.js';
import { readSqlText } from './sql-text.js';
import { quoted } from './wording.js';
import type { Path, Report, YamlFile } from './yaml.js';

/** What definitions are compared with: each other, and the destinations by name. */
export interface Surroundings {
  destinations: { known: readonly string[]; listed: readonly string[] };
  /** Whether the changes of `profiles` are named, without which none of a definition can be followed. */
  profilesFollowed: boolean;
  /** The keys so far; gets this one. */
  keys: Map<string, Place>;
  /** The files read so far; gets an `sql_file`. */
  files: Set<string>;
  report: Report;
  /** Takes a sentence about a setting that has no effect. */
  remark: (sentence: string) => void;
}

const DAY_MS = 86_400_000;
const MINUTE_MS = 60_000;

type Fields = z.output<typeof audienceSchema> & Partial<Pick<z.output<typeof traitSchema>, 'on_missing' | 'prefix'>>;

const LISTS = [
  { list: 'audiences', kind: 'audience' },
  { list: 'traits', kind: 'trait' },
] as const;

/** Where the definitions of a file are; what should be a list and isn't is reported. */
export function definitionPaths(source: YamlFile, report?: Report): { kind: Definition['kind']; path: Path }[] {
  return LISTS.flatMap(({ list, kind }) => {
    const entries = source.at([list]) ?? [];
    if (Array.isArray(entries)) return entries.map((_, index) => ({ kind, path: [list, index] }));
    const message = `\`${list}\` must be a list, each entry beginning with a dash: \`- name: Big spenders\`.`;
    report?.({ place: source.placeOf([list]), message });
    return [];
  });
}

/** One entry of `audiences` or `traits`; undefined only where a mistake has been reported. */
export function readDefinition(
  source: YamlFile,
  path: Path,
  kind: Definition['kind'],
  surroundings: Surroundings,
): Definition | undefined {
  const { report } = surroundings;
  const schema = kind === 'audience' ? audienceSchema : traitSchema;
  const fields: Fields | undefined = readPart(source, path, schema, report, path);
  if (fields === undefined) return undefined;
  const key = readKey(source, path, fields, surroundings);
  const text = readSqlText(source, path, fields, surroundings.files, report);
  const changes = readChanges(source, path, fields.changes, report);
  const cadence = readCadence(source, path, { ...fields, key: key ?? '' }, surroundings);
  const sends = readSends(source, path, kind, { ...fields, key: key ?? '' }, surroundings.destinations, report);
  if (key === undefined || text === undefined) return undefined;
  const asked = fields.lookback === undefined ? findLookback(text.sql) : null;
  if (asked !== null) {
    report({
      place: text.placeOf(asked),
      message: `\`:lookback\` stands for an interval that ${quoted(key)} lacks: add it, such as \`lookback: 30 days\`.`,
    });
    return undefined;
  }
  return {
    key,
    name: fields.name?.trim() ?? key,
    kind,
    text,
    lookback: fields.lookback ?? null,
    cadence,
    changes,
    reconcileMs: fields.reconcile ?? DAY_MS,
    sends,
    initial: fields.initial ?? 'send',
    onMissing: fields.on_missing === 'keep' ? 'keep' : 'null',
    onDelete: fields.on_delete ?? 'leave',
    enabled: fields.enabled ?? true,
    guard: fields.guard === null ? null : guardLimits(fields.guard ?? {}),
    properties: fields.properties ?? [],
    prefix: fields.prefix ?? '',
    place: source.placeOf(path),
  };
}

function readKey(source: YamlFile, path: Path, fields: Fields, { keys, report }: Surroundings): string | undefined {
  const from = source.at([...path, 'key']) === undefined ? 'name' : 'key';
  if (source.at([...path, from]) === undefined) {
    report({ place: source.placeOf(path), message: 'A `name` is missing here, such as `name: Big spenders`.' });
    return undefined;
  }
  const given = fields[from];
  if (given === undefined) return undefined;
  const place = source.placeOf([...path, from]);
  const key = from === 'key' ? given.trim() : keyFromName(given);
  if (key === '') {
    report({
      place,
      message: 'The `name` has none of the characters a-z, 0-9 and _, which make the key: add a `key`.',
    });
    return undefined;
  }
  const problem = keyProblem(key);
  if (problem !== null) {
    report({ place, message: `The key ${quoted(key)} ${problem}${from === 'name' ? ', or add a `key`' : ''}.` });
    return undefined;
  }
  const other = keys.get(key);
  if (other !== undefined) {
    const where = `${other.file}:${other.line}:${other.column}`;
    report({ place, message: `The key ${quoted(key)} is taken by the definition at ${where}: choose another.` });
    return undefined;
  }
  keys.set(key, place);
  return key;
}

function readCadence(source: YamlFile, path: Path, fields: Fields & { key: string }, around: Surroundings): Cadence {
  const { key, schedule, lookback, poll } = fields;
  const { profilesFollowed, report, remark } = around;
  const has = (name: string) => source.at([...path, name]) !== undefined;
  const isRealtime = schedule?.kind === 'realtime';
  if (has('poll')) {
    // Beside real time it says how often to look while that is not to be had.
    for (const other of ['lookback', 'schedule'].filter((name) => has(name) && !(name === 'schedule' && isRealtime))) {
      const hint = other === 'lookback' ? ', or use `schedule` for other times than every hour' : '';
      report({
        place: source.keyPlaceOf([...path, 'poll']),
        message: `\`poll\` and \`${other}\` can't stand together: leave one out${hint}.`,
      });
    }
  }
  if (has('reconcile') && !has('changes')) {
    remark(`\`reconcile\` of ${quoted(key)} has no effect without \`changes\`: all its runs are for everyone.`);
  }
  const polled = { kind: 'poll', everyMs: poll ?? MINUTE_MS } as const;
  const hourly = { kind: 'hourly' } as const;
  if (isRealtime) {
    const missing = !has('changes')
      ? '`changes`: the tables that it depends on, such as `changes: { orders: customer_id }`'
      : !profilesFollowed
        ? "`profiles.changes` too: the tables that hold people's userIds and emails, such as `changes: { customers: id }`"
        : null;
    if (missing !== null) {
      report({ place: source.placeOf([...path, 'schedule']), message: `\`schedule: realtime\` needs ${missing}.` });
    }
    return { kind: 'realtime', fallback: lookback === undefined ? polled : hourly, asked: true };
  }
  if (schedule !== undefined) return schedule;
  if (lookback !== undefined) return hourly;
  if (!has('changes')) return polled;
  if (profilesFollowed) return { kind: 'realtime', fallback: polled, asked: false };
  remark(`\`changes\` of ${quoted(key)} has no effect while \`profiles\` has none: it is polled.`);
  return polled;
}

function guardLimits(limits: Partial<Record<keyof GuardLimits, number | null | undefined>>): GuardLimits {
  const { exits = 0.3, growth = 1, nulls = 0.3 } = limits;
  return { exits, growth, nulls };
}
