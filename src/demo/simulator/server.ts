/**
 * A stand-in for Iterable's API on this machine, at least as strict as the real one: it is what the demo, the tests and
 * the benchmarks send to. A request passes the key, the quota of its endpoint and the size of its body, is applied to the
 * project, written to the journal, and only then answered.
 */
import { once } from 'node:events';
import type { IncomingMessage, Server, ServerResponse } from 'node:http';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';

import type { ProjectKey } from '../../core/definition.js';
import { OperatorError } from '../../lib/errors.js';
import type { Answer } from './answer.js';
import { badParams, json, refusal } from './answer.js';
import { createBucket } from './bucket.js';
import type { Bucket, Grant } from './bucket.js';
import { readBody } from './call.js';
import { removeUser, takeLines } from './change.js';
import type { Endpoint, Route } from './endpoints.js';
import { findRoute, QUOTAS } from './endpoints.js';
import type { Fault, Faults } from './faults.js';
import { createFaults } from './faults.js';
import type { FieldType } from './fields.js';
import type { Journal } from './journal.js';
import { openJournal, replay } from './journal.js';
import { parseRaw } from './json.js';
import type { Application, Project, ProjectOptions } from './project.js';
import { createProject } from './project.js';
import type { SeenRequest, Stats } from './traffic.js';
import { createTraffic } from './traffic.js';
import { findUser, forgetUser } from './users.js';
import type { SimulatedEvent, SimulatedList, SimulatedUser } from './view.js';
import { viewEvents, viewLists, viewUserOf, viewUsers } from './view.js';

/** Calls a second for an endpoint; the others keep Iterable's published quota. */
export type Quotas = Partial<Record<Endpoint, number | 'off'>> | 'off';

export interface SimulatorOptions extends Partial<Omit<ProjectOptions, 'projectType'>> {
  projectType: ProjectKey;
  /** The only key that is accepted; left out, any that isn't empty. */
  apiKey?: string;
  /** 0, the default, for any free one. */
  port?: number;
  /** Where the project outlives the process; left out, it doesn't. */
  directory?: string;
  /** Replays the directory once, writes nothing, and refuses writes with 403: for a process that only looks. */
  readOnly?: boolean;
  /** Waits so long before every answer. */
  latencyMs?: number;
  quotas?: Quotas;
  /** The share above its quota that an endpoint lets through all the same. */
  tolerance?: number;
  /** How many requests to keep with their bodies; 100 unless said otherwise. */
  keepRequests?: number;
}

export interface Simulator {
  /** The base URL, without `/api`. */
  readonly url: string;
  readonly faults: Faults;
  readonly stats: Stats;
  /** What a sender did that Iterable answers with success but may get wrong. */
  readonly violations: Project['violations'];
  /** Each application of a track call since the start, in order, repeats included. */
  readonly eventHistory: readonly Application[];
  readonly userCount: number;
  users: () => Generator<SimulatedUser>;
  /** By email or userId; as it is, whatever is still being processed. */
  user: (identifier: string) => SimulatedUser | undefined;
  events: (identifier?: string) => SimulatedEvent[];
  /** How often calls with this event id were applied. */
  applications: (eventId: string) => number;
  lists: () => SimulatedList[];
  fieldTypes: () => Record<string, FieldType>;
  /** The last requests, oldest first. */
  requests: () => SeenRequest[];
  /** As users/forget does; an unknown identifier is refused from now on too. */
  forget: (identifier: string) => void;
  deleteUser: (identifier: string) => void;
  setLatency: (ms: number) => void;
  setProcessing: (ms: number) => void;
  setQuota: (endpoint: Endpoint, perSecond: number | 'off') => void;
  /** Cuts what is open, the hanging requests too. */
  close: () => Promise<void>;
}

interface Parts {
  options: SimulatorOptions;
  project: Project;
  journal: Journal;
  traffic: ReturnType<typeof createTraffic>;
  faults: ReturnType<typeof createFaults>;
  gates: Map<Endpoint, Bucket>;
  state: { latencyMs: number; isClosed: boolean };
}

const MOST_BODY_BYTES = 4_000_000;
const KEEP_ALIVE_MS = 75_000;

