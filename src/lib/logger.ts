import { createLogger as createWinston, format, transports } from 'winston';
import pc from 'picocolors';

/**
 * The log, on stderr: pretty on a terminal, JSON otherwise. What goes in is a sentence and a few plain facts; secrets that
 * were registered are scrubbed out of the finished line, and of an error only its class, its code and where it arose are
 * told, since its text may hold anything.
 */
export interface Logger {
  error: (message: string, facts?: Facts) => void;
  warn: (message: string, facts?: Facts) => void;
  info: (message: string, facts?: Facts) => void;
  debug: (message: string, facts?: Facts) => void;
  /** An error that was caught and isn't passed on. */
  failure: (message: string, error: unknown, facts?: Facts) => void;
  close: () => Promise<void>;
}

export type Facts = Readonly<Record<string, string | number | boolean | null>>;

export interface LoggerOptions {
  level: 'error' | 'warn' | 'info' | 'debug';
  format: 'pretty' | 'json' | 'auto';
  /** Texts that no line may hold. */
  secrets: readonly string[];
  stream?: NodeJS.WritableStream;
}

/** Shorter ones would blacken common words. */
const SHORTEST_SECRET = 4;
const COLOURS = { error: pc.red, warn: pc.yellow, info: pc.cyan, debug: pc.dim } as const;

/** What may be told of an error: its message may hold anything, and stands in its stack too. */
function factsOf(error: unknown): Facts {
  if (!(error instanceof Error)) return { error: typeof error };
  const { name, message, stack = '' } = error;
  const code = 'code' in error && typeof error.code === 'string' && /^\w{1,40}$/.test(error.code) ? error.code : null;
  const trace = stack.slice(stack.lastIndexOf(message) + message.length);
  const at = /\n\s+at (.+)/.exec(message === '' ? stack : trace)?.[1] ?? null;
  return { error: name, ...(code === null ? {} : { code }), ...(at === null ? {} : { at }) };
}

const ADDRESS_PART = String.raw`[^\s"'<>()[\]{}@,;:=&/?|\\]+`;
// From the beginning of a run of such characters alone, so that a long one is read once.
const ADDRESS = new RegExp(`(?<!${ADDRESS_PART.slice(0, -1)})${ADDRESS_PART}(?:@|%40|\\\\+u0040)${ADDRESS_PART}`, 'gi');

/** The text with `[email]` for every address of a person, as such or as it stands in a URL or in JSON. */
export function hideAddresses(text: string): string {
  return text.replaceAll(ADDRESS, '[email]');
}

/** The forms in which a secret may stand in a line, the longest first: one may be a part of another. */
function formsOf(secrets: readonly string[]): readonly string[] {
  const forms = secrets.flatMap((secret) => [secret, JSON.stringify(secret).slice(1, -1), encodeURIComponent(secret)]);
  return [...new Set(forms)].filter(({ length }) => length >= SHORTEST_SECRET).sort((a, b) => b.length - a.length);
}

/** Takes registered secrets, passwords within URLs and addresses of people out of a finished line. */
function scrub(line: string, forms: readonly string[]): string {
  const plain = forms.reduce((text, form) => text.replaceAll(form, '[redacted]'), line);
  return hideAddresses(plain.replaceAll(/(:\/\/[^\s:/@]*:)[^\s@/"]+@/g, '$1[redacted]@'));
}

/** Values may hold what would steer a terminal. */
function withoutControls(text: string): string {
  return text.replaceAll(/[^\P{Cc}\n\t]/gu, '\uFFFD');
}

export function createLogger({ level, format: form, secrets, stream = process.stderr }: LoggerOptions): Logger {
  const pretty = form === 'pretty' || (form === 'auto' && 'isTTY' in stream && stream.isTTY === true);
  const forms = formsOf(secrets);
  const line = format.printf(({ level: at, message, timestamp, ...facts }) => {
    const text = String(message);
    if (!pretty) return scrub(JSON.stringify({ time: timestamp, level: at, message: text, ...facts }), forms);
    const told = Object.entries(facts).map(([name, value]) => pc.dim(`${name}=${withoutControls(String(value))}`));
    const colour = COLOURS[at as keyof typeof COLOURS];
    const parts = [pc.dim(String(timestamp).slice(11, 19)), colour(at.padEnd(5)), withoutControls(text), ...told];
    return scrub(parts.join(' '), forms);
  });
  const winston = createWinston({
    level,
    format: format.combine(format.timestamp(), line),
    transports: [new transports.Stream({ stream })],
  });
  let isClosed = false;
  const write =
    (at: 'error' | 'warn' | 'info' | 'debug') =>
    (message: string, facts: Facts = {}) => {
      // What comes late must not end the process.
      if (!isClosed) winston.log({ level: at, message, ...facts });
    };
  return {
    error: write('error'),
    warn: write('warn'),
    info: write('info'),
    debug: write('debug'),
    failure: (message, error, facts = {}) => {
      write('warn')(`${message}.`, { ...facts, ...factsOf(error) });
    },
    close: () =>
      new Promise((resolve) => {
        isClosed = true;
        winston.on('finish', resolve);
        winston.end();
      }),
  };
}
