/**
 * What to send next for one recipient, from what waits for it at one destination: all marks that are ready become one
 * user update; events go in the order in which they arose, never before an identify that arose earlier and can still be
 * acknowledged; what waits for an earlier key of the same person is left out; whoever has vanished from the source is
 * asked for first.
 */
export interface Waiting {
  id: number;
  kind: 'm' | 'e';
  /** Its time has come; false while a retry waits. */
  due: boolean;
  /** The mark of a key that it replaces is still waiting. */
  blocked: boolean;
  /** Its person is gone from the source: the destination is asked before it is told. */
  confirm: boolean;
}

export type Step<T extends Waiting> =
  | { kind: 'update'; marks: readonly T[] }
  | { kind: 'track'; event: T }
  | { kind: 'ask'; rows: readonly T[] }
  | { kind: 'wait' };

/** `rows` in the order of their ids. */
export function nextStep<T extends Waiting>(rows: readonly T[]): Step<T> {
  const ready = rows.filter((row) => row.kind === 'm' && row.due && !row.blocked && !row.confirm);
  if (ready.length > 0) return { kind: 'update', marks: ready };
  const unsure = rows.filter((row) => row.confirm && row.due && !row.blocked);
  if (unsure.some((row) => row.kind === 'm')) return { kind: 'ask', rows: unsure };
  const event = rows.find((row) => row.kind === 'e');
  if (!event?.due || rows.some((row) => row.kind === 'm' && row.id < event.id)) return { kind: 'wait' };
  return event.confirm ? { kind: 'ask', rows: unsure } : { kind: 'track', event };
}
