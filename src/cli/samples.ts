import { formatCall, type Computation } from '../core/call.js';
import type { Definition } from '../core/definition.js';
import type { FieldType } from '../core/field.js';
import { quoteLiteral, type Client } from '../db/connect.js';
import { membershipEventId, membershipProperties } from '../sync/apply.js';
import { fieldTypes, UNREGISTERED, type DefinitionRow } from '../sync/comparison.js';
import type { Inputs } from '../sync/statement.js';

/**
 * A few of the calls that a comparison would cause, read from its `delta`: the very calls, with the values that
 * PostgreSQL gave them, in Segment's form.
 */
export interface Samples {
  entered: readonly Sample[];
  exited: readonly Sample[];
  changed: readonly Sample[];
  /** Recipients for whom two profiles have different values; nothing is sent for them. */
  conflicting: readonly string[];
}

export interface Sample {
  recipient: string;
  /** The calls as JSON texts. */
  calls: readonly string[];
}

const EACH = 3;

interface SampleRow {
  op: 'e' | 'x' | 'c';
  recipient: string;
  beside: string | null;
  fields: string[];
  /** JSON texts, in the order of `fields`. */
  values: string[];
  message_id: string;
  occurred_at: string;
  properties: string;
  /** Only the key of the person changes: no event tells of that. */
  moved: boolean;
}

/** The properties and the id of a track call, as SQL over a row of `delta`, named d; as `apply.ts` makes them. */
function trackSql(definition: Definition, row: DefinitionRow, { moments }: Inputs): { id: string; properties: string } {
  const { key, name, kind } = definition;
  if (kind === 'audience') {
    const idOf = (at: string, which: 'entered' | 'exited'): string =>
      membershipEventId(row.computationId, 'd.recipient', at, which);
    return {
      id: `case d.op when 'x' then ${idOf('d.entered_at', 'exited')} else ${idOf(moments.now, 'entered')} end`,
      properties: `case d.op when 'x' then ${membershipProperties(key, name, false, 'd.old_value')}
        else ${membershipProperties(key, name, true, 'd.value')} end`,
    };
  }
  return {
    id: membershipEventId(row.computationId, 'd.recipient', moments.now, 'computed'),
    properties: `coalesce(coalesce(d.value, d.old_value) - $2::text[], '{}') || jsonb_build_object('trait_key', ${quoteLiteral(key)}::text)
      || coalesce((select jsonb_object_agg(f, d.value -> f) from unnest(due.fields) as f), '{}')`,
  };
}

async function readRows(
  session: Client,
  definition: Definition,
  row: DefinitionRow,
  inputs: Inputs,
): Promise<readonly SampleRow[]> {
  const { kind, key } = definition;
  const fields =
    kind === 'audience' ? [key] : [...new Set([...Object.keys(fieldTypes(inputs.shape)), ...Object.keys(row.fields)])];
  const due =
    kind === 'audience'
      ? '$2::text[]'
      : `case d.op when 'c' then d.columns
           else array(select k from jsonb_object_keys(case d.op when 'x' then d.old_value else d.value end) as k
             where k = any($2::text[]) order by k) end`;
  const value =
    kind === 'audience' ? `case d.op when 'x' then 'false' else 'true' end` : `coalesce((d.value -> f)::text, 'null')`;
  const { id, properties } = trackSql(definition, row, inputs);
  const others = `from snapshot as s where s.definition_id = ${row.id} and s.profile_id = d.profile_id`;
  const moved =
    row === UNREGISTERED
      ? 'false'
      : `case d.op when 'e' then exists (select ${others})
           when 'x' then exists (select ${others} and s.recipient not in (select recipient from delta where op = 'x'))
             or exists (select from delta as n where n.op = 'e' and n.profile_id = d.profile_id)
           else false end`;
  const some = (['e', 'x', 'c'] as const).map(
    (op) => `(select * from delta where op = '${op}' order by recipient limit $1)`,
  );
  const { rows } = await session.query<SampleRow>(
    `select d.op, d.recipient, case when d.introduce then d.beside end as beside, due.fields,
       array(select ${value} from unnest(due.fields) with ordinality as u(f, n) order by n) as values,
       ${id} as message_id, extract(epoch from ${inputs.moments.now})::text as occurred_at, (${properties})::text as properties,
       ${moved} as moved
     from (${some.join(' union all ')}) as d cross join lateral (select ${due} as fields) as due`,
    [EACH, fields],
  );
  return rows;
}

/** Reads samples while `delta` is there. `namespace` tells one installation's calls from another's. */
export async function readSamples(
  session: Client,
  {
    definition,
    row,
    inputs,
    namespace,
  }: { definition: Definition; row: DefinitionRow; inputs: Inputs; namespace: string },
): Promise<Samples> {
  const sends = [...definition.sends.values()];
  const types: Readonly<Record<string, FieldType | undefined>> = fieldTypes(inputs.shape);
  const computation: Computation = { kind: definition.kind, id: row.computationId, key: definition.key };
  const eventOf = (op: SampleRow['op']): string | undefined => {
    const send = sends.find(({ track }) => track);
    return definition.kind === 'trait' ? send?.computed : op === 'x' ? send?.exited : send?.entered;
  };
  const callsOf = (sample: SampleRow): string[] => {
    const { op, recipient, beside, message_id: messageId, occurred_at: at, properties } = sample;
    const traits = sample.fields.map((field, index) => ({
      field,
      json: sample.values[index] ?? 'null',
      type: types[field] ?? 'string',
    }));
    const event = eventOf(op);
    const calls: string[] = [];
    if (sends.some(({ identify }) => identify)) {
      calls.push(formatCall({ type: 'identify', messageId: null, recipient, beside, computation, traits }, namespace));
    }
    if (event !== undefined && !sample.moved) {
      const track = { type: 'track', event, messageId, occurredAt: Number(at), properties, dates: [] } as const;
      calls.push(formatCall({ ...track, recipient, beside, computation }, namespace));
    }
    return calls;
  };
  const rows = await readRows(session, definition, row, inputs);
  const of = (op: SampleRow['op']): Sample[] =>
    rows
      .filter((sample) => sample.op === op)
      .map((sample) => ({ recipient: sample.recipient, calls: callsOf(sample) }));
  const conflicts = await session.query<{ recipient: string }>(
    `select recipient from delta where op = 'd' order by recipient limit $1`,
    [EACH],
  );
  return {
    entered: of('e'),
    exited: of('x'),
    changed: of('c'),
    conflicting: conflicts.rows.map(({ recipient }) => recipient),
  };
}
