import pc from 'picocolors';
import type { Definition } from '../core/definition.js';
import { judgeGuard, type GuardVerdict } from '../core/guard.js';
import { describeProblem, OperatorError, type Problem } from '../lib/errors.js';
import { refuseConflicts, tryRun, UNREGISTERED, type DefinitionRow } from '../sync/comparison.js';
import type { RunCounts } from '../sync/delta.js';
import { refuseMassRemoval } from '../sync/registry.js';
import type { CommandContext } from './command.js';
import { readKnown, refuseKindChange, refuseUnknown, type Known } from './known.js';
import type { Opened } from './open.js';
import { countOf, formatCount, plain, rawJson, SIGN, type Output, type RawJson } from './output.js';
import { readSamples, type Sample, type Samples } from './samples.js';

/**
 * `plan`: what a run of each definition would send, and what a changed configuration would do once it is applied.
 * Definitions are computed and compared as in a run, in transactions that are rolled back; before the first sync there
 * is no state to compare with, and everything is new.
 */

/** What applying the configuration does by itself. */
interface Change {
  definition: string;
  change: 'added' | 'returns' | 'disabled' | 'removed' | 'backfill';
  /** Calls that it causes. */
  calls: number;
  /** They wait for a person's approval. */
  held: boolean;
  note: string;
}

interface Plan {
  definition: Definition;
  known: Known | null;
  counts: RunCounts;
  verdict: GuardVerdict;
  samples: Samples;
  calls: number;
  /** Why the run would fail all the same; null where it wouldn't. */
  failure: OperatorError | null;
}

function removal({ key, onDelete, members }: Known): Change {
  const exits = onDelete === 'exit_all' && members > 0;
  return {
    definition: key,
    change: 'removed',
    calls: exits ? members : 0,
    held: exits,
    note: exits
      ? `is gone from the configuration; with on_delete: exit_all its ${countOf(members, 'member')} exit once you approve it`
      : `is gone from the configuration; nothing is sent, and ${countOf(members, 'user keeps', 'users keep')} what Iterable has`,
  };
}

/** What the destinations that a synced definition has gained are sent when the configuration is applied. */
function gains({ targetOf, config }: Opened, definition: Definition, known: Known): Change[] {
  if (known.first || definition.initial === 'skip' || known.state === 'archived') return [];
  return config.destinations.flatMap((destination) => {
    const send = definition.sends.get(destination.name);
    if (send?.identify !== true || known.identified.includes(`${destination.name} ${targetOf(destination).host}`))
      return [];
    const note = `is new at ${destination.name}, which gets its ${countOf(known.members, 'member')}`;
    return [{ definition: definition.key, change: 'backfill', calls: known.members, held: false, note }];
  });
}

function changesOf(opened: Opened, known: ReadonlyMap<string, Known>, keys: readonly string[]): readonly Change[] {
  const { definitions } = opened.config;
  const wanted = (key: string): boolean => keys.length === 0 || keys.includes(key);
  const removed = [...known.values()].filter(
    ({ key, state }) => state !== 'archived' && !definitions.some((definition) => definition.key === key),
  );
  const changed = definitions.flatMap((definition): Change[] => {
    const { key, enabled } = definition;
    const before = known.get(key);
    const change = (name: Change['change'], note: string): Change => ({
      definition: key,
      change: name,
      calls: 0,
      held: false,
      note,
    });
    if (before === undefined) return enabled ? [change('added', 'is new')] : [];
    if (!enabled) {
      const note = 'becomes disabled: it is not run any more, and nothing is sent';
      return before.state === 'disabled' ? [] : [change('disabled', note)];
    }
    const note = 'comes back, and is compared with what was last sent';
    const returns = before.state === 'disabled' || before.state === 'archived' ? [change('returns', note)] : [];
    return [...returns, ...gains(opened, definition, before)];
  });
  return [...changed, ...removed.map(removal)].filter(({ definition }) => wanted(definition));
}

/** How many calls a run that goes ahead causes, before those for one person become one. */
function countCalls(definition: Definition, row: DefinitionRow, { entered, exited, changed }: RunCounts): number {
  if (row.first && definition.initial === 'skip') return 0;
  const sends = [...definition.sends.values()];
  const each = sends.reduce(
    (sum, { identify, track, list }) => sum + [identify, track, list !== null].filter(Boolean).length,
    0,
  );
  return (entered + exited + changed) * each;
}

async function planOne(opened: Opened, definition: Definition, known: Known | null): Promise<Plan> {
  refuseKindChange(definition, known?.kind);
  const row = known ?? UNREGISTERED;
  const { counts, samples } = await tryRun(opened, definition, row, async (session, found, inputs) => ({
    counts: found,
    samples: await readSamples(session, { definition, row, inputs, namespace: opened.config.state.schema }),
  }));
  const verdict = judgeGuard(definition.guard, counts, { first: row.first });
  const failure = refusalOf(() => refuseConflicts(definition, counts));
  return { definition, known, counts, verdict, samples, calls: countCalls(definition, row, counts), failure };
}

function refusalOf(refuse: () => void): OperatorError | null {
  try {
    refuse();
    return null;
  } catch (error) {
    if (error instanceof OperatorError) return error;
    throw error;
  }
}

