import { dirname, resolve } from 'node:path';
import type { z } from 'zod';
import type { Place } from '../lib/errors.js';
import { Secret } from '../lib/secret.js';
import { readPart } from './parts.js';
import { destinationSchemas, destinationTypes } from './schema.js';
import type { Destination, FileDestination, IterableDestination, SegmentDestination } from './types.js';
import { quoted } from './wording.js';
import type { Path, Report, YamlFile } from './yaml.js';

/** Iterable's own limits for a project, in requests a second; it says none for lists. */
const QUOTAS = {
  users_update: 500,
  users_bulk_update: 5,
  events_track: 2_000,
  events_track_bulk: 10,
  lists: 5,
  reads: 100,
};

type Keys = Map<string, Place>;

/** A `send` mapping has these beside its destinations. */
const TAKEN_NAMES = ['entered', 'exited', 'computed'];

/** `names` has those with mistakes too, so that definitions may refer to them. */
export interface Destinations {
  names: readonly string[];
  destinations: readonly Destination[];
  /** Those that have lists. */
  listed: readonly string[];
}

export function readDestinations(source: YamlFile, report: Report): Destinations {
  const example = 'such as `iterable: { type: iterable, api_key: ... }`';
  const section = source.at(['destinations']) ?? {};
  if (typeof section !== 'object' || Array.isArray(section)) {
    const message = `\`destinations\` must be a mapping of names and destinations, ${example}.`;
    report({ place: source.placeOf(['destinations']), message });
    return { names: [], listed: [], destinations: [] };
  }
  const names = Object.keys(section);
  if (names.length === 0) {
    report({ place: source.placeOf(['destinations']), message: `A destination is missing: name one, ${example}.` });
  }
  const keys = new Map<string, Place>();
  const destinations = names.map((name) => readDestination(source, name, keys, report));
  const isListed = (name: string): boolean =>
    !['segment', 'file'].includes(String(source.at(['destinations', name, 'type'])));
  return { names, listed: names.filter(isListed), destinations: destinations.filter((each) => each !== undefined) };
}

function readDestination(source: YamlFile, name: string, keys: Keys, report: Report): Destination | undefined {
  const path = ['destinations', name];
  const place = source.keyPlaceOf(path);
  if (!/^[a-z][a-z0-9_-]{0,62}$/i.test(name) || TAKEN_NAMES.includes(name)) {
    const rule = `letters, digits, _ and - beginning with a letter, and none of ${TAKEN_NAMES.join(', ')}`;
    report({ place, message: `${quoted(name)} can't be the name of a destination: use ${rule}.` });
  }
  const type = readType(source, path, report);
  switch (type) {
    case undefined:
      return undefined;
    case 'iterable':
      return readIterable(source, name, keys, report);
    case 'segment':
      return readSegment(source, name, keys, report);
    case 'file':
      return readFile(source, name, report);
  }
}

function readType(source: YamlFile, path: Path, report: Report): Destination['type'] | undefined {
  const section = source.at(path);
  if (typeof section === 'object' && section !== null && !Array.isArray(section)) {
    return readPart(source, [...path, 'type'], destinationTypes, report);
  }
  // Says that it must be a mapping.
  readPart(source, path, destinationSchemas.iterable, report);
  return undefined;
}

/** Two destinations with one key would share its quota without knowing of each other. */
function noteKey(
  source: YamlFile,
  path: Path,
  { key, keys, report }: { key: string; keys: Keys; report: Report },
): void {
  const other = keys.get(key);
  if (other !== undefined) {
    const message = `The API key is the same as that of the destination in line ${other.line}: one project is one destination.`;
    report({ place: source.placeOf(path), message });
  }
  keys.set(key, source.placeOf(path));
}

function readIterable(source: YamlFile, name: string, keys: Keys, report: Report): IterableDestination | undefined {
  const path = ['destinations', name];
  const fields = readPart(source, path, destinationSchemas.iterable, report);
  if (fields === undefined) return undefined;
  const { api_key: apiKey = null, region = { kind: 'host', baseUrl: 'https://api.iterable.com' } } = fields;
  if (apiKey !== null && apiKey !== '') noteKey(source, [...path, 'api_key'], { key: apiKey, keys, report });
  return {
    type: 'iterable',
    name,
    apiKey: apiKey === null || apiKey === '' ? null : new Secret(apiKey),
    region,
    quotas: readQuotas(source, name, fields, report),
    place: source.keyPlaceOf(path),
  };
}

function readSegment(source: YamlFile, name: string, keys: Keys, report: Report): SegmentDestination | undefined {
  const path = ['destinations', name];
  const fields = readPart(source, path, destinationSchemas.segment, report);
  if (fields === undefined) return undefined;
  const { write_key: key = null, url: baseUrl = 'https://api.segment.io', quotas = {} } = fields;
  const place = source.keyPlaceOf(path);
  if (key === null || key === '') {
    const isAsked = source.isUnresolved([...path, 'write_key']);
    if (!isAsked) report({ place, message: `\`write_key\` of destination ${quoted(name)} is missing.` });
    return undefined;
  }
  noteKey(source, [...path, 'write_key'], { key, keys, report });
  return { type: 'segment', name, writeKey: new Secret(key), baseUrl, quotas: { batch: quotas.batch ?? 10 }, place };
}

function readFile(source: YamlFile, name: string, report: Report): FileDestination | undefined {
  const path = ['destinations', name];
  const fields = readPart(source, path, destinationSchemas.file, report);
  if (fields?.path === undefined) return undefined;
  const { path: file, quotas = {} } = fields;
  return {
    type: 'file',
    name,
    path: resolve(dirname(source.file), file.trim()),
    quotas: { batch: quotas.batch ?? 100 },
    place: source.keyPlaceOf(path),
  };
}

function readQuotas(
  source: YamlFile,
  name: string,
  { quota = 1, quotas = {} }: z.output<typeof destinationSchemas.iterable>,
  report: Report,
): IterableDestination['quotas'] {
  const path = ['destinations', name, 'quota'];
  if (source.at(path) !== undefined && source.at(['destinations', name, 'quotas']) !== undefined) {
    report({ place: source.keyPlaceOf(path), message: "`quota` and `quotas` can't stand together: keep one." });
  }
  // Less than one a second is one in several seconds.
  const part = (name: keyof typeof QUOTAS) => quotas[name] ?? QUOTAS[name] * quota;
  return {
    usersUpdate: part('users_update'),
    usersBulkUpdate: part('users_bulk_update'),
    eventsTrack: part('events_track'),
    eventsTrackBulk: part('events_track_bulk'),
    lists: part('lists'),
    reads: part('reads'),
  };
}
