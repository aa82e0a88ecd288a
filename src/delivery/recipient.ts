import type { ListChange } from '../core/call.js';
import { nextStep } from '../core/next.js';
import type { Verdict } from '../core/verdict.js';
import { LIST, type WaitingEvent, type WaitingMark, type WaitingRow } from '../outbox/queue.js';
import type { Settlement } from '../outbox/settle.js';
import { again, askLater, giveUp, isDoubtful, waitFor, type PutOff, type Refused } from './attempts.js';
import type { Outlet, Urgency } from './outlet.js';
import { partsOf, singleOut, takeApart, trackOf, updateOf, type Parts, type Progress } from './parts.js';
import { KNOWN_TO_BE_FORGOTTEN, LEFT_OUT, refusalOf } from './refusals.js';

/**
 * Delivers what waits for one recipient: one user update from all marks that are ready, then their places on lists, then
 * the events, one after the other. Every row that was sent is settled:
 *
 *   acknowledged ─ gone · refused ─ dead, or taken apart first · again ─ due later
 *
 * and one that wasn't, or that met a full quota, stays as it was. A merged update that is refused for its content, or for
 * trouble that doesn't pass, is taken apart, and so is one of which a mark has failed again and again. A conflict of two
 * identifiers, or one that is refused, is tried once with the key alone.
 */
export interface Desk {
  outlet: Outlet;
  /** The destination refuses everything: it stops. */
  stop: (reason: string) => void;
  /** The id of the list that a definition fills; what keeps it from being known is put into effect like any verdict. */
  listOf: (mark: WaitingMark) => Promise<{ kind: 'list'; id: number } | Verdict | null>;
  /** What a definition's calls go to is gone: they wait for a person. */
  stopDefinition: (definitionId: number, reason: string) => void;
  /** A field of a definition was accepted, or an event of it (null). */
  passed: (definitionId: number, field: string | null) => void;
  /** One was refused for its content; false where the call waits from now on. */
  refused: (definitionId: number, field: string | null, reason: string) => boolean;
  /** Whether a field of a definition isn't sent any more. */
  leavesOut: (definitionId: number, field: string) => boolean;
}

export interface Delivered {
  /** Whether something of these calls that is due was not sent. */
  lookAgain: boolean;
  /** For so long nothing more may be sent: a request that went unanswered may still be applied. */
  restMs: number;
}

/** By priority: live, scheduled, backfill. */
const URGENCIES: readonly Urgency[] = ['now', 'soon', 'later'];
const NOTHING: readonly PutOff[] = [];
/** The column that is a place on a list. */
const PLACE = [LIST];

type Final = Extract<Verdict, { kind: 'acknowledged' | 'refused' }>;
/** `halt`: nothing more may be sent for this recipient now. */
type Outcome = 'done' | 'halt';

/**
 * One delivery: a state and no call stack, since thousands are under way and each function that waits for another would
 * hold a good part of a kilobyte.
 */
interface Errand extends Delivered {
  desk: Desk;
  settle: (settlement: Settlement) => void;
  recipient: string;
  urgency: Urgency;
  /** What hasn't been begun, in the order of its ids. */
  rows: readonly WaitingRow[];
  /** The marks that have been begun. */
  begun: readonly Progress[];
  /** What is to be sent for what has been begun; what a refusal asks for goes first. */
  tasks: Task[];
  /** What failed and is tried again, each row once. Nothing else is begun then. */
  putOff: readonly PutOff[];
}

/** A request, as long as there is one. */
type Task =
  | { kind: 'update'; parts: Parts; keyAlone: boolean }
  | { kind: 'find list'; of: Progress }
  | { kind: 'list'; of: Progress; change: ListChange }
  | { kind: 'ask'; rows: readonly WaitingRow[] }
  | { kind: 'track'; row: WaitingEvent; keyAlone: boolean };

type TaskOf<K extends Task['kind']> = Extract<Task, { kind: K }>;

