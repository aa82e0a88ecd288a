import { expect, test } from 'vitest';
import { call, get, post, simulators, type Reply } from './support/simulated.js';

const start = simulators({ projectType: 'hybrid' });
const ada = 'ada@example.com';

test('an event is tracked, its user created, and both are read back', async () => {
  const simulator = await start();
  const reply = await post(
    simulator,
    'events/track',
    '{"userId":"u1","eventName":"Audience Entered","id":"personas-1","createdAt":1767225600,"dataFields":{"total":10.0}}',
  );
  expect(reply).toMatchObject({ status: 200, body: { code: 'Success', params: { id: 'personas-1' } } });
  const { text, body } = await get(simulator, 'events/byUserId/u1');
  expect(body).toMatchObject({
    events: [
      {
        _id: 'personas-1',
        eventType: 'customEvent',
        eventName: 'Audience Entered',
        userId: 'u1',
        createdAt: '2026-01-01 00:00:00 +00:00',
        dataFields: { total: 10 },
      },
    ],
  });
  expect(text).toContain('"total":10.0');
  expect(simulator.events('u1')).toMatchObject([{ id: 'personas-1', identifier: 'u1', fields: { total: '10.0' } }]);
});

test('an event whose id is known takes the place of the first, and its applications are counted', async () => {
  const simulator = await start();
  const event = { userId: 'u1', eventName: 'E', id: 'e-1', dataFields: { n: 1 } };
  await post(simulator, 'events/track', event);
  await post(simulator, 'events/trackBulk', { events: [{ ...event, dataFields: { n: 2 } }] });
  expect(simulator.events()).toMatchObject([{ id: 'e-1', fields: { n: '2' }, applications: 2 }]);
  expect(simulator.applications('e-1')).toBe(2);
  expect(simulator.eventHistory.map(({ id, identifier, name }) => [id, identifier, name])).toEqual([
    ['e-1', 'u1', 'E'],
    ['e-1', 'u1', 'E'],
  ]);
  await post(simulator, 'events/track', { userId: 'u1', eventName: 'E' });
  await post(simulator, 'events/track', { userId: 'u1', eventName: 'E' });
  expect(simulator.events()).toHaveLength(3);
});

test('track creates no user in an email-based project, alone or in bulk', async () => {
  const simulator = await start({ projectType: 'email' });
  const byEmail = await post(simulator, 'events/track', { email: ada, eventName: 'E' });
  expect(byEmail).toMatchObject({ status: 400, body: { code: 'UnknownEmailError' } });
  const byUserId = await post(simulator, 'events/track', { userId: 'u1', eventName: 'E' });
  expect(byUserId).toMatchObject({ status: 400, body: { code: 'UnknownUserIdError' } });

  await post(simulator, 'users/update', { email: ada, userId: 'u2' });
  const events = [
    { email: 'Ada@Example.com', eventName: 'E' },
    { email: 'Bob@example.com', eventName: 'E' },
    { userId: 'u1', eventName: 'E' },
    { userId: 'u2', eventName: 'E' },
    { email: 'nonsense', eventName: 'E' },
  ];
  const { status, body } = await post(simulator, 'events/trackBulk', { events });
  expect(status).toBe(200);
  expect(body).toMatchObject({
    successCount: 2,
    failCount: 3,
    disallowedEventNames: [],
    invalidEmails: ['nonsense'],
    failedUpdates: {
      invalidEmails: ['nonsense'],
      invalidUserIds: [],
      notFoundEmails: ['bob@example.com'],
      notFoundUserIds: ['u1'],
      forgottenEmails: [],
      forgottenUserIds: [],
    },
  });
  expect(Object.keys(body['failedUpdates'] as object)).toHaveLength(6);
  expect(simulator.events(ada)).toHaveLength(2);
});

test.each([
  [{ id: 'with_underscore' }],
  [{ id: '' }],
  [{ id: 'x'.repeat(513) }],
  [{ id: 7 }],
  [{ createdAt: 1767225600000 }],
  [{ createdAt: 1767225600.5 }],
  [{ createdAt: '2026-01-01' }],
  [{ campaignId: 'c' }],
  [{ eventName: '' }],
  [{ eventName: null }],
])('an event with %j is refused', async (wrong) => {
  const simulator = await start();
  const event = { userId: 'u1', eventName: 'E', ...wrong };
  expect(await post(simulator, 'events/track', event)).toMatchObject({ status: 400, body: { code: 'BadParams' } });
  expect((await post(simulator, 'events/trackBulk', { events: [event] })).status).toBe(400);
  expect(simulator.events()).toEqual([]);
});

