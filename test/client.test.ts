import { createServer, type RequestListener, type Server } from 'node:http';
import type { AddressInfo } from 'node:net';
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

const update = (timeoutMs = 10_000): HttpRequest => ({
  method: 'POST',
  path: '/api/users/update',
  body: '{"userId":"u1","dataFields":{"vip":true}}',
  timeoutMs,
});

describe('the client', () => {
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
});
