import { createServer, type IncomingMessage } from 'node:http';
import type { AddressInfo } from 'node:net';

/** What stands between senders and a destination: it knows who sent what and when, and may keep requests for a while. */
export interface Gate {
  url: string;
  /** All that have come, in their order. */
  passages: () => readonly Passage[];
  /**
   * Has requests wait for so many milliseconds before they are passed on, be their sender still there or not; those of
   * which `holdMs` says undefined are passed on at once.
   */
  hold: (holdMs: (passage: Passage) => number | undefined) => void;
  close: () => Promise<void>;
}

export interface Passage {
  /** Milliseconds since 1970, with fractions. */
  readonly at: number;
  readonly path: string;
  readonly apiKey: string;
  readonly body: string;
  /** When the destination answered it, or cut the connection instead. */
  end: { at: number; isCut: boolean } | undefined;
}

/** The most that came within any window of so many milliseconds. */
export function mostWithin(times: readonly number[], windowMs: number): number {
  let first = 0;
  return times.reduce((most, time, last) => {
    while ((times[first] ?? time) <= time - windowMs) first += 1;
    return Math.max(most, last - first + 1);
  }, 0);
}

const now = (): number => performance.timeOrigin + performance.now();

async function readText(request: IncomingMessage): Promise<string> {
  const chunks: Buffer[] = [];
  for await (const chunk of request) chunks.push(chunk as Buffer);
  return Buffer.concat(chunks).toString();
}

export async function startGate(target: string): Promise<Gate> {
  const passages: Passage[] = [];
  const timers = new Set<NodeJS.Timeout>();
  let holdMs: (passage: Passage) => number | undefined = () => undefined;
  const wait = (ms: number): Promise<void> =>
    new Promise((resolve) => {
      const timer = setTimeout(() => {
        timers.delete(timer);
        resolve();
      }, ms);
      timers.add(timer);
    });
  const server = createServer((request, response) => {
    const pass = async (): Promise<void> => {
      const at = now();
      const { url: path = '', method = 'GET', headers } = request;
      const apiKey = String(headers['api-key']);
      const body = await readText(request);
      const passage: Passage = { at, path, apiKey, body, end: undefined };
      passages.push(passage);
      const ms = holdMs(passage);
      if (ms !== undefined) await wait(ms);
      try {
        const answer = await fetch(target + path, {
          method,
          headers: { 'Api-Key': apiKey, 'Content-Type': headers['content-type'] ?? 'application/json' },
          ...(method === 'GET' ? {} : { body }),
        });
        const text = await answer.text();
        passage.end = { at: now(), isCut: false };
        response.writeHead(answer.status, { 'content-type': answer.headers.get('content-type') ?? '' }).end(text);
      } catch {
        passage.end = { at: now(), isCut: true };
        request.socket.resetAndDestroy();
      }
    };
    void pass();
  });
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  return {
    url: `http://127.0.0.1:${(server.address() as AddressInfo).port}`,
    passages: () => passages,
    hold: (next) => {
      holdMs = next;
    },
    close: async () => {
      for (const timer of timers) clearTimeout(timer);
      await new Promise<void>((resolve) => {
        server.close(() => resolve());
        server.closeAllConnections();
      });
    },
  };
}
