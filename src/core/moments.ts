/**
 * `:now` and `:lookback` in a definition's SQL: found outside strings, quoted names, comments, dollar quotes, casts and
 * slices of arrays (`a[1:now]`), and replaced by literals, since COPY takes no parameters. The lexical rules are
 * PostgreSQL's (https://www.postgresql.org/docs/current/sql-syntax-lexical.html).
 */
export interface BoundText {
  text: string;
  /** The offset in the text as written for one in the bound text; both count characters, as PostgreSQL does. */
  originalOffset: (offset: number) => number;
}

const COMMENT = /--[^\n\r]*/y;
const BLANK = /\s+/y;
const PLACEHOLDER = /(?<![\w\u0080-\uffff$)\]"'.]):(?:now|lookback)\b/y;
/** What has to be passed over in one piece. */
const WORDS = [
  /[eE]'(?:[^'\\]|\\[\s\S]|'')*'/y,
  /'(?:[^']|'')*'/y,
  /"(?:[^"]|"")*"/y,
  /\$([A-Za-z_\u0080-\uffff][\w\u0080-\uffff]*)?\$[\s\S]*?\$\1\$/y,
  /::/y,
  /[A-Za-z_\u0080-\uffff][\w$\u0080-\uffff]*/y,
];

/** The end of the block comment that begins at `start`; they nest. */
function endOfComment(sql: string, start: number): number {
  let depth = 0;
  let at = start;
  while (at < sql.length) {
    if (sql.startsWith('/*', at)) {
      depth += 1;
      at += 2;
    } else if (sql.startsWith('*/', at)) {
      depth -= 1;
      at += 2;
      if (depth === 0) return at;
    } else at += 1;
  }
  return at;
}

function matchAt(pattern: RegExp, sql: string, at: number): string | null {
  pattern.lastIndex = at;
  return pattern.exec(sql)?.[0] ?? null;
}

interface Token {
  kind: 'blank' | 'placeholder' | 'word';
  at: number;
  text: string;
}

/** The text cut into comments and white space, placeholders, and the rest in pieces that mustn't be looked into. */
function* tokensOf(sql: string): Generator<Token> {
  for (let at = 0; at < sql.length;) {
    const comment = sql.startsWith('/*', at) ? sql.slice(at, endOfComment(sql, at)) : matchAt(COMMENT, sql, at);
    const blank = comment ?? matchAt(BLANK, sql, at);
    const placeholder = blank === null ? matchAt(PLACEHOLDER, sql, at) : null;
    const word = WORDS.map((pattern) => matchAt(pattern, sql, at)).find((match) => match !== null) ?? sql.charAt(at);
    const text = blank ?? placeholder ?? word;
    yield { kind: blank !== null ? 'blank' : placeholder !== null ? 'placeholder' : 'word', at, text };
    at += text.length;
  }
}

/** Where the text first asks for the lookback window, in characters as PostgreSQL counts them; null where it doesn't. */
export function findLookback(sql: string): number | null {
  return findMoments(sql).find(({ name }) => name === ':lookback')?.at ?? null;
}

/** Each `:now` and `:lookback`, with its place in characters as PostgreSQL counts them. */
export function findMoments(sql: string): readonly { name: string; at: number }[] {
  return [...tokensOf(sql)]
    .filter(({ kind }) => kind === 'placeholder')
    .map(({ text, at }) => ({ name: text, at: countCharacters(sql.slice(0, at)) }));
}

/** Whether the text has this name, given in lower case, as PostgreSQL reads names: in any case, or so in quotes. */
export function hasName(sql: string, name: string): boolean {
  return [...tokensOf(sql)].some(({ text }) => text.toLowerCase() === name || text === `"${name}"`);
}

/** The text up to its last word: without the semicolons, comments and white space at its end. */
export function withoutEnd(sql: string): string {
  let end = 0;
  for (const { kind, at, text } of tokensOf(sql)) if (kind !== 'blank' && text !== ';') end = at + text.length;
  return sql.slice(0, end);
}

/** Where a second statement begins, in characters; null where there is none. */
export function secondStatement(sql: string): number | null {
  let ended = false;
  for (const { kind, at, text } of tokensOf(sql)) {
    if (kind === 'blank') continue;
    if (ended && text !== ';') return countCharacters(sql.slice(0, at));
    ended ||= text === ';';
  }
  return null;
}

const countCharacters = (text: string): number => Array.from(text).length;

/** Puts `values` (SQL expressions) in the place of the placeholders. */
export function bindMoments(sql: string, values: Readonly<Record<'now' | 'lookback', string>>): BoundText {
  const pieces: string[] = [];
  const shifts: { boundEnd: number; boundStart: number; original: number; originalEnd: number }[] = [];
  let [original, bound] = [0, 0];
  for (const { kind, text } of tokensOf(sql)) {
    const piece = kind === 'placeholder' ? values[text === ':now' ? 'now' : 'lookback'] : text;
    const [originalEnd, boundEnd] = [original + countCharacters(text), bound + countCharacters(piece)];
    if (kind === 'placeholder') shifts.push({ boundStart: bound, boundEnd, original, originalEnd });
    pieces.push(piece);
    [original, bound] = [originalEnd, boundEnd];
  }
  return {
    text: pieces.join(''),
    originalOffset: (offset) => {
      let result = offset;
      for (const shift of shifts) {
        if (offset < shift.boundStart) break;
        result = offset < shift.boundEnd ? shift.original : shift.originalEnd + (offset - shift.boundEnd);
      }
      return result;
    },
  };
}
