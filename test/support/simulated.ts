import { afterEach } from 'vitest';
import { startSimulator, type Simulator, type SimulatorOptions } from '../../src/demo/simulator/server.js';

/** Simulators for the tests of a file, and requests to them as any HTTP client makes them. */
export interface Reply {
  status: number;
  text: string;
  body: Record<string, unknown>;
}

/** A function that starts a simulator, which is closed when its test has ended. */
export function simulators(
  defaults: Pick<SimulatorOptions, 'projectType'>,
): (options?: Partial<SimulatorOptions>) => Promise<Simulator> {
  const open: Simulator[] = [];
  afterEach(async () => {
    await Promise.all(open.splice(0).map((simulator) => simulator.close()));
  });
  return async (options = {}) => {
    const simulator = await startSimulator({ quotas: 'off', ...defaults, ...options });
    open.push(simulator);
    return simulator;
  };
}

export async function call(
  simulator: Simulator,
  method: string,
  path: string,
  body?: unknown,
  key = 'key',
): Promise<Reply> {
  const response = await fetch(`${simulator.url}/api/${path}`, {
    method,
    headers: { 'Api-Key': key, ...(body !== undefined && { 'Content-Type': 'application/json' }) },
    ...(body !== undefined && { body: typeof body === 'string' ? body : JSON.stringify(body) }),
  });
  const text = await response.text();
  const isJson = response.headers.get('content-type') === 'application/json';
  return { status: response.status, text, body: isJson ? (JSON.parse(text) as Record<string, unknown>) : {} };
}

export const post = (simulator: Simulator, path: string, body: unknown): Promise<Reply> =>
  call(simulator, 'POST', path, body);
export const get = (simulator: Simulator, path: string): Promise<Reply> => call(simulator, 'GET', path);

/** users/update for one user; text goes as it is into `dataFields`. */
export const update = (simulator: Simulator, who: object, fields = '{}', more: object = {}): Promise<Reply> =>
  post(simulator, 'users/update', JSON.stringify({ ...who, ...more }).replace(/}$/, `,"dataFields":${fields}}`));
