import { once } from 'node:events';
import { createServer, type RequestListener, type Server } from 'node:http';
import { createServer as createSocketServer, Socket, type AddressInfo } from 'node:net';
import { afterEach, describe, expect, it } from 'vitest';
import { startSimulator } from '../src/demo/simulator/server.js';
import type { HttpRequest } from '../src/destinations/carrier.js';
import { createHttpClient, type HttpClient } from '../src/destinations/client.js';
import { Secret } from '../src/lib/secret.js';

const KEY = 'a-key-of-32-characters-0123456789';

const closers: (() => unknown)[] = [];
afterEach(async () => {
  for (const close of closers.splice(0).reverse()) await close();
});

function connect(baseUrl: string): HttpClient {
  const authorise = (key: string) => ({ 'api-key': key });
  const client = createHttpClient({ baseUrl, key: new Secret(KEY), authorise });
  closers.push(() => client.close());
  return client;
}

async function serve(listener: RequestListener): Promise<string> {
  const server: Server = createServer(listener);
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  closers.push(() => {
    server.closeAllConnections();
    server.close();
  });
  return `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
}

describe.each([
  ['one that is seldom', false],
  ['one of hundreds a second', true],
])('the client, with a request that is %s,', (_, isFrequent) => {
  const update = (timeoutMs = 10_000): HttpRequest => ({
    method: 'POST',
    path: '/api/users/update',
    body: '{"userId":"u1","dataFields":{"vip":true}}',
    timeoutMs,
    isFrequent,
  });

  it('gives status, body and Retry-After of an answer, whatever they are', async () => {
    const url = await serve((_, response) => {
      response.writeHead(503, { 'retry-after': '7' }).end('<html>');
    });
    expect(await connect(url).send(update())).toEqual({
      kind: 'answered',
      status: 503,
      body: '<html>',
      retryAfter: '7',
    });
  });

  it('sends the key and the body as they are', async () => {
    const seen: { headers: Record<string, unknown>; body: string }[] = [];
    const url = await serve((request, response) => {
      let body = '';
      request.on('data', (chunk: Buffer) => (body += chunk.toString()));
      request.on('end', () => {
        seen.push({ headers: request.headers, body });
        response.end('{}');
      });
    });
    await connect(url).send({ ...update(), path: '/api/x', body: '{"n":10.0}' });
    expect(seen).toMatchObject([
      { headers: { 'api-key': KEY, 'content-type': 'application/json' }, body: '{"n":10.0}' },
    ]);
  });

  it('follows no redirect, with which the key would go to another host', async () => {
    const elsewhere: unknown[] = [];
    const other = await serve((request, response) => {
      elsewhere.push(request.headers['api-key']);
      response.end('{}');
    });
    const url = await serve((_, response) => {
      response.writeHead(307, { location: `${other}/api/users/update` }).end();
    });
    expect(await connect(url).send(update())).toMatchObject({ kind: 'answered', status: 307 });
    expect(elsewhere).toEqual([]);
  });

  it('cuts its key out of an answer', async () => {
    const url = await serve((request, response) => {
      response.writeHead(400).end(`No: ${String(request.headers['api-key'])}!`);
    });
    expect(await connect(url).send(update())).toMatchObject({ body: 'No: [redacted]!' });
  });

  it('knows whether a request that got no answer can have been applied', async () => {
    const closed = await serve(() => undefined);
    const simulator = await startSimulator({ projectType: 'hybrid', quotas: 'off' });
    closers.push(() => simulator.close());
    const client = connect(simulator.url);
    simulator.faults.failNext(1, { reset: true, afterApplying: true });
    expect(await client.send(update())).toMatchObject({ kind: 'lost', reached: true });
    simulator.faults.failNext(1, { hang: true });
    expect(await client.send(update(200))).toMatchObject({ kind: 'lost', because: 'ETIMEDOUT', reached: true });
    await closers.shift()?.();
    expect(await connect(closed).send(update())).toEqual({ kind: 'lost', because: 'ECONNREFUSED', reached: false });
  });

  it('is over in time though an answer goes on and on', async () => {
    const url = await serve((_, response) => {
      const dripping = setInterval(() => response.write(' '), 20);
      response.on('close', () => clearInterval(dripping));
    });
    expect(await connect(url).send(update(300))).toEqual({ kind: 'lost', because: 'ETIMEDOUT', reached: true });
  });

  it('takes an answer that breaks off for none', async () => {
    const url = await serve((_, response) => {
      response.writeHead(200, { 'content-length': '100' }).write('{"code":');
      setImmediate(() => response.destroy());
    });
    expect(await connect(url).send(update())).toMatchObject({ kind: 'lost', because: 'ECONNRESET', reached: true });
  });

  it('takes what is not HTTP for no answer, and tells nothing of it', async () => {
    const server = createSocketServer((socket) => {
      socket.once('data', (bytes) => socket.end(bytes));
      socket.on('error', () => undefined);
    }).listen(0, '127.0.0.1');
    closers.push(() => server.close());
    await once(server, 'listening');
    const url = `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
    const answer = await connect(url).send(update());
    expect(answer).toMatchObject({ kind: 'lost', reached: true });
    expect(JSON.stringify(answer)).not.toMatch(/api-key|userId/);
  });

  it('uses a connection again, and makes another where the server has closed it meanwhile', async () => {
    const sockets: Socket[] = [];
    const url = await serve(({ socket }, response) => {
      sockets.push(socket);
      response.end('{}');
    });
    const client = connect(url);
    for (let turn = 0; turn < 2; turn += 1) {
      expect(await client.send(update())).toMatchObject({ kind: 'answered', status: 200 });
    }
    expect(sockets[1]).toBe(sockets[0]);
    // It is closed on this side when it has been on the other, too.
    const closed = once(sockets[0] ?? new Socket(), 'close');
    sockets[0]?.end();
    await closed;
    expect(await client.send(update())).toMatchObject({ kind: 'answered', status: 200 });
    expect(sockets[2]).not.toBe(sockets[0]);
  });

  it('ends what is under way when it is closed', async () => {
    let arrived: () => void = () => undefined;
    const arrival = new Promise<void>((resolve) => (arrived = resolve));
    const url = await serve(() => arrived());
    const client = connect(url);
    const sending = client.send(update());
    await arrival;
    client.close();
    expect(await sending).toMatchObject({ kind: 'lost', because: 'ECONNRESET', reached: true });
  });
});

