import { hashOf } from '../outbox/queue.js';
import pc from 'picocolors';
import { recipientsMeant } from '../core/recipient.js';
import type { Queryable } from '../db/connect.js';
import type { CommandContext } from './command.js';
import { countOf, formatMoment, formatTable, plain, rawJson, SIGN, type RawJson } from './output.js';

/** `profile`: all that is known of one person, by any of their identifiers. */
interface Recipient {
  recipient: string;
  profileId: string | null;
  /** The identifier that rides along with the key. */
  beside: string | null;
}

interface Membership {
  definition: string;
  name: string;
  recipient: string;
  enteredAt: Date;
}

interface TraitValue {
  field: string;
  recipient: string;
  /** As JSON text. */
  value: string;
}

interface WaitingCall {
  destination: string;
  definition: string;
  kind: 'identify' | 'track';
  recipient: string;
  /** The fields that are due, or the event. */
  what: string[];
  dueAt: Date;
  attempts: number;
}

interface DeadCall extends Omit<WaitingCall, 'dueAt' | 'attempts'> {
  reason: string;
  answer: string;
  diedAt: Date;
  retryAt: Date | null;
}

interface Transition {
  at: Date;
  definition: string;
  kind: 'entered' | 'exited' | 'changed';
  recipient: string;
  run: number | null;
}

interface Conflict {
  definition: string;
  recipient: string;
  /** Some of the profiles that share the recipient and have different values. */
  profiles: string[];
}

interface Person {
  recipients: readonly Recipient[];
  memberships: readonly Membership[];
  traits: readonly TraitValue[];
  waiting: readonly WaitingCall[];
  dead: readonly DeadCall[];
  transitions: readonly Transition[];
  conflicting: readonly Conflict[];
  /** Was erased on request, and is left out of everything. */
  forgotten: boolean;
}

const TRANSITIONS = 20;

/** The recipients that the text means, directly, by what rides along, or by a profile that they share. */
async function findRecipients(pool: Queryable, text: string): Promise<readonly Recipient[]> {
  const meant = recipientsMeant(text);
  const ids = meant.map((recipient) => recipient.slice(2));
  const { rows } = await pool.query<Recipient>(
    `with named as (
       select recipient, profile_id from snapshot where definition_id = any(array(select id from definition)) and recipient = any($1)
       union select recipient, profile_id from snapshot where beside = any($2)),
     one as (
       select recipient from named
       union select s.recipient from snapshot as s where s.profile_id in (select profile_id from named)
       union select recipient from outbox where recipient = any($1)
       union select recipient from dead_call where recipient = any($1)
       union select recipient from conflict where recipient = any($1)
       union select recipient from transition where recipient = any($1))
     select one.recipient, held.profile_id as "profileId", held.beside
     from one left join lateral (
       select min(s.profile_id) as profile_id, min(s.beside) as beside from snapshot as s
       where s.definition_id = any(array(select id from definition)) and s.recipient = one.recipient) as held on true
     order by one.recipient desc`,
    [meant, ids],
  );
  return rows;
}

async function readPerson(pool: Queryable, text: string): Promise<Person> {
  const recipients = await findRecipients(pool, text);
  const keys = recipients.map(({ recipient }) => recipient);
  const read = async <T extends object>(select: string, more: readonly unknown[] = []): Promise<readonly T[]> =>
    (await pool.query<T>(select, [keys, ...more])).rows;
  const held = `snapshot as s join definition as d on d.id = s.definition_id
    where s.definition_id = any(array(select id from definition)) and s.recipient = any($1)`;
  const memberships = await read<Membership>(
    `select d.key as definition, d.name, s.recipient, s.entered_at as "enteredAt" from ${held}
       and d.kind = 'audience' and not s.kept order by d.key, s.recipient desc`,
  );
  const traits = await read<TraitValue>(
    `select v.key as field, s.recipient, v.value::text as value
     from (select s.recipient, s.value, d.fields from ${held} and d.kind = 'trait') as s
     cross join lateral jsonb_each(s.value) as v where s.fields ? v.key order by v.key, s.recipient desc`,
  );
  const waiting = await read<WaitingCall>(
    `select t.name as destination, d.key as definition, case o.kind when 'm' then 'identify' else 'track' end as kind, recipient, coalesce(columns, array[event]) as what,
       o.due_at as "dueAt", attempts
     from outbox as o join destination as t on t.id = o.destination_id join definition as d on d.id = o.definition_id
     where recipient = any($1) order by o.id`,
  );
  const dead = await read<DeadCall>(
    `select t.name as destination, d.key as definition, case x.kind when 'm' then 'identify' else 'track' end as kind,
       recipient, array[coalesce(field, event)] as what, x.reason, answer, died_at as "diedAt", retry_at as "retryAt"
     from dead_call as x join destination as t on t.id = x.destination_id join definition as d on d.id = x.definition_id
     where recipient = any($1) order by x.id`,
  );
  const transitions = await read<Transition>(
    `select at, d.key as definition, case x.kind when 'e' then 'entered' when 'x' then 'exited' else 'changed' end as kind,
       recipient, run_id as run
     from transition as x join definition as d on d.id = x.definition_id
     where recipient = any($1) order by at desc, d.key limit $2`,
    [TRANSITIONS],
  );
  const conflicting = await read<Conflict>(
    `select d.key as definition, recipient, profiles
     from conflict as x join definition as d on d.id = x.definition_id where recipient = any($1) order by d.key`,
  );
  const forgotten = await pool.query(
    `select from forgotten where hash in (
       select ${hashOf('r')} from unnest($1::text[]) as r)
     limit 1`,
    [recipientsMeant(text)],
  );
  const erased = forgotten.rowCount !== 0;
  return { recipients, memberships, traits, waiting, dead, transitions, conflicting, forgotten: erased };
}

