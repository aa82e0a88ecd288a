import type pg from 'pg';
import { AUDIENCE, PROFILES, TRAIT } from './shop.js';

/**
 * What somebody would write by hand for the shop alone: the statements that a run is measured against. They know that
 * everybody has a userId, that nobody turns up twice and what the columns are, and they write nothing but a count.
 */
export interface Differences {
  entered: number;
  exited: number;
  changed: number;
}

const RECIPIENT = `coalesce('u:' || p.user_id, 'e:' || lower(btrim(p.email)))`;

const AUDIENCE_ROWS = `select ${RECIPIENT} as recipient, m.profile_id::text as profile_id, p.email as beside
  from (${AUDIENCE}) as m join (${PROFILES}) as p on p.profile_id = m.profile_id`;

/** Counts by one full join how the audience differs from its snapshot. */
export async function countAudience(client: pg.Client, definitionId: number): Promise<Differences> {
  return count(
    client,
    `select count(*) filter (where s.recipient is null) as entered, count(*) filter (where c.recipient is null) as exited,
       0 as changed
     from (${AUDIENCE_ROWS}) as c
     full join (select recipient from personas.snapshot where definition_id = ${definitionId}) as s
       on s.recipient = c.recipient`,
  );
}

/** The same for the trait, whose values are compared too. */
export async function countTrait(client: pg.Client, definitionId: number): Promise<Differences> {
  return count(
    client,
    `select count(*) filter (where s.recipient is null) as entered, count(*) filter (where c.recipient is null) as exited,
       count(*) filter (where c.recipient = s.recipient and c.value <> s.value) as changed
     from (select ${RECIPIENT} as recipient, jsonb_build_object('spend', m.value) as value
           from (${TRAIT}) as m join (${PROFILES}) as p on p.profile_id = m.profile_id) as c
     full join (select recipient, value from personas.snapshot where definition_id = ${definitionId}) as s
       on s.recipient = c.recipient`,
  );
}

async function count(client: pg.Client, statement: string): Promise<Differences> {
  const { rows } = await client.query<Record<keyof Differences, string>>(statement);
  const row = rows[0];
  return { entered: Number(row?.entered), exited: Number(row?.exited), changed: Number(row?.changed) };
}

/** Makes a table like a snapshot, with its indexes, and no rows. */
export async function createCopy(client: pg.Client, name: string, definitionId: number): Promise<void> {
  await client.query(`create table ${name} (like personas.snapshot_${definitionId} including all)`);
}

/** Fills such a table with the audience; returns the number of rows. */
export async function fillCopy(client: pg.Client, name: string, definitionId: number): Promise<number> {
  const { rowCount } = await client.query(
    `insert into ${name} (definition_id, recipient, profile_id, beside, entered_at)
     select ${definitionId}, recipient, profile_id, lower(btrim(beside)), now() from (${AUDIENCE_ROWS}) as rows`,
  );
  return rowCount ?? 0;
}
