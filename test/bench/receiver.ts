import { fork } from 'node:child_process';
import { once } from 'node:events';
import { fileURLToPath } from 'node:url';
import type { Endpoint } from '../../src/demo/simulator/endpoints.js';
import { startSimulator, type SimulatorOptions } from '../../src/demo/simulator/server.js';

/** The simulator as a process of its own, so that what is measured has a core to itself. */
export interface Receiver {
  url: string;
  ask: (endpoint: Endpoint) => Promise<Received>;
  /** The updates of users since this was last asked, where they are kept. */
  arrivals: () => Promise<readonly Arrival[]>;
  stop: () => Promise<void>;
}

export interface Received {
  requests: number;
  throttled: number;
  /** Users or events in the requests that were accepted. */
  items: number;
  users: number;
}

/** An update of a user: when its request arrived, in milliseconds since 1970, whose it is, and the fields. */
export type Arrival = readonly [at: number, userId: string, fields: Readonly<Record<string, unknown>>];

interface Options extends SimulatorOptions {
  /** Whether the updates of users are kept, each with its moment. */
  keepsArrivals?: boolean;
}

type Question = { kind: 'ask'; endpoint: Endpoint } | { kind: 'arrivals' } | { kind: 'stop' };

export async function startReceiver(options: Options): Promise<Receiver> {
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
    arrivals: () => {
      const answer = listen<readonly Arrival[]>();
      child.send({ kind: 'arrivals' } satisfies Question);
      return answer;
    },
    stop: async () => {
      const ended = once(child, 'exit');
      child.send({ kind: 'stop' } satisfies Question);
      await ended;
    },
  };
}

interface Update {
  userId?: string;
  email?: string;
  dataFields?: Record<string, unknown>;
}

/** The users of a request's body, single or bulk. */
function updatesOf(body: string): readonly Update[] {
  const parsed = JSON.parse(body) as Update & { users?: readonly Update[] };
  return parsed.users ?? [parsed];
}

async function receive({ keepsArrivals = false, ...options }: Options): Promise<void> {
  const simulator = await startSimulator({ keepRequests: 0, ...options });
  const items = new Map<Endpoint | undefined, number>();
  let arrivals: Arrival[] = [];
  simulator.faults.failRandomly({
    share: 0,
    seed: 1,
    match: ({ endpoint, body }) => {
      if (keepsArrivals && (endpoint === 'users/update' || endpoint === 'users/bulkUpdate')) {
        const at = performance.timeOrigin + performance.now();
        for (const { userId, email, dataFields } of updatesOf(body)) {
          arrivals.push([at, userId ?? email ?? '', dataFields ?? {}]);
        }
      }
      const count = endpoint?.includes('ulk') === true ? body.split('"dataFields":').length - 1 : 1;
      items.set(endpoint, (items.get(endpoint) ?? 0) + count);
      return false;
    },
  });
  process.on('message', (question: Question) => {
    if (question.kind === 'stop') void simulator.close().then(() => process.exit(0));
    else if (question.kind === 'arrivals') {
      process.send?.(arrivals);
      arrivals = [];
    } else {
      const { endpoint } = question;
      process.send?.({
        requests: simulator.stats.count(endpoint),
        throttled: simulator.stats.count(endpoint, 429),
        items: items.get(endpoint) ?? 0,
        users: simulator.userCount,
      } satisfies Received);
    }
  });
  process.send?.({ url: simulator.url });
}

if (process.send !== undefined && process.argv[1] === fileURLToPath(import.meta.url)) {
  await receive(JSON.parse(process.argv[2] ?? '{}') as Options);
}
