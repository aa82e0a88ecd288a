import type pg from 'pg';
import type { Client, Runner } from './connect.js';

/**
 * Statements that come again and again on a connection that is kept. A text is prepared when it first comes, and run by its
 * name from then on; and what is asked for in one turn of the event loop is one message with one answer, however many
 * statements it is. So a transaction of thirty statements costs two or three of each instead of as many parsings, plans,
 * descriptions and waits.
 *
 * What must hold:
 * - Texts are constant: what differs from time to time is a parameter, or a setting of the transaction.
 * - Statements run in the order in which they were asked for. After one that fails, those of the same message aren't run,
 *   and fail with what it failed with; so whoever asks for several waits for them by `Promise.all`.
 * - Nothing else is asked of the client meanwhile.
 */
export type Repeated = Runner;

/** Texts that would be prepared beyond these are parsed each time: they can't be constant. */
const MOST = 1_000;

interface Column {
  name: string;
  parse: (text: string) => unknown;
}

/** A statement that has been prepared, and what its rows are. */
interface Prepared {
  readonly name: string;
  columns: readonly Column[];
}

interface Asked {
  text: string;
  values: readonly unknown[];
  resolve: (result: pg.QueryResult) => void;
  reject: (error: unknown) => void;
}

export function repeat(client: Client): Repeated {
  const known = new Map<string, Prepared>();
  let named = 0;
  let waiting: Asked[] = [];
  let isUnderWay = false;

  const send = (): void => {
    if (isUnderWay || waiting.length === 0) return;
    isUnderWay = true;
    const asked = waiting;
    waiting = [];
    client.query(
      createMessage(client, asked, {
        find: (text) => known.get(text),
        // One that fails leaves it open which of its statements have been prepared: these get other names.
        name: () => (known.size < MOST ? `personas_${(named += 1)}` : ''),
        keep: (text, prepared) => known.set(text, prepared),
        onEnd: () => {
          isUnderWay = false;
          send();
        },
      }),
    );
  };
  return {
    query: <R extends pg.QueryResultRow>(text: string, values: unknown[] = []) => {
      const answer = new Promise<pg.QueryResult<R>>((resolve, reject) => {
        if (waiting.length === 0) queueMicrotask(send);
        waiting.push({ text, values, resolve: resolve as Asked['resolve'], reject });
      });
      // Whoever waits for another of the same message hears of the failure there.
      answer.catch(() => undefined);
      return answer;
    },
  };
}

interface Memory {
  find: (text: string) => Prepared | undefined;
  /** A new name; empty: it isn't kept. */
  name: () => string;
  keep: (text: string, prepared: Prepared) => void;
  onEnd: () => void;
}

/** What pg asks of whatever is sent over its connections, and tells it of the answer. */
interface Message extends pg.Submittable {
  handleRowDescription: (message: { fields: readonly pg.FieldDef[] }) => void;
  handleDataRow: (message: { fields: readonly (string | null)[] }) => void;
  handleCommandComplete: (message: { text: string }) => void;
  handleEmptyQuery: () => void;
  handleError: (error: unknown) => void;
  handleReadyForQuery: () => void;
}

/** Several statements up to one Sync, which is where the server answers them all. */
function createMessage(client: Client, asked: readonly Asked[], { find, name, keep, onEnd }: Memory): Message {
  const named = new Map<string, Prepared>();
  const statements = asked.map(({ text }) => {
    const known = find(text) ?? named.get(text);
    const prepared: Prepared = known ?? { name: name(), columns: [] };
    // One without a name is gone with the next one.
    if (prepared.name !== '') named.set(text, prepared);
    return { prepared, isNew: known === undefined };
  });
  const results: pg.QueryResult[] = [];
  let rows: pg.QueryResultRow[] = [];
  const end = (failure: { error: unknown } | null): void => {
    asked.forEach(({ text, resolve, reject }, index) => {
      const result = results[index];
      const statement = statements[index];
      if (failure === null && statement?.isNew === true && statement.prepared.name !== '') {
        keep(text, statement.prepared);
      }
      if (result !== undefined) resolve(result);
      else reject(failure?.error ?? new Error('The server has answered fewer statements than it was sent.'));
    });
    onEnd();
  };
  const complete = (command: string): void => {
    results.push({
      command,
      rows,
      rowCount: Number(/\d+$/.exec(command)?.[0] ?? rows.length),
      oid: 0,
      fields: [],
    });
    rows = [];
  };
  return {
    submit: (connection) => {
      connection.stream.cork();
      statements.forEach(({ prepared: { name: statement }, isNew }, index) => {
        const { text = '', values = [] } = asked[index] ?? {};
        if (isNew) {
          connection.parse({ name: statement, text, types: [] }, true);
          connection.describe({ type: 'S', name: statement }, true);
        }
        connection.bind({ statement, values: values.map(encode) }, true);
        connection.execute({}, true);
      });
      connection.sync();
      connection.stream.uncork();
    },
    handleRowDescription: ({ fields }) => {
      const statement = statements[results.length];
      if (statement === undefined) return;
      const columns = fields.map(({ name: column, dataTypeID }) => ({
        name: column,
        parse: client.getTypeParser(dataTypeID as never, 'text') as Column['parse'],
      }));
      statement.prepared.columns = columns;
    },
    handleDataRow: ({ fields }) => {
      const row: pg.QueryResultRow = {};
      statements[results.length]?.prepared.columns.forEach(({ name: column, parse }, index) => {
        const text = fields[index] ?? null;
        row[column] = text === null ? null : parse(text);
      });
      rows.push(row);
    },
    handleCommandComplete: ({ text }) => {
      complete(text);
    },
    handleEmptyQuery: () => {
      complete('');
    },
    handleError: (error) => {
      end({ error });
    },
    handleReadyForQuery: () => {
      end(null);
    },
  };
}

/** A value as PostgreSQL reads it. */
function encode(value: unknown): string | null {
  if (value === null || value === undefined) return null;
  if (Array.isArray(value)) return `{${value.map(encodeElement).join(',')}}`;
  return typeof value === 'string' ? value : JSON.stringify(value);
}

function encodeElement(element: unknown): string {
  const text = encode(element);
  return text === null ? 'NULL' : `"${text.replaceAll(/["\\]/g, '\\$&')}"`;
}
