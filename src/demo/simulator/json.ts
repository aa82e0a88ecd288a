/**
 * JSON that keeps the text of every value. `JSON.parse` makes one number of `10` and `10.0` and loses the digits of a
 * whole number past 2^53; Iterable tells the first two apart and keeps the third, so what stands for it must too.
 */

interface RawString {
  kind: 'string';
  raw: string;
  text: string;
}

interface RawArray {
  kind: 'array';
  raw: string;
  items: RawJson[];
}

export interface RawObject {
  kind: 'object';
  raw: string;
  members: Map<string, RawJson>;
}

/** A JSON value with its own text in `raw`. */
export type RawJson =
  | { kind: 'null'; raw: string }
  | { kind: 'boolean'; raw: string }
  | { kind: 'number'; raw: string }
  | RawString
  | RawArray
  | RawObject;

const MOST_DEPTH = 100;
const WORD = /[\w.+-]+/y;

/** Reads any text; throws a SyntaxError where it isn't JSON or nests deeper than a hundred levels. */
export function parseRaw(text: string): RawJson {
  JSON.parse(text);
  return scanRaw(text);
}

/** Reads text that is known to be JSON. Of a member named twice the last counts. */
export function scanRaw(text: string): RawJson {
  let at = 0;

  /** Goes to the next character that isn't blank. */
  const next = (): string => {
    while (text.charCodeAt(at) <= 32) at++;
    return text.charAt(at);
  };

  const readString = (): RawString => {
    const start = at;
    at = endOfString(text, start);
    const raw = text.slice(start, at);
    return { kind: 'string', raw, text: raw.includes('\\') ? (JSON.parse(raw) as string) : raw.slice(1, -1) };
  };

  const readArray = (depth: number): RawArray => {
    const start = at++;
    const items: RawJson[] = [];
    while (next() !== ']') {
      if (next() === ',') at++;
      items.push(readValue(depth + 1));
    }
    at++;
    return { kind: 'array', raw: text.slice(start, at), items };
  };

  const readObject = (depth: number): RawObject => {
    const start = at++;
    const members = new Map<string, RawJson>();
    while (next() !== '}') {
      if (next() === ',') at++;
      next();
      const name = readString().text;
      next();
      at++;
      members.set(name, readValue(depth + 1));
    }
    at++;
    return { kind: 'object', raw: text.slice(start, at), members };
  };

  const readWord = (): RawJson => {
    WORD.lastIndex = at;
    const raw = WORD.exec(text)?.[0] ?? '';
    at += raw.length;
    if (raw === 'null') return { kind: 'null', raw };
    return { kind: raw === 'true' || raw === 'false' ? 'boolean' : 'number', raw };
  };

  const readValue = (depth: number): RawJson => {
    if (depth > MOST_DEPTH) throw new SyntaxError(`JSON is nested deeper than ${MOST_DEPTH} levels`);
    const first = next();
    if (first === '"') return readString();
    if (first === '{') return readObject(depth);
    return first === '[' ? readArray(depth) : readWord();
  };

  return readValue(0);
}

/** An object's text from the texts of its members, without blanks between them. */
export function rawObject(members: ReadonlyMap<string, RawJson>): RawObject {
  const parts: string[] = [];
  for (const [name, value] of members) parts.push(`${JSON.stringify(name)}:${value.raw}`);
  return { kind: 'object', raw: `{${parts.join(',')}}`, members: new Map(members) };
}

export function rawString(text: string): RawString {
  return { kind: 'string', raw: JSON.stringify(text), text };
}

/** A copy that doesn't keep the whole text alive that it was cut from; for whatever is stored. */
export function detach(text: string): string {
  return ` ${text}`.slice(1);
}

function endOfString(text: string, start: number): number {
  let end = text.indexOf('"', start + 1);
  while (isEscaped(text, end)) end = text.indexOf('"', end + 1);
  return end + 1;
}

function isEscaped(text: string, position: number): boolean {
  let backslashes = 0;
  while (text[position - 1 - backslashes] === '\\') backslashes++;
  return backslashes % 2 === 1;
}
