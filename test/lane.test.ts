import { afterEach, describe, expect, it } from 'vitest';
import type { IdentifyCall } from '../src/core/call.js';
import type { Verdict } from '../src/core/verdict.js';
import { createLane, type Lane, type LaneOptions } from '../src/delivery/lane.js';
import { createSlots } from '../src/delivery/slots.js';
import type { SeenRequest } from '../src/demo/simulator/traffic.js';
import { startSimulator, type Simulator, type SimulatorOptions } from '../src/demo/simulator/server.js';
import type { Carrier, Item, Port } from '../src/destinations/carrier.js';
import { createIterablePort, type IterableQuotas } from '../src/destinations/iterable/port.js';
import { Secret } from '../src/lib/secret.js';

/** Lanes to the simulator: what they make of calls, of quotas and of whatever is answered. */
const QUOTAS = {
  usersUpdate: 1_000,
  usersBulkUpdate: 50,
  eventsTrack: 2_000,
  eventsTrackBulk: 10,
  lists: 5,
  reads: 100,
};
const OK = { kind: 'acknowledged' } as const;
/** What the simulator says where it was asked to fail. */
const FAULT = '{"msg":"A fault that was asked for","code":"GenericError","params":null}';

const closers: (() => unknown)[] = [];
afterEach(async () => {
  for (const close of closers.splice(0).reverse()) await close();
});

async function simulate(options: Partial<SimulatorOptions> = {}): Promise<Simulator> {
  const simulator = await startSimulator({ projectType: 'hybrid', quotas: 'off', keepRequests: 10_000, ...options });
  closers.push(() => simulator.close());
  return simulator;
}

interface Opened {
  port: Port;
  single: Lane;
  bulk: Lane;
}

function open(
  simulator: Simulator,
  {
    quotas = {},
    mayBegin = () => true,
    onLeftOut = () => undefined,
    ...limits
  }: { quotas?: Partial<IterableQuotas> } & Partial<
    Pick<LaneOptions<Verdict>, 'mayBegin' | 'onLeftOut'> & Pick<Carrier, 'most' | 'bytes'>
  > = {},
): Opened {
  const port = createIterablePort({
    baseUrl: simulator.url,
    apiKey: new Secret('key'),
    projectKey: 'hybrid',
    quotas: { ...QUOTAS, ...quotas },
  });
  closers.push(() => port.close());
  const laneOf = (carrier: Carrier): Lane =>
    createLane({ carrier, transmit: port.transmit, mayBegin, onFree: () => undefined, onLeftOut });
  const { single, bulk } = port.update;
  if (bulk === null) throw new Error('There is no bulk.');
  return { port, single: laneOf(single), bulk: laneOf({ ...bulk, ...limits }) };
}

let users = 0;
function update(
  { port }: Pick<Opened, 'port'>,
  {
    userId,
    json = 'true',
    field = 'vip',
    beside = null,
  }: { userId?: string; json?: string; field?: string; beside?: string | null } = {},
): Item {
  users += 1;
  const call: IdentifyCall = {
    type: 'identify',
    messageId: null,
    recipient: `u:${userId ?? `n${users}`}`,
    beside,
    computation: { kind: 'audience', id: 'aud_1', key: 'vip' },
    traits: [{ field, json, type: 'boolean' }],
  };
  return port.update.item([call]);
}
const several = (opened: Opened, count: number): Item[] => Array.from({ length: count }, () => update(opened));
const sendAll = (lane: Lane, items: readonly Item[], urgent = false): Promise<(Verdict | null)[]> =>
  Promise.all(items.map((item) => lane.send(item, urgent)));
const usersOf = ({ body }: SeenRequest): string[] =>
  (JSON.parse(body) as { users: { userId: string }[] }).users.map(({ userId }) => userId);
const batches = (simulator: Simulator): string[][] =>
  simulator
    .requests()
    .filter(({ endpoint }) => endpoint === 'users/bulkUpdate')
    .map(usersOf);

