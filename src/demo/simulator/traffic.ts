/** What a simulator remembers of the requests that it got: counts, times of arrival, and the last requests as they came. */
import type { Endpoint } from './endpoints.js';

/** `reset` and `hung` are faults: no answer was sent. */
type Outcome = number | 'reset' | 'hung';

export interface SeenRequest {
  readonly endpoint: Endpoint | undefined;
  readonly method: string;
  /** With the query. */
  readonly path: string;
  readonly body: string;
  /** Milliseconds since 1970, with fractions. */
  readonly at: number;
  /** Undefined until it is answered. */
  outcome: Outcome | undefined;
}

export interface Stats {
  /** How many were answered; with an outcome only those with it, without an endpoint those of all. */
  count: (endpoint?: Endpoint, outcome?: Outcome) => number;
  /** When requests arrived, refused ones too: milliseconds since 1970, with fractions. The newest million is kept. */
  arrivals: (endpoint: Endpoint) => readonly number[];
  /** The most arrivals within any window of so many milliseconds. */
  mostWithin: (endpoint: Endpoint, windowMs: number) => number;
}

export interface Traffic {
  stats: Stats;
  requests: () => readonly SeenRequest[];
  arrived: (endpoint: Endpoint | undefined, at: number) => void;
  /** Keeps the request, if any are kept. */
  keep: (request: SeenRequest) => void;
  answered: (endpoint: Endpoint | undefined, outcome: Outcome) => void;
}

const MOST_ARRIVALS = 1_000_000;
const MOST_KEPT_CHARACTERS = 64_000_000;

/** Keeps the last `keepRequests` requests, fewer where their bodies come to more than 64 MB. */
export function createTraffic(keepRequests: number): Traffic {
  const counts = new Map<Endpoint | undefined, Map<Outcome, number>>();
  const times = new Map<Endpoint | undefined, number[]>();
  const kept: SeenRequest[] = [];
  let characters = 0;

  const count = (endpoint?: Endpoint, outcome?: Outcome): number => {
    let sum = 0;
    for (const [name, outcomes] of counts) {
      if (endpoint !== undefined && name !== endpoint) continue;
      for (const [kind, number] of outcomes) if (outcome === undefined || kind === outcome) sum += number;
    }
    return sum;
  };

  const arrivals = (endpoint: Endpoint): readonly number[] => times.get(endpoint) ?? [];

  return {
    stats: {
      count,
      arrivals,
      mostWithin: (endpoint, windowMs) => {
        const at = arrivals(endpoint);
        let most = 0;
        let first = 0;
        at.forEach((time, last) => {
          while ((at[first] ?? time) <= time - windowMs) first++;
          most = Math.max(most, last - first + 1);
        });
        return most;
      },
    },
    requests: () => kept,
    arrived: (endpoint, at) => {
      const list = times.get(endpoint) ?? [];
      if (list.length === 0) times.set(endpoint, list);
      list.push(at);
      if (list.length >= 2 * MOST_ARRIVALS) list.splice(0, MOST_ARRIVALS);
    },
    keep: (request) => {
      if (keepRequests === 0) return;
      kept.push(request);
      characters += request.body.length;
      while (kept.length > keepRequests || (characters > MOST_KEPT_CHARACTERS && kept.length > 1)) {
        characters -= kept.shift()?.body.length ?? 0;
      }
    },
    answered: (endpoint, outcome) => {
      const outcomes = counts.get(endpoint) ?? new Map<Outcome, number>();
      if (outcomes.size === 0) counts.set(endpoint, outcomes);
      outcomes.set(outcome, (outcomes.get(outcome) ?? 0) + 1);
    },
  };
}
