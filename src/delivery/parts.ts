import type { IdentifyCall, TrackCall, UserUpdate } from '../core/call.js';
import { LIST, type WaitingEvent, type WaitingMark } from '../outbox/queue.js';

/**
 * What of a recipient's marks goes in one update, and in which pieces it goes where that is refused for what it holds: the
 * named field alone, else definition by definition, then column by column, until the guilty column is alone. What has
 * failed very often goes column by column from the start.
 */

/** What has come to an end of a mark's columns. */
export interface Progress {
  mark: WaitingMark;
  accepted: readonly string[];
  refused: readonly string[];
}

/** Columns of a mark that are sent in one request. */
export interface Part {
  of: Progress;
  columns: readonly string[];
}

/** What goes in one update: one part at least. */
export type Parts = readonly [Part, ...Part[]];

/** All that are fields of some marks and not refused yet, as one update; null where there are none. */
export function partsOf(all: readonly Progress[]): Parts | null {
  const open = ({ mark, refused }: Progress): readonly string[] =>
    columnsOf(mark).filter((column) => !refused.includes(column));
  const [first, ...others] = all.map((of): Part => ({ of, columns: open(of) })).filter(hasColumns);
  return first === undefined ? null : [first, ...others];
}

/** The calls that make one update; `keyAlone` leaves out the identifier beside the key. */
export function updateOf([first, ...others]: Parts, recipient: string, keyAlone: boolean): UserUpdate {
  return [identifyCall(first, recipient, keyAlone), ...others.map((part) => identifyCall(part, recipient, keyAlone))];
}

function identifyCall({ of: { mark }, columns }: Part, recipient: string, keyAlone: boolean): IdentifyCall {
  const isAll = columns.length === mark.values.length;
  const traits = isAll ? mark.values : mark.values.filter(({ field }) => columns.includes(field));
  const isWhole = isAll || columns.length === columnsOf(mark).length;
  return {
    type: 'identify',
    // A version is used once: the number of a change, whenever it is sent.
    messageId: `personas_${mark.computation.id.replace(/^\w+_/, '')}_${mark.version}${isWhole ? '' : `_${columns.join('_')}`}`,
    recipient,
    beside: mark.withBeside && !keyAlone ? mark.beside : null,
    computation: mark.computation,
    traits,
  };
}

export function trackOf(row: WaitingEvent, recipient: string, keyAlone: boolean): TrackCall {
  const { beside, computation, event, messageId, occurredAt, properties, dates } = row;
  return {
    type: 'track',
    recipient,
    beside: keyAlone ? null : beside,
    computation,
    event,
    messageId,
    occurredAt,
    properties,
    dates,
  };
}

/** Smaller updates out of a refused one; none where it can't be taken apart further. */
export function takeApart(parts: readonly Part[], field: string | null): readonly Parts[] {
  const columns = parts.flatMap((part) => part.columns);
  if (columns.length <= 1) return [];
  const keep = (wanted: (column: string) => boolean): readonly Part[] =>
    parts.map((part) => ({ ...part, columns: part.columns.filter(wanted) })).filter(hasColumns);
  const pieces =
    field !== null && columns.some((column) => column !== field)
      ? [keep((column) => column !== field), keep((column) => column === field)]
      : parts.length > 1
        ? parts.map((part) => [part])
        : columns.map((wanted) => keep((column) => column === wanted));
  return pieces.flatMap(([first, ...others]) => (first === undefined ? [] : [[first, ...others] as const]));
}

/**
 * The doubtful columns one by one, after all others together. Another of them is the first each time: one that is never
 * answered ends the turn.
 */
export function singleOut(parts: Parts, isDoubtful: (mark: WaitingMark) => boolean): readonly Parts[] {
  const [first, ...others] = parts.filter(({ of }) => !isDoubtful(of.mark));
  const singles = parts
    .filter(({ of }) => isDoubtful(of.mark))
    .flatMap((part) => part.columns.map((column): Parts => [{ ...part, columns: [column] }]));
  const from = (singles[0]?.[0].of.mark.attempts ?? 0) % Math.max(1, singles.length);
  const turned = [...singles.slice(from), ...singles.slice(0, from)];
  return first === undefined ? turned : [[first, ...others], ...turned];
}

/** The columns of a mark that are fields. */
const columnsOf = (mark: WaitingMark): readonly string[] =>
  mark.values.map(({ field }) => field).filter((field) => field !== LIST);
const hasColumns = ({ columns }: Part): boolean => columns.length > 0;