describe('a lane', () => {
  it('sends 500 a second to whoever takes 500 a second, and meets no 429', async () => {
    const simulator = await simulate({ quotas: {}, tolerance: 0.03 });
    const opened = open(simulator, { quotas: { usersUpdate: 500 } });
    const end = performance.now() + 3_000;
    let answers = 0;
    const send = async (): Promise<void> => {
      while (performance.now() < end) if ((await opened.single.send(update(opened), false)) !== null) answers += 1;
    };
    await Promise.all(Array.from({ length: 60 }, send));
    expect(simulator.stats.count('users/update', 429)).toBe(0);
    // The exact rate is held by the pace, and measured by the benchmark; this machine may be busy.
    expect(answers).toBeGreaterThan(400);
  });

  it('gives back what can’t be sent in time, as it was', async () => {
    const simulator = await simulate();
    const opened = open(simulator, { quotas: { usersUpdate: 1 } });
    const answers = await sendAll(opened.single, several(opened, 5));
    expect(answers.filter((answer) => answer === null).length).toBeGreaterThanOrEqual(2);
    expect(simulator.requests().length).toBe(answers.filter((answer) => answer !== null).length);
  });

  it('says how much it has room for', async () => {
    const simulator = await simulate({ latencyMs: 50 });
    const opened = open(simulator, { quotas: { usersUpdate: 10 } });
    expect(opened.single.room()).toBe(8);
    const sending = sendAll(opened.single, several(opened, 20));
    expect(opened.single.room()).toBe(0);
    await sending;
    expect(opened.single.room()).toBe(8);
  });

  it('says how long an urgent call would wait, behind what is urgent and before all else', async () => {
    const simulator = await simulate();
    const opened = open(simulator, { quotas: { usersUpdate: 1 } });
    expect(opened.single.waitMs()).toBe(0);
    const plain = sendAll(opened.single, several(opened, 4));
    // One has been sent, and takes the quota of a second.
    const behind = opened.single.waitMs();
    expect(behind).toBeGreaterThan(0);
    expect(behind).toBeLessThan(1_100);
    const urgent = [1, 2].map(() => opened.single.send(update(opened), true));
    expect(opened.single.waitMs()).toBeGreaterThan(behind + 1_500);
    await Promise.all([plain, ...urgent]);
  });

  it('closes for as long as a 429 asks, gives the call back, and opens again by itself', async () => {
    const simulator = await simulate();
    const opened = open(simulator);
    simulator.faults.failNext(1, { status: 429, body: { code: 'RateLimitExceeded', params: { rateLimitReset: 0.3 } } });
    expect(await opened.single.send(update(opened), false)).toBeNull();
    expect(opened.single.state()).toBe('closed');
    expect(opened.single.trouble()).toMatch(/429/);
    expect(opened.single.figures()).toMatchObject({ requests: 1, throttled: 1, calls: 0 });
    const began = performance.now();
    expect(await opened.single.send(update(opened), false)).toEqual(OK);
    expect(performance.now() - began).toBeGreaterThan(250);
    expect(opened.single.state()).toBe('open');
    expect(opened.single.trouble()).toBeNull();
  });

  it('closes when too many requests in a row fail, and one at a time finds out whether that is over', async () => {
    const simulator = await simulate({ latencyMs: 30 });
    const opened = open(simulator);
    const lane = opened.single;
    simulator.faults.failNext(30, { status: 503 });
    await sendAll(lane, several(opened, 20));
    expect(lane.state()).toBe('closed');
    expect(lane.trouble()).toMatch(/HTTP 503/);

    const before = simulator.requests().length;
    await sendAll(lane, several(opened, 20));
    expect(simulator.requests().length - before).toBeLessThanOrEqual(2);

    simulator.faults.clear();
    let answer: Verdict | null = null;
    while (answer === null) answer = await lane.send(update(opened), false);
    expect(answer).toEqual(OK);
    expect(lane.state()).toBe('open');
  });

  it('closes when something else answers in the place of the destination, be it with success', async () => {
    const simulator = await simulate();
    const opened = open(simulator);
    simulator.faults.failRandomly({ share: 1, seed: 1, status: 200, body: '<html>Maintenance</html>' });
    await sendAll(opened.single, several(opened, 20));
    expect(opened.single.state()).toBe('closed');
    expect(opened.single.figures().calls).toBe(0);
  });

  it('is back at its full rate as soon as a destination that was away answers again', async () => {
    const simulator = await simulate({ latencyMs: 30 });
    const opened = open(simulator, { quotas: { usersUpdate: 200 } });
    const lane = opened.single;
    const stopping = new AbortController();
    const send = async (): Promise<void> => {
      while (!stopping.signal.aborted) {
        if ((await lane.send(update(opened), false)) === null) await new Promise((resolve) => setTimeout(resolve, 10));
      }
    };
    const senders = Array.from({ length: 40 }, send);
    const acknowledgedIn = async (ms: number): Promise<number> => {
      const before = lane.figures().calls;
      await new Promise((resolve) => setTimeout(resolve, ms));
      return lane.figures().calls - before;
    };
    await acknowledgedIn(1_000);
    const usual = await acknowledgedIn(1_000);
    simulator.faults.failRandomly({ share: 1, seed: 1, status: 503 });
    await expect.poll(lane.state, { interval: 5 }).toBe('closed');
    const requests = simulator.requests().length;
    expect(await acknowledgedIn(3_000)).toBe(0);
    expect(simulator.requests().length - requests).toBeLessThan(20);
    simulator.faults.clear();
    await expect.poll(lane.state, { interval: 5, timeout: 10_000 }).toBe('open');
    expect(await acknowledgedIn(1_000)).toBeGreaterThan(0.7 * usual);
    stopping.abort();
    await Promise.all(senders);
  });

  it('has those who find out that a destination is away come again within seconds', async () => {
    const simulator = await simulate();
    const opened = open(simulator);
    simulator.faults.failRandomly({ share: 1, seed: 1, status: 503 });
    const verdicts = [];
    for (let n = 0; n < 12; n += 1) {
      await expect.poll(opened.single.state, { interval: 5, timeout: 10_000 }).not.toBe('closed');
      verdicts.push(await opened.single.send(update(opened), false));
    }
    const failed = { kind: 'again', late: false, reason: 'HTTP 503', answer: FAULT, isBlameless: true };
    expect(verdicts[0]).toEqual({ ...failed, waitMs: null });
    expect(verdicts.at(-1)).toEqual({ ...failed, waitMs: 5_000 });
  });

  it('blames a call that fails only where others get through', async () => {
    const simulator = await simulate();
    const opened = open(simulator);
    const isPoison = ({ body }: SeenRequest): boolean => body.includes('poison');
    simulator.faults.failRandomly({ share: 1, seed: 1, status: 500, match: isPoison });
    const send = (userId?: string): Promise<Verdict | null> =>
      opened.single.send(update(opened, userId === undefined ? {} : { userId }), false);
    const atFirst = await send('poison');
    expect(await send()).toEqual(OK);
    const verdicts = [];
    for (let n = 0; n < 12; n += 1) {
      await expect.poll(opened.single.state, { interval: 5, timeout: 10_000 }).not.toBe('closed');
      verdicts.push(await send('poison'));
    }
    const failed = { kind: 'again', waitMs: null, late: false, reason: 'HTTP 500', answer: FAULT };
    expect(atFirst).toEqual({ ...failed, isBlameless: true });
    expect(verdicts.slice(0, 9)).toEqual(Array(9).fill(failed));
    expect(verdicts.slice(9)).toEqual(Array(3).fill({ ...failed, waitMs: 5_000, isBlameless: true }));
  });

  it('takes a refusal that is the destination’s own trouble for an outage where nothing gets through', async () => {
    const simulator = await simulate();
    const opened = open(simulator);
    simulator.faults.failRandomly({ share: 1, seed: 1, status: 400, body: { code: 'GenericError', msg: 'no' } });
    const verdicts = [];
    for (let n = 0; n < 11; n += 1) {
      await expect.poll(opened.single.state, { interval: 5, timeout: 10_000 }).not.toBe('closed');
      verdicts.push(await opened.single.send(update(opened), false));
    }
    expect(verdicts.slice(0, 9)).toMatchObject(Array(9).fill({ kind: 'refused', about: 'trouble' }));
    expect(verdicts[10]).toMatchObject({ kind: 'again', reason: 'GenericError', isBlameless: true });
  });

  it('refuses what alone is over the bytes of a request, without sending it', async () => {
    const simulator = await simulate();
    const opened = open(simulator, { bytes: 1_000 });
    const { update: way } = opened.port;
    const overhead = way.bulk?.overhead ?? 0;
    const sized = (bytes: number): Item => {
      const item = update(opened, { field: 'text', json: '""' });
      const missing = bytes - Buffer.byteLength(item.text);
      return { ...item, text: item.text.replace('""', `"${'x'.repeat(missing)}"`) };
    };
    const items = [sized(1_000 - overhead), sized(1_001 - overhead), update(opened)];
    const verdicts = await sendAll(opened.bulk, items);
    expect(verdicts).toMatchObject([OK, { kind: 'refused', about: 'content', reason: 'TooLarge' }, OK]);
    const sizes = (): number[] => simulator.requests().map(({ body }) => Buffer.byteLength(body));
    expect(Math.max(...sizes())).toBe(1_000);
    expect(simulator.userCount).toBe(2);
    expect(await opened.single.send(sized(4_000_001), false)).toMatchObject({ reason: 'TooLarge' });
    expect(Math.max(...sizes())).toBe(1_000);
    await opened.single.send(sized(4_000_000), false);
    expect(sizes().at(-1)).toBe(4_000_000);
  });

  it('isn’t closed by failures among successes', async () => {
    const simulator = await simulate();
    const opened = open(simulator);
    simulator.faults.failRandomly({ share: 0.3, seed: 7, status: 500 });
    for (let n = 0; n < 200; n += 1) await opened.single.send(update(opened), false);
    expect(simulator.stats.count('users/update', 500)).toBeGreaterThan(40);
    expect(opened.single.state()).toBe('open');
  });

  it('sends nothing that may not begin', async () => {
    const simulator = await simulate();
    const opened = open(simulator, { mayBegin: () => false });
    expect(await opened.single.send(update(opened), false)).toBeNull();
    expect(simulator.requests()).toEqual([]);
  });
});

