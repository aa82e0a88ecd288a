import type { ChildProcess } from 'node:child_process';
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { appendFileSync, mkdtempSync, readdirSync, readFileSync, rmSync, statSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

import { afterEach, beforeEach, expect, test } from 'vitest';

import type { Simulator, SimulatorOptions } from '../src/demo/simulator/server.js';
import { startSimulator } from '../src/demo/simulator/server.js';
import { OperatorError } from '../src/lib/errors.js';

const open: Simulator[] = [];
let directory: string;

beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), 'simulator-'));
});

afterEach(async () => {
  await Promise.all(open.splice(0).map((simulator) => simulator.close()));
  rmSync(directory, { recursive: true });
});

async function start(options: Partial<SimulatorOptions> = {}): Promise<Simulator> {
  const simulator = await startSimulator({ projectType: 'hybrid', quotas: 'off', directory, ...options });
  open.push(simulator);
  return simulator;
}

async function post(url: string, path: string, body: unknown): Promise<number> {
  const response = await fetch(`${url}/api/${path}`, {
    method: 'POST',
    headers: { 'Api-Key': 'key', 'Content-Type': 'application/json' },
    body: typeof body === 'string' ? body : JSON.stringify(body),
  });
  await response.arrayBuffer();
  return response.status;
}

async function fill({ url }: Simulator): Promise<void> {
  await post(url, 'users/update', '{"email":"ada@example.com","userId":"u1","dataFields":{"total":10.0,"n":{"a":[]}}}');
  await post(url, 'users/update', { userId: 'line\tbreak' });
  await post(url, 'users/update', { userId: 'u2', dataFields: { text: 'a\nb "é" \u2028' } });
  await post(url, 'users/update', { userId: 'u3' });
  for (const total of [1, 2]) {
    await post(url, 'events/track', { userId: 'u2', eventName: 'E', id: 'e-1', createdAt: 5, dataFields: { total } });
  }
  const items = [{ id: 'p', name: 'P', price: 1, quantity: 1 }];
  await post(url, 'commerce/trackPurchase', { user: { userId: 'u2' }, items, total: 1, id: 'e-1' });
  await post(url, 'lists', { name: 'A' });
  await post(url, 'lists/subscribe', { listId: 1001, subscribers: [{ userId: 'u1' }, { userId: 'u2' }] });
  await post(url, 'lists/unsubscribe', { listId: 1001, subscribers: [{ userId: 'u1' }] });
  await post(url, 'users/forget', { userId: 'u3' });
}

function stateOf(simulator: Simulator): unknown {
  return {
    users: [...simulator.users()],
    events: simulator.events(),
    lists: simulator.lists().map(({ members, ...list }) => ({ ...list, members: members() })),
    types: simulator.fieldTypes(),
  };
}

const file = (): string => join(directory, 'iterable.jsonl');

test('a second start finds what the first one was sent', async () => {
  const first = await start();
  await fill(first);
  const before = stateOf(first);
  await first.close();

  const second = await start();
  expect(stateOf(second)).toEqual(before);
  expect(second.user('u1')?.fields).toEqual({ total: '10.0', n: '{"a":[]}' });
  expect(second.applications('e-1')).toBe(2);
  expect(await post(second.url, 'users/update', { userId: 'u3' })).toBe(400);
  expect(await post(second.url, 'users/update', { userId: 'u1', dataFields: { total: 'text' } })).toBe(400);
  await second.close();
  expect(stateOf(await start())).toEqual(before);
});

test('what was answered is in the file before the answer, also when the process is killed', async () => {
  const child = startChild();
  const url = await firstLine(child);
  let answered = 0;
  const sending = (async () => {
    for (;;) {
      const users = Array.from({ length: 5 }, (_, n) => ({ userId: `u${answered * 5 + n}`, dataFields: { n } }));
      await post(url, 'users/bulkUpdate', { users });
      if (++answered === 40) child.kill('SIGKILL');
    }
  })();
  await expect(sending).rejects.toThrow();
  if (child.signalCode === null) await once(child, 'exit');

  const simulator = await start({ projectType: 'user_id' });
  expect(simulator.userCount).toBeGreaterThanOrEqual(answered * 5);
  expect(simulator.user(`u${answered * 5 - 1}`)?.fields).toEqual({ n: '4' });
});

