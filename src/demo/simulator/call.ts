/**
 * A call as the endpoints get it, and the reading of its body. The first member with a wrong type is kept as the problem; Iterable takes a `null` member for
 * nothing the documentation promises, so it counts as a wrong type, except inside `dataFields`, where it removes.
 */
import type { RawJson, RawObject } from './json.js';

export interface Body {
  text: (name: string) => string | undefined;
  flag: (name: string) => boolean | undefined;
  /** A whole number that JavaScript holds exactly. */
  whole: (name: string) => number | undefined;
  /** Seconds since 1970. */
  seconds: (name: string) => number | undefined;
  /** An object's members; none where it is absent. */
  fields: (name: string) => ReadonlyMap<string, RawJson>;
  object: (name: string) => Body | undefined;
  /** An array of objects; undefined where it is absent. */
  objects: (name: string) => Body[] | undefined;
  raw: (name: string) => RawJson | undefined;
  /** Notes something else that is wrong. */
  refuse: (problem: string) => void;
  /** What was wrong with the members read so far, if anything. */
  problem: () => string | undefined;
}

export interface Call {
  body: Body;
  /** The variable part of the path, such as an email; empty where there is none. */
  argument: string;
  query: URLSearchParams;
}

const YEAR_2100 = 4_102_444_800;
const NO_FIELDS: ReadonlyMap<string, RawJson> = new Map<string, RawJson>();

/** Bodies read from one request share its problem. */
export function readBody({ members }: RawObject, problems: string[] = []): Body {
  const read = <Kind extends RawJson['kind']>(
    name: string,
    kind: Kind,
  ): Extract<RawJson, { kind: Kind }> | undefined => {
    const value = members.get(name);
    if (value === undefined || isOfKind(value, kind)) return value;
    problems.push(`'${name}' has to be of type ${kind}`);
    return undefined;
  };
  const whole = (name: string): number | undefined => {
    const value = read(name, 'number');
    if (value === undefined) return undefined;
    const number = Number(value.raw);
    if (!/[.eE]/.test(value.raw) && Number.isSafeInteger(number)) return number;
    problems.push(`'${name}' has to be a whole number`);
    return undefined;
  };
  return {
    text: (name) => read(name, 'string')?.text,
    flag: (name) => {
      const value = read(name, 'boolean');
      return value && value.raw === 'true';
    },
    whole,
    seconds: (name) => {
      const value = whole(name);
      if (value === undefined || (value >= 0 && value < YEAR_2100)) return value;
      problems.push(`'${name}' has to be in seconds since 1970`);
      return undefined;
    },
    fields: (name) => read(name, 'object')?.members ?? NO_FIELDS,
    object: (name) => {
      const value = read(name, 'object');
      return value && readBody(value, problems);
    },
    objects: (name) => {
      const items = read(name, 'array')?.items;
      const objects = items?.filter((item) => item.kind === 'object');
      if (objects?.length !== items?.length) problems.push(`'${name}' has to hold objects only`);
      return objects?.map((object) => readBody(object, problems));
    },
    raw: (name) => members.get(name),
    refuse: (problem) => void problems.push(problem),
    problem: () => problems[0],
  };
}

function isOfKind<Kind extends RawJson['kind']>(value: RawJson, kind: Kind): value is Extract<RawJson, { kind: Kind }> {
  return value.kind === kind;
}
