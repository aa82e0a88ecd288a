import { once } from 'node:events';
import { createServer, type ServerResponse } from 'node:http';
import type { AddressInfo } from 'node:net';
import { OperatorError } from '../lib/errors.js';
import type { Logger } from '../lib/logger.js';

/**
 * What is served while the daemon runs: pages by path, each made when it is asked for. Nothing that is asked can change
 * anything, and no page holds a secret or a person.
 */
export interface Page {
  status: number;
  contentType: string;
  body: string;
}

export interface Server {
  /** `http://host:port`. */
  url: string;
  close: () => Promise<void>;
}

export interface ServerOptions {
  host: string;
  /** 0: any that is free. */
  port: number;
  pages: Readonly<Record<string, () => Promise<Page> | Page>>;
  log: Logger;
}

export const text = (status: number, body: string): Page => ({ status, contentType: 'text/plain', body: `${body}\n` });

function send(response: ServerResponse, { status, contentType, body }: Page, withBody: boolean): void {
  response.writeHead(status, {
    'content-type': `${contentType}; charset=utf-8`,
    'content-length': Buffer.byteLength(body),
    'cache-control': 'no-store',
    'x-content-type-options': 'nosniff',
    ...(status === 405 ? { allow: 'GET, HEAD' } : {}),
  });
  response.end(withBody ? body : undefined);
}

/** Throws an OperatorError where nothing can be served at this address. */
export async function startServer({ host, port, pages, log }: ServerOptions): Promise<Server> {
  const find = async (method: string, path: string): Promise<Page> => {
    const page = Object.hasOwn(pages, path) ? pages[path] : undefined;
    if (page === undefined) return text(404, `There is ${Object.keys(pages).join(', ')}.`);
    if (method !== 'GET' && method !== 'HEAD') return text(405, 'Only to be looked at.');
    try {
      return await page();
    } catch (error) {
      log.failure(`The page ${path} cannot be served`, error);
      return text(500, 'This page cannot be made at present.');
    }
  };
  const server = createServer((request, response) => {
    const { method = '', url = '' } = request;
    void find(method, url.split('?', 1)[0] ?? '').then((page) => send(response, page, method !== 'HEAD'));
  });
  try {
    server.listen(port, host);
    await once(server, 'listening');
  } catch (error) {
    const code = error instanceof Error && 'code' in error ? String(error.code) : '';
    const why =
      code === 'EADDRINUSE' ? 'is taken' : code === 'EACCES' ? 'needs more rights' : `can't be used (${code})`;
    const instead = 'Name another with `http: { port: … }`, or serve nothing with `http: off`.';
    throw new OperatorError(`Port ${port} of ${host} ${why}. ${instead}`, { cause: error });
  }
  const { port: taken } = server.address() as AddressInfo;
  return {
    url: `http://${host.includes(':') ? `[${host}]` : host}:${taken}`,
    close: async () => {
      server.closeAllConnections();
      await new Promise((resolve) => server.close(resolve));
    },
  };
}
