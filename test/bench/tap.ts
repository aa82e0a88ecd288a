import { fork } from 'node:child_process';
import { once } from 'node:events';
import { connect, createServer, type AddressInfo } from 'node:net';
import { fileURLToPath } from 'node:url';

/**
 * A process between sender and receiver that notes when each request arrives, and passes everything on: a receiver that
 * is busy with one request would note the next too late, and so too close to the one after it.
 */
export interface Tap {
  url: string;
  /** The most requests that arrived within any second since `since`, in milliseconds since 1970. */
  mostInASecond: (since: number) => Promise<number>;
  stop: () => Promise<void>;
}

export async function startTap(receiverUrl: string): Promise<Tap> {
  const child = fork(fileURLToPath(import.meta.url), [new URL(receiverUrl).port], { execArgv: ['--import', 'tsx'] });
  const listen = async <T>(): Promise<T> => ((await once(child, 'message')) as [T])[0];
  const port = await listen<number>();
  return {
    url: `http://127.0.0.1:${port}`,
    mostInASecond: (since) => {
      const answer = listen<number>();
      child.send(since);
      return answer;
    },
    stop: async () => {
      const ended = once(child, 'exit');
      child.kill();
      await ended;
    },
  };
}

/** The most of `times`, which ascend, within any second. */
export function mostInASecond(times: readonly number[]): number {
  let first = 0;
  return times.reduce((most, time, last) => {
    while ((times[first] ?? time) <= time - 1_000) first += 1;
    return Math.max(most, last - first + 1);
  }, 0);
}

function tap(receiverPort: number): void {
  const arrivals: number[] = [];
  const server = createServer({ noDelay: true }, (sender) => {
    const receiver = connect({ port: receiverPort, host: '127.0.0.1', noDelay: true });
    // One request after the other goes over a connection: what comes after an answer is the next.
    let isIdle = true;
    sender.on('data', (bytes) => {
      if (isIdle) arrivals.push(performance.timeOrigin + performance.now());
      isIdle = false;
      receiver.write(bytes);
    });
    receiver.on('data', (bytes) => {
      isIdle = true;
      sender.write(bytes);
    });
    for (const [one, other] of [
      [sender, receiver],
      [receiver, sender],
    ] as const) {
      one.on('close', () => other.destroy());
      one.on('error', () => other.destroy());
    }
  });
  server.listen(0, '127.0.0.1', () => process.send?.((server.address() as AddressInfo).port));
  process.on('message', (since: number) => process.send?.(mostInASecond(arrivals.filter((at) => at >= since))));
}

if (process.send !== undefined && process.argv[1] === fileURLToPath(import.meta.url)) tap(Number(process.argv[2]));