/** By field; where recipients of the person differ, the first one's value. */
function traitsJson(traits: readonly TraitValue[]): Record<string, RawJson> {
  const values: Record<string, RawJson> = {};
  for (const { field, value } of traits) values[field] ??= rawJson(value);
  return values;
}

interface Row {
  cells: readonly string[];
  recipient: string;
}

/** Rows in columns; those that say the same of several recipients become one, with whom it is about at the end. */
function describeRows(rows: readonly Row[], recipients: number): readonly string[] {
  const merged = new Map<string, { cells: readonly string[]; about: string[] }>();
  for (const { cells, recipient } of rows) {
    const id = JSON.stringify(cells);
    const same = merged.get(id) ?? { cells, about: [] };
    same.about.push(plain(recipient.slice(2)));
    merged.set(id, same);
  }
  const [first] = rows;
  if (first === undefined) return [];
  const table = formatTable(
    [...first.cells, ''].map(() => ({ title: '' })),
    [...merged.values()].map(({ cells, about }) => [...cells, about.length === recipients ? '' : about.join(', ')]),
  );
  return table.split('\n').slice(1);
}

function describeRecipient({ recipient, beside, profileId }: Recipient): string {
  const facts = [
    recipient.startsWith('u:') ? 'userId' : 'email',
    ...(beside === null ? [] : [`with ${plain(beside)}`]),
    ...(profileId === null ? [] : [`profile ${plain(profileId)}`]),
  ];
  return `${pc.bold(plain(recipient.slice(2)))} ${pc.dim(facts.join(', '))}`;
}

/** What is known under its titles; a title under which there is nothing is left out. */
function describePerson({ memberships, traits, waiting, dead, transitions, conflicting }: Person, now: Date) {
  const rowsOf = <T extends { recipient: string }>(items: readonly T[], cells: (item: T) => string[]): Row[] =>
    items.map((item) => ({ cells: cells(item), recipient: item.recipient }));
  const dueIn = ({ dueAt, attempts }: WaitingCall): string =>
    dueAt > now ? `${formatMoment(dueAt, now)}, after ${countOf(attempts, 'attempt')}` : 'now';
  return [
    { title: 'Audiences', rows: rowsOf(memberships, (each) => [each.definition, formatMoment(each.enteredAt, now)]) },
    { title: 'Traits', rows: rowsOf(traits, (each) => [plain(each.field), plain(each.value)]) },
    {
      title: 'Waiting',
      rows: rowsOf(waiting, (each) => [
        `${each.kind} to ${each.destination}`,
        each.definition,
        plain(each.what.join(', ')),
        dueIn(each),
      ]),
    },
    {
      title: 'Refused',
      rows: rowsOf(dead, (each) => [
        `${each.kind} to ${each.destination}`,
        each.definition,
        plain(each.what.join(', ')),
        formatMoment(each.diedAt, now),
        `${plain(each.reason)} ${pc.dim(plain(each.answer))}`,
      ]),
    },
    {
      title: 'Kept as it was, since profiles that share the recipient have different values',
      rows: rowsOf(conflicting, (each) => [
        each.definition,
        each.profiles.length === 0 ? '' : `profiles ${each.profiles.map(plain).join(', ')}`,
      ]),
    },
    {
      title: 'Last changes',
      rows: rowsOf(transitions, (each) => [formatMoment(each.at, now), each.kind, each.definition]),
    },
  ];
}

export async function profile({ opened, output }: CommandContext, text: string): Promise<number> {
  const person = await readPerson(opened.databases.state.pool, text);
  const { recipients, traits, dead, forgotten } = person;
  output.object({ ...person, traits: traitsJson(traits) });
  if (forgotten) output.line(`${SIGN.note} This person was erased on request, and is left out of everything.`);
  if (recipients.length === 0) {
    output.line(
      'Nothing is known of anyone by this email or userId: in no audience, with no trait, and nothing waits.',
    );
    return 0;
  }
  for (const recipient of recipients) output.line(describeRecipient(recipient));
  for (const { title, rows } of describePerson(person, new Date())) {
    const lines = describeRows(rows, recipients.length);
    if (lines.length > 0) output.line(`\n${pc.bold(title)}\n${lines.map((line) => `  ${line}`).join('\n')}`);
  }
  if (dead.length > 0) output.line('\n`personas-sync failed list` says what can be done about refused calls.');
  return 0;
}
