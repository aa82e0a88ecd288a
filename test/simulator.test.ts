import { expect, test } from 'vitest';
import { call, get, post, update, simulators } from './support/simulated.js';

const start = simulators({ projectType: 'email' });
const ada = 'ada@example.com';

test('a user is created, updated field by field, and read back', async () => {
  const simulator = await start();
  const reply = await update(simulator, { email: 'Ada@Example.com' }, '{"vip":true,"city":"London"}');
  expect(reply).toMatchObject({ status: 200, body: { msg: '', code: 'Success', params: null } });
  await update(simulator, { email: ada }, '{"city":"Paris"}');

  const { body } = await get(simulator, `users/${encodeURIComponent(ada)}`);
  const date = expect.stringMatching(/^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \+00:00$/) as string;
  const derived = { email: ada, signupDate: date, profileUpdatedAt: date, signupSource: 'API' };
  expect(body).toEqual({ user: { email: ada, dataFields: { ...derived, vip: true, city: 'Paris' } } });
  expect((await get(simulator, `users/getByEmail?email=${ada}`)).body).toEqual(body);
  expect(simulator.user(ada)?.fields).toEqual({ vip: 'true', city: '"Paris"' });
  expect((await get(simulator, 'users/nobody@example.com')).text).toBe('{}');
});

test('null removes a field, and an object replaces the whole object unless nested objects are merged', async () => {
  const simulator = await start();
  await update(simulator, { email: ada }, '{"a":1,"b":{"x":1,"y":2}}');
  await update(simulator, { email: ada }, '{"a":null,"b":{"x":3}}');
  expect(simulator.user(ada)?.fields).toEqual({ b: '{"x":3}' });
  await update(simulator, { email: ada }, '{"b":{"z":4}}', { mergeNestedObjects: true });
  expect(simulator.user(ada)?.fields).toEqual({ b: '{"x":3,"z":4}' });
  await update(simulator, { email: ada }, '{"b.x":null,"b.w":5}');
  expect(simulator.user(ada)?.fields).toEqual({ b: '{"z":4,"w":5}' });
});

test('every value keeps the digits it was sent with', async () => {
  const simulator = await start();
  const fields = '{"big":9007199254740993,"whole":10.0,"list":[1.50,2.0],"text":"a\\"b"}';
  await update(simulator, { email: ada }, fields);
  const { text } = await get(simulator, `users/${ada}`);
  expect(text).toContain('"big":9007199254740993');
  expect(text).toContain('"whole":10.0');
  expect(simulator.user(ada)?.fields).toEqual({
    big: '9007199254740993',
    whole: '10.0',
    list: '[1.50,2.0]',
    text: '"a\\"b"',
  });
});

test.each([
  ['10', 'long'],
  ['10.0', 'double'],
  ['1e3', 'double'],
  ['true', 'boolean'],
  ['"text"', 'string'],
  ['"2026-02-28"', 'date'],
  ['"2026-02-28 23:59:59 +00:00"', 'date'],
  ['"2026-02-28T23:59:59.123Z"', 'date'],
  ['"2026-02-28T23:59:59+02:00"', 'date'],
  ['"2026-02-30"', 'string'],
  ['"2026-02-28 24:00:00 +00:00"', 'string'],
  ['"2026-02-28 10:00:00.123 +00:00"', 'string'],
  ['"2026-2-8"', 'string'],
  ['{"inner":1}', 'object'],
  ['["a"]', 'string'],
  ['[1,2]', 'long'],
])('the first value %s fixes the type %s', async (value, type) => {
  const simulator = await start();
  await update(simulator, { email: ada }, `{"field":${value}}`);
  const { body } = await get(simulator, 'users/getFields');
  expect(body).toMatchObject({ fields: { field: type, email: 'string' } });
  expect(simulator.fieldTypes()['field']).toBe(type);
});

test.each([
  ['10', '10.5', false],
  ['10.0', '10', true],
  ['10.0', '10.5', true],
  ['"text"', '"2026-01-01"', true],
  ['"2026-01-01"', '"text"', false],
  ['"text"', '1', false],
  ['true', '"true"', false],
  ['1', '9223372036854775808', false],
  ['1', '9223372036854775807', true],
  ['{"x":1}', '{"x":"one"}', false],
  ['1', '[1,"a"]', false],
  ['[]', '"anything"', true],
])('after %s the value %s is accepted: %s', async (first, second, accepted) => {
  const simulator = await start();
  await update(simulator, { email: ada }, `{"field":${first}}`);
  const reply = await update(simulator, { email: ada }, `{"field":${second},"other":1}`);
  expect(reply.status).toBe(accepted ? 200 : 400);
  expect(simulator.fieldTypes()['other']).toBe(accepted ? 'long' : undefined);
});