/** Delivers what can be delivered now of `rows`, in the order of its ids; `settle` is told of each row that was sent. */
export async function deliverRecipient(
  desk: Desk,
  settle: (settlement: Settlement) => void,
  recipient: string,
  rows: readonly WaitingRow[],
): Promise<Delivered> {
  const urgency = urgencyOf(rows);
  const errand: Errand = {
    desk,
    settle,
    recipient,
    urgency,
    rows,
    begun: [],
    tasks: [],
    putOff: NOTHING,
    lookAgain: false,
    restMs: 0,
  };
  if (rows[0]?.isForgotten === true) {
    for (const row of rows) refuse(errand, row, null, KNOWN_TO_BE_FORGOTTEN);
    return errand;
  }
  const { outlet } = desk;
  let outcome: Outcome = 'done';
  const goesOn = (): boolean => outcome === 'done' && errand.restMs === 0;
  for (let task = next(errand); task !== null; task = goesOn() ? next(errand) : null) {
    switch (task.kind) {
      case 'update':
        outcome = heedUpdate(
          errand,
          task,
          await outlet.update(updateOf(task.parts, recipient, task.keyAlone), urgency),
        );
        break;
      case 'find list':
        outcome = heedFound(errand, task.of, task.of.mark.list === null ? null : await desk.listOf(task.of.mark));
        break;
      case 'list':
        outcome = heedList(errand, task, await outlet.list(task.change, urgency));
        break;
      case 'ask':
        outcome = heedAsked(errand, task.rows, await outlet.find(recipient));
        break;
      case 'track':
        outcome = heedTrack(errand, task, await outlet.track(trackOf(task.row, recipient, task.keyAlone), urgency));
        break;
    }
  }
  settleBegun(errand);
  for (const each of errand.putOff) settle(each);
  return errand;
}

const without = (rows: readonly WaitingRow[], gone: readonly WaitingRow[]): readonly WaitingRow[] =>
  rows.filter((row) => !gone.includes(row));

function urgencyOf(rows: readonly WaitingRow[]): Urgency {
  let most = 2;
  for (const { priority } of rows) most = Math.min(most, priority);
  return URGENCIES[most] ?? 'later';
}

function acknowledge(errand: Errand, row: WaitingRow): void {
  errand.settle({ kind: 'acknowledged', id: row.id, version: row.version, columns: null });
}

/** False where the call waits instead. */
function refuse(errand: Errand, row: WaitingRow, columns: readonly string[] | null, verdict: Refused): boolean {
  const { about, reason } = verdict;
  const fields = row.kind === 'e' ? [null] : (columns ?? row.values.map(({ field }) => field));
  // What is wrong with a definition shows in all of its calls: they needn't all die of it.
  if (about === 'content' && !fields.every((field) => errand.desk.refused(row.definitionId, field, reason))) {
    errand.lookAgain = true;
    return false;
  }
  errand.settle(refusalOf(row, columns, verdict, errand.recipient));
  return true;
}

/** Passes on what ends a call; puts anything else into effect, for the rows that were sent, and gives null. */
function conclude(errand: Errand, verdict: Verdict | null, rows: readonly WaitingRow[]): Final | null {
  switch (verdict?.kind) {
    case 'acknowledged':
    case 'refused':
      return verdict;
    case 'again': {
      if (verdict.late) errand.restMs = verdict.waitMs ?? 0;
      const refused = giveUp(rows, verdict);
      if (refused !== null) return refused;
      const failed = rows.map((row) => again(row, verdict));
      errand.putOff = [...errand.putOff.filter(({ id }) => failed.every((row) => row.id !== id)), ...failed];
      return null;
    }
    case 'gone':
      for (const { definitionId } of rows) errand.desk.stopDefinition(definitionId, verdict.reason);
      return null;
    case 'stop':
      errand.desk.stop(verdict.reason);
      errand.lookAgain = true;
      return null;
    case 'slower':
    case undefined:
      errand.lookAgain = true;
      return null;
  }
}

/** The next request; begins more of what waits when nothing is left of what has been begun. */
function next(errand: Errand): Task | null {
  for (;;) {
    const task = errand.tasks.shift();
    if (task !== undefined) return divided(errand, task);
    settleBegun(errand);
    // What comes next may have to come after what is tried again.
    if (errand.putOff.length > 0) return null;
    const step = nextStep(errand.rows);
    switch (step.kind) {
      case 'wait':
        return null;
      case 'update':
        begin(
          errand,
          step.marks.filter((row) => row.kind === 'm').sort((a, b) => a.version - b.version),
        );
        errand.rows = without(errand.rows, step.marks);
        break;
      case 'ask':
        return { kind: 'ask', rows: step.rows };
      case 'track':
        errand.rows = without(errand.rows, [step.event]);
        if (step.event.kind === 'e') return { kind: 'track', row: step.event, keyAlone: false };
    }
  }
}

