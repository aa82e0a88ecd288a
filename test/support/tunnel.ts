import { connect, createServer, type AddressInfo, type Socket } from 'node:net';

/** A way to PostgreSQL that can go quiet, as when a machine or a network dies without a word. */
export interface Tunnel {
  url: string;
  /** How many connections have been made through it. */
  made: () => number;
  /** What is connected now stays so, but nothing passes any more. What connects later passes. */
  freeze: () => void;
  close: () => Promise<void>;
}

export async function startTunnel(url: string): Promise<Tunnel> {
  const target = new URL(url);
  const pairs: (readonly [Socket, Socket])[] = [];
  const server = createServer((client) => {
    const upstream = connect(Number(target.port), target.hostname);
    const pair = [client, upstream] as const;
    pairs.push(pair);
    for (const socket of pair) socket.on('error', () => pair.forEach((each) => each.destroy()));
    client.pipe(upstream);
    upstream.pipe(client);
  });
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  const address = new URL(url);
  address.hostname = '127.0.0.1';
  address.port = String((server.address() as AddressInfo).port);
  return {
    url: address.toString(),
    made: () => pairs.length,
    freeze: () => {
      for (const [client, upstream] of pairs) {
        client.unpipe(upstream);
        upstream.unpipe(client);
        for (const socket of [client, upstream]) socket.pause();
      }
    },
    close: async () => {
      for (const socket of pairs.flat()) socket.destroy();
      await new Promise((resolve) => server.close(resolve));
    },
  };
}