test('an id of 512 letters, digits and hyphens is accepted', async () => {
  const simulator = await start();
  const event = { userId: 'u1', eventName: 'E', id: `A-9${'x'.repeat(509)}` };
  expect((await post(simulator, 'events/track', event)).status).toBe(200);
});

test('the fields of an event keep their types for each event name apart', async () => {
  const simulator = await start();
  const track = (eventName: string, value: unknown): Promise<Reply> =>
    post(simulator, 'events/track', { userId: 'u1', eventName, dataFields: { value } });
  await track('A', 1);
  expect((await track('B', 'one')).status).toBe(200);
  expect((await track('A', 'one')).body).toMatchObject({
    code: 'RequestFieldsTypesMismatched',
    params: { validationErrors: { value: { category: 'customEvent', expectedType: 'long' } } },
  });
  const events = ['one', 2].map((value) => ({ userId: 'u2', eventName: 'A', dataFields: { value } }));
  expect((await post(simulator, 'events/trackBulk', { events })).status).toBe(400);
  expect(simulator.user('u2')).toBeUndefined();
});

test('a disallowed event name is answered with success alone and named in bulk, and never applied', async () => {
  const simulator = await start({ disallowedEventNames: ['Secret'] });
  const event = { userId: 'u1', eventName: 'Secret' };
  const { status, body } = await post(simulator, 'events/track', event);
  expect(status).toBe(200);
  expect(body['msg']).toContain('is disallowed from tracking');
  const bulk = await post(simulator, 'events/trackBulk', { events: [event, { ...event, eventName: 'Open' }] });
  expect(bulk.body).toMatchObject({ successCount: 1, disallowedEventNames: ['Secret'] });
  expect(simulator.events().map(({ name }) => name)).toEqual(['Open']);
});

test('the newest events of a user are read first, two hundred at most', async () => {
  const simulator = await start();
  const events = Array.from({ length: 250 }, (_, n) => ({ userId: 'u1', eventName: 'E', id: `e-${n}`, createdAt: n }));
  await post(simulator, 'events/trackBulk', { events });
  const read = async (query: string): Promise<string[]> => {
    const { body } = await get(simulator, `events/byUserId/u1${query}`);
    return (body['events'] as { _id: string }[]).map(({ _id }) => _id);
  };
  expect((await read('?limit=2')).join()).toBe('e-249,e-248');
  expect(await read('?limit=1000')).toHaveLength(200);
  expect((await get(simulator, 'events/nobody@example.com')).body).toEqual({ events: [] });
});

test('a purchase empties the cart, and one with a known id takes the place of the first', async () => {
  const simulator = await start({ projectType: 'email' });
  const items = [{ id: 'p1', name: 'Shoes', price: 10.5, quantity: 1 }];
  const cart = await post(simulator, 'commerce/updateCart', { user: { email: ada, dataFields: { vip: true } }, items });
  expect(cart.status).toBe(200);
  expect(simulator.user(ada)?.fields).toEqual({ vip: 'true', shoppingCartItems: JSON.stringify(items) });

  const purchase = { user: { email: ada }, items, total: 10.5, id: 'order-1', dataFields: { coupon: 'X' } };
  expect((await post(simulator, 'commerce/trackPurchase', purchase)).body).toMatchObject({ code: 'Success' });
  await post(simulator, 'commerce/trackPurchase', { ...purchase, total: 11 });
  expect(simulator.user(ada)?.fields['shoppingCartItems']).toBe('[]');
  expect(simulator.events(ada)).toMatchObject([
    { type: 'purchase', id: 'order-1', applications: 2, fields: { total: '11', coupon: '"X"' } },
  ]);
  for (const wrong of [{ total: '1' }, { items: [{ id: 'p1' }] }, { user: undefined }, { user: {} }]) {
    expect((await post(simulator, 'commerce/trackPurchase', { ...purchase, ...wrong })).status).toBe(400);
  }
});