describe('a lane in bulk', () => {
  it('gathers what comes within a moment into one request', async () => {
    const simulator = await simulate();
    const opened = open(simulator);
    expect(await sendAll(opened.bulk, several(opened, 30))).toEqual(Array(30).fill(OK));
    expect(batches(simulator).map(({ length }) => length)).toEqual([30]);
  });

  it('cuts requests by count, and sends a full one at once', async () => {
    const simulator = await simulate();
    const opened = open(simulator, { most: 10 });
    const began = performance.now();
    await sendAll(opened.bulk, several(opened, 20));
    expect(performance.now() - began).toBeLessThan(90);
    expect(batches(simulator).map(({ length }) => length)).toEqual([10, 10]);
  });

  it('cuts requests by the bytes of the final body', async () => {
    const simulator = await simulate();
    const opened = open(simulator, { bytes: 1_000 });
    const items = Array.from({ length: 20 }, () => update(opened, { json: `"${'ü'.repeat(100)}"`, field: 'text' }));
    expect(await sendAll(opened.bulk, items)).toEqual(Array(20).fill(OK));
    const sizes = simulator.requests().map(({ body }) => Buffer.byteLength(body));
    expect(Math.max(...sizes)).toBeLessThanOrEqual(1_000);
    expect(Math.max(...sizes)).toBeGreaterThan(700);
  });

  it('has nobody twice in a request, by either identifier', async () => {
    const simulator = await simulate();
    const opened = open(simulator);
    const items = [
      update(opened, { userId: 'a', beside: 'x@x.de' }),
      update(opened, { userId: 'a' }),
      update(opened, { userId: 'b', beside: 'X@x.de' }),
      update(opened, { userId: 'c' }),
    ];
    await sendAll(opened.bulk, items);
    expect(batches(simulator)).toEqual([
      ['a', 'c'],
      ['a', 'b'],
    ]);
  });

  it('takes urgent calls first', async () => {
    const simulator = await simulate();
    const opened = open(simulator, { most: 10 });
    const plain = sendAll(opened.bulk, several(opened, 15));
    const urgent = Array.from({ length: 5 }, (_, n) => update(opened, { userId: `urgent${n}` }));
    await Promise.all([plain, sendAll(opened.bulk, urgent, true)]);
    expect(batches(simulator)[1]?.slice(0, 5)).toEqual(['urgent0', 'urgent1', 'urgent2', 'urgent3', 'urgent4']);
  });

  it('gives each call its own verdict', async () => {
    const simulator = await simulate();
    simulator.forget('gone');
    const opened = open(simulator);
    const items = [update(opened), update(opened, { userId: 'gone' }), update(opened, { userId: 'ü' }), update(opened)];
    expect(await sendAll(opened.bulk, items)).toMatchObject([
      OK,
      { kind: 'refused', about: 'person', reason: 'ForgottenUserError' },
      { kind: 'refused', about: 'person', reason: 'InvalidUserIdError' },
      OK,
    ]);
    expect(batches(simulator)).toHaveLength(1);
    // What was refused has been taken, and not accepted.
    expect(opened.bulk.figures()).toMatchObject({ requests: 1, calls: 2 });
  });

  it('counts what was accepted, and what was taken, a second', async () => {
    const simulator = await simulate();
    simulator.forget('gone');
    const opened = open(simulator);
    await sendAll(opened.bulk, [...several(opened, 2), update(opened, { userId: 'gone' })]);
    const rates = (): number[] =>
      [opened.bulk.figures().callsPerSecond, opened.bulk.takenPerSecond()].map((n) => n * 9);
    // The second that goes on isn't counted yet.
    await expect.poll(() => rates().map(Math.round), { timeout: 5_000 }).toEqual([2, 3]);
  });

  it('blames nobody among others whose request wasn’t answered, and blames who was alone in it', async () => {
    const simulator = await simulate();
    const opened = open(simulator);
    await opened.bulk.send(update(opened), false);
    simulator.faults.failNext(2, { reset: true });
    for (const verdict of await sendAll(opened.bulk, several(opened, 3)))
      expect(verdict).toMatchObject({ reason: 'NoAnswer', isBlameless: true });
    const alone = await opened.bulk.send(update(opened), false);
    expect(alone).toMatchObject({ kind: 'again', late: true, reason: 'NoAnswer' });
    expect(alone).not.toHaveProperty('isBlameless');
  });

  it('says that an answer is none that can be read where it doesn’t add up for one alone', async () => {
    const simulator = await simulate();
    const opened = open(simulator);
    await opened.bulk.send(update(opened), false);
    simulator.faults.failNext(1, { status: 200, body: { successCount: 3, failCount: 0, failedUpdates: {} } });
    expect(await opened.bulk.send(update(opened), false)).toEqual({
      kind: 'again',
      waitMs: null,
      late: false,
      reason: 'UnreadableAnswer',
      answer: '{"successCount":3,"failCount":0,"failedUpdates":{}}',
    });
  });

  it('finds the guilty call of a batch that is refused whole, and delivers its neighbours', async () => {
    const simulator = await simulate();
    const opened = open(simulator);
    await opened.single.send(update(opened, { field: 'ltv', json: '1' }), false);
    const items = several(opened, 63);
    items.splice(40, 0, update(opened, { field: 'ltv', json: '"text"' }));
    const verdicts = await sendAll(opened.bulk, items);
    expect(verdicts[40]).toMatchObject({ kind: 'refused', reason: 'RequestFieldsTypesMismatched', field: 'ltv' });
    expect(verdicts.filter((verdict) => verdict?.kind === 'acknowledged')).toHaveLength(63);
    // The field is named: only those who carry it are sent apart.
    expect(batches(simulator).map(({ length }) => length)).toEqual([64, 63, 1]);
  });

  it('finds several guilty calls in halves where nothing is named', async () => {
    const simulator = await simulate();
    const opened = open(simulator);
    const isGuilty = (id: string): boolean => id.startsWith('bad');
    simulator.faults.failRandomly({
      share: 1,
      seed: 1,
      endpoint: 'users/bulkUpdate',
      status: 400,
      body: { code: 'BadParams', msg: 'no', params: null },
      match: (request) => usersOf(request).some(isGuilty),
    });
    const items = several(opened, 120);
    for (const at of [5, 60, 61]) items.splice(at, 0, update(opened, { userId: `bad${at}` }));
    const verdicts = await sendAll(opened.bulk, items);
    expect(verdicts.filter((verdict) => verdict?.kind === 'acknowledged')).toHaveLength(120);
    expect(verdicts.filter((verdict) => verdict?.kind === 'refused')).toHaveLength(3);
    expect(simulator.userCount).toBe(120);
  });

  it('halves what is too large, by count or by bytes', async () => {
    const simulator = await simulate({ maxBatch: 10 });
    const opened = open(simulator);
    expect(await sendAll(opened.bulk, several(opened, 40))).toEqual(Array(40).fill(OK));
    expect(simulator.userCount).toBe(40);
  });

  it('believes no answer that doesn’t add up, and asks in halves', async () => {
    const simulator = await simulate();
    const opened = open(simulator);
    simulator.faults.failNext(1, {
      afterApplying: true,
      status: 200,
      body: { successCount: 3, failCount: 0, failedUpdates: {} },
    });
    expect(await sendAll(opened.bulk, several(opened, 8))).toEqual(Array(8).fill(OK));
    expect(batches(simulator).map(({ length }) => length)).toEqual([8, 4, 4]);
  });

  it('finds the one call that the destination fails at', async () => {
    const simulator = await simulate();
    const opened = open(simulator);
    simulator.faults.failRandomly({
      share: 1,
      seed: 1,
      status: 500,
      endpoint: 'users/bulkUpdate',
      match: (request) => usersOf(request).includes('poison'),
    });
    const items = several(opened, 50);
    items.splice(20, 0, update(opened, { userId: 'poison' }));
    const verdicts = await sendAll(opened.bulk, items);
    expect(verdicts[20]).toMatchObject({ kind: 'again', late: false });
    expect(verdicts[20]).not.toHaveProperty('isBlameless');
    expect(verdicts.filter((verdict) => verdict?.kind === 'acknowledged')).toHaveLength(50);
    expect(opened.bulk.state()).toBe('open');
  });

  it('sends a batch once more that failed by accident', async () => {
    const simulator = await simulate();
    const opened = open(simulator);
    simulator.faults.failNext(1, { status: 503 });
    expect(await sendAll(opened.bulk, several(opened, 20))).toEqual(Array(20).fill(OK));
    expect(batches(simulator).map(({ length }) => length)).toEqual([20, 20]);
  });

  it('doesn’t take a batch apart while the destination is away', async () => {
    const simulator = await simulate();
    const opened = open(simulator);
    simulator.faults.failRandomly({ share: 1, seed: 1, status: 503 });
    const verdicts = await sendAll(opened.bulk, several(opened, 100));
    expect(verdicts.every((verdict) => verdict === null || verdict.kind === 'again')).toBe(true);
    expect(simulator.requests().length).toBeLessThan(8);
    expect(opened.bulk.state()).toBe('closed');
  });

  it('gives everybody back when a batch meets a full quota', async () => {
    const simulator = await simulate();
    const opened = open(simulator);
    simulator.faults.failNext(1, { status: 429, headers: { 'retry-after': '1' } });
    expect(await sendAll(opened.bulk, several(opened, 20))).toEqual(Array(20).fill(null));
    expect(opened.bulk.state()).toBe('closed');
  });

  it('tells of a batch without an answer that it may still be applied', async () => {
    const simulator = await simulate();
    const opened = open(simulator);
    simulator.faults.failNext(1, { reset: true, afterApplying: true });
    const unanswered = { reason: 'NoAnswer', answer: 'No answer came (ECONNRESET).', isBlameless: true };
    expect(await sendAll(opened.bulk, several(opened, 3))).toEqual(
      Array(3).fill({ kind: 'again', waitMs: 60_000, late: true, ...unanswered }),
    );
  });

  it('tells which fields the destination leaves out', async () => {
    const simulator = await simulate();
    const leftOut: string[] = [];
    const opened = open(simulator, { onLeftOut: (fields) => leftOut.push(...fields) });
    simulator.faults.failNext(1, {
      status: 200,
      body: { successCount: 1, failCount: 0, filteredOutFields: ['ltv'], failedUpdates: {} },
    });
    await opened.bulk.send(update(opened), false);
    expect(leftOut).toEqual(['ltv']);
  });
});

