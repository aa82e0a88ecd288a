import { request as requestPlain, type Agent as HttpAgent, type RequestOptions } from 'node:http';
import { request as requestTls, type Agent as HttpsAgent } from 'node:https';
import { urlToHttpOptions } from 'node:url';
import type { Answer, Transmit } from './carrier.js';

/**
 * Requests that come hundreds of times a second, by node:http itself: a quarter of what they cost by got. They go over
 * the same connections, fail with the same codes, and keep the same promises: nothing is repeated, no redirect is
 * followed, and a request is over in time, from its beginning to the last byte of its answer. Of an error only the code
 * leaves this file, since the error may hold the request.
 */
export interface DirectOptions {
  /** Without a slash at its end. */
  baseUrl: string;
  headers: Readonly<Record<string, string>>;
  agent: { http: HttpAgent; https: HttpsAgent };
  /** How long a connection may take to be made. */
  connectMs: number;
}

/** An answer to one call has some hundred characters; what is beyond this is left unread. */
const MOST_ANSWER = 100_000;

export function createDirectSender({ baseUrl, headers, agent, connectMs }: DirectOptions): Transmit {
  const url = new URL(baseUrl);
  const isTls = url.protocol === 'https:';
  const target: RequestOptions = { ...urlToHttpOptions(url), agent: isTls ? agent.https : agent.http };
  const prefix = url.pathname.replace(/\/$/, '');
  // An answer is too short to be worth packing.
  const plainHeaders = { ...headers, 'accept-encoding': 'identity', 'content-type': 'application/json' };
  return ({ method, path, body, timeoutMs }) =>
    new Promise((resolve) => {
      const length = body === null ? 0 : Buffer.byteLength(body);
      const options = {
        ...target,
        method,
        path: prefix + path,
        headers: { ...plainHeaders, 'content-length': length },
      };
      const request = isTls ? requestTls(options) : requestPlain(options);
      // Before that nothing of it is sent.
      let isConnected = false;
      let connecting: NodeJS.Timeout | undefined;
      const end = (answer: Answer): void => {
        clearTimeout(deadline);
        clearTimeout(connecting);
        // What happens from now on, as when it is destroyed, changes nothing.
        resolve(answer);
      };
      const lose = (because: string): void => {
        end({ kind: 'lost', because, reached: isConnected });
        request.destroy();
      };
      const fail = (error: NodeJS.ErrnoException): void => lose(error.code ?? 'UNKNOWN');
      const giveUp = (): void => lose('ETIMEDOUT');
      const deadline = setTimeout(giveUp, timeoutMs);

      request.on('socket', (socket) => {
        isConnected = !socket.connecting;
        if (isConnected) return;
        connecting = setTimeout(giveUp, connectMs);
        socket.once(isTls ? 'secureConnect' : 'connect', () => {
          isConnected = true;
          clearTimeout(connecting);
        });
      });
      request.on('response', (response) => {
        let text = '';
        const answer = (): void =>
          end({
            kind: 'answered',
            status: response.statusCode ?? 0,
            body: text,
            retryAfter: response.headers['retry-after'] ?? null,
          });
        response.setEncoding('utf8');
        response.on('data', (part: string) => {
          text += part;
          if (text.length <= MOST_ANSWER) return;
          answer();
          request.destroy();
        });
        response.on('end', answer);
        response.on('error', fail);
      });
      request.on('error', fail);
      request.end(body ?? undefined);
    });
}
