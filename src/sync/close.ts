import type { Config } from '../config/types.js';
import { createHash } from 'node:crypto';
import type { Definition } from '../core/definition.js';
import type { Runner } from '../db/connect.js';
import { lockFields } from '../db/locks.js';
import type { Applied } from './apply.js';
import { fieldTypes, refuseSharedFields, riderTypes, type DefinitionRow } from './comparison.js';
import type { Inputs } from './statement.js';

/**
 * What a definition is remembered by from one comparison to the next: the text that made its snapshot, its members, and the
 * fields that Iterable knows by now. Written under the definition's lock, in the transaction that applies `delta`.
 */

/** What stands for the meaning of a definition: when it changes, an approval no longer holds, and all is compared anew. */
export function hashDefinition(definition: Definition, config: Config): string {
  const parts = [definition.text.sql, definition.lookback ?? '', config.profiles.text.sql, definition.onMissing];
  return createHash('sha256').update(JSON.stringify(parts)).digest('hex');
}

/** What `applyDelta` needs to know of a definition; `now` is the moment of the comparison as SQL. */
export function appliedOf(
  { definition: { key, name, kind }, shape, moments }: Inputs,
  row: DefinitionRow,
  { runId, priority }: Pick<Applied, 'runId' | 'priority'>,
): Applied {
  const fields = new Set([...Object.keys(fieldTypes(shape)), ...Object.keys(row.fields)]);
  return {
    definitionId: row.id,
    runId,
    key,
    name,
    kind,
    computationId: row.computationId,
    fields: kind === 'trait' ? [...fields] : [],
    now: moments.now,
    first: row.first,
    priority,
  };
}

/**
 * The fields of a definition with their types, those included of which this run has the first value: what was never sent
 * has no type in Iterable. A field that is new is claimed under a lock, since two definitions could take it at once.
 */
export async function claimFields(
  session: Runner,
  { definition, shape }: Inputs,
  row: DefinitionRow,
): Promise<Readonly<Record<string, string>>> {
  const unknown = Object.entries(fieldTypes(shape)).filter(([field]) => !Object.hasOwn(row.fields, field));
  if (unknown.length === 0 && !row.first) return row.fields;
  const { rows } = await session.query<{ field: string }>(
    `select f as field from unnest($1::text[]) as f
     where exists (select from delta where op in ('e', 'c') and value ? f)`,
    [unknown.map(([field]) => field)],
  );
  const found = new Set(rows.map(({ field }) => field));
  await lockFields(session);
  await refuseSharedFields(session, definition, row, shape);
  return { ...row.fields, ...Object.fromEntries(unknown.filter(([field]) => found.has(field))) };
}

interface Left {
  members: number;
  textHash: string;
  /** The members are counted anew instead. */
  recount: boolean;
}

/** What a run leaves on its definition: the fields that Iterable now knows, the text that made them, the members. */
export async function closeDefinition(session: Runner, inputs: Inputs, row: DefinitionRow, left: Left): Promise<void> {
  const fields = await claimFields(session, inputs, row);
  await writeLeft(session, inputs, row.id, { ...left, fields });
}

/** The same with fields that have been claimed. */
export function writeLeft(
  session: Runner,
  { shape, moments }: Inputs,
  definitionId: number,
  { members, textHash, recount, fields }: Left & { fields: Readonly<Record<string, string>> },
): Promise<unknown> {
  return session.query(
    `update definition set members = coalesce($5::bigint, (select count(*) from snapshot where definition_id = $1 and not kept)),
       fields = $2, riders = $4, text_hash = $3, first_run_at = coalesce(first_run_at, ${moments.now}) where id = $1`,
    [definitionId, JSON.stringify(fields), textHash, JSON.stringify(riderTypes(shape)), recount ? null : members],
  );
}