test('a type mismatch names the field, what it expects and what it got', async () => {
  const simulator = await start();
  await update(simulator, { email: ada }, '{"signup day":"2026-01-01"}');
  const { status, body } = await update(simulator, { email: ada }, '{"signup day":"GGG","fine":1}');
  expect(status).toBe(400);
  expect(body).toMatchObject({
    code: 'RequestFieldsTypesMismatched',
    params: {
      validationErrors: {
        'signup day': {
          incomingTypes: ['string', 'keyword'],
          expectedType: 'date',
          category: 'user',
          offendingValue: 'GGG',
          _type: 'UnexpectedType',
        },
      },
    },
  });
  expect(body['msg']).toContain("'signup day'");
  expect(simulator.user(ada)?.fields).toEqual({ 'signup day': '"2026-01-01"' });
});

test('a date in UTC comes back in one form however it was sent', async () => {
  const simulator = await start();
  await update(simulator, { email: ada }, '{"at":"2020-08-19T20:50:04.000Z","day":"2020-08-19"}');
  expect(simulator.user(ada)?.fields).toEqual({ at: '"2020-08-19 20:50:04 +00:00"', day: '"2020-08-19"' });
});

test('a bulk update is answered with 200 and the identifiers of those that failed', async () => {
  const simulator = await start({ projectType: 'hybrid' });
  await update(simulator, { email: ada, userId: 'u1' });
  simulator.forget('gone@example.com');
  const { status, body } = await post(simulator, 'users/bulkUpdate', {
    users: [
      { userId: 'u2', dataFields: { vip: true } },
      { email: 'nonsense' },
      { userId: 'ends with space ' },
      { userId: 'u3', email: ada },
      { email: 'Gone@example.com' },
      { userId: 'u4', dataFields: { itblInternal: {} } },
    ],
  });
  expect(status).toBe(200);
  expect(body).toMatchObject({
    successCount: 1,
    failCount: 5,
    createdFields: ['vip'],
    filteredOutFields: [],
    invalidEmails: ['nonsense'],
    invalidUserIds: ['ends with space '],
    failedUpdates: {
      invalidEmails: ['nonsense'],
      invalidUserIds: ['ends with space '],
      notFoundEmails: [],
      notFoundUserIds: [],
      invalidDataEmails: [],
      invalidDataUserIds: ['u4'],
      conflictEmails: [],
      conflictUserIds: ['u3'],
      forgottenEmails: ['gone@example.com'],
      forgottenUserIds: [],
    },
  });
});

test('a bulk update with a type mismatch is refused whole, or names the user where that is asked for', async () => {
  const users = [
    { email: ada, dataFields: { a: 1, fresh: true } },
    { email: 'bob@example.com', dataFields: { a: 'one' } },
  ];
  const whole = await start();
  const refused = await post(whole, 'users/bulkUpdate', { users });
  expect(refused.body).toMatchObject({
    code: 'RequestFieldsTypesMismatched',
    params: { validationErrors: { a: { expectedType: 'long' } } },
  });
  expect(whole.userCount).toBe(0);
  expect(whole.fieldTypes()['fresh']).toBeUndefined();

  const apart = await start({ bulkMismatch: 'invalidData' });
  const { body } = await post(apart, 'users/bulkUpdate', { users });
  expect(body).toMatchObject({ successCount: 1, failedUpdates: { invalidDataEmails: ['bob@example.com'] } });
});

test('fields that are new are left out and named where the request asks for that', async () => {
  const simulator = await start();
  await update(simulator, { email: ada }, '{"known":1}');
  const users = [{ email: ada, dataFields: { known: 2, unknown: 3 } }];
  const { body } = await post(simulator, 'users/bulkUpdate', { users, createNewFields: false });
  expect(body).toMatchObject({ successCount: 1, createdFields: [], filteredOutFields: ['unknown'] });
  expect(simulator.user(ada)?.fields).toEqual({ known: '2' });
});

