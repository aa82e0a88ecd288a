/** What may go wrong between a sender and Iterable, on demand: refusals, lost answers, cut connections, slowness. */
import type { Endpoint } from './endpoints.js';
import type { SeenRequest } from './traffic.js';

/** Without `status`, `reset`, `hang` and `delayMs` the answer is a 500. */
export interface Fault {
  /** Left out: any. */
  endpoint?: Endpoint | readonly Endpoint[];
  /** Which requests are meant, by what they say. */
  match?: (request: SeenRequest) => boolean;
  status?: number;
  /** An object is sent as JSON, text as HTML. */
  body?: string | object;
  headers?: Record<string, string>;
  /** The request takes effect before it fails: the sender can't know. */
  afterApplying?: boolean;
  /** The connection is cut instead of an answer. */
  reset?: boolean;
  /** No answer until the simulator is closed. */
  hang?: boolean;
  /** Waits before the answer; alone, the answer is the true one. */
  delayMs?: number;
}

export interface Faults {
  /** The next `count` requests that fit; a second call takes its turn after the first. */
  failNext: (count: number, fault?: Fault) => void;
  /** A share of the requests that fit, the same ones for the same seed and order of requests. */
  failRandomly: (fault: Fault & { share: number; seed: number }) => void;
  clear: () => void;
}

export function createFaults(): Faults & { draw: (request: SeenRequest) => Fault | undefined } {
  let counted: { left: number; fault: Fault }[] = [];
  let random: { share: number; next: () => number; fault: Fault }[] = [];
  return {
    failNext: (count, fault = {}) => void counted.push({ left: count, fault }),
    failRandomly: ({ share, seed, ...fault }) => void random.push({ share, next: randomNumbers(seed), fault }),
    clear: () => {
      counted = [];
      random = [];
    },
    draw: (request) => {
      const due = counted.find(({ fault }) => fits(fault, request));
      if (due !== undefined) {
        due.left--;
        counted = counted.filter(({ left }) => left > 0);
        return due.fault;
      }
      return random.find(({ share, next, fault }) => fits(fault, request) && next() < share)?.fault;
    },
  };
}

function fits({ endpoint, match }: Fault, request: SeenRequest): boolean {
  const wanted: readonly (Endpoint | undefined)[] = typeof endpoint === 'string' ? [endpoint] : (endpoint ?? []);
  const isWanted = endpoint === undefined || wanted.includes(request.endpoint);
  return isWanted && (match === undefined || match(request));
}

/** Numbers from 0 up to 1, always the same for one seed (mulberry32). */
function randomNumbers(seed: number): () => number {
  let state = seed;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}
