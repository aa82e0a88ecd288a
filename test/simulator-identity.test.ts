import { expect, test } from 'vitest';
import { call, get, post, update, simulators, type Reply } from './support/simulated.js';

const start = simulators({ projectType: 'email' });
const ada = 'ada@example.com';

test.each([
  ['000', 400, 'InvalidEmailAddressError'],
  ['a b@example.com', 400, 'InvalidEmailAddressError'],
  ['a@localhost', 400, 'InvalidEmailAddressError'],
  ['a..b@example.com', 400, 'InvalidEmailAddressError'],
  ['ä@example.com', 400, 'InvalidEmailAddressError'],
  ["o'neil+x@sub.example.co", 200, 'Success'],
])('the email %s is answered with %i %s', async (email, status, code) => {
  expect(await update(await start(), { email })).toMatchObject({ status, body: { code } });
});

test.each([
  ['', 400],
  ['x'.repeat(52), 200],
  ['x'.repeat(53), 400],
  ['trailing ', 400],
  ['naïve', 400],
  ['with space', 200],
])('the userId "%s" is answered with %i', async (userId, status) => {
  const simulator = await start({ projectType: 'user_id' });
  expect((await update(simulator, { userId })).status).toBe(status);
});

test('an email-based project creates a user from a userId alone only where it is preferred', async () => {
  const simulator = await start();
  const refused = await update(simulator, { userId: 'u1' });
  expect(refused).toMatchObject({ status: 400, body: { code: 'UnknownUserIdError' } });
  await update(simulator, { userId: 'u1' }, '{"a":1}', { preferUserId: true });
  await update(simulator, { userId: 'u1' }, '{"b":2}');
  expect(simulator.user('u1')).toMatchObject({ userId: 'u1', fields: { a: '1', b: '2' } });
  expect(simulator.user('u1')?.email).toMatch(/@placeholder\.email$/);
});

test('in an email-based project the email identifies and the userId is overwritten', async () => {
  const simulator = await start();
  await update(simulator, { email: ada, userId: 'u1' });
  await update(simulator, { email: ada, userId: 'u2' });
  await update(simulator, { email: 'bob@example.com', userId: 'u2' });
  expect([...simulator.users()].map(({ key, userId }) => [key, userId])).toEqual([
    [ada, 'u2'],
    ['bob@example.com', 'u2'],
  ]);
  expect((await update(simulator, { email: ada }, '{"email":"new@example.com"}')).status).toBe(400);
});

test('in a userID-based project the userId identifies and the email comes from the fields', async () => {
  const simulator = await start({ projectType: 'user_id' });
  await update(simulator, { userId: 'u1', email: 'ignored@example.com' }, '{"email":"Ada@example.com"}');
  await update(simulator, { userId: 'U1' });
  expect([...simulator.users()].map(({ key, email }) => [key, email])).toEqual([
    ['u1', ada],
    ['U1', null],
  ]);
  expect((await update(simulator, { email: ada })).status).toBe(400);
  expect((await get(simulator, 'users/byUserId/u1')).body).toMatchObject({ user: { userId: 'u1', email: ada } });
});

test('a hybrid project knows a user by either identifier and refuses two that are different users', async () => {
  const simulator = await start({ projectType: 'hybrid' });
  await update(simulator, { email: ada }, '{"a":1}');
  await update(simulator, { userId: 'u1', email: ada }, '{"b":2}');
  expect(simulator.userCount).toBe(1);
  expect(simulator.user('u1')).toMatchObject({ key: 'u1', email: ada, fields: { a: '1', b: '2' } });

  await update(simulator, { userId: 'u2' });
  const conflict = await update(simulator, { userId: 'u2', email: ada });
  expect(conflict).toMatchObject({ status: 409, body: { code: 'ExternalKeyConflict' } });
  expect((await update(simulator, { userId: 'u3', email: ada })).status).toBe(409);
  expect((await update(simulator, { userId: 'u2' }, `{"email":"${ada}"}`)).status).toBe(409);

  await update(simulator, { userId: 'u1', email: 'ada@new.example.com' });
  expect(simulator.user(ada)).toBeUndefined();
  expect(simulator.user('u1')?.email).toBe('ada@new.example.com');
});

test('a forgotten user is gone, and both identifiers are refused in a hybrid project', async () => {
  const simulator = await start({ projectType: 'hybrid', forgottenStatus: 409 });
  await update(simulator, { email: ada, userId: 'u1' });
  expect((await post(simulator, 'users/forget', { userId: 'u1' })).status).toBe(200);
  expect(simulator.userCount).toBe(0);
  for (const who of [{ email: ada }, { userId: 'u1' }]) {
    expect(await update(simulator, who)).toMatchObject({ status: 409, body: { code: 'ForgottenUserError' } });
  }
  expect((await post(simulator, 'users/forget', { userId: 'nobody' })).status).toBe(400);
  const events = [{ userId: 'u1', eventName: 'E' }];
  const { body } = await post(simulator, 'events/trackBulk', { events });
  expect(body).toMatchObject({ failCount: 1, failedUpdates: { forgottenUserIds: ['u1'] } });
});

test('a forgotten userId is not created again in an email-based project', async () => {
  const simulator = await start();
  simulator.forget('u1');
  const reply = await update(simulator, { userId: 'u1' }, '{}', { preferUserId: true });
  expect(reply).toMatchObject({ status: 400, body: { code: 'ForgottenUserError' } });
});

test('deleting an unknown email succeeds, deleting an unknown userId does not', async () => {
  const simulator = await start({ projectType: 'hybrid' });
  await update(simulator, { email: ada, userId: 'u1' });
  expect((await call(simulator, 'DELETE', 'users/byUserId/u1')).status).toBe(200);
  expect((await call(simulator, 'DELETE', 'users/byUserId/u1')).status).toBe(400);
  expect((await call(simulator, 'DELETE', `users/${ada}`)).body).toMatchObject({ code: 'Success' });
  expect(simulator.userCount).toBe(0);
});

test('updateEmail moves a user in an email-based project and is refused in the others', async () => {
  const simulator = await start();
  await update(simulator, { email: ada }, '{"a":1}');
  await update(simulator, { email: 'bob@example.com' });
  const move = (currentEmail: string, newEmail: string): Promise<Reply> =>
    post(simulator, 'users/updateEmail', { currentEmail, newEmail });
  expect((await move(ada, 'bob@example.com')).body).toMatchObject({ code: 'EmailAlreadyExists' });
  expect((await move('nobody@example.com', 'x@example.com')).body).toMatchObject({ code: 'BadParams' });
  expect((await move(ada, 'nonsense')).body).toMatchObject({ code: 'InvalidEmailAddressError' });
  expect((await move(ada, 'Lovelace@example.com')).status).toBe(200);
  expect(simulator.user('lovelace@example.com')?.fields).toEqual({ a: '1' });
  expect(simulator.user(ada)).toBeUndefined();

  const hybrid = await start({ projectType: 'hybrid' });
  expect((await post(hybrid, 'users/updateEmail', { currentEmail: ada, newEmail: 'x@example.com' })).status).toBe(400);
});
