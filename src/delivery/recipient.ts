import type { IdentifyCall, TrackCall, UserUpdate } from '../core/call.js';
import { nextStep } from '../core/next.js';
import type { Refusal, Verdict } from '../core/verdict.js';
import { backoffMs } from '../lib/backoff.js';
import { LIST, type WaitingEvent, type WaitingMark, type WaitingRow } from '../outbox/queue.js';
import { type Settlement } from '../outbox/settle.js';
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
  settle: (settlement: Settlement) => void;
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
/** `attempts` counts a hundred for each such answer, and one for each failure since. */
const WAIT_STEP = 100;

type Refused = Extract<Verdict, { kind: 'refused' }>;
type Final = Extract<Verdict, { kind: 'acknowledged' | 'refused' }>;
/** What has become of the columns of each mark. */
type OpenColumns = ReadonlyMap<WaitingMark, Map<string, 'open' | 'acknowledged' | 'refused'>>;
/** `halt`: nothing more may be sent for this recipient now. */
type Outcome = 'done' | 'halt';

/** Columns of a mark that are sent in one request. */
interface Part {
  mark: WaitingMark;
  columns: readonly string[];
}

function identifyCall({ mark, columns }: Part, recipient: string, keyAlone: boolean): IdentifyCall {
  const isWhole = columns.length === mark.values.filter(({ field }) => field !== LIST).length;
  return {
    type: 'identify',
    // A version is used once: the number of a change, whenever it is sent.
    messageId: `personas_${mark.computation.id.replace(/^\w+_/, '')}_${mark.version}${isWhole ? '' : `_${columns.join('_')}`}`,
    recipient,
    beside: mark.withBeside && !keyAlone ? mark.beside : null,
    computation: mark.computation,
    traits: mark.values.filter(({ field }) => columns.includes(field)),
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

export async function deliverRecipient(
  desk: Desk,
  recipient: string,
  waiting: readonly WaitingRow[],
): Promise<Delivered> {
  const { outlet, settle } = desk;
  const delivered: Delivered = { lookAgain: 'no', restMs: 0 };
  const urgency = URGENCIES[Math.min(2, ...waiting.map(({ priority }) => priority))] ?? 'later';

  const acknowledge = (row: WaitingRow, columns: readonly string[] | null = null): void => {
    const { id, version } = row;
    desk.passed(row);
    settle({ kind: 'acknowledged', id, version, columns });
  };
  /** False where the call waits instead. */
  const refuse = (row: WaitingRow, columns: readonly string[] | null, verdict: Refused): boolean => {
    const { id, version } = row;
    const { about, reason, answer } = verdict;
    // What is wrong with a definition shows in all of its calls: they needn't all die of it.
    if (about === 'content' && !desk.refused(row, reason)) {
      delivered.lookAgain = 'own';
      return false;
    }
    const retryAfterMs = WAITED_FOR.has(about) || reason === 'UniqueFieldsLimitExceeded' ? PASSING_RETRY_MS : null;
    const forgotten = reason === FORGOTTEN ? recipient : null;
    settle({ kind: 'refused', id, version, columns, reason, answer, retryAfterMs, forgotten });
    return true;
  };

  /** Passes on what ends a call; puts anything else into effect, for the rows that were sent, and gives null. */
  const conclude = (verdict: Verdict | null, rows: readonly WaitingRow[]): Final | null => {
    switch (verdict?.kind) {
      case 'acknowledged':
      case 'refused':
        return verdict;
      case 'again':
        for (const row of rows) settle({ ...again(row, verdict.waitMs), late: verdict.late });
        if (verdict.late) delivered.restMs = verdict.waitMs ?? 0;
        return null;
      case 'gone':
        for (const { definitionId } of rows) desk.stopDefinition(definitionId, verdict.reason);
        return null;
      case 'stop':
        desk.stop(verdict.reason);
        delivered.lookAgain = 'own';
        return null;
      case 'slower':
      case undefined:
        delivered.lookAgain = 'own';
        return null;
    }
  };

  /** Sends parts as one update, in pieces where it is refused; notes in `open` what has come to an end. */
  const update = async (parts: readonly Part[], keyAlone: boolean, open: OpenColumns): Promise<Outcome> => {
    const [first, ...others] = parts.map((part) => identifyCall(part, recipient, keyAlone));
    if (first === undefined) return 'done';
    const calls: UserUpdate = [first, ...others];
    const marks = parts.map(({ mark }) => mark);
    const verdict = conclude(await outlet.update(calls, urgency), marks);
    if (verdict === null) return 'halt';
    if (verdict.kind === 'acknowledged') {
      for (const { mark, columns } of parts) for (const column of columns) open.get(mark)?.set(column, 'acknowledged');
      return 'done';
    }
    const isPaired = calls.some(({ beside }) => beside !== null);
    if (isPaired && mayBeBeside(verdict)) return update(parts, true, open);
    const waited = verdict.about === 'trouble' ? parts.flatMap(({ mark }) => waitFor(mark, verdict) ?? []) : [];
    if (waited.length > 0) {
      for (const each of waited) settle(each);
      return 'halt';
    }
    const pieces = verdict.about === 'content' ? takeApart(parts, verdict.field) : null;
    if (pieces !== null) {
      for (const piece of pieces) if ((await update(piece, keyAlone, open)) === 'halt') return 'halt';
      return 'done';
    }
    let outcome: Outcome = 'done';
    for (const { mark, columns } of parts) {
      if (!refuse(mark, columns, verdict)) outcome = 'halt';
      else for (const column of columns) open.get(mark)?.set(column, 'refused');
    }
    return outcome;
  };

  /** Puts the recipient on the list of a definition, or takes them off. */
  const list = async (mark: WaitingMark, open: OpenColumns): Promise<Outcome> => {
    if (mark.list === null) {
      // The definition fills no list any more.
      open.get(mark)?.set(LIST, 'acknowledged');
      return 'done';
    }
    const found = await desk.listOf(mark);
    if (found?.kind !== 'list') {
      const refused = conclude(found, [mark]);
      if (refused?.kind === 'refused') {
        desk.stopDefinition(mark.definitionId, `The list "${mark.list.name}" can't be made (${refused.reason}).`);
      }
      return 'halt';
    }
    const member = mark.values.some(({ field, json }) => field === LIST && json === 'true');
    const change = { recipient, listId: found.id, member, existingOnly: mark.list.existingOnly };
    const verdict = conclude(await outlet.list(change, urgency), [mark]);
    if (verdict === null) return 'halt';
    if (verdict.kind === 'refused') {
      const waited = waitFor(mark, verdict);
      if (waited !== null) {
        settle(waited);
        return 'halt';
      }
      // Who isn't there needn't be on the list, where nobody is to be made for it.
      if (!(verdict.about === 'unknown' && change.existingOnly)) {
        if (!refuse(mark, [LIST], verdict)) return 'halt';
        open.get(mark)?.set(LIST, 'refused');
        return 'done';
      }
    }
    open.get(mark)?.set(LIST, 'acknowledged');
    return 'done';
  };

  /** Sends what is due of some marks; whatever has come to an end is settled, though something else must wait. */
  const sendMarks = async (marks: readonly WaitingMark[]): Promise<Outcome> => {
    const fieldsOf = (mark: WaitingMark): string[] => mark.values.map(({ field }) => field);
    const open: OpenColumns = new Map(
      marks.map((mark) => [mark, new Map(fieldsOf(mark).map((name) => [name, 'open']))]),
    );
    const parts = marks
      .map((mark): Part => ({ mark, columns: fieldsOf(mark).filter((name) => name !== LIST) }))
      .filter(({ columns }) => columns.length > 0);
    let outcome = await update(parts, false, open);
    for (const mark of marks) {
      if (outcome === 'done' && fieldsOf(mark).includes(LIST)) outcome = await list(mark, open);
    }
    for (const [mark, columns] of open) {
      const ended = [...columns].filter(([, state]) => state !== 'open');
      const accepted = ended.filter(([, state]) => state === 'acknowledged').map(([name]) => name);
      // What was refused is taken out of the mark; with the rest of it acknowledged, it is gone.
      if (accepted.length > 0) acknowledge(mark, ended.length === columns.size ? null : accepted);
      if (ended.length === columns.size && mark.hasFollowers) delivered.lookAgain = 'any';
    }
    return outcome;
  };

  /** Whether the person is still there, where the source has lost them. */
  const ask = async (rows: readonly WaitingRow[]): Promise<Outcome | 'there'> => {
    const answer = await outlet.find(recipient);
    if (answer?.kind === 'there') return 'there';
    if (answer?.kind === 'absent') {
      for (const row of rows) {
        // A user who isn't there after a minute won't be made only to be told that they left.
        if (row.confirmStage >= 2) acknowledge(row);
        else settle({ ...again(row, ASYNCHRONOUS_MS), attempts: row.attempts, confirmStage: 2 });
      }
      return rows.every((row) => row.confirmStage >= 2) ? 'done' : 'halt';
    }
    const verdict = conclude(answer, rows);
    if (verdict === null) return 'halt';
    if (verdict.kind === 'acknowledged') return 'there';
    for (const row of rows) refuse(row, null, verdict);
    return 'done';
  };

  const track = async (row: WaitingEvent, keyAlone: boolean): Promise<Outcome> => {
    const call = trackCall(row, recipient, keyAlone);
    const verdict = conclude(await outlet.track(call, urgency), [row]);
    if (verdict === null) return 'halt';
    if (verdict.kind === 'acknowledged') {
      acknowledge(row);
      return 'done';
    }
    if (call.beside !== null && mayBeBeside(verdict)) return track(row, true);
    const waited = waitFor(row, verdict);
    if (waited === null) return refuse(row, null, verdict) ? 'done' : 'halt';
    settle(waited);
    return 'halt';
  };

  const [first] = waiting;
  if (first?.isForgotten === true) {
    for (const row of waiting) refuse(row, null, KNOWN_TO_BE_FORGOTTEN);
    return delivered;
  }
  let rows = waiting;
  for (;;) {
    const step = nextStep(rows);
    switch (step.kind) {
      case 'wait':
        return delivered;
      case 'update': {
        const marks = step.marks.filter((row) => row.kind === 'm').sort((a, b) => a.version - b.version);
        if ((await sendMarks(marks)) === 'halt') return delivered;
        const sent = new Set<WaitingRow>(marks);
        rows = rows.filter((row) => !sent.has(row));
        break;
      }
      case 'ask': {
        const asked = new Set<WaitingRow>(step.rows);
        const outcome = await ask(step.rows);
        if (outcome === 'halt') return delivered;
        rows =
          outcome === 'there'
            ? rows.map((row) => (asked.has(row) ? { ...row, confirm: false } : row))
            : rows.filter((row) => !asked.has(row));
        break;
      }
      case 'track': {
        const { event } = step;
        if (event.kind !== 'e' || (await track(event, false)) === 'halt') return delivered;
        rows = rows.filter((row) => row !== event);
        break;
      }
    }
  }
}

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
    parts.map((part) => ({ ...part, columns: part.columns.filter(wanted) })).filter((part) => part.columns.length > 0);
  if (field !== null && columns.some((column) => column !== field)) {
    return [keep((column) => column !== field), keep((column) => column === field)];
  }
  if (parts.length > 1) return parts.map((part) => [part]);
  return columns.map((wanted) => keep((column) => column === wanted));
}