test('a last line that was cut off is left out, and writing goes on after it', async () => {
  const first = await start();
  await post(first.url, 'users/update', { userId: 'u1' });
  await first.close();
  appendFileSync(file(), '["user",2,null,"u2","{}",17');

  const second = await start();
  expect([...second.users()].map(({ key }) => key)).toEqual(['u1']);
  await post(second.url, 'users/update', { userId: 'u3' });
  await second.close();
  expect([...(await start()).users()].map(({ key }) => key)).toEqual(['u1', 'u3']);
});

test('a line that is damaged in the middle stops the start and says which', async () => {
  const first = await start();
  await post(first.url, 'users/update', { userId: 'u1' });
  await first.close();
  appendFileSync(file(), 'damaged\n["gone",1]\n');
  await expect(start()).rejects.toThrow(OperatorError);
  await expect(start()).rejects.toThrow(`${file()}:4:`);
});

test('the number of a list that was deleted is not given again after a restart', async () => {
  const first = await start();
  for (const name of ['A', 'B']) await post(first.url, 'lists', { name });
  const { url } = first;
  const deleted = await fetch(`${url}/api/lists/1002`, { method: 'DELETE', headers: { 'Api-Key': 'key' } });
  expect(deleted.status).toBe(200);
  await first.close();
  await (await start()).close();
  const third = await start();
  await post(third.url, 'lists', { name: 'C' });
  expect(third.lists().map(({ id }) => id)).toEqual([1001, 1003]);
});

test('a port that is taken is named', async () => {
  const { url } = await start();
  const port = Number(new URL(url).port);
  await expect(startSimulator({ projectType: 'email', port })).rejects.toThrow(`Port ${port} is taken`);
});

test('a project of another type stops the start', async () => {
  await (await start()).close();
  await expect(start({ projectType: 'email' })).rejects.toThrow('holds a project of type hybrid');
});

test('the file is shortened at start to what still counts', async () => {
  const first = await start();
  for (let n = 0; n < 50; n++) await post(first.url, 'users/update', { userId: 'u1', dataFields: { n } });
  await first.close();
  const before = statSync(file()).size;
  await (await start()).close();
  expect(statSync(file()).size).toBeLessThan(before / 5);
  expect(readdirSync(directory)).toEqual(['iterable.jsonl']);
});

test('a process that only looks sees the users, writes nothing, and refuses writes', async () => {
  const writer = await start();
  await fill(writer);
  const bytes = readFileSync(file());
  const reader = await start({ readOnly: true });
  expect(stateOf(reader)).toEqual(stateOf(writer));
  expect(await post(reader.url, 'users/update', { userId: 'u9' })).toBe(403);
  expect(readFileSync(file())).toEqual(bytes);
  expect(await post(writer.url, 'users/update', { userId: 'u9' })).toBe(200);
});

function startChild(): ChildProcess {
  const server = new URL('../src/demo/simulator/server.ts', import.meta.url).href;
  const program = `
    const { startSimulator } = await import(${JSON.stringify(server)});
    const options = { projectType: 'user_id', quotas: 'off', directory: ${JSON.stringify(directory)} };
    console.log((await startSimulator(options)).url);`;
  return spawn(process.execPath, ['--import', 'tsx', '--input-type=module', '--eval', program], {
    stdio: ['ignore', 'pipe', 'inherit'],
  });
}

async function firstLine({ stdout }: ChildProcess): Promise<string> {
  if (stdout === null) throw new Error('The child has no standard output');
  const [chunk] = (await once(stdout, 'data')) as [Buffer];
  return chunk.toString().trim();
}
