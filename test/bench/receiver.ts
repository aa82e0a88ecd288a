import { fork } from 'node:child_process';
import { once } from 'node:events';
import { fileURLToPath } from 'node:url';
import type { Endpoint } from '../../src/demo/simulator/endpoints.js';
import { startSimulator, type SimulatorOptions } from '../../src/demo/simulator/server.js';

/** The simulator as a process of its own, so that what is measured has a core to itself. */
export interface Receiver {
  url: string;
  ask: (endpoint: Endpoint) => Promise<Received>;
  stop: () => Promise<void>;
}

export interface Received {
  requests: number;
  throttled: number;
  /** Users or events in the requests that were accepted. */
  items: number;
  users: number;
  /** The most requests that arrived within any second. */
  mostInASecond: number;
}

type Question = { kind: 'ask'; endpoint: Endpoint } | { kind: 'stop' };

export async function startReceiver(options: SimulatorOptions): Promise<Receiver> {
  const child = fork(fileURLToPath(import.meta.url), [JSON.stringify(options)], { execArgv: ['--import', 'tsx'] });
  const listen = async <T>(): Promise<T> => ((await once(child, 'message')) as [T])[0];
  const { url } = await listen<{ url: string }>();
  return {
    url,
    ask: (endpoint) => {
      const answer = listen<Received>();
      child.send({ kind: 'ask', endpoint } satisfies Question);
      return answer;
    },
    stop: async () => {
      const ended = once(child, 'exit');
      child.send({ kind: 'stop' } satisfies Question);
      await ended;
    },
  };
}

async function receive(options: SimulatorOptions): Promise<void> {
  const simulator = await startSimulator({ keepRequests: 0, ...options });
  const items = new Map<Endpoint | undefined, number>();
  simulator.faults.failRandomly({
    share: 0,
    seed: 1,
    match: ({ endpoint, body }) => {
      const count = endpoint?.includes('ulk') === true ? body.split('"dataFields":').length - 1 : 1;
      items.set(endpoint, (items.get(endpoint) ?? 0) + count);
      return false;
    },
  });
  process.on('message', (question: Question) => {
    if (question.kind === 'stop') void simulator.close().then(() => process.exit(0));
    else {
      const { endpoint } = question;
      process.send?.({
        requests: simulator.stats.count(endpoint),
        throttled: simulator.stats.count(endpoint, 429),
        items: items.get(endpoint) ?? 0,
        users: simulator.userCount,
        mostInASecond: simulator.stats.mostWithin(endpoint, 1_000),
      } satisfies Received);
    }
  });
  process.send?.({ url: simulator.url });
}

if (process.send !== undefined && process.argv[1] === fileURLToPath(import.meta.url)) {
  await receive(JSON.parse(process.argv[2] ?? '{}') as SimulatorOptions);
}
