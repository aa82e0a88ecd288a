import { expect, test } from 'vitest';

import { createBucket } from '../src/demo/simulator/bucket.js';
import type { Simulator } from '../src/demo/simulator/server.js';
import { simulators } from './support/simulated.js';

const start = simulators({ projectType: 'user_id' });

function send(simulator: Simulator, path: string, body: unknown, signal?: AbortSignal): Promise<Response> {
  return fetch(`${simulator.url}/api/${path}`, {
    method: 'POST',
    headers: { 'Api-Key': 'key', 'Content-Type': 'application/json' },
    body: JSON.stringify(body),
    ...(signal && { signal }),
  });
}

const update = (simulator: Simulator, userId: string): Promise<Response> => send(simulator, 'users/update', { userId });

test('a bucket gives its quota at once and then as fast as it is refilled', () => {
  const bucket = createBucket({ requests: 2, windowMs: 1_000 }, 0);
  expect([0, 0, 0].map((at) => bucket.take(at).kind)).toEqual(['granted', 'granted', 'refused']);
  expect(bucket.take(400)).toEqual({ kind: 'refused', resetSeconds: 1, remaining: 0, limit: 2 });
  expect([500, 500, 1_000, 9_000, 9_000, 9_000].map((at) => bucket.take(at).kind)).toEqual([
    'granted',
    'refused',
    'granted',
    'granted',
    'granted',
    'refused',
  ]);
});

test('a tolerance lets a share above the quota through', () => {
  const bucket = createBucket({ requests: 100, windowMs: 1_000 }, 0.03);
  const granted = Array.from({ length: 200 }, () => bucket.take(0)).filter(({ kind }) => kind === 'granted');
  expect(granted).toHaveLength(103);
});

test('past the quota the user endpoints say when to come again, the others only that it is too much', async () => {
  const simulator = await start({ quotas: { 'users/update': 1, 'events/track': 1 } });
  const event = { userId: 'u1', eventName: 'E' };
  expect((await update(simulator, 'u1')).status).toBe(200);
  const refused = await update(simulator, 'u2');
  expect(refused.status).toBe(429);
  expect(await refused.json()).toMatchObject({
    code: 'RateLimitExceeded',
    params: { rateLimitReset: 1, rateLimitRemaining: 0, rateLimitLimit: 1 },
  });
  expect((await send(simulator, 'events/track', event)).status).toBe(200);
  const other = await send(simulator, 'events/track', event);
  expect(other.status).toBe(429);
  expect(await other.json()).toMatchObject({ code: 'RateLimitExceeded', params: null });
  expect(simulator.user('u2')).toBeUndefined();

  simulator.setQuota('users/update', 'off');
  expect((await update(simulator, 'u2')).status).toBe(200);
});

test('the published quotas hold unless others are given', async () => {
  const simulator = await start({ quotas: {} });
  const replies = await Promise.all(
    Array.from({ length: 6 }, () => send(simulator, 'users/bulkUpdate', { users: [] })),
  );
  expect(replies.map(({ status }) => status).sort()).toEqual([200, 200, 200, 200, 200, 429]);
});

test('requests are counted by endpoint and outcome, with their times, and the last are kept', async () => {
  const simulator = await start({ keepRequests: 2 });
  for (const userId of ['u1', 'u2', 'bad ', 'u3']) await update(simulator, userId);
  const { stats } = simulator;
  expect(stats.count('users/update')).toBe(4);
  expect(stats.count('users/update', 200)).toBe(3);
  expect(stats.count(undefined, 400)).toBe(1);
  expect(stats.arrivals('users/update')).toHaveLength(4);
  expect(stats.mostWithin('users/update', 60_000)).toBe(4);
  expect(stats.mostWithin('events/track', 1_000)).toBe(0);
  expect(simulator.requests()).toMatchObject([
    { endpoint: 'users/update', method: 'POST', body: '{"userId":"bad "}', outcome: 400 },
    { path: '/api/users/update', body: '{"userId":"u3"}', outcome: 200 },
  ]);
});

