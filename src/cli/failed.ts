import pc from 'picocolors';
import { parseInterval } from '../lib/duration.js';
import { OperatorError } from '../lib/errors.js';
import { FIELD_STOPPED, listDead, type DeadFilter, type DeadGroup } from '../outbox/dead.js';
import { LIST } from '../outbox/queue.js';
import { act } from './act.js';
import { agrees, type CommandContext } from './command.js';
import { readDestinationNames, readKeys, refuseUnknown } from './known.js';
import type { Opened } from './open.js';
import { countOf, formatCount, formatMoment, formatTable, plain, SIGN } from './output.js';
import { deliverAndReport, EXIT, exitOf, summarise } from './sync.js';

/** `failed list`, `retry` and `discard`: what Iterable has refused. */

/** What a person can do about a refusal, by its code; the codes are those of https://api.iterable.com/api/docs. */
const ADVICE: Readonly<Record<string, string>> = {
  RequestFieldsTypesMismatched:
    'the field has another type in Iterable: `personas-sync check` names both; cast the column, or rename the field',
  InvalidEmailAddressError: 'the address is no valid one: correct it in your data, which sends it again by itself',
  InvalidUserIdError: 'the userId is no valid one (52 printable characters at most): correct it in your data',
  ForgottenUserError: 'the person was erased in Iterable, which takes nothing for them any more: `failed discard` them',
  UnknownEmailError: 'Iterable does not know the address; it is tried again by itself after a day',
  UnknownUserIdError: 'Iterable does not know the userId; it is tried again by itself after a day',
  UniqueFieldsLimitExceeded:
    'the project has as many fields as it may have: remove some in Iterable, then `failed retry`',
  [FIELD_STOPPED]:
    'a hundred in a row had been refused for this field, so that it was not sent any more; when that is mended, `personas-sync resume` the definition',
  ForbiddenParamsError: 'Iterable keeps the field for itself: give it another name',
  NoAnswer: 'no answer to the call came for hours, while others were answered; it is tried again by itself after a day',
  UnreadableAnswer:
    'what was answered to the call for hours could not be read, unlike other answers; it is tried again by itself after a day',
  TooLarge: 'the call alone is larger than the destination takes: have the definition give less',
  BatchTooLarge: 'the call alone is larger than the destination takes: have the definition give less',
};
const FAILED =
  'the destination failed at the call for hours, while it took others; it is tried again by itself after a day';
const adviceOn = (reason: string): string | undefined =>
  ADVICE[reason] ?? (/^HTTP (408|5\d\d)$/.test(reason) ? FAILED : undefined);
const ANSWER_LENGTH = 160;

/** Checks what was typed; the interval as PostgreSQL reads it. */
async function readFilter({ opened }: CommandContext, filter: DeadFilter): Promise<DeadFilter> {
  const { keys, destination, olderThan } = filter;
  refuseUnknown(keys, keys.length === 0 ? [] : await readKeys(opened), 'definition');
  if (destination !== null) refuseUnknown([destination], await readDestinationNames(opened), 'destination');
  if (olderThan === null) return filter;
  const interval = parseInterval(olderThan);
  if (interval === null) throw new OperatorError(`--older-than must be a length of time, such as '2 days' or 12h.`);
  return { ...filter, olderThan: interval };
}

function showGroups(groups: readonly DeadGroup[]): string {
  const columns = [
    { title: 'definition' },
    { title: 'destination' },
    { title: 'reason' },
    { title: 'calls', align: 'right' },
    { title: 'oldest', align: 'right' },
  ] as const;
  const now = new Date();
  const rows = groups.map(({ definition, destination, reason, count, oldest }) => [
    definition,
    destination,
    plain(reason),
    formatCount(count),
    formatMoment(oldest, now),
  ]);
  return formatTable(columns, rows);
}

function showSamples({ definition, reason, count, samples }: DeadGroup): string[] {
  return [
    `${pc.bold(definition)} ${plain(reason)}`,
    ...samples.map(({ recipient, field, event, answer }) => {
      const what =
        field === null ? `event "${event ?? ''}"` : field === LIST ? 'the place on the list' : `field ${field}`;
      const said = answer.length > ANSWER_LENGTH ? `${answer.slice(0, ANSWER_LENGTH)}…` : answer;
      return `  ${plain(recipient.slice(2))}, ${plain(what)}: ${pc.dim(plain(said))}`;
    }),
    ...(count > samples.length ? [`  … and ${formatCount(count - samples.length)} more`] : []),
  ];
}

