import { appendFile, open } from 'node:fs/promises';
import { formatCall } from '../../core/call.js';
import { SINGLE_REQUEST_MS } from '../../core/timeouts.js';
import { unanswered } from '../answer.js';
import { plain, type Carrier, type Port, type Transmit } from '../carrier.js';

/**
 * A file that gets a line of JSON for each call, in Segment's form: for looking at what would be sent, and for tests.
 * Each write is one append; what a write that failed has left of a line is ended by the next.
 */
export interface FilePortOptions {
  /** Absolute; made where it isn't there. */
  path: string;
  namespace: string;
  quotas: { batch: number };
}

const MOST = 1_000;
const MOST_BYTES = 4_000_000;

/** Whether the file ends in the middle of a line. */
async function endsInLine(path: string): Promise<boolean> {
  const file = await open(path, 'r').catch(() => null);
  if (file === null) return false;
  try {
    const { size } = await file.stat();
    const { buffer, bytesRead } = await file.read(Buffer.alloc(1), 0, 1, Math.max(0, size - 1));
    return bytesRead > 0 && buffer.toString() !== '\n';
  } finally {
    await file.close();
  }
}

export function createFilePort({ path, namespace, quotas }: FilePortOptions): Port {
  // A process that ended in the middle of a write may have left a part of a line, too.
  let isSure = false;
  let writing: Promise<unknown> = Promise.resolve();
  const write = async (body: string): Promise<void> => {
    const start = !isSure && (await endsInLine(path)) ? '\n' : '';
    isSure = false;
    await appendFile(path, `${start}${body}`, { mode: 0o600 });
    isSure = true;
  };
  const append: Transmit = async ({ body }) => {
    const written = writing.then(() => write(body ?? ''));
    writing = written.catch(() => undefined);
    try {
      await written;
      return { kind: 'answered', status: 200, body: '', retryAfter: null };
    } catch (error) {
      const code = error instanceof Error && 'code' in error ? String(error.code) : 'EIO';
      return { kind: 'lost', because: code, reached: false };
    }
  };
  const carrier: Carrier = {
    name: 'batch',
    perSecond: quotas.batch,
    most: MOST,
    bytes: MOST_BYTES,
    overhead: 0,
    timeoutMs: SINGLE_REQUEST_MS,
    request: (items) => ({
      method: 'POST',
      path: '',
      body: items.map(({ text }) => `${text}\n`).join(''),
      timeoutMs: SINGLE_REQUEST_MS,
    }),
    judge: (answer) => ({
      kind: 'whole',
      verdict: answer.kind === 'answered' ? { kind: 'acknowledged' } : unanswered(answer),
    }),
  };
  const format = (call: Parameters<typeof formatCall>[0]): string => formatCall(call, namespace);
  return {
    update: { item: (calls) => plain(calls.map(format).join('\n')), single: carrier, bulk: null },
    track: { item: (call) => plain(format(call)), single: carrier, bulk: null },
    users: null,
    lists: null,
    transmit: append,
    close: () => undefined,
  };
}
