import { act } from './act.js';
import type { CommandContext } from './command.js';
import { countOf, formatCount, SIGN } from './output.js';
import { deliverAndReport, exitOf, summarise } from './sync.js';

/** `approve` and `reject`: what becomes of a held run. */
const EXIT = { operator: 2, later: 75 };

/**
 * Runs the held definition anew. It goes ahead while its text is the same and no count exceeds what the person saw by a
 * tenth; else it is held again, with the new counts.
 */
export async function approve(context: CommandContext, run: number): Promise<number> {
  const { opened, output, signal } = context;
  let exit = 0;
  const acted = await act(opened, {
    kind: 'approve',
    args: { run },
    signal,
    afterwards: async (done) => {
      if (done.outcome !== 'done') return;
      const [result] = done.progress.runs;
      if (result === undefined) {
        exit = EXIT.later;
        const message = `Another run of the same definition is under way; approve run ${run} again in a moment.`;
        output.object({ error: { code: exit, problems: [{ message }] } });
        output.say(`${SIGN.note} ${message}`);
        return;
      }
      const { definition, outcome, members, entered, exited, changed } = result;
      if (outcome === 'succeeded') {
        const ended = await deliverAndReport(context, done);
        exit = ended.exit;
        output.object({ run, definition, outcome, members, entered, exited, changed, ...summarise(ended.delivery) });
        output.line(
          `${SIGN.good} ${definition}: ${countOf(members, 'member')}, ${formatCount(entered)} entered, ${formatCount(exited)} exited, ${formatCount(changed)} changed${exit === 0 ? '; all delivered' : ''}`,
        );
        return;
      }
      output.object({ run: result.run, definition, outcome, members, entered, exited, changed, error: result.error });
      output.say(`${SIGN.bad} ${definition}: ${result.error ?? outcome}`);
      if (outcome === 'held') {
        output.say(
          `It would change over a tenth more than what was seen, or its text is another, and is now run ${result.run}. Look again with \`personas-sync plan ${definition}\`, then \`approve ${result.run}\`.`,
        );
      }
    },
  });
  return exitOf(context, acted, exit);
}

/** Drops a held run. Its definition is paused; where it was the removal of one, everybody keeps what they have. */
export async function reject(context: CommandContext, run: number): Promise<number> {
  const { opened, output, signal } = context;
  const acted = await act(opened, {
    kind: 'reject',
    args: { run },
    signal,
    afterwards: async (done) => {
      const [definition] = done.progress.definitions;
      if (done.outcome !== 'done' || definition === undefined) return;
      const row = await opened.databases.state.db
        .selectFrom('definition')
        .select('state')
        .where('key', '=', definition)
        .executeTakeFirst();
      output.object({ run, definition, decision: 'rejected', state: row?.state ?? null });
      output.line(
        row?.state === 'paused'
          ? `${SIGN.good} Run ${run} is dropped and ${definition} is paused. When its data is mended, \`personas-sync resume ${definition}\`.`
          : `${SIGN.good} Run ${run} is dropped: nothing is sent for ${definition}, and everybody keeps what Iterable has.`,
      );
    },
  });
  return exitOf(context, acted, 0);
}