export async function list(context: CommandContext, options: DeadFilter): Promise<number> {
  const { opened, output } = context;
  const filter = await readFilter(context, options);
  const groups = await listDead(opened.databases.state.pool, filter);
  output.object({
    failed: groups.map(({ definition, destination, reason, count, oldest, samples }) => ({
      definition,
      destination,
      reason,
      count,
      oldest,
      samples,
    })),
  });
  if (groups.length === 0) {
    output.line(`${SIGN.good} No refused calls${JSON.stringify(options) === NO_FILTER ? '' : ' like that'}.`);
    return 0;
  }
  output.line(showGroups(groups));
  for (const group of groups) output.line(`\n${showSamples(group).join('\n')}`);
  output.line();
  for (const reason of new Set(groups.map((group) => group.reason))) {
    const advice = adviceOn(reason);
    if (advice !== undefined) output.line(`${SIGN.note} ${reason}: ${advice}.`);
  }
  output.line(
    '`personas-sync failed retry` sends them again, `failed discard` drops them; a newer change takes their place by itself.',
  );
  return 0;
}

const NO_FILTER = JSON.stringify({ keys: [], reason: null, destination: null, olderThan: null } satisfies DeadFilter);

/** How many are of destinations that are no longer in the configuration: what is tried again waits there. */
async function countGone({ config, databases, targetOf }: Opened, filter: DeadFilter): Promise<number> {
  const present = new Set(config.destinations.map((each) => `${each.name} ${targetOf(each).host}`));
  const groups = await listDead(databases.state.pool, filter);
  return groups
    .filter(({ destination, host }) => !present.has(`${destination} ${host}`))
    .reduce((sum, { count }) => sum + count, 0);
}

export async function retry(context: CommandContext, options: DeadFilter): Promise<number> {
  const { opened, output, signal } = context;
  const filter = await readFilter(context, options);
  const gone = await countGone(opened, filter);
  let exit = 0;
  const acted = await act(opened, {
    kind: 'retry',
    args: filter,
    signal,
    afterwards: async (done) => {
      if (done.outcome !== 'done') return;
      const retried = done.progress.count ?? 0;
      if (retried > 0) output.say(`${countOf(retried, 'refused call')} tried again.`);
      const ended = await deliverAndReport(context, done);
      exit = gone > 0 ? EXIT.operator : ended.exit;
      const summary = summarise(ended.delivery);
      output.object({ retried, ...summary, stopped: summary.stopped + gone });
      if (gone > 0)
        output.say(
          `${SIGN.bad} ${countOf(gone, 'call')} for a destination that is no longer configured must wait, and would go on if it came back.`,
        );
      if (retried === 0) output.line(`${SIGN.good} There were no refused calls to try again.`);
      else if (exit === 0) output.line(`${SIGN.good} All delivered.`);
    },
  });
  return exitOf(context, acted, exit);
}

export async function discard(context: CommandContext, options: DeadFilter, yes: boolean): Promise<number> {
  const { opened, output, signal } = context;
  const filter = await readFilter(context, options);
  const groups = await listDead(opened.databases.state.pool, filter);
  const matching = groups.reduce((sum, { count }) => sum + count, 0);
  if (matching === 0) {
    output.object({ discarded: 0 });
    output.line(`${SIGN.good} There are no refused calls to drop.`);
    return 0;
  }
  output.say(
    `This drops ${countOf(matching, 'refused call')} for good: Iterable does not get what they carried unless it changes again.`,
  );
  if (!(await agrees(context, 'Drop them?', yes))) {
    output.object({ discarded: 0, matching });
    return 2;
  }
  const acted = await act(opened, { kind: 'discard', args: filter, signal });
  if (acted.outcome === 'done') {
    const discarded = acted.progress.count ?? 0;
    output.object({ discarded });
    output.line(`${SIGN.good} ${countOf(discarded, 'refused call')} dropped.`);
  }
  return exitOf(context, acted, 0);
}