test('the next requests fail as asked, of one endpoint alone, and then no more', async () => {
  const simulator = await start();
  simulator.faults.failNext(2, { endpoint: 'users/update', status: 503, body: '<html>busy</html>' });
  expect((await send(simulator, 'events/track', { userId: 'u0', eventName: 'E' })).status).toBe(200);
  const first = await update(simulator, 'u1');
  expect([first.status, await first.text(), first.headers.get('content-type')]).toEqual([
    503,
    '<html>busy</html>',
    'text/html',
  ]);
  expect((await update(simulator, 'u1')).status).toBe(503);
  expect(simulator.user('u1')).toBeUndefined();
  expect((await update(simulator, 'u1')).status).toBe(200);
});

test('a fault may carry headers and a body, choose its requests, and strike after the write', async () => {
  const simulator = await start();
  simulator.faults.failNext(1, {
    match: ({ body }) => body.includes('u2'),
    status: 429,
    headers: { 'Retry-After': '7' },
    body: { code: 'RateLimitExceeded' },
    afterApplying: true,
  });
  expect((await update(simulator, 'u1')).status).toBe(200);
  const failed = await update(simulator, 'u2');
  expect([failed.status, failed.headers.get('retry-after')]).toEqual([429, '7']);
  expect(simulator.user('u2')).toBeDefined();
});

test('a connection is cut, before the write or after it', async () => {
  const simulator = await start();
  simulator.faults.failNext(1, { reset: true });
  simulator.faults.failNext(1, { reset: true, afterApplying: true });
  await expect(update(simulator, 'u1')).rejects.toThrow();
  await expect(update(simulator, 'u2')).rejects.toThrow();
  expect([...simulator.users()].map(({ key }) => key)).toEqual(['u2']);
  expect(simulator.stats.count('users/update', 'reset')).toBe(2);
});

test('a request may hang until the simulator is closed', async () => {
  const simulator = await start();
  simulator.faults.failNext(1, { hang: true, afterApplying: true });
  const hanging = expect(update(simulator, 'u1')).rejects.toThrow();
  expect((await update(simulator, 'u2')).status).toBe(200);
  await simulator.close();
  await hanging;
  expect(simulator.stats.count('users/update', 'hung')).toBe(1);
  expect(simulator.userCount).toBe(2);
});

test('a sender that gives up leaves the simulator unharmed, and its request may count', async () => {
  const simulator = await start();
  const patience = new AbortController();
  simulator.faults.failNext(1, {
    delayMs: 3_600_000,
    match: () => {
      setImmediate(() => patience.abort());
      return true;
    },
  });
  await expect(send(simulator, 'users/update', { userId: 'u1' }, patience.signal)).rejects.toThrow();
  expect(simulator.user('u1')).toBeDefined();
  expect((await update(simulator, 'u2')).status).toBe(200);
});

test('random faults strike the same requests for the same seed', async () => {
  const outcomes: number[][] = [];
  while (outcomes.length < 2) {
    const simulator = await start();
    simulator.faults.failRandomly({ share: 0.5, seed: 7, status: 500 });
    const statuses: number[] = [];
    for (let n = 0; n < 20; n++) statuses.push((await update(simulator, `u${n}`)).status);
    simulator.faults.clear();
    expect((await update(simulator, 'after')).status).toBe(200);
    outcomes.push(statuses);
  }
  expect(outcomes[0]).toEqual(outcomes[1]);
  expect(new Set(outcomes[0])).toEqual(new Set([200, 500]));
});

test('an answer waits for the latency', async () => {
  const simulator = await start({ latencyMs: 40 });
  const slow = performance.now();
  await update(simulator, 'u1');
  expect(performance.now() - slow).toBeGreaterThan(38);
  simulator.setLatency(0);
  expect((await update(simulator, 'u1')).status).toBe(200);
});

test('many requests at once are all answered and all counted', async () => {
  const simulator = await start({ keepRequests: 0 });
  const replies = await Promise.all(Array.from({ length: 500 }, (_, n) => update(simulator, `u${n}`)));
  expect(new Set(replies.map(({ status }) => status))).toEqual(new Set([200]));
  expect(simulator.userCount).toBe(500);
  expect(simulator.requests()).toEqual([]);
});
