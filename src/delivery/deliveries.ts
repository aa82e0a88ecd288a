import type { State } from '../db/state.js';
import type { Port } from '../destinations/carrier.js';
import type { Logger } from '../lib/logger.js';
import { noteDelivery } from '../outbox/noted.js';
import { startDispatcher, type Dispatcher } from './dispatcher.js';
import { createMemory, type Memory } from './outlet.js';

/**
 * The dispatchers of all destinations. They are replaced as one when the destinations change; what was sent within the
 * last second counts for the quotas of those that come after, here and with the next leader.
 */
export interface Deliveries {
  /** Has these destinations sent to; nothing happens where `description` is that of those that are. */
  replace: (destinations: readonly Reachable[], description: string) => Promise<void>;
  /** Something may have come into the outbox, with this id or a higher one; left out: any. */
  nudge: (lowestId?: number) => void;
  all: () => readonly { id: number; name: string; dispatcher: Dispatcher }[];
  /** Writes down how the deliveries go, for whoever looks at the tables. */
  report: () => Promise<void>;
  stop: () => Promise<void>;
  /** For how long, from now, a request that begins would share a quota's time with the last that this instance sent. */
  quietMs: () => number;
}

export interface Reachable {
  id: number;
  name: string;
  connect: () => Promise<Port>;
}

/** All or none. */
async function connectAll(destinations: readonly Reachable[]): Promise<readonly (Reachable & { port: Port })[]> {
  const results = await Promise.allSettled(destinations.map(({ connect }) => connect()));
  const opened = results.flatMap((result, index) => {
    const destination = destinations[index];
    return result.status === 'fulfilled' && destination !== undefined ? [{ ...destination, port: result.value }] : [];
  });
  const failed = results.find(({ status }) => status === 'rejected');
  if (failed?.status !== 'rejected') return opened;
  for (const { port } of opened) port.close();
  throw failed.reason;
}

export interface DeliveriesOptions {
  state: State;
  leader: string;
  isHybrid: () => boolean;
  mayBegin: (timeoutMs: number) => boolean;
  prepareBulk: () => boolean;
  /** How long ago, when this was made, something that an earlier leader sent in bulk may have taken effect. */
  bulkAgoMs: number;
  /** How long to wait before looking again at an empty queue, where that is `deafMs` unless a command is heard. */
  lookMs: (deafMs: number) => number;
  log: Logger;
}

export function createDeliveries(options: DeliveriesOptions): Deliveries {
  const { state, leader, isHybrid, mayBegin, prepareBulk, bulkAgoMs, lookMs, log } = options;
  const since = performance.now();
  const told = new Map<number, string>();
  const memories = new Map<number, Memory>();
  const memoryOf = (id: number): Memory => {
    const memory = memories.get(id) ?? createMemory(bulkAgoMs + performance.now() - since);
    memories.set(id, memory);
    return memory;
  };
  let running: readonly { id: number; name: string; port: Port; dispatcher: Dispatcher }[] = [];
  let described = '';
  let quietUntil = -Infinity;
  /** For good: what is being replaced meanwhile isn't started any more. */
  let isStopped = false;
  let replacing: Promise<void> = Promise.resolve();

  const tell = async ({ id, dispatcher }: (typeof running)[number]): Promise<void> => {
    await dispatcher.note();
    const delivery = JSON.stringify({
      acknowledgedPerSecond: dispatcher.acknowledgedPerSecond(),
      lanes: dispatcher.lanes(),
    });
    if (told.get(id) === delivery) return;
    await noteDelivery(state, leader, id, delivery);
    told.set(id, delivery);
  };
  const end = async (): Promise<void> => {
    const ending = running;
    running = [];
    await Promise.all(ending.map(({ dispatcher }) => dispatcher.stop()));
    // What the last answers have said. Where the state is out of reach, nobody is told.
    for (const each of ending) await tell(each).catch(() => undefined);
    for (const { dispatcher, port } of ending) {
      quietUntil = Math.max(quietUntil, performance.now() + dispatcher.quietMs());
      port.close();
    }
  };
  const quietMs = (): number => Math.max(0, quietUntil - performance.now());

  const replace = async (destinations: readonly Reachable[], description: string): Promise<void> => {
    if (description === described && running.length > 0) return;
    const opened = await connectAll(destinations);
    await end();
    await new Promise((resolve) => setTimeout(resolve, quietMs()));
    if (isStopped) {
      for (const { port } of opened) port.close();
      return;
    }
    described = description;
    running = opened.map(({ id, name, port }) => ({
      id,
      name,
      port,
      dispatcher: startDispatcher({
        state,
        leader,
        destinationId: id,
        destinationName: name,
        isHybrid: isHybrid(),
        port,
        mayBegin,
        prepareBulk,
        memory: memoryOf(id),
        lookMs,
        onLeaseLost: () => log.warn('Calls that were under way are not settled: another instance leads.'),
        log,
      }),
    }));
  };

  return {
    replace: (destinations, description) => (replacing = replace(destinations, description)),
    nudge: (lowestId) => {
      for (const { dispatcher } of running) dispatcher.nudge(lowestId);
    },
    all: () => running,
    report: async () => {
      for (const each of running) await tell(each);
    },
    stop: async () => {
      isStopped = true;
      await end();
      await replacing.catch(() => undefined);
    },
    quietMs,
  };
}
