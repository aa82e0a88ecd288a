import type { Runner } from '../db/connect.js';
import { quoteLiteral } from '../db/connect.js';
import { databaseFailure } from '../db/failure.js';
import { COLUMNS_TOGETHER, DUE_NOW, LIST } from '../outbox/queue.js';

/**
 * Writes what a comparison found: snapshot, marks, events and history, in the one transaction that holds `delta`, under
 * the definition's lock. What changes in the snapshot and what a destination must be told of it commit together.
 *
 * The order matters. Who was known before is read before the snapshot changes, who is left is read after it. Marks are
 * written before events, so that they have the lower number: a person is identified before an event about them is sent.
 */
export interface Applied {
  definitionId: number;
  /** Null: what has changed was evaluated by itself. */
  runId: number | null;
  key: string;
  name: string;
  kind: 'audience' | 'trait';
  computationId: string;
  /** Fields of a trait, those it has no more included; empty for an audience. */
  fields: readonly string[];
  /** The run's time as an SQL literal. */
  now: string;
  /** The first run fills the snapshot and leaves the telling to the cursor of the first sync. */
  first: boolean;
  /** 0 live, 1 scheduled. */
  priority: 0 | 1;
  /** The recipients that were looked at; left out: all. */
  some?: readonly string[];
}

/** A statement of applying, and the kinds of differences (`op`) without which it does nothing. */
interface Step {
  ops: string;
  text: string;
  values?: unknown[];
  /** Whether it puts something into the outbox. */
  raises?: true;
}

/** The id of a track call, fixed when it arises: the same parts give the same id. */
function messageId(parts: readonly string[]): string {
  const text = parts.join(` || '|' || `);
  return `'personas_' || encode(substr(sha256(convert_to(${text}, 'UTF8')), 1, 16), 'hex')`;
}

/** The id of an Entered or Exited event of a member who entered at `enteredAt`. */
export function membershipEventId(
  computationId: string,
  recipient: string,
  enteredAt: string,
  which: 'entered' | 'exited' | 'computed',
): string {
  return messageId([
    quoteLiteral(computationId),
    recipient,
    `extract(epoch from ${enteredAt})::text`,
    quoteLiteral(which),
  ]);
}

/** The properties of an Entered or Exited event, as Segment's Personas sends them; what rides along comes first. */
export function membershipProperties(key: string, name: string, member: boolean, riders: string): string {
  return `coalesce(${riders}, '{}') || jsonb_build_object('audience_key', ${quoteLiteral(key)}::text, 'audience_name', ${quoteLiteral(name)}::text, ${quoteLiteral(key)}, ${member})`;
}

const fieldArray = (fields: readonly string[]): string => `array[${fields.map(quoteLiteral).join(', ')}]::text[]`;

/** Entries of people who were there before under another key, read before the snapshot changes; events alone ask for it. */
const findKnown = ({ definitionId }: Applied): Step => ({
  ops: 'e',
  text: `update delta as d set known = true where d.op = 'e' and d.profile_id is not null
     and exists (select from snapshot_${definitionId} as s where s.profile_id = d.profile_id)`,
});

/**
 * Those who entered, in the order of the key, so that the index grows at its end and stays compact. They go into the
 * definition's own partition, which is faster than by way of its parent.
 */
const insertEntries = ({ definitionId, now }: Applied): Step => ({
  ops: 'e',
  text: `insert into snapshot_${definitionId} (definition_id, recipient, profile_id, others, beside, value, entered_at)
       select ${definitionId}, recipient, profile_id, others, beside, value, ${now} from delta where op = 'e' order by recipient`,
});

