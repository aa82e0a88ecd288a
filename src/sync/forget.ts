import { recipientsMeant } from '../core/recipient.js';
import { inTransaction, type Client } from '../db/connect.js';
import type { State } from '../db/state.js';
import { hashOf } from '../outbox/queue.js';
import { CUTS_OFF, lockDefinition } from '../db/locks.js';

/**
 * Erases a person from every table, and remembers a keyed hash of each of their recipients so that they aren't queued
 * again. Nothing is sent: erasing a user in Iterable is Iterable's own call, and another's decision.
 */
export interface Forgotten {
  recipients: readonly string[];
  rows: number;
}

/** The recipients of the person who is known by `text`: by the key, by what rides along with it, or by the same profile. */
async function findRecipients(client: Pick<Client, 'query'>, text: string): Promise<readonly string[]> {
  const meant = recipientsMeant(text);
  const ids = [...new Set(meant.map((recipient) => recipient.slice(2)))];
  const { rows } = await client.query<{ recipient: string }>(
    `with named as (
       select definition_id, recipient, profile_id from snapshot
       where definition_id in (select id from definition) and recipient = any($1) or beside = any($2))
     select recipient from named
     union select s.recipient from named as n join snapshot as s on s.definition_id = n.definition_id and s.profile_id = n.profile_id
     union select recipient from outbox where recipient = any($1) or beside = any($2)
     union select recipient from dead_call where recipient = any($1) or beside = any($2)
     union select recipient from conflict where recipient = any($1)
     union select recipient from transition where recipient = any($1)`,
    [meant, ids],
  );
  return [...new Set([...rows.map(({ recipient }) => recipient), ...meant])];
}

/** What would be erased; changes nothing. */
export async function previewForget(state: State, text: string): Promise<Forgotten> {
  const recipients = await findRecipients(state.pool, text);
  const { rows } = await state.pool.query<{ rows: number }>(
    `select (select count(*) from snapshot where recipient = any($1)) + (select count(*) from outbox where recipient = any($1))
       + (select count(*) from dead_call where recipient = any($1)) + (select count(*) from conflict where recipient = any($1))
       + (select count(*) from transition where recipient = any($1)) + (select count(*) from sample where recipient = any($1))
       + (select count(*) from difference where recipient = any($1)) as rows`,
    [recipients],
  );
  return { recipients, rows: rows[0]?.rows ?? 0 };
}

/** From now on no run takes these recipients up: each looks once more when it has the definition's lock. */
async function remember(client: Client, recipients: readonly string[]): Promise<void> {
  await client.query(
    `insert into forgotten (hash)
     select ${hashOf('r')} from unnest($1::text[]) as r
     on conflict do nothing`,
    [recipients],
  );
}

/**
 * The hashes are committed first, then the requests of `verify` and every definition's lock are waited for: what took the
 * person up before has committed by then, and what comes after leaves them out. The requests come first: while they are
 * waited for, no run and no batch waits, too.
 */
export async function forget(state: State, text: string): Promise<Forgotten> {
  const meant = await inTransaction(state.pool, async (client) => {
    const recipients = await findRecipients(client, text);
    await remember(client, recipients);
    return recipients;
  });
  return inTransaction(state.pool, async (client) => {
    // What `verify` writes down of people it does while it holds its request, which takes as long as sorting a snapshot.
    await client.query(
      `select ${CUTS_OFF} from request where kind = 'verify' and outcome is null order by id for update`,
    );
    const definitions = await client.query<{ id: number }>('select id from definition order by id');
    for (const { id } of definitions.rows) await lockDefinition(client, id);
    const recipients = [...new Set([...meant, ...(await findRecipients(client, text))])];
    await remember(client, recipients);
    let rows = 0;
    const profiles = new Set<string>();
    for (const { id: definition_id } of definitions.rows) {
      const gone = await client.query<{ kept: boolean; profile_id: string | null }>(
        'delete from snapshot where definition_id = $1 and recipient = any($2) returning kept, profile_id',
        [definition_id, recipients],
      );
      rows += gone.rows.length;
      for (const { profile_id } of gone.rows) if (profile_id !== null) profiles.add(profile_id);
      const members = gone.rows.filter(({ kept }) => !kept).length;
      await client.query('update definition set members = greatest(0, members - $2) where id = $1', [
        definition_id,
        members,
      ]);
    }
    for (const table of ['outbox', 'dead_call', 'conflict', 'transition', 'sample', 'difference']) {
      const gone = await client.query(`delete from ${table} where recipient = any($1)`, [recipients]);
      rows += gone.rowCount ?? 0;
    }
    for (const table of ['due', 'validity']) {
      await client.query(`delete from ${table} where profile_id = any($1)`, [[...profiles]]);
    }
    await client.query(`delete from noted where name = any($1)`, [[...profiles, ...recipients]]);
    return { recipients, rows };
  });
}
