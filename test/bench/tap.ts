import { fork } from 'node:child_process';
import { once } from 'node:events';
import { createServer as createHttpServer } from 'node:http';
import { connect, createServer, type AddressInfo, type Server } from 'node:net';
import { fileURLToPath } from 'node:url';

/**
 * A process that notes when each request arrives: a receiver that is busy with one request, or clears its memory, would
 * note the next too late, and so too close to the one after it. It stands before a receiver and passes everything on, or,
 * where that would take more processor than there is, in the place of one.
 */
export interface Tap {
  url: string;
  /** The most requests that arrived within any second since `since`, in milliseconds since 1970. */
  mostInASecond: (since: number) => Promise<number>;
  stop: () => Promise<void>;
}

/** `before` is the receiver's URL; `answersAfterMs` what it answers after, with success, where there is none. */
type Place = { before: string } | { answersAfterMs: number };

export async function startTap(place: Place): Promise<Tap> {
  const child = fork(fileURLToPath(import.meta.url), [JSON.stringify(place)], { execArgv: ['--import', 'tsx'] });
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

type Note = () => void;

function passOn(note: Note, receiverPort: number): Server {
  return createServer({ noDelay: true }, (sender) => {
    const receiver = connect({ port: receiverPort, host: '127.0.0.1', noDelay: true });
    // One request after the other goes over a connection: what comes after an answer is the next.
    let isIdle = true;
    sender.on('data', (bytes) => {
      if (isIdle) note();
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
}

const SUCCESS = JSON.stringify({ msg: '', code: 'Success', params: null });

function answerAfter(note: Note, latencyMs: number): Server {
  return createHttpServer((request, response) => {
    note();
    request.resume();
    setTimeout(() => response.end(SUCCESS), latencyMs);
  });
}

function serve(place: Place): void {
  const arrivals: number[] = [];
  const note = (): void => {
    arrivals.push(performance.timeOrigin + performance.now());
  };
  const server =
    'before' in place ? passOn(note, Number(new URL(place.before).port)) : answerAfter(note, place.answersAfterMs);
  server.listen(0, '127.0.0.1', () => process.send?.((server.address() as AddressInfo).port));
  process.on('message', (since: number) => process.send?.(mostInASecond(arrivals.filter((at) => at >= since))));
}

if (process.send !== undefined && process.argv[1] === fileURLToPath(import.meta.url)) {
  serve(JSON.parse(process.argv[2] ?? '') as Place);
}