test('a list is made, subscribed to, read and left', async () => {
  const simulator = await start();
  const { body } = await post(simulator, 'lists', { name: 'VIPs', description: 'who matters' });
  const listId = body['listId'] as number;
  const subscribers = [{ email: ada, userId: 'u1', dataFields: { vip: true } }, { email: 'Bob@example.com' }];
  const subscribed = await post(simulator, 'lists/subscribe', {
    listId,
    subscribers: [...subscribers, { email: 'x' }],
  });
  expect(subscribed).toMatchObject({ status: 200, body: { successCount: 2, failCount: 1, invalidEmails: ['x'] } });
  expect((await get(simulator, 'lists')).body).toMatchObject({
    lists: [{ id: listId, name: 'VIPs', description: 'who matters', listType: 'Standard' }],
  });
  expect((await get(simulator, `lists/${listId}/size`)).text).toBe('2');
  expect((await get(simulator, `lists/getUsers?listId=${listId}`)).text).toBe(`${ada}\nbob@example.com\n`);
  expect((await get(simulator, `users/${ada}`)).body).toMatchObject({
    user: { dataFields: { emailListIds: [listId] } },
  });

  const left = await post(simulator, 'lists/unsubscribe', {
    listId,
    subscribers: [{ userId: 'u1' }, { userId: 'nobody' }],
    channelUnsubscribe: false,
  });
  expect(left.body).toMatchObject({ successCount: 1, failCount: 1, failedUpdates: { notFoundUserIds: ['nobody'] } });
  expect(simulator.lists()).toMatchObject([{ id: listId, size: 1 }]);
  expect(simulator.lists()[0]?.members()).toEqual(['bob@example.com']);
});

test('a user who is deleted leaves no events behind and no list', async () => {
  const simulator = await start();
  const { body } = await post(simulator, 'lists', { name: 'A' });
  await post(simulator, 'lists/subscribe', { listId: body['listId'], subscribers: [{ userId: 'u1' }] });
  await post(simulator, 'events/track', { userId: 'u1', eventName: 'E' });
  simulator.deleteUser('u1');
  expect(simulator.lists()).toMatchObject([{ size: 0 }]);
  expect(simulator.events()).toEqual([]);
});

test('a subscription may be for existing users only', async () => {
  const simulator = await start({ projectType: 'email' });
  const { body } = await post(simulator, 'lists', { name: 'L' });
  const request = { listId: body['listId'], subscribers: [{ email: ada }], updateExistingUsersOnly: true };
  expect((await post(simulator, 'lists/subscribe', request)).body).toMatchObject({
    successCount: 0,
    failedUpdates: { notFoundEmails: [ada] },
  });
  expect(simulator.userCount).toBe(0);
});

test('a channel unsubscription reaches every list', async () => {
  const simulator = await start();
  const first = (await post(simulator, 'lists', { name: 'A' })).body['listId'];
  const second = (await post(simulator, 'lists', { name: 'B' })).body['listId'];
  const subscribers = [{ userId: 'u1' }];
  for (const listId of [first, second]) await post(simulator, 'lists/subscribe', { listId, subscribers });
  await post(simulator, 'lists/unsubscribe', { listId: first, subscribers, channelUnsubscribe: true });
  expect(simulator.lists().map(({ size }) => size)).toEqual([0, 0]);
  expect(simulator.user('u1')?.fields).toEqual({ unsubscribedChannelIds: '[1]' });
});

test('a list that is gone is answered with 404, and its number is never given again', async () => {
  const simulator = await start();
  const listId = (await post(simulator, 'lists', { name: 'A' })).body['listId'] as number;
  expect((await call(simulator, 'DELETE', `lists/${listId}`)).body).toMatchObject({ code: 'Success' });
  const reply = await post(simulator, 'lists/subscribe', { listId, subscribers: [{ userId: 'u1' }] });
  expect(reply).toMatchObject({ status: 404, body: { code: 'NotFound', params: { listId } } });
  expect((await post(simulator, 'lists', { name: 'B' })).body['listId']).toBe(listId + 1);
});
