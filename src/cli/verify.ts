import type { Pool } from '../db/connect.js';
import { countDifferences, dropDifferences, readDifferences, type Difference } from '../sync/findings.js';
import type { VerifyOptions } from '../sync/verify.js';
import { act } from './act.js';
import type { CommandContext } from './command.js';
import { readKeys, refuseUnknown } from './known.js';
import { countOf, formatCount, formatTable, plain, SIGN } from './output.js';
import { deliverAndReport, EXIT, exitOf } from './sync.js';

/**
 * `verify`: reads users back from Iterable, a hundred a second, and compares them with what was sent. It ends with 2
 * where something differs, unless `--repair` has sent it again.
 */
const SHOWN = 20;

const sentence = ({ recipient, field, expected, found, destination }: Difference): string =>
  `${plain(recipient.slice(2))} at ${plain(destination)}: ${plain(field)} should be ${plain(expected)}, and is ${found === null ? 'missing' : plain(found)}`;

/** All that differs, a page after the other; what has been taken is dropped. */
async function* takeDifferences(pool: Pool, request: number): AsyncGenerator<readonly Difference[]> {
  let page = await readDifferences(pool, request, { after: 0 });
  for (let last = page.at(-1)?.id; last !== undefined; last = page.at(-1)?.id) {
    yield page.map(({ id: _, ...difference }) => difference);
    await dropDifferences(pool, request, last);
    page = await readDifferences(pool, request, { after: last });
  }
}

async function showDifferences({ opened, output }: CommandContext, request: number): Promise<void> {
  const { pool } = opened.databases.state;
  const more = (await countDifferences(pool, request)) - SHOWN;
  const first = await readDifferences(pool, request, { after: 0, most: SHOWN });
  for (const difference of first) output.line(`${SIGN.bad} ${sentence(difference)}`);
  if (more > 0) output.line(`… and ${formatCount(more)} more (--json has them).`);
  await dropDifferences(pool, request);
}

export async function verify(context: CommandContext, options: VerifyOptions): Promise<number> {
  const { opened, output, signal } = context;
  refuseUnknown(options.keys, await readKeys(opened), 'definition');
  let exit: number = EXIT.done;
  let said = 0;
  const acted = await act(opened, {
    kind: 'verify',
    args: options,
    signal,
    onProgress: ({ count }) => {
      if (output.json || count === null || count === said) return;
      said = count;
      output.say(`${countOf(count, 'user')} read.`);
    },
    afterwards: async (done) => {
      const { verified = [] } = done.progress;
      if (done.outcome !== 'done') return;
      const differing = verified.reduce((sum, each) => sum + each.differing, 0);
      const unjudged = verified.reduce((sum, each) => sum + each.unjudged, 0);
      const { pool } = opened.databases.state;
      await output.objectWith({ verified }, 'differences', takeDifferences(pool, done.id));
      output.line(
        formatTable(
          [
            { title: 'definition' },
            { title: 'destination' },
            { title: 'checked', align: 'right' },
            { title: 'differing', align: 'right' },
            { title: 'not judged', align: 'right' },
          ],
          verified.map((each) => [
            each.definition,
            plain(each.destination),
            formatCount(each.checked),
            formatCount(each.differing),
            formatCount(each.unjudged),
          ]),
        ),
      );
      if (!output.json) await showDifferences(context, done.id);
      if (unjudged > 0) {
        output.line(
          `${SIGN.note} ${countOf(unjudged, 'user')} can't be judged: calls of theirs wait, were refused or are less than a minute old, or they could not be read.`,
        );
      }
      if (verified.length === 0)
        output.line(`${SIGN.note} Nothing can be verified: nothing is synced to a destination that can be read.`);
      else if (differing === 0) output.line(`${SIGN.good} What was read is as it was sent.`);
      else if (!options.repair) {
        output.line('`personas-sync verify --repair` sends again what differs.');
        exit = EXIT.operator;
      } else exit = (await deliverAndReport(context, done)).exit;
    },
  });
  return exitOf(context, acted, exit);
}