const changeMembers = ({ definitionId }: Applied): readonly Step[] => [
  {
    ops: 'x',
    text: `delete from snapshot_${definitionId} as s using delta as d where s.definition_id = ${definitionId} and s.recipient = d.recipient and d.op = 'x'`,
  },
  {
    ops: 'ct',
    text: `update snapshot_${definitionId} as s set profile_id = d.profile_id, others = d.others, beside = d.beside, value = d.value, kept = false,
         beside_changed = d.op = 't' and (s.beside_changed or s.beside is distinct from d.beside)
       from delta as d where s.definition_id = ${definitionId} and s.recipient = d.recipient and d.op in ('c', 't')`,
  },
  {
    ops: 'k',
    text: `update snapshot_${definitionId} as s set kept = true from delta as d
       where s.definition_id = ${definitionId} and s.recipient = d.recipient and d.op = 'k'`,
  },
];

/**
 * Members whom the first sync hasn't reached have been told nothing: nothing is said when they leave, and what has changed
 * is said when they are reached.
 */
const untold = (
  d: string,
  dd: string,
): string => `(${d}.op in ('x', 'c') and ${dd}.backfill is not distinct from 'initial'
  and ${d}.entered_at <= ${dd}.backfill_until and (${dd}.backfill_position is null or ${d}.recipient > ${dd}.backfill_position))`;

/** The columns of an audience that a destination is due: its field, and its place on a list. */
export const audienceColumns = (dd: string, key: string): string =>
  `(case when ${dd}.identify then array[${key}] else '{}'::text[] end
    || case when ${dd}.list is not null then array[${quoteLiteral(LIST)}] else '{}'::text[] end)`;

function raiseMarks({ definitionId, key, kind, fields, priority }: Applied): readonly Step[] {
  const keysOf = (value: string): string =>
    `(select array_agg(k) from jsonb_object_keys(${value}) as k where k = any(${fieldArray(fields)}))`;
  const columns =
    kind === 'audience'
      ? audienceColumns('dd', quoteLiteral(key))
      : `case d.op when 'c' then d.columns when 'e' then ${keysOf('d.value')} else ${keysOf('d.old_value')} end`;
  return [
    {
      ops: 'exc',
      raises: true,
      text: `insert into outbox (kind, destination_id, definition_id, priority, recipient, columns, with_beside, confirm, exit_of, follows)
     select 'm', destination_id, ${definitionId}, ${priority}, recipient, columns, introduce, confirm, exit_of, follows from (
       select dd.destination_id, d.recipient, ${columns} as columns, d.introduce, case when d.vanished then 1 else 0 end as confirm,
         case when d.op = 'x' then d.profile_id end as exit_of,
         case when d.op = 'e' and (here.profile_id is not null or exists (select from outbox as x where x.exit_of = d.profile_id offset 0))
           then d.profile_id end as follows
       from delta as d join definition_destination as dd on dd.definition_id = ${definitionId} and dd.active and (dd.identify or dd.list is not null)
       -- Who leaves under one key and enters under another at once; where nobody enters, that isn't looked for.
       left join (select distinct profile_id from delta where op = 'x' and (select true from delta where op = 'e' limit 1)) as here
         on d.op = 'e' and here.profile_id = d.profile_id
       where d.op in ('e', 'x', 'c') and not ${untold('d', 'dd')}
     ) as raised where cardinality(columns) > 0
     order by recipient
     on conflict (recipient, destination_id, definition_id) where kind = 'm' do update set
       columns = ${COLUMNS_TOGETHER},
       version = nextval('version'), with_beside = outbox.with_beside or excluded.with_beside, confirm = excluded.confirm,
       exit_of = excluded.exit_of, passed_on = false, follows = case when excluded.exit_of is null then coalesce(excluded.follows, outbox.follows) end,
       priority = least(outbox.priority, excluded.priority), attempts = 0, due_at = ${DUE_NOW}`,
    },
    {
      ops: 'exc',
      text: `delete from dead_call as x using delta as d
     where x.kind = 'm' and x.definition_id = ${definitionId} and x.recipient = d.recipient and d.op in ('e', 'x', 'c')
       and (d.op <> 'c' or x.field = any(d.columns))`,
    },
  ];
}

