import { inTransaction, withCancellable, type Client, type Pool, type Queryable } from '../db/connect.js';
import { CUTS_OFF } from '../db/locks.js';
import { UnavailableError } from '../lib/errors.js';
import { COLUMNS_TOGETHER, DUE_NOW, hashOf } from '../outbox/queue.js';

/**
 * Whom `verify` has still to read and what it has found, in the tables `sample` and `difference`: however many there are,
 * neither the leader nor the command holds more than a page of them. People are in them, so each row goes as soon as it
 * has been read, at the latest ten minutes after the request has ended.
 *
 * Whatever is written holds the request's row, and only while it is this leader's to carry out. `forget` takes that row
 * once it has remembered whom it erases: what was written before is erased, what comes after leaves them out. So does
 * whoever leads next, to carry the request out: an instance that stands still with the row is cut off by the server.
 */
export interface Difference {
  definition: string;
  destination: string;
  recipient: string;
  field: string;
  /** JSON texts; null: the user isn't there. */
  expected: string;
  found: string | null;
}

export type Found = Pick<Difference, 'recipient' | 'field' | 'expected' | 'found'> & { definitionId: number };

/** Recipients, or rows, that are read at once. */
const PAGE = 500;

export interface Findings {
  /** Adds members of a definition, drawn by a hash, and a tenth as many of those who have left. */
  draw: (definitionId: number, destinationId: number, options: { sample: number; seed: string }) => Promise<void>;
  /** The next recipients, in order: of those who were drawn, or of those of whom something differs. */
  page: (from: 'sample' | 'difference', destinationId: number, after: string) => Promise<readonly string[]>;
  /** Puts what these recipients turned out to have in the place of what was known of them. */
  note: (destinationId: number, recipients: readonly string[], found: readonly Found[]) => Promise<void>;
  /** Marks what differs at a destination to be sent again. */
  repair: (destinationId: number) => Promise<void>;
  /** Drops all, where it is still this leader's. */
  clear: () => Promise<void>;
}

const isNotForgotten = (recipient: string): string =>
  `not exists (select from forgotten where hash = ${hashOf(recipient)})`;