/** What of a mark isn't sent any more, since it was refused for everybody. */
function leaveOut(errand: Errand, mark: WaitingMark): readonly string[] {
  const stopped = mark.values.filter(({ field }) => errand.desk.leavesOut(mark.definitionId, field));
  const fields = stopped.map(({ field }) => field);
  if (fields.length > 0) errand.settle(refusalOf(mark, fields, LEFT_OUT, errand.recipient));
  return fields;
}

/** What has failed again and again doesn't go with others: one poisonous value would hold up all of them. */
function divided(errand: Errand, task: Task): Task {
  if (task.kind !== 'update' || !task.parts.some(({ of }) => isDoubtful(of.mark))) return task;
  const [first = task.parts, ...others] = singleOut(task.parts, isDoubtful);
  errand.tasks.unshift(...others.map((parts): Task => ({ ...task, parts })));
  return { ...task, parts: first };
}

/** All fields of some marks are one update; then come their places on lists. */
function begin(errand: Errand, marks: readonly WaitingMark[]): void {
  const begun = marks.map((mark): Progress => ({ mark, accepted: [], refused: leaveOut(errand, mark) }));
  errand.begun = begun;
  const parts = partsOf(begun);
  if (parts !== null) errand.tasks.push({ kind: 'update', parts, keyAlone: false });
  for (const of of begun) {
    if (of.mark.values.some(({ field }) => field === LIST) && !of.refused.includes(LIST))
      errand.tasks.push({ kind: 'find list', of });
  }
}

/** Whatever has come to an end of the marks that were begun is settled, though something else of them must wait. */
function settleBegun(errand: Errand): void {
  for (const { mark, accepted, refused } of errand.begun) {
    const isOver = accepted.length + refused.length === mark.values.length;
    for (const field of accepted) errand.desk.passed(mark.definitionId, field);
    // What was refused is taken out of the mark; with the rest of it acknowledged, it is gone.
    if (accepted.length > 0) {
      errand.settle({ kind: 'acknowledged', id: mark.id, version: mark.version, columns: isOver ? null : accepted });
    }
  }
  errand.begun = [];
}

/** An update that is refused is sent in pieces. */
function heedUpdate(errand: Errand, { parts, keyAlone }: TaskOf<'update'>, answer: Verdict | null): Outcome {
  const marks = parts.map(({ of }) => of.mark);
  const verdict = conclude(errand, answer, marks);
  // The other columns of what goes one by one needn't wait for this one.
  const isItsOwn = answer?.kind === 'again' && answer.isBlameless !== true && marks.every(isDoubtful);
  if (verdict === null) return isItsOwn ? 'done' : 'halt';
  if (verdict.kind === 'acknowledged') {
    for (const { of, columns } of parts) of.accepted = together(of.accepted, columns);
    return 'done';
  }
  const isPaired = !keyAlone && marks.some(({ withBeside, beside }) => withBeside && beside !== null);
  if (isPaired && mayBeBeside(verdict)) {
    errand.tasks.unshift({ kind: 'update', parts, keyAlone: true });
    return 'done';
  }
  const waited = verdict.about === 'trouble' ? marks.flatMap((mark) => waitFor(mark, verdict.about) ?? []) : [];
  if (waited.length > 0) {
    for (const each of waited) errand.settle(each);
    return 'halt';
  }
  const isOfPart = verdict.about === 'content' || verdict.about === 'trouble';
  const pieces = isOfPart ? takeApart(parts, verdict.field) : [];
  if (pieces.length > 0) {
    errand.tasks.unshift(...pieces.map((piece): Task => ({ kind: 'update', parts: piece, keyAlone })));
    return 'done';
  }
  let outcome: Outcome = 'done';
  for (const { of, columns } of parts) {
    if (!refuse(errand, of.mark, columns, verdict)) outcome = 'halt';
    else of.refused = together(of.refused, columns);
  }
  return outcome;
}

