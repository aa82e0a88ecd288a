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
  /**
   * Where what arrives is noted: on the way to the receiver, or, at 2,000 requests a second, in the place of it, in a
   * measurement of its own.
   */
  tap: 'before' | 'alone';
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
    tap: 'before',
    carrierOf: ({ update }) => update.single,
    itemOf: userOf,
  },
  {
    name: 'users/bulkUpdate',
    endpoint: 'users/bulkUpdate',
    tap: 'before',
    carrierOf: ({ update }) => update.bulk,
    itemOf: userOf,
  },
  {
    name: 'events/track',
    endpoint: 'events/track',
    tap: 'alone',
    carrierOf: ({ track: way }) => way.single,
    itemOf: eventOf,
  },
  {
    name: 'events/trackBulk',
    endpoint: 'events/trackBulk',
    tap: 'before',
    carrierOf: ({ track: way }) => way.bulk,
    itemOf: eventOf,
  },
];

interface Held {
  perSecond: number;
  most: number;
  /** When requests were sent. */
  sent: readonly number[];
  accepted: number;
  /** Where what is measured begins, in milliseconds since 1970. */
  since: number;
}

/** Keeps as many calls waiting as the lane can take, for so long. */
async function holdLane(each: Case, url: string, seconds: number): Promise<Held> {
  const port = createIterablePort({
    baseUrl: url,
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
    const lane = createLane({
      carrier,
      transmit,
      mayBegin: () => true,
      onFree: () => undefined,
      onLeftOut: () => undefined,
    });
    // Both programs are compiled while they run: what is measured begins when that is done.
    const began = performance.now() + WARM_UP_MS;
    const end = began + seconds * 1_000;
    let [next, accepted] = [0, 0];
    const isMeasured = (at: number): boolean => at >= began && at < end;
    const keepSending = async (): Promise<void> => {
      while (performance.now() < end) {
        const verdict = await lane.send(each.itemOf(port, next++), false);
        if (verdict?.kind === 'acknowledged' && isMeasured(performance.now())) accepted += 1;
      }
    };
    const { perSecond, most } = carrier;
    const waiting = Math.ceil(perSecond * most * WAITING_SECONDS) + most;
    await Promise.all(Array.from({ length: waiting }, keepSending));
    return { perSecond, most, sent: sent.filter(isMeasured), accepted, since: performance.timeOrigin + began };
  } finally {
    port.close();
  }
}

/** The same at a receiver that does nothing but note what arrives. */
async function holdAlone(each: Case, seconds: number): Promise<{ sent: readonly number[]; arrived: number }> {
  const tap = await startTap({ answersAfterMs: LATENCY_MS });
  try {
    const { sent, since } = await holdLane(each, tap.url, seconds);
    return { sent, arrived: await tap.mostInASecond(since) };
  } finally {
    await tap.stop();
  }
}

async function measureLane(each: Case, seconds: number, where: string, report: Report): Promise<void> {
  const receiver = await startReceiver({ projectType: 'hybrid', latencyMs: LATENCY_MS, tolerance: TOLERANCE });
  const tap = each.tap === 'before' ? await startTap({ before: receiver.url }) : null;
  try {
    const { perSecond, most, sent, accepted, since } = await holdLane(each, tap?.url ?? receiver.url, seconds);
    const { throttled } = await receiver.ask(each.endpoint);
    const noted = tap === null ? await holdAlone(each, seconds) : { sent, arrived: await tap.mostInASecond(since) };
    const share = (value: number): string => `${(value * 100).toFixed(1)} %`;
    const name = `${each.name}${where}`;
    const unit = most === 1 ? `${perSecond}/s` : `${perSecond}/s × ${most}`;
    const reached = Math.min(sent.length, noted.sent.length) / (perSecond * seconds);
    report.add({
      name: `${name}: of ${unit}`,
      measured: `${share(reached)}, ${Math.round(accepted / seconds)} calls/s`,
      bound: `at least ${share(LEAST)}`,
      holds: reached >= LEAST,
    });
    const whole = (value: number): string => String(value);
    const tolerated = Math.floor(perSecond * (1 + TOLERANCE)) || perSecond;
    report.add(
      limit(
        `${name}: most sent in a second`,
        Math.max(mostInASecond(sent), mostInASecond(noted.sent)),
        perSecond,
        whole,
      ),
    );
    report.add(limit(`${name}: most arrived in a second`, noted.arrived, tolerated, whole));
    report.add(limit(`${name}: answered with 429`, throttled, 0, whole));
  } finally {
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
