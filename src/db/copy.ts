import { Readable, type Writable } from 'node:stream';
import copyStreams from 'pg-copy-streams';
import Cursor from 'pg-cursor';
import type { Client } from './connect.js';
import { databaseFailure } from './failure.js';

/**
 * Rows from one database to another as COPY's text format, without looking into them. Where the source refuses COPY
 * (some poolers and hosts do), a cursor reads the same rows and they are written in the same format.
 */
const CURSOR_ROWS = 5_000;
const COPY_REFUSED = new Set(['0A000', '42501', '42601', 'XX000']);

/** A value in COPY's text format (https://www.postgresql.org/docs/current/sql-copy.html#id-1.9.55.9.2). */
function copyText(value: string | null): string {
  if (value === null) return '\\N';
  return value.replaceAll('\\', '\\\\').replaceAll('\t', '\\t').replaceAll('\n', '\\n').replaceAll('\r', '\\r');
}

async function* cursorRows(client: Client, query: string): AsyncGenerator<string> {
  const types = { getTypeParser: () => (text: string) => text };
  const cursor = client.query(new Cursor<(string | null)[]>(query, [], { rowMode: 'array', types }));
  try {
    for (;;) {
      const rows = await cursor.read(CURSOR_ROWS);
      if (rows.length === 0) return;
      yield rows.map((row) => `${row.map(copyText).join('\t')}\n`).join('');
    }
  } finally {
    await cursor.close();
  }
}

/** `pipeline` tells of an error; one that comes before or after it, when a connection breaks, must not end the process. */
function heard<S extends Readable | Writable>(stream: S): S {
  stream.on('error', () => undefined);
  return stream;
}

/**
 * The rows of `query` in COPY's text format. The client must be in a transaction, and is busy until the stream ends.
 * Whether COPY is allowed is found out with an empty one, so that a refusal isn't met in the middle.
 */
export async function copyRows(client: Client, query: string): Promise<Readable> {
  await client.query('savepoint copying');
  try {
    await client.query('copy (select 1 where false) to stdout');
  } catch (error) {
    const refused = databaseFailure(error)?.sqlstate;
    if (refused === undefined || !COPY_REFUSED.has(refused)) throw error;
    await client.query('rollback to savepoint copying');
    return Readable.from(cursorRows(client, query));
  }
  return heard(client.query(copyStreams.to(`copy (${query}) to stdout`)));
}

/** Takes rows in COPY's text format into `target`, a table with its columns. */
export function copyInto(client: Client, target: string): Writable & { rowCount: number } {
  return heard(client.query(copyStreams.from(`copy ${target} from stdin`)));
}