/** Rejects with an OperatorError where the port is taken or the directory holds something else than is asked for. */
export async function startSimulator(options: SimulatorOptions): Promise<Simulator> {
  const project = createProject({
    projectType: options.projectType,
    processingMs: options.processingMs ?? 0,
    forgottenStatus: options.forgottenStatus ?? 400,
    bulkMismatch: options.bulkMismatch ?? 'refuse',
    maxBatch: options.maxBatch ?? Infinity,
    disallowedEventNames: options.disallowedEventNames ?? [],
  });
  const parts: Parts = {
    options,
    project,
    journal: openStore(options, project),
    traffic: createTraffic(options.keepRequests ?? 100),
    faults: createFaults(),
    gates: createGates(options),
    state: { latencyMs: options.latencyMs ?? 0, isClosed: false },
  };
  // What is thrown while serving is a bug, or a disk that is full: the process ends rather than answer what isn't kept.
  const server = createServer((request, response) => void serve(parts, request, response));
  server.keepAliveTimeout = KEEP_ALIVE_MS;
  const port = await listen(server, options.port ?? 0);
  return {
    ...show(parts),
    url: `http://127.0.0.1:${port}`,
    get userCount() {
      return project.users.size;
    },
    close: async () => {
      if (parts.state.isClosed) return;
      parts.state.isClosed = true;
      await new Promise<void>((resolve) => {
        server.close(() => resolve());
        server.closeAllConnections();
      });
      parts.journal.close();
    },
  };
}

function show(parts: Parts): Omit<Simulator, 'url' | 'close' | 'userCount'> {
  const { options, project, journal, traffic, faults, gates, state } = parts;
  const alter = (change: () => void): void => {
    change();
    journal.append(takeLines(project));
  };
  return {
    faults,
    stats: traffic.stats,
    violations: project.violations,
    eventHistory: project.history,
    users: () => viewUsers(project),
    user: (identifier) => viewUserOf(project, identifier),
    events: (identifier) => viewEvents(project, identifier),
    applications: (eventId) => project.events.get(eventId)?.applications ?? 0,
    lists: () => viewLists(project),
    fieldTypes: () => Object.fromEntries(project.userSchema),
    requests: () => [...traffic.requests()],
    forget: (identifier) => {
      const isEmail = identifier.includes('@');
      const unknown = { email: isEmail ? identifier.toLowerCase() : null, userId: isEmail ? null : identifier };
      alter(() => forgetUser(project, findUser(project, identifier.toLowerCase(), identifier) ?? unknown));
    },
    deleteUser: (identifier) => {
      const user = findUser(project, identifier.toLowerCase(), identifier);
      if (user !== undefined) alter(() => removeUser(project, user));
    },
    setLatency: (ms) => {
      state.latencyMs = ms;
    },
    setProcessing: (ms) => {
      project.options.processingMs = ms;
    },
    setQuota: (endpoint, perSecond) => setGate(gates, endpoint, perSecond, options.tolerance),
  };
}

async function serve(parts: Parts, request: IncomingMessage, response: ServerResponse): Promise<void> {
  const { traffic, faults, journal, project, state } = parts;
  const at = performance.timeOrigin + performance.now();
  const { method = '', url = '' } = request;
  const [path = '', query = ''] = url.split('?', 2);
  const route = findRoute(method, path);
  traffic.arrived(route?.endpoint, at);
  const early = refuseEarly(parts, request, route);
  const body = await readBytes(request);
  if (body === 'aborted' || state.isClosed) return;
  const isTooLarge = body === 'too large';
  const text = isTooLarge ? '' : body.toString();
  const seen: SeenRequest = { endpoint: route?.endpoint, method, path: url, body: text, at, outcome: undefined };
  traffic.keep(seen);
  const fault = early === undefined ? faults.draw(seen) : undefined;
  const failure = fault && failureOf(fault);

  let answer = early;
  if (route !== undefined && answer === undefined && (failure === undefined || fault?.afterApplying === true)) {
    answer = isTooLarge
      ? refusal(413, 'BatchTooLarge', `The body is over ${MOST_BODY_BYTES} bytes`)
      : run(project, route, { request, text, query });
    journal.append(takeLines(project));
  }
  await pause(state.latencyMs + (fault?.delayMs ?? 0));

  seen.outcome = typeof failure === 'string' ? failure : (failure ?? answer)?.status;
  if (seen.outcome !== undefined) traffic.answered(route?.endpoint, seen.outcome);
  if (failure === 'hung') return;
  if (failure === 'reset') request.socket.resetAndDestroy();
  else send(response, failure ?? answer ?? json({}), fault?.headers);
}

async function listen(server: Server, port: number): Promise<number> {
  try {
    server.listen(port, '127.0.0.1');
    await once(server, 'listening');
  } catch (error) {
    if (!(error instanceof Error && 'code' in error && error.code === 'EADDRINUSE')) throw error;
    throw new OperatorError(`Port ${port} is taken; name another one for the simulator`, { cause: error });
  }
  return (server.address() as AddressInfo).port;
}

function openStore({ directory, readOnly }: SimulatorOptions, project: Project): Journal {
  if (directory !== undefined && readOnly !== true) return openJournal(directory, project);
  if (directory !== undefined) replay(directory, project);
  return { append: () => undefined, close: () => undefined };
}

