import type { Difference, VerifyOptions } from '../sync/verify.js';
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
      const { verified = [], differences = [] } = done.progress;
      if (done.outcome !== 'done') return;
      // People are in it: what has been read isn't kept.
      await opened.databases.state.pool.query(`update request set progress = progress - 'differences' where id = $1`, [
        done.id,
      ]);
      const differing = verified.reduce((sum, each) => sum + each.differing, 0);
      const unjudged = verified.reduce((sum, each) => sum + each.unjudged, 0);
      output.object({ verified, differences });
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
      for (const difference of differences.slice(0, SHOWN)) output.line(`${SIGN.bad} ${sentence(difference)}`);
      if (differences.length > SHOWN)
        output.line(`… and ${formatCount(differences.length - SHOWN)} more (--json has them).`);
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