const frequent: HttpRequest = {
  method: 'POST',
  path: '/api/x',
  body: '{}',
  timeoutMs: 10_000,
  isFrequent: true,
};

it('knows that nothing was sent where no connection is made in time', async () => {
  // Nobody answers the greeting of TLS.
  const server = createSocketServer((socket) => socket.on('error', () => undefined)).listen(0, '127.0.0.1');
  await once(server, 'listening');
  closers.push(() => server.close());
  const url = `https://127.0.0.1:${(server.address() as AddressInfo).port}`;
  expect(await connect(url).send({ ...frequent, timeoutMs: 200 })).toEqual({
    kind: 'lost',
    because: 'ETIMEDOUT',
    reached: false,
  });
});

it('leaves the rest of an answer to one call unread where it has no end', async () => {
  const url = await serve((_, response) => {
    const write = (): void => {
      while (response.write('x'.repeat(10_000)));
    };
    response.writeHead(400).on('drain', write);
    write();
  });
  const answer = await connect(url).send(frequent);
  expect(answer).toMatchObject({ kind: 'answered', status: 400 });
  expect(answer.kind === 'answered' && answer.body.length < 300_000).toBe(true);
});

it('sends below the path of its address', async () => {
  const paths: (string | undefined)[] = [];
  const url = await serve((request, response) => {
    paths.push(request.url);
    response.end('{}');
  });
  const client = connect(`${url}/proxy`);
  for (const isFrequent of [false, true]) await client.send({ ...frequent, isFrequent });
  expect(paths).toEqual(['/proxy/api/x', '/proxy/api/x']);
});
