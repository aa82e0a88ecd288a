import { Agent as HttpAgent } from 'node:http';
import { Agent as HttpsAgent } from 'node:https';
import got, { RequestError, TimeoutError, type Got } from 'got';
import type { Secret } from '../lib/secret.js';
import type { Answer, HttpRequest, Transmit } from './carrier.js';
import { createDirectSender } from './direct.js';

/**
 * The one way out over HTTP. It neither repeats nor follows anything: attempts and waits belong to the outbox, and a
 * redirect would carry the key to another host. got's own errors hold the request's headers and body, so none of them
 * leaves this file. What comes hundreds of times a second goes without got, over the same connections.
 */
export interface HttpClient {
  send: Transmit;
  close: () => void;
}

const CONNECT_MS = 5_000;
/** Failures from before a connection stood: nothing was sent. */
const NEVER_SENT = new Set(['ECONNREFUSED', 'ENOTFOUND', 'EAI_AGAIN', 'EHOSTUNREACH', 'ENETUNREACH']);
const CONNECTING = new Set(['lookup', 'connect', 'secureConnect']);

/** A shorter one is a stand-in, and could be a word of any answer. */
const SHORTEST_KEY = 8;

export interface HttpClientOptions {
  /** Without a slash at its end. */
  baseUrl: string;
  /** The header that carries the key, and what it says for a key. */
  authorise: (key: string) => Readonly<Record<string, string>>;
  key: Secret;
}

export function createHttpClient({ baseUrl, authorise, key: secret }: HttpClientOptions): HttpClient {
  const key = secret.reveal();
  // A request begins when it was let through: it must not wait for a socket. Lanes limit how many are open.
  const keepAlive = { keepAlive: true, maxSockets: Infinity, maxFreeSockets: 512 };
  const agent = { http: new HttpAgent(keepAlive), https: new HttpsAgent(keepAlive) };
  const headers = { 'user-agent': 'personas-sync', accept: 'application/json', ...authorise(key) };
  const sendDirectly = createDirectSender({ baseUrl, headers, agent, connectMs: CONNECT_MS });
  // What is the same in all requests is settled once: merging options is a good part of what got costs.
  const client: Got = got.extend({
    agent,
    retry: { limit: 0 },
    followRedirect: false,
    throwHttpErrors: false,
    decompress: true,
    headers,
  });
  const clients = new Map<string, Got>();
  const clientOf = (method: HttpRequest['method'], timeoutMs: number): Got => {
    const name = `${method} ${timeoutMs}`;
    const known = clients.get(name);
    if (known !== undefined) return known;
    const headers = method === 'POST' ? { 'content-type': 'application/json' } : {};
    const timeout = { connect: Math.min(CONNECT_MS, timeoutMs), request: timeoutMs };
    const made: Got = client.extend({ method, headers, timeout });
    clients.set(name, made);
    return made;
  };
  const sendByGot = async ({ method, path, body, timeoutMs }: HttpRequest): Promise<Answer> => {
    try {
      const send = clientOf(method, timeoutMs);
      const response = await send(`${baseUrl}${path}`, body === null ? {} : { body });
      return {
        kind: 'answered',
        status: response.statusCode,
        body: response.body,
        retryAfter: response.headers['retry-after'] ?? null,
      };
    } catch (error) {
      if (error instanceof TimeoutError) {
        return { kind: 'lost', because: 'ETIMEDOUT', reached: !CONNECTING.has(error.event) };
      }
      if (error instanceof RequestError) {
        return { kind: 'lost', because: error.code, reached: !NEVER_SENT.has(error.code) };
      }
      throw error;
    }
  };
  return {
    send: async (request) => {
      const sending = request.isFrequent === true ? sendDirectly(request) : sendByGot(request);
      const answer = await sending.catch(() => {
        // Neither the error nor the whole path, which may hold a person's address, is told.
        throw new Error(`A request to ${request.path.split('/', 3).join('/')} failed in an unknown way.`);
      });
      if (answer.kind === 'lost' || key.length < SHORTEST_KEY) return answer;
      // An answer is kept, and may quote the request: the key goes no further than this.
      return { ...answer, body: answer.body.replaceAll(key, '[redacted]') };
    },
    close: () => {
      agent.http.destroy();
      agent.https.destroy();
    },
  };
}
