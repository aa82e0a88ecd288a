import type { Client } from '../db/connect.js';
import { lockDefinition } from '../db/locks.js';
import { applyDelta } from './apply.js';
import { appliedOf, closeDefinition } from './close.js';
import { countChanges, isWindowed, readMembers, type DefinitionRow } from './comparison.js';
import { enterState } from './compute.js';
import type { RunCounts } from './delta.js';
import { leaveOut, type Start } from './due.js';
import { addToHour, beginHour } from './hour.js';
import { dropWhole, keepWhole, PARTED_FROM, takePart } from './parts.js';
import { finishRun, isOpen, releaseHeldRun, type Finish, type HeldRun, type RunRecord } from './record.js';
import type { Inputs } from './statement.js';
import { writeWindows } from './windows.js';

/**
 * Writes what a run has found and may write, and its outcome with the last of it. In one transaction where it is small, or
 * nobody else writes; a large change of a definition that is followed goes in parts, each in a short transaction of its
 * own, so that single changes of other people never wait long. Between two parts the snapshot is partly of before; a run
 * that is ended there is due again, and finds the rest.
 */
export interface Found {
  row: DefinitionRow;
  /** Null: changes of the definition aren't followed. */
  start: Start | null;
  counts: RunCounts;
  held: HeldRun | null;
  approved: boolean;
  /** The members are counted anew. */
  recount: boolean;
}

export interface Ending {
  record: RunRecord;
  textHash: string;
  finish: Finish;
}

/** `twice`: a recipient came twice, and nothing is written; `superseded`: another leads, and nothing more is written. */
export type Written = 'written' | 'twice' | 'superseded';

/** The session's transaction holds the definition's lock and `delta`, and its bare names are those of the state. Ends it. */
export async function writeFound(
  schema: string,
  session: Client,
  inputs: Inputs,
  found: Found,
  ending: Ending,
): Promise<Written> {
  const { row, start, counts } = found;
  const isLarge = counts.entered + counts.exited + counts.changed >= PARTED_FROM;
  return start !== null && !row.first && isLarge
    ? writeInParts(schema, session, inputs, { ...found, start }, ending)
    : writeAtOnce(session, inputs, found, ending);
}

async function writeAtOnce(session: Client, inputs: Inputs, found: Found, ending: Ending): Promise<Written> {
  const { row, counts, recount } = found;
  const applied = appliedOf(inputs, row, { runId: ending.record.id, priority: 1 });
  if (!(await applyDelta(session, applied, { send: inputs.definition.initial === 'send' }))) {
    await session.query('rollback');
    return 'twice';
  }
  await closeDefinition(session, inputs, row, { members: counts.members, textHash: ending.textHash, recount });
  return end(session, inputs, found, ending, counts);
}

async function writeInParts(
  schema: string,
  session: Client,
  inputs: Inputs,
  found: Found & { start: Start },
  ending: Ending,
): Promise<Written> {
  const { record, textHash } = ending;
  const windowed = isWindowed(inputs, found.row);
  const parts = await keepWhole(session, { windowed });
  await session.query('commit');
  try {
    for (let part = 0; ; part += 1) {
      await session.query('begin; set local synchronous_commit = on; set local random_page_cost = 1.1');
      await enterState(session, schema);
      await lockDefinition(session, found.row.id);
      if (!(await isOpen(session, record))) {
        await session.query('rollback');
        return 'superseded';
      }
      await takePart(session, part, { windowed: windowed && part === parts - 1 });
      await leaveOut(session, found.row.id, found.start);
      const row = { ...found.row, members: await readMembers(session, found.row.id) };
      const counts = await countChanges(session, inputs, row);
      const applied = appliedOf(inputs, row, { runId: record.id, priority: 1 });
      // The conflicts of everybody stand in the first part.
      if (!(await applyDelta(session, part === 0 ? applied : { ...applied, some: [] }, { send: true })))
        throw new Error('A recipient came twice to a part of what a run found.');
      await closeDefinition(session, inputs, row, { members: counts.members, textHash, recount: false });
      if (part === parts - 1) return await end(session, inputs, { ...found, row }, ending, counts);
      await addToHour(session, row.id, counts);
      await session.query('commit');
    }
  } finally {
    await dropWhole(session).catch(() => undefined);
  }
}

/** Ends the run in the transaction that writes the last of it; `written` is what this transaction has. */
async function end(
  session: Client,
  inputs: Inputs,
  { row, held, approved }: Found,
  { record, finish }: Ending,
  written: RunCounts,
): Promise<Written> {
  if (isWindowed(inputs, row)) await writeWindows(session, row.id);
  if (row.live && approved) await beginHour(session, row.id);
  else if (row.live && !row.first) await addToHour(session, row.id, written);
  if (held !== null) await releaseHeldRun(session, held, approved);
  if (!(await finishRun(session, record, finish))) {
    await session.query('rollback');
    return 'superseded';
  }
  await session.query('commit');
  return 'written';
}
