import pc from 'picocolors';

/**
 * What a person sees. Results go to stdout, as text or as one JSON object; everything said along the way goes to stderr.
 * Colours follow NO_COLOR and the terminal. Control characters in a value can't reach the terminal.
 */
export interface Output {
  json: boolean;
  /** A line of a result; nothing under `--json`. */
  line: (text?: string) => void;
  /** The whole result under `--json`; nothing otherwise. `version` is added. May hold `RawJson`. */
  object: (result: Readonly<Record<string, unknown>>) => void;
  /** The same, of a result that is too long to be held: its last member, `name`, is a list that comes in pages. */
  objectWith: (
    result: Readonly<Record<string, unknown>>,
    name: string,
    pages: AsyncIterable<readonly unknown[]>,
  ) => Promise<void>;
  /** A line about the work itself. */
  say: (text: string) => void;
}

export const SIGN = { good: pc.green('✓'), bad: pc.red('✗'), note: pc.yellow('!') };

/** Values from a database may hold escape sequences, or signs that turn the direction of the text. */
export function plain(text: string): string {
  return text.replaceAll(/[\u0000-\u001f\u007f-\u009f\u200e\u200f\u2028-\u202e\u2066-\u2069]/g, '\uFFFD');
}

/** The same for a text of several lines, which follow indented. */
export function plainLines(text: string): string {
  return text.split('\n').map(plain).join('\n    ');
}

const RAW = Symbol('raw');

/** JSON text within a result: it is put in as it is, with the digits that PostgreSQL gave it. */
export interface RawJson {
  [RAW]: string;
}

export function rawJson(text: string): RawJson {
  return { [RAW]: text };
}

function isRaw(value: unknown): value is RawJson {
  return typeof value === 'object' && value !== null && RAW in value;
}

/** As JSON.stringify. The mark that stands for a raw text meanwhile has a NUL, which no text of a database has. */
function stringify(result: unknown): string {
  const raws: string[] = [];
  const text = JSON.stringify(result, (_, value: unknown) =>
    isRaw(value) ? `\u0000${raws.push(value[RAW]) - 1}` : value,
  );
  return text.replaceAll(/"\\u0000(\d+)"/g, (_, index: string) => raws[Number(index)] ?? 'null');
}

/** Resolves when the text has gone out, or nobody reads any more. */
function write(text: string): Promise<void> {
  return new Promise((resolve) => process.stdout.write(text, () => resolve()));
}

export function createOutput(json: boolean): Output {
  return {
    json,
    line: (text = '') => {
      if (!json) process.stdout.write(`${text}\n`);
    },
    object: (result) => {
      if (json) process.stdout.write(`${stringify({ version: 1, ...result })}\n`);
    },
    objectWith: async (result, name, pages) => {
      if (!json) return;
      await write(`${stringify({ version: 1, ...result }).slice(0, -1)},${JSON.stringify(name)}:[`);
      let isFirst = true;
      for await (const page of pages) {
        if (page.length === 0) continue;
        await write(`${isFirst ? '' : ','}${page.map(stringify).join(',')}`);
        isFirst = false;
      }
      await write(']}\n');
    },
    say: (text) => process.stderr.write(`${text}\n`),
  };
}

const width = (text: string): number => text.replaceAll(/\u001b\[\d+m/g, '').length;

export interface ColumnStyle {
  title: string;
  align?: 'left' | 'right';
}

/** Rows as text, in columns as wide as their widest value. */
export function formatTable(columns: readonly ColumnStyle[], rows: readonly (readonly string[])[]): string {
  const widths = columns.map(({ title }, index) =>
    Math.max(width(title), ...rows.map((row) => width(row[index] ?? ''))),
  );
  const pad = (text: string, index: number): string => {
    const space = ' '.repeat(Math.max(0, (widths[index] ?? 0) - width(text)));
    return columns[index]?.align === 'right' ? space + text : text + space;
  };
  const lines = [
    columns.map(({ title }, index) => pc.dim(pad(title, index))),
    ...rows.map((row) => columns.map((_, index) => pad(row[index] ?? '', index))),
  ];
  return lines.map((cells) => cells.join('  ').trimEnd()).join('\n');
}

const numbers = new Intl.NumberFormat('en-US');

export function formatCount(count: number | null): string {
  return count === null ? '–' : numbers.format(count);
}

/** `1 call`, `1,200 calls`. */
export function countOf(count: number | null, noun: string, plural = `${noun}s`): string {
  return `${formatCount(count)} ${count === 1 ? noun : plural}`;
}

/** `45 s`, `3 min 20 s`, `2 h 5 min`, `3 d 4 h`. */
export function formatDuration(ms: number): string {
  const two = (whole: number, unit: string, rest: number, smaller: string): string =>
    rest === 0 ? `${whole} ${unit}` : `${whole} ${unit} ${rest} ${smaller}`;
  const seconds = Math.max(0, Math.round(ms / 1000));
  if (seconds < 60) return ms < 1000 ? `${Math.max(0, Math.round(ms))} ms` : `${seconds} s`;
  const minutes = Math.floor(seconds / 60);
  if (minutes < 60) return two(minutes, 'min', seconds % 60, 's');
  const hours = Math.floor(minutes / 60);
  if (hours < 48) return two(hours, 'h', minutes % 60, 'min');
  return two(Math.floor(hours / 24), 'd', hours % 24, 'h');
}

/** `3 min ago`, `in 20 s`. */
export function formatMoment(moment: Date | null, now: Date): string {
  if (moment === null) return '–';
  const ms = moment.getTime() - now.getTime();
  return ms >= 0 ? `in ${formatDuration(ms)}` : `${formatDuration(-ms)} ago`;
}