/** Whether any destination is sent events of this definition. */
async function isTracked(session: Runner, { definitionId }: Applied): Promise<boolean> {
  const { rowCount } = await session.query(
    `select from definition_destination where definition_id = ${definitionId} and active and track limit 1`,
  );
  return rowCount !== 0;
}

/** Entered for those who were not there before, Exited for those who have nothing left, Trait Computed for new values. */
function raiseEvents(applied: Applied): readonly Step[] {
  const { definitionId, key, name, kind, computationId, fields, now, priority } = applied;
  // Somebody who was there, but whom the first sync had not reached, has not been told of: their entry is told now.
  const told = `select b.destination_id, x.profile_id from delta as x
      join definition_destination as b on b.definition_id = ${definitionId} and b.backfill = 'initial' and not ${untold('x', 'b')}
      where x.op = 'x' and x.profile_id is not null
    union select b.destination_id, k.profile_id from delta as k
      join definition_destination as b on b.definition_id = ${definitionId} and b.backfill = 'initial'
      join snapshot as s on s.definition_id = ${definitionId} and s.profile_id = k.profile_id and s.entered_at < ${now}
      where k.known`;
  const isNew = `(not d.known or dd.backfill is not distinct from 'initial' and t.profile_id is null)`;
  const insert = (ops: string, event: string, id: string, properties: string, where: string): Step => ({
    ops,
    raises: true,
    text: `insert into outbox (kind, destination_id, definition_id, priority, recipient, event, message_id, occurred_at, properties, beside, confirm)
       select 'e', dd.destination_id, ${definitionId}, ${priority}, d.recipient, dd.${event}, ${id}, ${now}, ${properties},
         case when d.introduce then d.beside end, case when d.vanished then 1 else 0 end
       from delta as d join definition_destination as dd on dd.definition_id = ${definitionId} and dd.active and dd.track
       left join (${told}) as t on t.destination_id = dd.destination_id and t.profile_id = d.profile_id
       where ${where} and not ${untold('d', 'dd')}
       order by d.recipient`,
  });
  if (kind === 'audience') {
    const riders = (value: string): string => value;
    return [
      insert(
        'e',
        'entered',
        membershipEventId(computationId, 'd.recipient', now, 'entered'),
        membershipProperties(key, name, true, riders('d.value')),
        `d.op = 'e' and ${isNew}`,
      ),
      insert(
        'x',
        'exited',
        membershipEventId(computationId, 'd.recipient', 'd.entered_at', 'exited'),
        membershipProperties(key, name, false, riders('d.old_value')),
        `d.op = 'x' and not exists (select from snapshot as s
         where s.definition_id = ${definitionId} and s.profile_id = d.profile_id)`,
      ),
    ];
  }
  const due = `case d.op when 'c' then d.columns else (select array_agg(k) from jsonb_object_keys(case d.op when 'x' then d.old_value else d.value end) as k where k = any(${fieldArray(fields)})) end`;
  const values = `(select jsonb_object_agg(k, d.value -> k) from unnest(${due}) as k)`;
  const riders = `coalesce(coalesce(d.value, d.old_value) - ${fieldArray(fields)}, '{}')`;
  return [
    insert(
      'ecx',
      'computed',
      messageId([
        quoteLiteral(computationId),
        'd.recipient',
        `extract(epoch from ${now})::text`,
        quoteLiteral('computed'),
      ]),
      `${riders} || jsonb_build_object('trait_key', ${quoteLiteral(key)}::text) || coalesce(${values}, '{}')`,
      `d.op in ('e', 'c', 'x') and ${isNew} and not (d.op = 'x' and exists (select from snapshot as s
       where s.definition_id = ${definitionId} and s.profile_id = d.profile_id))`,
    ),
  ];
}

