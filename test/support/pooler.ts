import { createServer, connect, type AddressInfo } from 'node:net';

/**
 * A pooler between a client and PostgreSQL that lets no COPY through, as some do: such a statement is answered with
 * SQLSTATE 0A000, everything else is passed on. Messages: https://www.postgresql.org/docs/current/protocol-message-formats.html
 */
export interface Pooler {
  url: string;
  /** How many COPY statements it has refused. */
  refused: () => number;
  close: () => Promise<void>;
}

const field = (code: string, text: string): Buffer => Buffer.from(`${code}${text}\0`);

function message(type: string, body: Buffer): Buffer {
  const head = Buffer.alloc(5);
  head.write(type);
  head.writeInt32BE(body.length + 4, 1);
  return Buffer.concat([head, body]);
}

const REFUSAL = Buffer.concat([
  message(
    'E',
    Buffer.concat([
      field('S', 'ERROR'),
      field('V', 'ERROR'),
      field('C', '0A000'),
      field('M', 'no COPY here'),
      Buffer.from([0]),
    ]),
  ),
  message('Z', Buffer.from('T')),
]);

export async function startPooler(url: string): Promise<Pooler> {
  const target = new URL(url);
  let refused = 0;
  const server = createServer((client) => {
    const upstream = connect(Number(target.port), target.hostname);
    upstream.pipe(client);
    let waiting = Buffer.alloc(0);
    let begun = false;
    client.on('data', (chunk) => {
      waiting = Buffer.concat([waiting, chunk]);
      for (;;) {
        // The first message has no type.
        const offset = begun ? 1 : 0;
        if (waiting.length < offset + 4) return;
        const length = offset + waiting.readInt32BE(offset);
        if (waiting.length < length) return;
        const whole = waiting.subarray(0, length);
        waiting = waiting.subarray(length);
        const isCopy = begun && whole[0] === 0x51 && /^copy \(/.test(whole.toString('utf8', 5));
        begun = true;
        if (isCopy) {
          refused += 1;
          client.write(REFUSAL);
        } else upstream.write(whole);
      }
    });
    for (const [one, other] of [
      [client, upstream],
      [upstream, client],
    ] as const) {
      one.on('error', () => other.destroy());
      one.on('close', () => other.destroy());
    }
  });
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  const address = new URL(url);
  address.port = String((server.address() as AddressInfo).port);
  return {
    url: address.toString(),
    refused: () => refused,
    close: () => new Promise((resolve) => server.close(() => resolve())),
  };
}