function showPlan(output: Output, { definition, known, counts, verdict, samples, failure }: Plan): void {
  const { key, kind } = definition;
  const { members, entered, exited, changed, withoutIdentifier, conflicting, skippedValues } = counts;
  const sign = failure !== null ? SIGN.bad : verdict.kind === 'holds' ? SIGN.note : SIGN.good;
  const moves = [`${formatCount(entered)} would enter`, `${formatCount(exited)} exit`];
  if (kind === 'trait') moves.push(`${formatCount(changed)} change`);
  const isNew = known === null || known.first ? ' (new)' : '';
  output.line(
    `${sign} ${pc.bold(key)}${isNew}: ${countOf(members, 'member')}; ${entered + exited + changed === 0 ? 'nothing would change' : moves.join(', ')}`,
  );
  const notes = [
    ...(failure === null ? [] : [`The run would fail: ${failure.message}`]),
    ...(verdict.kind === 'holds' ? [`The run would be held: ${verdict.because}.`] : []),
    ...(known === null || known.heldRun === null
      ? []
      : [`Run ${known.heldRun} is held: \`personas-sync approve ${known.heldRun}\` or \`reject ${known.heldRun}\`.`]),
    ...(known?.state === 'paused'
      ? [`It is paused: nothing of this happens before \`personas-sync resume ${key}\`.`]
      : []),
    ...((known ?? UNREGISTERED).first && definition.initial === 'skip'
      ? ['initial: skip: nothing is sent for those who are in at the first run.']
      : []),
    ...(withoutIdentifier === 0
      ? []
      : [`${countOf(withoutIdentifier, 'profile has', 'profiles have')} no identifier, and nothing is sent for them.`]),
    ...(skippedValues === 0
      ? []
      : [`${countOf(skippedValues, 'row has', 'rows have')} a value that can't be sent (NaN or infinity).`]),
    ...(conflicting === 0
      ? []
      : [
          `${countOf(conflicting, 'recipient has', 'recipients have')} two different values from profiles that share it, such as ${samples.conflicting.map((each) => plain(each.slice(2))).join(', ')}.`,
        ]),
  ];
  for (const note of notes) output.line(`    ${note}`);
  const told = [
    ...each('enters', samples.entered),
    ...each('exits', samples.exited),
    ...each('changes', samples.changed),
  ];
  for (const line of told) output.line(`    ${line}`);
}

function each(word: string, samples: readonly Sample[]): string[] {
  return samples.flatMap(({ recipient, calls }) =>
    calls.map((call) => `${pc.dim(word)} ${plain(recipient.slice(2))} ${pc.dim(plain(withoutContext(call)))}`),
  );
}

/** The context, which ends a call, is the same for all of a definition; `--json` has it. */
function withoutContext(call: string): string {
  const at = call.lastIndexOf(', "context": {"personas":');
  return at < 0 ? call : `${call.slice(0, at)}}`;
}

const callsOf = (samples: readonly Sample[]): RawJson[] => samples.flatMap(({ calls }) => calls.map(rawJson));

function planJson({ definition, counts, verdict, samples, calls }: Plan): Record<string, unknown> {
  const { members, entered, exited, changed, withoutIdentifier, conflicting, skippedValues } = counts;
  return {
    definition: definition.key,
    members,
    entered,
    exited,
    changed,
    withoutIdentifier,
    conflicting,
    skippedValues,
    calls,
    guard: verdict.kind,
    because: verdict.kind === 'holds' ? verdict.because : null,
    samples: {
      entered: callsOf(samples.entered),
      exited: callsOf(samples.exited),
      changed: callsOf(samples.changed),
      conflicting: samples.conflicting,
    },
  };
}

export async function plan({ opened, output, signal }: CommandContext, keys: readonly string[]): Promise<number> {
  const known = await readKnown(opened);
  const { definitions } = opened.config;
  const living = [...known.values()].filter(({ state }) => state !== 'archived').map(({ key }) => key);
  refuseUnknown(keys, [...new Set([...definitions.map(({ key }) => key), ...living])], 'definition');
  const chosen = definitions.filter(({ key, enabled }) => (keys.length === 0 ? enabled : keys.includes(key)));
  const plans: Plan[] = [];
  const failed: { definition: string; problems: readonly Problem[] }[] = [];
  for (const definition of chosen) {
    try {
      const planned = await planOne(opened, definition, known.get(definition.key) ?? null);
      plans.push(planned);
      if (planned.failure !== null) failed.push({ definition: definition.key, problems: planned.failure.problems });
      showPlan(output, planned);
    } catch (error) {
      if (signal.aborted || !(error instanceof OperatorError)) throw error;
      failed.push({ definition: definition.key, problems: error.problems });
      output.line(`${SIGN.bad} ${pc.bold(definition.key)}`);
      for (const problem of error.problems) output.line(`    ${plain(describeProblem(problem))}`);
    }
  }
  const changes = changesOf(opened, known, keys);
  const refusal = keys.length > 0 ? null : refusalOf(() => refuseMassRemoval(opened.config, [...known.values()]));
  output.object({ plans: plans.map(planJson), failed, changes, refused: refusal?.message ?? null });

  const told = changes.filter(({ change }) => change !== 'added');
  if (told.length > 0) output.line('\nApplying the configuration:');
  for (const { definition, note } of told) output.line(`  ${SIGN.note} ${definition} ${note}.`);
  if (refusal !== null) output.line(`  ${SIGN.bad} ${plain(refusal.message)}`);
  const going = plans.filter(
    ({ verdict, failure, known: row }) => failure === null && verdict.kind === 'passes' && row?.state !== 'paused',
  );
  const caused = refusal === null ? [...going, ...changes.filter(({ held }) => !held)] : [];
  const calls = caused.reduce((sum, one) => sum + one.calls, 0);
  output.line();
  const sync =
    calls === 0 ? 'A sync would send nothing.' : `\`personas-sync sync\` would send ${countOf(calls, 'call')} at most.`;
  output.line(`Nothing was written or sent. ${sync}`);
  if (failed.length > 0)
    output.line(
      `${SIGN.bad} ${countOf(failed.length, 'definition fails', 'definitions fail')}; the others go on without them.`,
    );
  return failed.length > 0 || refusal !== null ? 2 : 0;
}
