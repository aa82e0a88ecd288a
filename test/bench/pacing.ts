import { spawn, type ChildProcess } from 'node:child_process';
import type { IdentifyCall, TrackCall } from '../../src/core/call.js';
import { createLane } from '../../src/delivery/lane.js';
import type { Endpoint } from '../../src/demo/simulator/endpoints.js';
import type { Item, Port, Transmit } from '../../src/destinations/carrier.js';
import { createIterablePort } from '../../src/destinations/iterable/port.js';
import { Secret } from '../../src/lib/secret.js';
import { limit, type Report } from './figures.js';
import { startReceiver } from './receiver.js';
import { mostInASecond, startTap } from './tap.js';

/**
 * Whether the lanes for users and events hold their quotas, at a receiver with 50 ms of latency that refuses whatever is more than 3 % above it:
 * the share of the quota that is reached, and the most requests in any second, as they were sent and as they arrived.
 */
const LATENCY_MS = 50;
const TOLERANCE = 0.03;
const LEAST = 0.97;
const QUOTAS = { usersUpdate: 500, usersBulkUpdate: 5, eventsTrack: 2_000, eventsTrackBulk: 10, lists: 5, reads: 100 };
const COMPUTATION = { kind: 'audience', id: 'aud_bench', key: 'vip' } as const;
/** Calls that wait for their turn at any time, in seconds of the quota. */
const WAITING_SECONDS = 0.6;
const WARM_UP_MS = 5_000;

interface Case {
  name: string;
  endpoint: Endpoint;
  /** Whether a process of its own notes what arrives; at 2,000 requests a second there is no processor left for it. */
  isTapped: boolean;
  carrierOf: (port: Port) => Port['update']['single'] | null;
  itemOf: (port: Port, n: number) => Item;
}

const identify = (n: number): IdentifyCall => ({
  type: 'identify',
  messageId: null,
  recipient: `u:${n}`,
  beside: null,
  computation: COMPUTATION,
  traits: [{ field: 'vip', json: 'true', type: 'boolean' }],
});
const track = (n: number): TrackCall => ({
  type: 'track',
  recipient: `u:${n}`,
  beside: null,
  computation: COMPUTATION,
  event: 'Audience Entered',
  messageId: `personas_${n}`,
  occurredAt: 1_767_225_600,
  properties: '{"audience_key": "vip", "vip": true}',
  dates: [],
});
const userOf = (port: Port, n: number): Item => port.update.item([identify(n)]);
const eventOf = (port: Port, n: number): Item => port.track.item(track(n));

const CASES: readonly Case[] = [
  {
    name: 'users/update',
    endpoint: 'users/update',
    isTapped: true,
    carrierOf: ({ update }) => update.single,
    itemOf: userOf,
  },
  {
    name: 'users/bulkUpdate',
    endpoint: 'users/bulkUpdate',
    isTapped: true,
    carrierOf: ({ update }) => update.bulk,
    itemOf: userOf,
  },
  {
    name: 'events/track',
    endpoint: 'events/track',
    isTapped: false,
    carrierOf: ({ track: way }) => way.single,
    itemOf: eventOf,
  },
  {
    name: 'events/trackBulk',
    endpoint: 'events/trackBulk',
    isTapped: true,
    carrierOf: ({ track: way }) => way.bulk,
    itemOf: eventOf,
  },
];

async function measureLane(each: Case, seconds: number, where: string, report: Report): Promise<void> {
  const receiver = await startReceiver({ projectType: 'hybrid', latencyMs: LATENCY_MS, tolerance: TOLERANCE });
  const tap = each.isTapped ? await startTap(receiver.url) : null;
  const port = createIterablePort({
    baseUrl: tap?.url ?? receiver.url,
    apiKey: new Secret('bench'),
    projectKey: 'hybrid',
    quotas: QUOTAS,
  });
  try {
    const carrier = each.carrierOf(port);
    if (carrier === null) throw new Error('There is no such lane.');
    const sent: number[] = [];
    const transmit: Transmit = (request) => {
      sent.push(performance.now());
      return port.transmit(request);
    };
    const lane = createLane({ carrier, transmit, mayBegin: () => true, onFree: () => undefined });
    // Both programs are compiled while they run: what is measured begins when that is done.
    const began = performance.now() + WARM_UP_MS;
    const since = performance.timeOrigin + began;
    const end = began + seconds * 1_000;
    let [next, accepted] = [0, 0];
    const isMeasured = (at: number): boolean => at >= began && at < end;
    const keepSending = async (): Promise<void> => {
      while (performance.now() < end) {
        const verdict = await lane.send(each.itemOf(port, next++), false);
        if (verdict?.kind === 'acknowledged' && isMeasured(performance.now())) accepted += 1;
      }
    };
    const waiting = Math.ceil(carrier.perSecond * carrier.most * WAITING_SECONDS) + carrier.most;
    await Promise.all(Array.from({ length: waiting }, keepSending));
    const received = await receiver.ask(each.endpoint);
    const { perSecond, most } = carrier;
    const inTime = sent.filter(isMeasured).length;
    const share = (value: number): string => `${(value * 100).toFixed(1)} %`;
    const name = `${each.name}${where}`;
    const unit = most === 1 ? `${perSecond}/s` : `${perSecond}/s × ${most}`;
    const reached = inTime / (perSecond * seconds);
    report.add({
      name: `${name}: of ${unit}`,
      measured: `${share(reached)}, ${Math.round(accepted / seconds)} calls/s`,
      bound: `at least ${share(LEAST)}`,
      holds: reached >= LEAST,
    });
    const whole = (value: number): string => String(value);
    report.add(limit(`${name}: most sent in a second`, mostInASecond(sent.filter(isMeasured)), perSecond, whole));
    const tolerated = Math.floor(perSecond * (1 + TOLERANCE)) || perSecond;
    report.add(
      limit(
        `${name}: most arrived in a second`,
        tap === null ? received.mostInASecond : await tap.mostInASecond(since),
        tolerated,
        whole,
      ),
    );
    report.add(limit(`${name}: answered with 429`, received.throttled, 0, whole));
  } finally {
    port.close();
    await tap?.stop();
    await receiver.stop();
  }
}

/** A process that keeps a core busy. */
const keepBusy = (): ChildProcess => spawn(process.execPath, ['-e', 'for (;;);'], { stdio: 'ignore' });

export async function measurePacing(seconds: number, report: Report): Promise<void> {
  for (const each of CASES) await measureLane(each, seconds, '', report);
  const busy = keepBusy();
  try {
    for (const each of CASES.filter(({ endpoint }) => endpoint !== 'events/track')) {
      await measureLane(each, seconds, ', with a core kept busy', report);
    }
  } finally {
    busy.kill();
  }
}
