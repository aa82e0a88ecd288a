import { lockDefinition } from '../db/locks.js';
import { applyDelta } from './apply.js';
import { DELTA_TABLE, type RunCounts } from './delta.js';
import { enterState, withRunSession } from './compute.js';
import type { RunContext, RunResult } from './run.js';

/** Carries out `on_delete: exit_all` for an archived definition whose held run a person has approved. */
export async function exitAll(context: RunContext, definitionId: number, heldRunId: number): Promise<RunResult> {
  const { databases } = context;
  return withRunSession(databases, context.signal, async (session) => {
    await session.query('begin; set local synchronous_commit = on');
    await enterState(session, databases.state.schema);
    await lockDefinition(session, definitionId);
    const row = await session.query<{
      key: string;
      name: string;
      kind: 'audience' | 'trait';
      computation_id: string;
      fields: string;
    }>('select key, name, kind, computation_id, fields from definition where id = $1', [definitionId]);
    const definition = row.rows[0];
    if (definition === undefined) throw new Error(`There is no definition ${definitionId}.`);
    await session.query(DELTA_TABLE);
    const exits = await session.query(
      `insert into delta (op, recipient, profile_id, beside, old_value, entered_at, introduce, unsendable, matched, was_kept)
       select 'x', recipient, profile_id, beside, value, entered_at, false, false, false, kept from snapshot where definition_id = $1`,
      [definitionId],
    );
    const exited = exits.rowCount ?? 0;
    const now = `(clock_timestamp())`;
    const fields: unknown = typeof definition.fields === 'string' ? JSON.parse(definition.fields) : definition.fields;
    await applyDelta(
      session,
      {
        definitionId,
        runId: heldRunId,
        key: definition.key,
        name: definition.name,
        kind: definition.kind,
        computationId: definition.computation_id,
        fields: Object.keys(fields as Record<string, string>),
        now,
        first: false,
        priority: 1,
      },
      { send: false },
    );
    await session.query('update definition set members = 0, first_run_at = null where id = $1', [definitionId]);
    await session.query(`update run set decision = 'approved' where id = $1`, [heldRunId]);
    await session.query('commit');
    const counts: RunCounts = {
      before: exited,
      members: 0,
      entered: 0,
      exited,
      changed: 0,
      nulled: 0,
      withoutIdentifier: 0,
      conflicting: 0,
      skippedValues: 0,
    };
    return {
      id: heldRunId,
      outcome: 'succeeded',
      error: null,
      counts,
      corrections: null,
      unavailable: false,
      cause: null,
    };
  });
}
