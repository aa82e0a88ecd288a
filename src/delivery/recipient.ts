import type { IdentifyCall, TrackCall, UserUpdate } from '../core/call.js';
import { nextStep } from '../core/next.js';
import type { Refusal, Verdict } from '../core/verdict.js';
import { backoffMs } from '../lib/backoff.js';
import { LIST, type WaitingEvent, type WaitingMark, type WaitingRow } from '../outbox/queue.js';
import type { Settlement } from '../outbox/settle.js';
import type { Outlet, Urgency } from './outlet.js';

/**
 * Delivers what waits for one recipient: one user update from all marks that are ready, then their places on lists, then
 * the events, one after the other. Every row that was sent is settled:
 *
 *   acknowledged ─ gone · refused ─ dead, or taken apart first · again ─ due later
 *
 * and one that wasn't, or that met a full quota, stays as it was. A merged update that is refused for its content is
 * taken apart: the named field alone, else definition by definition, then column by column, until the guilty column is
 * alone. A conflict of two identifiers, or one that is refused, is tried once with the key alone.
 */
export interface Desk {
  outlet: Outlet;
  /** The destination refuses everything: it stops. */
  stop: (reason: string) => void;
  /** The id of the list that a definition fills; what keeps it from being known is put into effect like any verdict. */
  listOf: (mark: WaitingMark) => Promise<{ kind: 'list'; id: number } | Verdict | null>;
  /** What a definition's calls go to is gone: they wait for a person. */
  stopDefinition: (definitionId: number, reason: string) => void;
  /** A call of the definition was accepted, or refused for its content; false where its calls wait from now on. */
  passed: (row: WaitingRow) => void;
  refused: (row: WaitingRow, reason: string) => boolean;
}

export interface Delivered {
  /** Whether something of these calls that is due was not sent, or any other has come to be ready. */
  lookAgain: 'no' | 'own' | 'any';
  /** For so long nothing more may be sent: a request that went unanswered may still be applied. */
  restMs: number;
}

/** By priority: live, scheduled, backfill. */
const URGENCIES: readonly Urgency[] = ['now', 'soon', 'later'];
const RETRY = { firstMs: 1_000, longestMs: 10 * 60_000 };
/**
 * Iterable is asynchronous: a user whom an update has just made may be unknown to a track for a while. Its own trouble with
 * a call may pass as well.
 */
const WAITED_FOR: ReadonlySet<Refusal> = new Set(['unknown', 'trouble']);
const WAITS_MS = [60_000, 120_000, 300_000];
/** A refusal of an identifier or a full project may pass; one of the content won't by itself. */
const PASSING_RETRY_MS = 24 * 3_600_000;
/** How long Iterable may take until it knows of a user. */
const ASYNCHRONOUS_MS = 60_000;
/** Iterable erases people on request, and then takes no call for them. */
const FORGOTTEN = 'ForgottenUserError';
const KNOWN_TO_BE_FORGOTTEN = {
  kind: 'refused',
  about: 'person',
  reason: FORGOTTEN,
  field: null,
  answer: 'Not sent: an earlier call was refused because the destination has forgotten this person.',
} as const;
/** The column that is a place on a list. */
const PLACE = [LIST];
/** `attempts` counts a hundred for each such answer, and one for each failure since. */
const WAIT_STEP = 100;

type Refused = Extract<Verdict, { kind: 'refused' }>;
type Final = Extract<Verdict, { kind: 'acknowledged' | 'refused' }>;
/** `halt`: nothing more may be sent for this recipient now. */
type Outcome = 'done' | 'halt';

/** One delivery: what its steps share. */
interface Errand extends Delivered {
  desk: Desk;
  settle: (settlement: Settlement) => void;
  recipient: string;
  urgency: Urgency;
}

/** What has come to an end of a mark's columns. */
interface Progress {
  mark: WaitingMark;
  accepted: readonly string[];
  refused: readonly string[];
}

