import pc from 'picocolors';
import type { RequestProgress } from '../sync/asking.js';
import { act, watchDelivery, type Acted, type Delivery } from './act.js';
import type { CommandContext } from './command.js';
import { countOf, formatCount, formatTable, plainLines, SIGN } from './output.js';
import { startProgress } from './progress.js';

/** `sync`: runs definitions once, now, and waits until what they have caused is delivered. */
export interface SyncOptions {
  keys: readonly string[];
  confirmRemovals: boolean;
}

export const EXIT = { done: 0, operator: 2, later: 75 };

/** Prints what became of each run, once. */
function reportRuns(context: CommandContext): (progress: RequestProgress) => void {
  const seen = new Set<number>();
  return ({ runs }) => {
    for (const run of runs) {
      if (seen.has(run.run)) continue;
      seen.add(run.run);
      if (run.outcome === 'succeeded') {
        const counts = [
          countOf(run.members, 'member'),
          `${formatCount(run.entered)} entered`,
          `${formatCount(run.exited)} exited`,
          `${formatCount(run.changed)} changed`,
          ...lossesOf(run),
        ];
        context.output.say(`${SIGN.good} ${run.definition}: ${counts.join(', ')}`);
      } else
        context.output.say(
          `${SIGN.bad} ${run.definition}: ${plainLines(run.error ?? run.outcome)}${run.outcome === 'held' ? ` Look at \`personas-sync plan ${run.definition}\`, then \`approve ${run.run}\` or \`reject ${run.run}\`.` : ''}`,
        );
    }
  };
}

/** What a run has left out, and why. */
function lossesOf({ withoutIdentifier, conflicting, skippedValues }: RequestProgress['runs'][number]): string[] {
  const losses = [
    [withoutIdentifier, 'without an identifier'],
    [conflicting, 'conflicting'],
    [skippedValues, "with a value that can't be sent"],
  ] as const;
  return losses.flatMap(([count, what]) => (count === null || count === 0 ? [] : [`${formatCount(count)} ${what}`]));
}

/** Waits for the delivery of what a request has caused, with a bar; returns how it ended and what to exit with. */
export async function deliverAndReport(
  context: CommandContext,
  acted: Acted,
): Promise<{ exit: number; delivery: Delivery }> {
  const { opened, output, signal } = context;
  const progress = startProgress('Delivering', output.json);
  let most = 0;
  const delivery = await watchDelivery(opened, acted, signal, ({ waiting, ahead, refused }) => {
    const left = waiting + ahead;
    most = Math.max(most, left);
    progress.update(most - left, most, refused > 0 ? pc.yellow(`, ${formatCount(refused)} refused`) : '');
  });
  progress.end();
  const { waiting, ahead, later, stopped, reason, refused, stalled } = delivery;
  const left = waiting + ahead;
  if (stopped > 0)
    output.say(
      `${SIGN.bad} ${countOf(stopped, 'call')} must wait: ${reason ?? ''} When that is mended, \`personas-sync resume\` lets them go.`,
    );
  if (refused > 0)
    output.say(
      `${SIGN.bad} ${countOf(refused, 'refused call')}: \`personas-sync failed list\` shows them with the answers.`,
    );
  if (stalled)
    output.say(
      `${SIGN.note} Iterable stays out of reach; ${countOf(left, 'call')} left, sent by the daemon or the next sync.`,
    );
  else if (left > 0)
    output.say(`${SIGN.note} Stopped; ${countOf(left, 'call')} left, sent by the daemon or the next sync.`);
  if (later > 0)
    output.say(`${SIGN.note} ${countOf(later, 'call')} must wait longer, sent by the daemon or the next sync.`);
  const exit = stopped > 0 || refused > 0 ? EXIT.operator : left > 0 || later > 0 ? EXIT.later : EXIT.done;
  return { exit, delivery };
}

/** How a delivery ended, as JSON: calls that are left, and those that were refused. */
export function summarise({ waiting, ahead, later, refused, stopped }: Delivery) {
  return { waiting: waiting + ahead, later, refused, stopped };
}

export async function sync(context: CommandContext, options: SyncOptions): Promise<number> {
  const { opened, output, signal } = context;
  let exit = EXIT.done;
  const acted = await act(opened, {
    kind: 'sync',
    args: { keys: options.keys, confirmRemovals: options.confirmRemovals },
    signal,
    onProgress: output.json ? () => undefined : reportRuns(context),
    afterwards: async (done) => {
      if (done.outcome !== 'done') return;
      const ended = await deliverAndReport(context, done);
      const { runs, unevaluated } = done.progress;
      exit = ended.exit === EXIT.done && unevaluated.length > 0 ? EXIT.later : ended.exit;
      for (const key of unevaluated)
        output.say(
          `${SIGN.note} Some of what has changed of ${key} can't be evaluated yet; \`personas-sync status ${key}\` says why.`,
        );
      output.object({ runs, unevaluated, ...summarise(ended.delivery) });
      const succeeded = runs.filter(({ outcome }) => outcome === 'succeeded');
      if (exit === EXIT.done && succeeded.length > 0) {
        output.line(
          formatTable(
            [
              { title: 'definition' },
              { title: 'members', align: 'right' },
              { title: 'entered', align: 'right' },
              { title: 'exited', align: 'right' },
              { title: 'changed', align: 'right' },
            ],
            succeeded.map((run) => [
              run.definition,
              formatCount(run.members),
              formatCount(run.entered),
              formatCount(run.exited),
              formatCount(run.changed),
            ]),
          ),
        );
        output.line(succeeded.length === runs.length ? 'All delivered.' : 'What has run is delivered.');
      }
    },
  });
  return exitOf(context, acted, exit);
}

/** The exit code of a command that acted; says why where it came to nothing. */
export function exitOf({ output }: CommandContext, acted: Acted, delivered: number): number {
  const giveUp = (code: number, message: string): number => {
    output.object({ error: { code, problems: [{ message }] } });
    output.say(`${SIGN.bad} ${message}`);
    return code;
  };
  if (acted.outcome === 'interrupted') {
    return giveUp(EXIT.later, 'Stopped. What has begun goes on with the daemon or the next command.');
  }
  if (acted.outcome !== 'done') {
    return giveUp(acted.outcome === 'refused' ? EXIT.operator : 1, acted.answer ?? 'The request failed.');
  }
  const bad = acted.progress.runs.filter((run) => run.outcome !== 'succeeded');
  if (bad.length === 0) return delivered;
  return bad.every((run) => run.unavailable) ? EXIT.later : EXIT.operator;
}
