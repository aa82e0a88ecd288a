import type { Definition } from '../core/definition.js';
import type { State } from '../db/state.js';
import { OperatorError, UnavailableError } from '../lib/errors.js';
import { NOTHING, type RequestArguments, type RequestDeps, type RequestProgress, type Save } from './asking.js';
import type { RunResult } from './run.js';

/** Carries out `sync`: runs definitions now, each as soon as there is a place. */
export async function sync(
  deps: RequestDeps,
  { keys, confirmRemovals }: RequestArguments['sync'],
  save: Save,
): Promise<RequestProgress> {
  await deps.reload(confirmRemovals);
  const definitions = await chosen(deps, keys);
  const runs: RequestProgress['runs'][number][] = [];
  const unevaluated: string[] = [];
  const keysChosen = definitions.map(({ key }) => key);
  await save({ ...NOTHING, definitions: keysChosen });
  await Promise.all(
    definitions.map(async (definition) => {
      const isFollowed = definition.cadence.kind === 'realtime';
      if (isFollowed) await deps.drain(definition.key);
      const result = await deps.scheduler.runNow(definition, { trigger: 'sync', approves: null });
      if (result === null) return;
      if (result.outcome === 'cancelled') throw new UnavailableError('Stopped.');
      runs.push(summary(definition.key, result));
      deps.nudge();
      await save({ ...NOTHING, definitions: keysChosen, runs });
      // Whoever changed while it ran was left out of the run, and is evaluated after it.
      if (isFollowed && result.outcome === 'succeeded' && !(await deps.drain(definition.key)))
        unevaluated.push(definition.key);
    }),
  );
  if (keys.length === 0) runs.push(...(await heldRemovals(deps.context.databases.state)));
  const upTo = await lastVersion(deps.context.databases.state);
  return { ...NOTHING, definitions: keysChosen, upTo, runs, unevaluated };
}

/** Definitions that were removed with `on_delete: exit_all`, and wait for a person to decide. */
async function heldRemovals(state: State): Promise<RequestProgress['runs']> {
  const rows = await state.db
    .selectFrom('run')
    .innerJoin('definition', 'definition.id', 'run.definition_id')
    .select([
      'definition.key as definition',
      'run.id as run',
      'run.error',
      'run.members',
      'run.entered',
      'run.exited',
      'run.changed',
    ])
    .where('run.trigger', '=', 'delete')
    .where('run.outcome', '=', 'held')
    .where('run.decision', 'is', null)
    .orderBy('run.id')
    .execute();
  return rows.map((row) => ({ ...row, outcome: 'held', unavailable: false, ...NO_LOSSES }));
}

/** The last version that was given: calls with a higher one arise later. */
export async function lastVersion(state: State): Promise<number> {
  const { rows } = await state.pool.query<{ last: number }>('select last_value as last from version');
  return rows[0]?.last ?? 0;
}

export function summary(definition: string, result: RunResult): RequestProgress['runs'][number] {
  const { id, outcome, error, counts, unavailable } = result;
  return {
    definition,
    run: id,
    outcome,
    error,
    unavailable,
    members: counts?.members ?? null,
    entered: counts?.entered ?? null,
    exited: counts?.exited ?? null,
    changed: counts?.changed ?? null,
    withoutIdentifier: counts?.withoutIdentifier ?? null,
    conflicting: counts?.conflicting ?? null,
    skippedValues: counts?.skippedValues ?? null,
  };
}

const NO_LOSSES = { withoutIdentifier: null, conflicting: null, skippedValues: null };

/** The definitions of these keys, or all that are active; throws where one can't be run. */
export async function chosen(deps: RequestDeps, keys: readonly string[]): Promise<readonly Definition[]> {
  const known = deps.definitions();
  const unknown = keys.filter((key) => !known.some((definition) => definition.key === key));
  if (unknown.length > 0) {
    throw new OperatorError(
      `No definition has the key ${unknown.map((key) => `"${key}"`).join(', ')}; known: ${known.map(({ key }) => key).join(', ') || 'none'}.`,
    );
  }
  const states = await deps.context.databases.state.db.selectFrom('definition').select(['key', 'state']).execute();
  const stateOf = new Map(states.map(({ key, state }) => [key, state]));
  const paused = keys.filter((key) => stateOf.get(key) === 'paused');
  if (paused.length > 0)
    throw new OperatorError(`"${paused.join('", "')}" is paused; \`personas-sync resume ${paused.join(' ')}\` first.`);
  const disabled = keys.filter((key) => stateOf.get(key) === 'disabled');
  if (disabled.length > 0) throw new OperatorError(`"${disabled.join('", "')}" is disabled (\`enabled: false\`).`);
  return known.filter(({ key }) => (keys.length === 0 ? stateOf.get(key) === 'active' : keys.includes(key)));
}