/** Columns of a mark that are sent in one request. */
interface Part {
  of: Progress;
  columns: readonly string[];
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

function trackCall(row: WaitingEvent, recipient: string, keyAlone: boolean): TrackCall {
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

/** Delivers what can be delivered now of `waiting`, in the order of its ids; `settle` is told of each row that was sent. */
export async function deliverRecipient(
  desk: Desk,
  settle: (settlement: Settlement) => void,
  recipient: string,
  waiting: readonly WaitingRow[],
): Promise<Delivered> {
  const errand: Errand = { desk, settle, recipient, urgency: urgencyOf(waiting), lookAgain: 'no', restMs: 0 };
  if (waiting[0]?.isForgotten === true) {
    for (const row of waiting) refuse(errand, row, null, KNOWN_TO_BE_FORGOTTEN);
    return errand;
  }
  let rows = waiting;
  for (;;) {
    const step = nextStep(rows);
    switch (step.kind) {
      case 'wait':
        return errand;
      case 'update': {
        const marks = step.marks.filter((row) => row.kind === 'm').sort((a, b) => a.version - b.version);
        if ((await sendMarks(errand, marks)) === 'halt') return errand;
        rows = without(rows, step.marks);
        break;
      }
      case 'ask': {
        const asked = step.rows;
        const outcome = await ask(errand, asked);
        if (outcome === 'halt') return errand;
        rows =
          outcome === 'there'
            ? rows.map((row) => (asked.includes(row) ? { ...row, confirm: false } : row))
            : without(rows, asked);
        break;
      }
      case 'track': {
        const { event } = step;
        if (event.kind !== 'e' || (await track(errand, event, false)) === 'halt') return errand;
        rows = without(rows, [event]);
        break;
      }
    }
  }
}

const without = (rows: readonly WaitingRow[], gone: readonly WaitingRow[]): readonly WaitingRow[] =>
  rows.filter((row) => !gone.includes(row));

function urgencyOf(rows: readonly WaitingRow[]): Urgency {
  let most = 2;
  for (const { priority } of rows) most = Math.min(most, priority);
  return URGENCIES[most] ?? 'later';
}

function acknowledge({ desk, settle }: Errand, row: WaitingRow, columns: readonly string[] | null): void {
  desk.passed(row);
  settle({ kind: 'acknowledged', id: row.id, version: row.version, columns });
}

/** False where the call waits instead. */
function refuse(errand: Errand, row: WaitingRow, columns: readonly string[] | null, verdict: Refused): boolean {
  const { id, version } = row;
  const { about, reason, answer } = verdict;
  // What is wrong with a definition shows in all of its calls: they needn't all die of it.
  if (about === 'content' && !errand.desk.refused(row, reason)) {
    errand.lookAgain = 'own';
    return false;
  }
  const retryAfterMs = WAITED_FOR.has(about) || reason === 'UniqueFieldsLimitExceeded' ? PASSING_RETRY_MS : null;
  const forgotten = reason === FORGOTTEN ? errand.recipient : null;
  errand.settle({ kind: 'refused', id, version, columns, reason, answer, retryAfterMs, forgotten });
  return true;
}

/** Passes on what ends a call; puts anything else into effect, for the rows that were sent, and gives null. */
function conclude(errand: Errand, verdict: Verdict | null, rows: readonly WaitingRow[]): Final | null {
  switch (verdict?.kind) {
    case 'acknowledged':
    case 'refused':
      return verdict;
    case 'again':
      for (const row of rows) errand.settle({ ...again(row, verdict.waitMs), late: verdict.late });
      if (verdict.late) errand.restMs = verdict.waitMs ?? 0;
      return null;
    case 'gone':
      for (const { definitionId } of rows) errand.desk.stopDefinition(definitionId, verdict.reason);
      return null;
    case 'stop':
      errand.desk.stop(verdict.reason);
      errand.lookAgain = 'own';
      return null;
    case 'slower':
    case undefined:
      errand.lookAgain = 'own';
      return null;
  }
}

/** Sends what is due of some marks; whatever has come to an end is settled, though something else must wait. */
async function sendMarks(errand: Errand, marks: readonly WaitingMark[]): Promise<Outcome> {
  const all = marks.map((mark): Progress => ({ mark, accepted: [], refused: [] }));
  const parts = all.map((of): Part => ({ of, columns: columnsOf(of.mark) })).filter(hasColumns);
  let outcome = await update(errand, parts, false);
  for (const each of all) {
    const isDue = each.mark.values.some(({ field }) => field === LIST);
    if (outcome === 'done' && isDue) outcome = await list(errand, each);
  }
  for (const { mark, accepted, refused } of all) {
    const isOver = accepted.length + refused.length === mark.values.length;
    // What was refused is taken out of the mark; with the rest of it acknowledged, it is gone.
    if (accepted.length > 0) acknowledge(errand, mark, isOver ? null : accepted);
    if (isOver && mark.hasFollowers) errand.lookAgain = 'any';
  }
  return outcome;
}

/** Sends parts as one update, in pieces where it is refused; notes in their marks' progress what has come to an end. */
async function update(errand: Errand, parts: readonly Part[], keyAlone: boolean): Promise<Outcome> {
  const [first, ...others] = parts.map((part) => identifyCall(part, errand.recipient, keyAlone));
  if (first === undefined) return 'done';
  const calls: UserUpdate = [first, ...others];
  const answer = await errand.desk.outlet.update(calls, errand.urgency);
  const verdict = conclude(
    errand,
    answer,
    parts.map(({ of }) => of.mark),
  );
  if (verdict === null) return 'halt';
  if (verdict.kind === 'acknowledged') {
    for (const { of, columns } of parts) of.accepted = together(of.accepted, columns);
    return 'done';
  }
  const isPaired = calls.some(({ beside }) => beside !== null);
  if (isPaired && mayBeBeside(verdict)) return update(errand, parts, true);
  const waited = verdict.about === 'trouble' ? parts.flatMap(({ of }) => waitFor(of.mark, verdict) ?? []) : [];
  if (waited.length > 0) {
    for (const each of waited) errand.settle(each);
    return 'halt';
  }
  const pieces = verdict.about === 'content' ? takeApart(parts, verdict.field) : null;
  if (pieces !== null) {
    for (const piece of pieces) if ((await update(errand, piece, keyAlone)) === 'halt') return 'halt';
    return 'done';
  }
  let outcome: Outcome = 'done';
  for (const { of, columns } of parts) {
    if (!refuse(errand, of.mark, columns, verdict)) outcome = 'halt';
    else of.refused = together(of.refused, columns);
  }
  return outcome;
}

/** Puts the recipient on the list of a definition, or takes them off. */
async function list(errand: Errand, progress: Progress): Promise<Outcome> {
  const { desk, settle, recipient, urgency } = errand;
  const { mark } = progress;
  const accept = (): Outcome => {
    progress.accepted = together(progress.accepted, PLACE);
    return 'done';
  };
  // The definition fills no list any more.
  if (mark.list === null) return accept();
  const found = await desk.listOf(mark);
  if (found?.kind !== 'list') {
    const refused = conclude(errand, found, [mark]);
    if (refused?.kind === 'refused') {
      desk.stopDefinition(mark.definitionId, `The list "${mark.list.name}" can't be made (${refused.reason}).`);
    }
    return 'halt';
  }
  const member = mark.values.some(({ field, json }) => field === LIST && json === 'true');
  const change = { recipient, listId: found.id, member, existingOnly: mark.list.existingOnly };
  const verdict = conclude(errand, await desk.outlet.list(change, urgency), [mark]);
  if (verdict === null) return 'halt';
  if (verdict.kind === 'acknowledged') return accept();
  const waited = waitFor(mark, verdict);
  if (waited !== null) {
    settle(waited);
    return 'halt';
  }
  // Who isn't there needn't be on the list, where nobody is to be made for it.
  if (verdict.about === 'unknown' && change.existingOnly) return accept();
  if (!refuse(errand, mark, PLACE, verdict)) return 'halt';
  progress.refused = together(progress.refused, PLACE);
  return 'done';
}

/** Whether the person is still there, where the source has lost them. */
async function ask(errand: Errand, rows: readonly WaitingRow[]): Promise<Outcome | 'there'> {
  const answer = await errand.desk.outlet.find(errand.recipient);
  if (answer?.kind === 'there') return 'there';
  if (answer?.kind === 'absent') {
    for (const row of rows) {
      // A user who isn't there after a minute won't be made only to be told that they left.
      if (row.confirmStage >= 2) acknowledge(errand, row, null);
      else errand.settle({ ...again(row, ASYNCHRONOUS_MS), attempts: row.attempts, confirmStage: 2 });
    }
    return rows.every((row) => row.confirmStage >= 2) ? 'done' : 'halt';
  }
  const verdict = conclude(errand, answer, rows);
  if (verdict === null) return 'halt';
  if (verdict.kind === 'acknowledged') return 'there';
  for (const row of rows) refuse(errand, row, null, verdict);
  return 'done';
}

async function track(errand: Errand, row: WaitingEvent, keyAlone: boolean): Promise<Outcome> {
  const call = trackCall(row, errand.recipient, keyAlone);
  const verdict = conclude(errand, await errand.desk.outlet.track(call, errand.urgency), [row]);
  if (verdict === null) return 'halt';
  if (verdict.kind === 'acknowledged') {
    acknowledge(errand, row, null);
    return 'done';
  }
  if (call.beside !== null && mayBeBeside(verdict)) return track(errand, row, true);
  const waited = waitFor(row, verdict);
  if (waited === null) return refuse(errand, row, null, verdict) ? 'done' : 'halt';
  errand.settle(waited);
  return 'halt';
}

/** The columns of a mark that are fields. */
const columnsOf = (mark: WaitingMark): readonly string[] =>
  mark.values.map(({ field }) => field).filter((field) => field !== LIST);
const hasColumns = ({ columns }: Part): boolean => columns.length > 0;
const together = (some: readonly string[], more: readonly string[]): readonly string[] =>
  some.length === 0 ? more : [...some, ...more];

/** One more answer that may be another in some minutes; null where that has been waited for long enough. */
function waitFor(row: WaitingRow, { about }: Refused): Extract<Settlement, { kind: 'again' }> | null {
  const waits = Math.floor(row.attempts / WAIT_STEP);
  const waitMs = WAITED_FOR.has(about) ? WAITS_MS[waits] : undefined;
  return waitMs === undefined ? null : { ...again(row, waitMs), attempts: (waits + 1) * WAIT_STEP };
}

/** Whether it may be the identifier beside the key that is refused: the key alone is tried then. */
const mayBeBeside = ({ about }: Refused): boolean => about === 'conflict' || about === 'person';

/** One more failure. */
function again({ id, version, attempts }: WaitingRow, waitMs: number | null): Extract<Settlement, { kind: 'again' }> {
  const failures = Math.min(attempts % WAIT_STEP, WAIT_STEP - 2) + 1;
  const afterMs = waitMs ?? backoffMs(failures, RETRY, Math.random());
  return { kind: 'again', id, version, afterMs, attempts: attempts - (attempts % WAIT_STEP) + failures };
}

/** Smaller requests out of a refused one; null where it can't be taken apart further. */
function takeApart(parts: readonly Part[], field: string | null): readonly (readonly Part[])[] | null {
  const columns = parts.flatMap((part) => part.columns);
  if (columns.length <= 1) return null;
  const keep = (wanted: (column: string) => boolean): readonly Part[] =>
    parts.map((part) => ({ ...part, columns: part.columns.filter(wanted) })).filter(hasColumns);
  if (field !== null && columns.some((column) => column !== field)) {
    return [keep((column) => column !== field), keep((column) => column === field)];
  }
  if (parts.length > 1) return parts.map((part) => [part]);
  return columns.map((wanted) => keep((column) => column === wanted));
}