/** The recipient is put on the list of a definition, or taken off, when it is known which list that is. */
function heedFound(errand: Errand, of: Progress, found: Awaited<ReturnType<Desk['listOf']>>): Outcome {
  const { mark } = of;
  // The definition fills no list any more.
  if (mark.list === null) return accept(of);
  if (found?.kind === 'list') {
    const member = mark.values.some(({ field, json }) => field === LIST && json === 'true');
    const change = { recipient: errand.recipient, listId: found.id, member, existingOnly: mark.list.existingOnly };
    errand.tasks.unshift({ kind: 'list', of, change });
    return 'done';
  }
  const refused = conclude(errand, found, [mark]);
  if (refused?.kind === 'refused' && found?.kind === 'again') return refusePlace(errand, of, refused);
  if (refused?.kind === 'refused') {
    const reason = `The list "${mark.list.name}" can't be made (${refused.reason}).`;
    errand.desk.stopDefinition(mark.definitionId, reason);
  }
  return 'halt';
}

function heedList(errand: Errand, { of, change }: TaskOf<'list'>, answer: Verdict | null): Outcome {
  const verdict = conclude(errand, answer, [of.mark]);
  if (verdict === null) return 'halt';
  if (verdict.kind === 'acknowledged') return accept(of);
  const waited = waitFor(of.mark, verdict.about);
  if (waited !== null) {
    errand.settle(waited);
    return 'halt';
  }
  // Who isn't there needn't be on the list, where nobody is to be made for it.
  if (verdict.about === 'unknown' && change.existingOnly) return accept(of);
  return refusePlace(errand, of, verdict);
}

function refusePlace(errand: Errand, of: Progress, verdict: Refused): Outcome {
  if (!refuse(errand, of.mark, PLACE, verdict)) return 'halt';
  of.refused = together(of.refused, PLACE);
  return 'done';
}

function accept(of: Progress): Outcome {
  of.accepted = together(of.accepted, PLACE);
  return 'done';
}

/** Whether the person is still there, where the source has lost them. */
function heedAsked(errand: Errand, asked: readonly WaitingRow[], answer: Awaited<ReturnType<Outlet['find']>>): Outcome {
  if (answer?.kind === 'absent') {
    for (const row of asked) {
      // A user who isn't there after a minute won't be made only to be told that they left.
      if (row.confirmStage >= 2) acknowledge(errand, row);
      else errand.settle(askLater(row));
    }
    errand.rows = without(errand.rows, asked);
    return asked.every((row) => row.confirmStage >= 2) ? 'done' : 'halt';
  }
  const verdict = answer?.kind === 'there' ? answer : conclude(errand, answer, asked);
  if (verdict === null) return 'halt';
  if (verdict.kind === 'refused') {
    for (const row of asked) refuse(errand, row, null, verdict);
    errand.rows = without(errand.rows, asked);
    return 'done';
  }
  errand.rows = errand.rows.map((row) => (asked.includes(row) ? { ...row, confirm: false } : row));
  return 'done';
}

function heedTrack(errand: Errand, { row, keyAlone }: TaskOf<'track'>, answer: Verdict | null): Outcome {
  const verdict = conclude(errand, answer, [row]);
  if (verdict === null) return 'halt';
  if (verdict.kind === 'acknowledged') {
    errand.desk.passed(row.definitionId, null);
    acknowledge(errand, row);
    return 'done';
  }
  if (!keyAlone && row.beside !== null && mayBeBeside(verdict)) {
    errand.tasks.unshift({ kind: 'track', row, keyAlone: true });
    return 'done';
  }
  const waited = waitFor(row, verdict.about);
  if (waited === null) return refuse(errand, row, null, verdict) ? 'done' : 'halt';
  errand.settle(waited);
  return 'halt';
}

/** Whether it may be the identifier beside the key that is refused: the key alone is tried then. */
const mayBeBeside = ({ about }: Refused): boolean => about === 'conflict' || about === 'person';

const together = (some: readonly string[], more: readonly string[]): readonly string[] =>
  some.length === 0 ? more : [...some, ...more];
