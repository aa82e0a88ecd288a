import type { ExpectedValue, ListChange, TrackCall, UserFound, UserUpdate } from '../core/call.js';
import type { BatchVerdict, Verdict } from '../core/verdict.js';

/**
 * How a destination takes calls: what delivering knows of it. A carrier is one way in, with a quota of its own; what
 * differs between destinations, and between single and bulk requests, is hidden behind these types.
 */
export interface HttpRequest {
  method: 'POST' | 'GET';
  path: string;
  body: string | null;
  /** How long it may be open altogether; the lease counts on it. */
  timeoutMs: number;
  /** One of hundreds a second: what it costs to send it counts. */
  isFrequent?: boolean;
}

export type Answer =
  | { kind: 'answered'; status: number; body: string; retryAfter: string | null }
  /** No answer came; `reached` where the request may have been applied all the same. */
  | { kind: 'lost'; because: string; reached: boolean };

/** Sends a request once; throws only for a bug. */
export type Transmit = (request: HttpRequest) => Promise<Answer>;

/** A call, or all calls of one update, as it goes into a request. */
export interface Item {
  /** Its text in the body. */
  text: string;
  /** Whom it names, `u:` or `e:` before it, emails in lower case: an answer names its failures so. */
  names: readonly string[];
  /** The columns that it carries. */
  fields: readonly string[];
  /** The name of its event; null where it is none. */
  event: string | null;
  /** Only what has the same goes into one request. */
  group: string;
  /** It is over a limit of the destination's for a single call: refused before it is sent. */
  isTooLarge?: boolean;
}

/** What names nobody and carries no columns: an answer to it says nothing of a part. */
export const plain = (text: string, group = ''): Item => ({ text, names: [], fields: [], event: null, group });

/** The body of a read. */
export interface Read {
  kind: 'read';
  body: string;
}

export interface Carrier<R = Verdict> {
  /** As its quota is called in the configuration. */
  name: string;
  /** Requests a second. */
  perSecond: number;
  /** The most items in a request, none of whose names is another's; and the most bytes of its body. */
  most: number;
  bytes: number;
  /** The bytes of a body without its items. */
  overhead: number;
  /** How long a request of this carrier may be open. */
  timeoutMs: number;
  request: (items: readonly Item[]) => HttpRequest;
  /** `now` is the answer's arrival, in milliseconds since 1970. */
  judge: (answer: Answer, items: readonly Item[], now: number) => BatchVerdict<R>;
}

/** One kind of call: how it is written, and by which carriers it goes. Without `bulk` all go by the one. */
export interface Way<C> {
  item: (call: C) => Item;
  single: Carrier;
  bulk: Carrier | null;
}

/** What a destination takes, and the connection to it. */
export interface Port {
  update: Way<UserUpdate>;
  track: Way<TrackCall>;
  /** Null where users can't be read: everybody is taken to be there. */
  users: {
    item: (recipient: string) => Item;
    carrier: Carrier<Verdict | Read>;
    isThere: (read: Read) => boolean;
    /** The fields that aren't as expected, with the JSON text of what there is; null: nothing. */
    compare: (read: Read, expected: readonly ExpectedValue[]) => UserFound;
  } | null;
  /** Null where there are no lists. */
  lists: {
    change: (change: ListChange) => Item;
    create: (name: string) => Item;
    carrier: Carrier<Verdict | Read>;
    /** Reads all lists. */
    all: Item;
    reads: Carrier<Verdict | Read>;
    /** The id of the list of this name, the lowest where several have it; null: there is none. */
    find: (read: Read, name: string) => number | null;
    /** The id of a list that was made. */
    made: (read: Read) => number | null;
  } | null;
  transmit: Transmit;
  close: () => void;
}