describe('the slots', () => {
  it('are as many as they are, and one that is held holds up few others', async () => {
    let freed = 0;
    const slots = createSlots(300, () => (freed += 1));
    let release: () => void = () => undefined;
    const held = new Promise<void>((resolve) => (release = resolve));
    slots.run([...Array(300).keys()], (n) => (n === 0 ? held : Promise.resolve()));
    expect(slots.free()).toBe(0);
    await expect.poll(() => slots.free()).toBe(295);
    expect(freed).toBe(59);
    release();
    await expect.poll(() => slots.free()).toBe(300);
  });

  it('are there at once for what mustn’t wait, however much has been begun before', () => {
    const slots = createSlots(300, () => undefined);
    const begun: number[] = [];
    const begin = (n: number): Promise<void> => {
      begun.push(n);
      return Promise.resolve();
    };
    slots.run([...Array(300).keys()], begin);
    slots.runNow([1_000, 1_001], begin);
    expect(begun).toEqual([1_000, 1_001]);
    expect([slots.free(), slots.spare()]).toEqual([0, 48]);
  });

  it('become more and fewer while tasks run', async () => {
    const slots = createSlots(60, () => undefined);
    let release: () => void = () => undefined;
    const held = new Promise<void>((resolve) => (release = resolve));
    const start = (count: number): void => slots.run([...Array(count).keys()], () => held);
    start(60);
    slots.resize(120);
    expect(slots.free()).toBe(60);
    start(60);
    slots.resize(60);
    expect([slots.free(), slots.taken()]).toEqual([0, 120]);
    release();
    await expect.poll(() => slots.free()).toBe(60);
  });
});