test('a project takes a thousand user fields and no more', async () => {
  const simulator = await start();
  const fields = Object.fromEntries(Array.from({ length: 1000 }, (_, number) => [`f${number}`, number]));
  expect((await update(simulator, { email: ada }, JSON.stringify(fields))).status).toBe(200);
  const more = await update(simulator, { email: ada }, '{"one_more":1}');
  expect(more).toMatchObject({ status: 400, body: { code: 'UniqueFieldsLimitExceeded' } });
  expect((await update(simulator, { email: ada }, '{"f1":7,"one_more":null}')).status).toBe(200);
});

test('reserved fields, over-long values and malformed requests are refused', async () => {
  const simulator = await start();
  const reserved = await update(simulator, { email: ada }, '{"devices":[]}');
  expect(reserved).toMatchObject({ status: 400, body: { code: 'ForbiddenParamsError' } });
  expect((await update(simulator, { email: ada }, `{"a":"${'x'.repeat(32_000)}"}`)).status).toBe(200);
  const long = await update(simulator, { email: ada }, `{"a":"${'x'.repeat(32_001)}"}`);
  expect(long).toMatchObject({ status: 400, body: { code: 'BadParams' } });

  for (const body of [
    { dataFields: {} },
    { email: null },
    { email: 1 },
    { email: ada, dataFields: [] },
    { email: ada, dataFields: null },
    { email: ada, preferUserId: 'yes' },
    [],
  ]) {
    expect(await post(simulator, 'users/update', body)).toMatchObject({ status: 400, body: { code: 'BadParams' } });
  }
  expect((await post(simulator, 'users/update', '{"email":')).body).toMatchObject({ code: 'BadJsonBody' });
  expect((await post(simulator, 'users/bulkUpdate', { users: [{ dataFields: {} }] })).status).toBe(400);
});

test('a body over four million bytes is refused with 413, and a batch over a given size with 400', async () => {
  const simulator = await start({ maxBatch: 2 });
  const large = await post(simulator, 'users/bulkUpdate', { users: [], padding: 'x'.repeat(4_000_000) });
  expect(large).toMatchObject({ status: 413, body: { code: 'BatchTooLarge' } });
  const users = ['a', 'b', 'c'].map((name) => ({ email: `${name}@example.com` }));
  const many = await post(simulator, 'users/bulkUpdate', { users });
  expect(many).toMatchObject({ status: 400, body: { code: 'BatchTooLarge' } });
});

test('a key is needed, and the right one where the simulator has one', async () => {
  const simulator = await start({ apiKey: 'secret' });
  expect((await call(simulator, 'GET', 'lists', undefined, 'secret')).status).toBe(200);
  for (const key of ['', 'other']) {
    const reply = await call(simulator, 'GET', 'lists', undefined, key);
    expect(reply).toMatchObject({ status: 401, body: { code: 'BadApiKey' } });
  }
  expect((await call(simulator, 'GET', 'nothing/here', undefined, 'secret')).status).toBe(404);
});

test('what is still being processed is neither read nor tracked', async () => {
  const simulator = await start();
  await update(simulator, { email: ada }, '{"a":1}');
  simulator.setProcessing(3_600_000);
  await update(simulator, { email: ada }, '{"a":2}');
  await update(simulator, { email: 'bob@example.com' });
  expect((await get(simulator, `users/${ada}`)).body).toMatchObject({ user: { dataFields: { a: 1 } } });
  expect((await get(simulator, 'users/bob@example.com')).text).toBe('{}');
  const event = { email: 'bob@example.com', eventName: 'E' };
  expect(await post(simulator, 'events/track', event)).toMatchObject({ body: { code: 'UnknownEmailError' } });

  simulator.setProcessing(0);
  expect((await get(simulator, `users/${ada}`)).body).toMatchObject({ user: { dataFields: { a: 2 } } });
  expect((await post(simulator, 'events/track', event)).status).toBe(200);
});

test('a sender that mixes pipelines or repeats an identifier in a batch is counted', async () => {
  const simulator = await start();
  await update(simulator, { email: ada });
  expect(simulator.violations).toEqual({ duplicateInBatch: 0, mixedPipelines: 0 });
  await post(simulator, 'users/bulkUpdate', { users: [{ email: ada }, { email: 'ADA@example.com' }] });
  expect(simulator.violations).toEqual({ duplicateInBatch: 1, mixedPipelines: 1 });
});