/** The findings of the request that `leader` carries out, until `signal` fires. */
export function openFindings(
  pool: Pool,
  { request, leader, signal }: { request: number; leader: string; signal: AbortSignal },
): Findings {
  const isOurs = async (client: Client): Promise<boolean> => {
    const { rowCount } = await client.query(
      `select ${CUTS_OFF} from request where id = $1 and taken_by = $2 and outcome is null for share`,
      [request, leader],
    );
    return rowCount === 1;
  };
  const refuseOthers = async (client: Client): Promise<void> => {
    if (!(await isOurs(client))) throw new UnavailableError('Another instance carries the request out.');
  };
  const write = (work: (client: Client) => Promise<void>): Promise<void> =>
    inTransaction(pool, async (client) => {
      await refuseOthers(client);
      await work(client);
    });

  const page: Findings['page'] = async (from, destinationId, after) => {
    // Until it is known how many there are, each page would sort them all.
    if (after === '') await pool.query(`analyze ${from}`);
    const { rows } = await pool.query<{ recipient: string }>(
      `select distinct recipient from ${from}
       where request_id = $1 and destination_id = $2 and recipient > $3 order by recipient limit ${PAGE}`,
      [request, destinationId, after],
    );
    return rows.map(({ recipient }) => recipient);
  };

  return {
    page,
    draw: (definitionId, destinationId, { sample, seed }) =>
      withCancellable(pool, signal, async (client) => {
        await client.query('begin');
        await refuseOthers(client);
        await client.query(
          `insert into sample (request_id, destination_id, recipient)
           select $1, $2, drawn.recipient from (
             (select recipient from snapshot where definition_id = ${definitionId} and not kept
              order by hashtext(recipient || $4) limit $3)
             union all
             (select distinct x.recipient from transition as x where x.definition_id = ${definitionId} and x.kind = 'x'
                and not exists (select from snapshot as s
                  where s.definition_id = ${definitionId} and s.recipient = x.recipient)
              limit ceil($3::int4 / 10.0))) as drawn
           where ${isNotForgotten('drawn.recipient')}
           on conflict do nothing`,
          [request, destinationId, sample, seed],
        );
        await client.query('commit');
      }),
    note: (destinationId, recipients, found) =>
      write(async (client) => {
        for (const table of ['sample', 'difference']) {
          await client.query(
            `delete from ${table} where request_id = $1 and destination_id = $2 and recipient = any($3)`,
            [request, destinationId, recipients],
          );
        }
        await client.query(
          `insert into difference (request_id, destination_id, definition_id, recipient, field, expected, found)
           select $1, $2, f.definition_id, f.recipient, f.field, f.expected, f.found
           from unnest($3::int4[], $4::text[], $5::text[], $6::text[], $7::text[]) with ordinality
             as f(definition_id, recipient, field, expected, found, place)
           where ${isNotForgotten('f.recipient')} order by f.place`,
          [
            request,
            destinationId,
            found.map(({ definitionId }) => definitionId),
            found.map(({ recipient }) => recipient),
            found.map(({ field }) => field),
            found.map(({ expected }) => expected),
            found.map((each) => each.found),
          ],
        );
      }),
    repair: async (destinationId) => {
      let recipients = await page('difference', destinationId, '');
      for (let last = recipients.at(-1); last !== undefined; last = recipients.at(-1)) {
        const some = recipients;
        await write(async (client) => {
          await client.query(
            `insert into outbox (kind, destination_id, definition_id, priority, recipient, columns, with_beside)
             select 'm', $2, definition_id, 1, recipient, array_agg(field), true
             from difference as d
             where request_id = $1 and destination_id = $2 and recipient = any($3) and ${isNotForgotten('d.recipient')}
             group by definition_id, recipient order by recipient, definition_id
             on conflict (recipient, destination_id, definition_id) where kind = 'm' do update set
               columns = ${COLUMNS_TOGETHER},
               version = nextval('version'), due_at = ${DUE_NOW}, attempts = 0`,
            [request, destinationId, some],
          );
        });
        recipients = await page('difference', destinationId, last);
      }
    },
    clear: () =>
      inTransaction(pool, async (client) => {
        if (!(await isOurs(client))) return;
        for (const table of ['sample', 'difference'])
          await client.query(`delete from ${table} where request_id = $1`, [request]);
      }),
  };
}

/** Where nobody has read on for so long, nobody will. */
const UNREAD = `interval '10 minutes'`;

export async function countDifferences(pool: Queryable, request: number): Promise<number> {
  const { rows } = await pool.query<{ count: number }>(
    'select count(*) as count from difference where request_id = $1',
    [request],
  );
  return rows[0]?.count ?? 0;
}

/** The next differences of a request that has ended, after the one of this id. Throws where it has been left for too long. */
export async function readDifferences(
  pool: Queryable,
  request: number,
  { after, most = PAGE }: { after: number; most?: number },
): Promise<readonly (Difference & { id: number })[]> {
  const there = await pool.query(
    `update request set read_at = now()
     where id = $1 and greatest(finished_at, read_at) > now() - ${UNREAD}`,
    [request],
  );
  if (there.rowCount === 0)
    throw new UnavailableError('What was found has been deleted, since nobody read on for ten minutes; verify again.');
  const { rows } = await pool.query<Difference & { id: number }>(
    `select x.id, d.key as definition, t.name as destination, x.recipient, x.field, x.expected, x.found
     from (select * from difference where request_id = $1 and id > $2 order by id limit $3) as x
     join definition as d on d.id = x.definition_id join destination as t on t.id = x.destination_id order by x.id`,
    [request, after, most],
  );
  return rows;
}

/** Drops the differences of a request that have been read: all, or those up to an id. */
export async function dropDifferences(pool: Queryable, request: number, upTo: number | null = null): Promise<void> {
  await pool.query('delete from difference where request_id = $1 and ($2::int8 is null or id <= $2)', [request, upTo]);
}

/** Drops what nobody has read. */
export async function dropUnread(pool: Queryable): Promise<void> {
  for (const table of ['sample', 'difference']) {
    await pool.query(
      `delete from ${table} using request as r
       where r.id = ${table}.request_id and greatest(r.finished_at, r.read_at) < now() - ${UNREAD}`,
    );
  }
}
