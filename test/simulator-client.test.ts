/** Iterable's own client, which checks every answer against its schemas, talking to the simulator. */
import { IterableApiError, IterableClient } from '@iterable/api';
import { afterEach, expect, test } from 'vitest';

import type { Simulator, SimulatorOptions } from '../src/demo/simulator/server.js';
import { startSimulator } from '../src/demo/simulator/server.js';

const open: { simulator: Simulator; client: IterableClient }[] = [];

afterEach(async () => {
  for (const { simulator, client } of open.splice(0)) {
    client.destroy();
    await simulator.close();
  }
});

async function connect(
  options: Partial<SimulatorOptions> = {},
): Promise<{ simulator: Simulator; client: IterableClient }> {
  const simulator = await startSimulator({ projectType: 'email', apiKey: 'secret', ...options });
  const client = new IterableClient({ apiKey: 'secret', baseUrl: simulator.url });
  open.push({ simulator, client });
  return { simulator, client };
}

/** What the client makes of a refusal. */
async function refusalOf(call: Promise<unknown>): Promise<IterableApiError> {
  const error: unknown = await call.then(
    () => undefined,
    (reason: unknown) => reason,
  );
  if (!(error instanceof IterableApiError)) throw new Error('The call was not refused as an error of the API');
  return error;
}

const email = 'ada+test@example.com';

test('users are created, updated, read, moved and deleted', async () => {
  const { client } = await connect();
  const created = await client.updateUser({ email, userId: 'u1', dataFields: { firstName: 'Ada', total: 99.99 } });
  expect(created).toEqual({ msg: '', code: 'Success', params: null });
  await client.updateUser({ email, dataFields: { total: 100 } });
  expect((await client.getUserByEmail({ email })).user).toMatchObject({
    email,
    userId: 'u1',
    dataFields: { firstName: 'Ada', total: 100 },
  });
  expect((await client.getUserByUserId({ userId: 'u1' })).user?.email).toBe(email);
  expect(await client.getUserByEmail({ email: 'nobody@example.com' })).toEqual({});

  await client.updateEmail({ currentEmail: email, newEmail: 'new@example.com' });
  expect((await client.getUserByEmail({ email: 'new@example.com' })).user?.userId).toBe('u1');
  await client.deleteUserByUserId({ userId: 'u1' });
  await client.deleteUserByEmail({ email: 'new@example.com' });
  expect(await client.getUserByEmail({ email: 'new@example.com' })).toEqual({});
});

test('a user without an email is read in the form that the client asks for', async () => {
  const { client } = await connect({ projectType: 'hybrid' });
  await client.updateUser({ userId: 'u1', dataFields: { vip: true } });
  expect((await client.getUserByUserId({ userId: 'u1' })).user).toMatchObject({ email: '', userId: 'u1' });
});

test('a bulk update is taken apart by user', async () => {
  const { client, simulator } = await connect();
  const answer = await client.bulkUpdateUsers({
    users: [{ email, dataFields: { vip: true } }, { email: 'nonsense' }, { userId: 'unknown' }],
  });
  expect(answer).toMatchObject({
    successCount: 1,
    failCount: 2,
    createdFields: ['vip'],
    invalidEmails: ['nonsense'],
    failedUpdates: { invalidEmails: ['nonsense'], invalidUserIds: [] },
  });
  expect(simulator.user(email)?.fields).toEqual({ vip: 'true' });
});

test('events are tracked alone and in bulk, and read', async () => {
  const { client } = await connect();
  await client.updateUser({ email, userId: 'u1' });
  const tracked = await client.trackEvent({
    email,
    eventName: 'Seen',
    id: 'e-1',
    dataFields: { n: 1 },
    createdAt: 100,
  });
  expect(tracked.params).toEqual({ id: 'e-1' });
  const bulk = await client.trackBulkEvents({
    events: [
      { userId: 'u1', eventName: 'Bought', id: 'e-2', dataFields: { n: 2 }, createdAt: 200, campaignId: 7 },
      { email: 'nobody@example.com', eventName: 'Bought' },
    ],
  });
  expect(bulk).toMatchObject({ successCount: 1, failCount: 1, createdFields: ['n'], disallowedEventNames: [] });
  const { events } = await client.getUserEventsByEmail({ email, limit: 10 });
  expect(events).toMatchObject([
    { _id: 'e-2', eventName: 'Bought', email, userId: 'u1', dataFields: { n: 2 }, campaignId: 7 },
    { _id: 'e-1', eventName: 'Seen' },
  ]);
  expect((await client.getUserEventsByUserId({ userId: 'u1' })).events).toEqual(events);
});

test('lists are made, filled, read, emptied and deleted', async () => {
  const { client, simulator } = await connect();
  const { listId } = await client.createList({ name: 'VIPs', description: 'who matters' });
  const subscribed = await client.subscribeUserToList({ listId, subscribers: [{ email, dataFields: { vip: true } }] });
  expect(subscribed).toMatchObject({ successCount: 1, failCount: 0 });
  expect((await client.getLists()).lists).toMatchObject([{ id: listId, name: 'VIPs', listType: 'Standard' }]);
  expect(await client.getListUsers({ listId, maxResults: 10 })).toEqual({ users: [{ email }] });
  expect(await client.getListSize({ listId })).toEqual({ size: 1 });
  const left = await client.unsubscribeUserFromList({ listId, subscribers: [{ email }] });
  expect(left.successCount).toBe(1);
  expect(await client.getListUsers({ listId })).toEqual({ users: [] });
  expect((await client.deleteList({ listId })).code).toBe('Success');
  expect(simulator.lists()).toEqual([]);
});

test('the fields of a project are read with their types', async () => {
  const { client } = await connect();
  await client.updateUser({ email, dataFields: { vip: true, count: 1, seen: '2026-01-01 00:00:00 +00:00' } });
  expect((await client.getUserFields()).fields).toMatchObject({
    email: 'string',
    userId: 'string',
    vip: 'boolean',
    count: 'long',
    seen: 'date',
  });
});

test('every refusal is an error that the client knows by its code', async () => {
  const { client, simulator } = await connect({ quotas: { 'users/update': 3 } });
  await client.updateUser({ email, dataFields: { count: 1 } });
  const mismatch = await refusalOf(client.updateUser({ email, dataFields: { count: 'one' } }));
  expect([mismatch.statusCode, mismatch.code]).toEqual([400, 'RequestFieldsTypesMismatched']);
  expect(mismatch.params?.['validationErrors']).toHaveProperty('count');
  const unknown = await refusalOf(client.trackEvent({ email: 'nobody@example.com', eventName: 'E' }));
  expect(unknown.code).toBe('UnknownEmailError');
  const gone = await refusalOf(client.subscribeUserToList({ listId: 1, subscribers: [{ email }] }));
  expect([gone.statusCode, gone.code]).toEqual([404, 'NotFound']);
  simulator.forget(email);
  expect((await refusalOf(client.updateUser({ email }))).code).toBe('ForgottenUserError');
  const limited = await refusalOf(client.updateUser({ email }));
  expect([limited.isRateLimitError(), limited.code]).toEqual([true, 'RateLimitExceeded']);

  const stranger = new IterableClient({ apiKey: 'other', baseUrl: simulator.url });
  const rejected = await refusalOf(stranger.getLists());
  stranger.destroy();
  expect([rejected.statusCode, rejected.code]).toEqual([401, 'BadApiKey']);
});
