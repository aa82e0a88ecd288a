import type pg from 'pg';
import type { Client } from './connect.js';

/**
 * Describes one statement over the extended protocol: Parse and Describe, no Execute. The server refuses several
 * statements and unbalanced parentheses by itself, tells the columns and their types, and runs nothing.
 */
export interface Description {
  columns: readonly { name: string; typeOid: number }[];
}

interface Wire {
  parse(message: { text: string; name: string; types: number[] }): void;
  describe(message: { type: 'S'; name: string }): void;
  sync(): void;
}

interface RowDescription {
  fields: readonly { name: string; dataTypeID: number }[];
}

class DescribeQuery {
  readonly #text: string;
  #columns: Description['columns'] = [];
  readonly done: Promise<Description>;
  #resolve: (description: Description) => void = () => undefined;
  #reject: (error: Error) => void = () => undefined;

  constructor(text: string) {
    this.#text = text;
    this.done = new Promise((resolve, reject) => {
      this.#resolve = resolve;
      this.#reject = reject;
    });
  }

  submit(connection: Wire): void {
    connection.parse({ text: this.#text, name: '', types: [] });
    connection.describe({ type: 'S', name: '' });
    connection.sync();
  }

  handleRowDescription(message: RowDescription): void {
    this.#columns = message.fields.map((field) => ({ name: field.name, typeOid: field.dataTypeID }));
  }

  handleError(error: Error): void {
    this.#reject(error);
  }

  handleReadyForQuery(): void {
    this.#resolve({ columns: this.#columns });
  }
}

/** The columns that `text` would give; none for a statement that gives no rows. Throws PostgreSQL's own error. */
export async function describeStatement(client: Client, text: string): Promise<Description> {
  const query = new DescribeQuery(text);
  // pg takes any object with `submit`; its types know that only of its own classes.
  client.query(query as unknown as pg.Submittable);
  return query.done;
}