/** What a request is refused for whatever it says: its path, its key, the quota. */
function refuseEarly(
  { options, gates }: Parts,
  request: IncomingMessage,
  route: Route | undefined,
): Answer | undefined {
  const key = request.headers['api-key'];
  if (typeof key !== 'string' || key === '' || (options.apiKey !== undefined && key !== options.apiKey)) {
    return refusal(401, 'BadApiKey', 'Invalid API key', { endpoint: request.url });
  }
  if (route === undefined) return refusal(404, 'NotFound', `No such path: ${request.url ?? ''}`);
  const grant = gates.get(route.endpoint)?.take(performance.now());
  if (grant?.kind === 'refused') return rateLimited(route.endpoint, grant);
  const isRefused = options.readOnly === true && request.method !== 'GET';
  return isRefused ? refusal(403, 'Forbidden', 'The simulator is read-only') : undefined;
}

/** Only the two user endpoints say when to come again. */
function rateLimited(endpoint: Endpoint, grant: Grant & { kind: 'refused' }): Answer {
  const tells = endpoint === 'users/update' || endpoint === 'users/bulkUpdate';
  const { resetSeconds, remaining, limit } = grant;
  const params = { rateLimitReset: resetSeconds, rateLimitRemaining: remaining, rateLimitLimit: limit };
  return refusal(429, 'RateLimitExceeded', 'Too many requests', tells ? params : null);
}

function run(
  project: Project,
  route: Route,
  { request, text, query }: { request: IncomingMessage; text: string; query: string },
): Answer {
  const call = { argument: route.argument, query: new URLSearchParams(query) };
  if (request.method !== 'POST') {
    return route.run(project, { ...call, body: readBody({ kind: 'object', raw: '{}', members: new Map() }) });
  }
  if (!/^application\/json\b/i.test(request.headers['content-type'] ?? '')) {
    return refusal(400, 'BadJsonBody', 'The Content-Type has to be application/json');
  }
  try {
    const value = parseRaw(text);
    return value.kind === 'object'
      ? route.run(project, { ...call, body: readBody(value) })
      : badParams('The body has to be an object');
  } catch (error) {
    if (error instanceof SyntaxError) return refusal(400, 'BadJsonBody', 'The body is not JSON');
    throw error;
  }
}

/** How a fault fails a request; undefined where it only delays the true answer. */
function failureOf({ status, body, reset, hang, delayMs }: Fault): Answer | 'reset' | 'hung' | undefined {
  if (reset === true) return 'reset';
  if (hang === true) return 'hung';
  if (status === undefined && body === undefined && delayMs !== undefined) return undefined;
  if (typeof body === 'string') return { status: status ?? 500, text: body, contentType: 'text/html' };
  if (body !== undefined) return json(body, status ?? 500);
  const codes = { 401: 'BadApiKey', 403: 'Forbidden', 404: 'NotFound', 429: 'RateLimitExceeded' } as const;
  const code = status === 401 || status === 403 || status === 404 || status === 429 ? codes[status] : 'GenericError';
  return refusal(status ?? 500, code, 'A fault that was asked for');
}

function createGates({ quotas = {}, tolerance }: SimulatorOptions): Map<Endpoint, Bucket> {
  const gates = new Map<Endpoint, Bucket>();
  if (quotas === 'off') return gates;
  for (const [endpoint, quota] of QUOTAS) gates.set(endpoint, createBucket(quota, tolerance ?? 0));
  for (const [endpoint, perSecond] of Object.entries(quotas))
    setGate(gates, endpoint as Endpoint, perSecond, tolerance);
  return gates;
}

function setGate(gates: Map<Endpoint, Bucket>, endpoint: Endpoint, perSecond: number | 'off', tolerance = 0): void {
  if (perSecond === 'off') gates.delete(endpoint);
  else gates.set(endpoint, createBucket({ requests: perSecond, windowMs: 1_000 }, tolerance));
}

function readBytes(request: IncomingMessage): Promise<Buffer | 'too large' | 'aborted'> {
  return new Promise((resolve) => {
    let chunks: Buffer[] = [];
    let size = 0;
    request.on('data', (chunk: Buffer) => {
      size += chunk.length;
      if (size > MOST_BODY_BYTES) chunks = [];
      else chunks.push(chunk);
    });
    request.once('end', () => resolve(size > MOST_BODY_BYTES ? 'too large' : Buffer.concat(chunks)));
    request.once('close', () => resolve('aborted'));
  });
}

function send(response: ServerResponse, { status, text, contentType }: Answer, headers?: Record<string, string>): void {
  const bytes = Buffer.from(text);
  response.writeHead(status, {
    'content-type': contentType ?? 'application/json',
    'content-length': bytes.length,
    ...headers,
  });
  response.end(bytes);
}

async function pause(ms: number): Promise<void> {
  if (ms <= 0) return;
  await new Promise((resolve) => setTimeout(resolve, ms).unref());
}
