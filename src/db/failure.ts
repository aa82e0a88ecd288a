import pg from 'pg';
import { UnavailableError } from '../lib/errors.js';

/**
 * What may be said of an error of PostgreSQL. Its message can hold a person's data (`Key (email)=(…) already exists`),
 * so only the SQLSTATE, the position, the constraint and the table are kept, and the sentence is ours.
 * Codes: https://www.postgresql.org/docs/current/errcodes-appendix.html
 */
export interface DatabaseFailure {
  sqlstate: string;
  sentence: string;
  /** 0-based offset in the statement that was sent. */
  position: number | null;
}

const SENTENCES: Readonly<Record<string, string>> = {
  '0A000': 'uses something that cannot stand inside a query (a statement that writes, for example)',
  '21000': 'has a sub-query that gives more than one row where one is expected',
  '22003': 'gives a number that is out of the range of its type',
  '22007': 'reads a text as a date or time that is none',
  '22008': 'gives a date or time that is out of range',
  '22012': 'divides by zero',
  '22P02': 'casts a text to a type that it cannot be read as',
  '25006': 'tries to write; a definition may only read',
  '42501': 'needs a privilege that the database role lacks',
  '42601': 'has a syntax error',
  '42602': 'has an invalid name',
  '42622': 'has a name that is too long',
  '42701': 'names a column twice',
  '42702': 'names a column that could be one of several tables',
  '42703': 'names a column that does not exist',
  '42704': 'names a type or object that does not exist',
  '42725': 'calls a function that could be one of several',
  '42803': 'uses a column outside GROUP BY',
  '42804': 'mixes types that do not fit together',
  '42846': 'casts to a type that the value cannot become',
  '42883': 'uses a function or an operator that does not exist for these types',
  '42P01': 'names a table that does not exist',
  '42P02': 'has a parameter ($1); write the value, :now or :lookback',
  '42P18': 'has a parameter whose type is unknown',
  '3F000': 'names a schema that does not exist',
  '53100': 'could not go on, since the disk of the database is full',
  '53200': 'could not go on, since the database is out of memory',
  '54001': 'is too complex for the database',
  '55P03': 'waited too long for a lock',
  '57014': 'took longer than the time allowed, or was cancelled',
  '40001': 'ran into a conflict with another transaction',
  '40P01': 'ran into a deadlock with another transaction',
};

const NETWORK = new Set([
  'ECONNREFUSED',
  'ECONNRESET',
  'ENOTFOUND',
  'EHOSTUNREACH',
  'ENETUNREACH',
  'ETIMEDOUT',
  'EPIPE',
  'EAI_AGAIN',
  'ENOENT',
]);
const AWAY = new Set(['25P03', '57P01', '57P02', '57P03', '53300', '53400']);
const REFUSED = new Set(['28000', '28P01', '3D000']);

function codeOf(error: unknown): string | null {
  if (typeof error !== 'object' || error === null || !('code' in error)) return null;
  return typeof error.code === 'string' ? error.code : null;
}

/** The failure of a statement, or null where the error is none of PostgreSQL's. */
export function databaseFailure(error: unknown): DatabaseFailure | null {
  if (!(error instanceof pg.DatabaseError)) return null;
  const sqlstate = error.code ?? '?????';
  const named = [
    error.table === undefined ? null : `table ${error.table}`,
    error.constraint === undefined ? null : `constraint ${error.constraint}`,
  ];
  const subject = named.filter((name) => name !== null).join(', ');
  const sentence = SENTENCES[sqlstate] ?? 'was refused by the database';
  const position = error.position === undefined ? NaN : Number(error.position);
  return {
    sqlstate,
    sentence: `${sentence}${subject === '' ? '' : ` (${subject})`} [SQLSTATE ${sqlstate}]`,
    position: Number.isFinite(position) ? position - 1 : null,
  };
}

/** Whether the database was out of reach, or its connection was lost: what time may mend. */
export function isUnreachable(error: unknown): boolean {
  if (error instanceof UnavailableError) return true;
  if (error instanceof AggregateError) return error.errors.some(isUnreachable);
  const code = codeOf(error);
  // A database that lets nobody in for a while; the same code has other meanings where a session stands.
  if (code === '55000' && error instanceof pg.DatabaseError) return error.file === 'postinit.c';
  if (code !== null) return NETWORK.has(code) || AWAY.has(code) || code.startsWith('08');
  // pg gives a lost connection no code.
  return (
    error instanceof Error &&
    !(error instanceof pg.DatabaseError) &&
    /^(Connection terminated|Client has encountered a connection error|timeout exceeded when trying to connect|Client was closed)/.test(
      error.message,
    )
  );
}

/** Whether the server was reached and let nobody in: wrong role, password or database name, which a person must mend. */
export function isLoginRefused(error: unknown): boolean {
  const code = codeOf(error);
  return code !== null && REFUSED.has(code);
}