const writeHistory = ({ definitionId, runId, now }: Applied): Step => ({
  ops: 'exc',
  text: `insert into transition (at, definition_id, run_id, kind, recipient)
     select ${now}, ${definitionId}, ${runId}, op, recipient from delta where op in ('e', 'x', 'c')`,
});

/** Recipients about whom profiles disagree now, for a person to look at: they keep what they had. */
const noteConflicts = ({ definitionId, some }: Applied): readonly Step[] => [
  {
    ops: 'excktwsd',
    text: `delete from conflict where definition_id = ${definitionId} ${some === undefined ? '' : 'and recipient = any($1)'}`,
    values: some === undefined ? [] : [some],
  },
  {
    ops: 'd',
    text: `insert into conflict (definition_id, recipient, profiles, others)
     select ${definitionId}, recipient, array_remove(rivals, null), array_append(others, profile_id) from delta where op = 'd'`,
  },
];

/** The first sync begins: each destination has a cursor over the snapshot, and gets its events too if it takes any. */
async function beginFirstSync(session: Runner, { definitionId, now }: Applied, members: number): Promise<void> {
  await session.query(
    `update definition_destination set backfill = 'initial', backfill_identify = identify or list is not null, backfill_events = track,
       backfill_position = null, backfill_until = ${now}, backfill_total = $2, backfill_done = 0, backfill_priority = 2
     where definition_id = $1 and active`,
    [definitionId, members],
  );
}

/**
 * Applies `delta`; the bare names of the session are those of the state. Returns false, with nothing of use written,
 * where `delta` gives a recipient twice: the caller rolls back and compares grouped.
 */
export async function applyDelta(session: Runner, applied: Applied, { send }: { send: boolean }): Promise<boolean> {
  const run = async (steps: readonly Step[]): Promise<void> => {
    for (const { text, values } of steps) await session.query(text, values);
  };
  const tracked = !applied.first && (await isTracked(session, applied));
  if (tracked) await run([findKnown(applied)]);
  if (!applied.first) await run(changeMembers(applied));
  let entered: number;
  try {
    entered = (await session.query(insertEntries(applied).text)).rowCount ?? 0;
  } catch (error) {
    if (databaseFailure(error)?.sqlstate === '23505') return false;
    throw error;
  }
  await run(noteConflicts(applied));
  if (applied.first) {
    if (send) await beginFirstSync(session, applied, entered);
    return true;
  }
  await run([...raiseMarks(applied), ...(tracked ? raiseEvents(applied) : []), writeHistory(applied)]);
  return true;
}

/**
 * The same where a few recipients were compared, grouped, by a definition that has run before: what can do nothing for
 * want of such differences isn't run, and nothing waits for the answer to the statement before. Returns the lowest id in
 * the outbox of what was raised; null where nothing was.
 */
export async function applySome(
  session: Runner,
  applied: Applied,
  { ops, tracked, conflicts }: { ops: ReadonlySet<string>; tracked: boolean; conflicts: boolean },
): Promise<number | null> {
  let lowest = Infinity;
  const run = async ({ text, values, raises }: Step): Promise<void> => {
    const { rows } = await session.query<{ id?: number }>(raises === true ? `${text} returning id` : text, values);
    if (raises === true) for (const { id = Infinity } of rows) lowest = Math.min(lowest, id);
  };
  const begin = (steps: readonly Step[]): Promise<void>[] =>
    steps.filter((step) => [...ops].some((op) => step.ops.includes(op))).map(run);
  const [forget, note] = noteConflicts(applied);
  const written = begin([
    ...(tracked ? [findKnown(applied)] : []),
    ...changeMembers(applied),
    insertEntries(applied),
    ...(forget !== undefined && conflicts ? [forget] : []),
    ...(note === undefined ? [] : [note]),
    ...raiseMarks(applied),
    ...(tracked ? raiseEvents(applied) : []),
    writeHistory(applied),
  ]);
  await Promise.all(written);
  return lowest === Infinity ? null : lowest;
}
