import type { ExpectedValue, UserFound } from '../core/call.js';
import type { FieldType } from '../core/field.js';
import { inTransaction } from '../db/connect.js';
import type { State } from '../db/state.js';
import { until } from '../lib/until.js';
import { COLUMNS_TOGETHER, DUE_NOW, hashOf, LIST } from '../outbox/queue.js';

/**
 * Reads users back from their destination and compares them with the snapshot: a sample of each definition's members,
 * and some who have left it. What can't be judged is counted apart: who has calls waiting or refused, whose value has
 * changed within a minute, who has left by one key and is in by another, and a definition whose first sync is under way.
 * What differs is read again after a minute, since Iterable takes calls before it applies them.
 */
export interface Verified {
  definition: string;
  destination: string;
  /** Users whose fields of this definition were compared. */
  checked: number;
  /** Users who can't be judged now, or couldn't be read. */
  unjudged: number;
  differing: number;
  repaired: number;
}

export interface Difference {
  definition: string;
  destination: string;
  recipient: string;
  field: string;
  /** JSON texts; null: the user isn't there. */
  expected: string;
  found: string | null;
}

/** What a user has; or when it can be read. */
export type CompareUser = (
  recipient: string,
  expected: readonly ExpectedValue[],
) => Promise<UserFound | 'later' | 'never'>;

export interface VerifyOptions {
  keys: readonly string[];
  /** Members of each definition. */
  sample: number;
  /** Marks what differs, so that it is sent again. */
  repair: boolean;
}

export interface VerifyDeps {
  state: State;
  /** The destinations that are sent to; `compare` null where users can't be read. */
  destinations: readonly { id: number; name: string; compare: CompareUser | null }[];
  /** Nothing more is read. */
  signal: AbortSignal;
  onProgress: (done: number) => Promise<void>;
}

const AT_ONCE = 50;
const PAGE = 500;
const ASYNCHRONOUS_MS = 60_000;
/** A destination that answers nobody for so long is given up. */
const GIVEN_UP_AFTER_MS = 60_000;
const ONCE_MORE_AFTER_MS = 250;
const MOST_SHOWN = 1_000;

interface Pair {
  definition_id: number;
  key: string;
  destination_id: number;
}

interface ExpectedRow {
  recipient: string;
  definition_id: number;
  key: string;
  field: string;
  json: string;
  type: FieldType;
  list_id: number | null;
  existing_only: boolean;
  is_open: boolean;
  /** Expected to have nothing, as somebody who isn't in the definition. */
  is_absent: boolean;
}

async function readPairs(state: State, destinationId: number, keys: readonly string[]): Promise<readonly Pair[]> {
  const { rows } = await state.pool.query<Pair>(
    `select d.id as definition_id, d.key, dd.destination_id from definition as d
     join definition_destination as dd on dd.definition_id = d.id and dd.active and (dd.identify or dd.list is not null)
     where dd.destination_id = $1 and (cardinality($2::text[]) = 0 or d.key = any($2)) and d.state <> 'archived'
       and d.first_run_at is not null and dd.backfill is null order by d.key`,
    [destinationId, keys],
  );
  return rows;
}

/** Members, drawn by a hash, and a tenth as many of those who have left. */
async function drawSample(state: State, { definition_id }: Pair, sample: number, seed: string): Promise<string[]> {
  const { rows } = await state.pool.query<{ recipient: string }>(
    `(select recipient from snapshot where definition_id = ${definition_id} and not kept
      order by hashtext(recipient || $2) limit $1)
     union all
     (select distinct x.recipient from transition as x where x.definition_id = ${definition_id} and x.kind = 'x'
        and not exists (select from snapshot as s where s.definition_id = ${definition_id} and s.recipient = x.recipient)
      limit ceil($1::int4 / 10.0))`,
    [sample, seed],
  );
  return rows.map(({ recipient }) => recipient);
}

async function readExpected(
  state: State,
  pairs: readonly Pair[],
  recipients: readonly string[],
): Promise<ExpectedRow[]> {
  const { rows } = await state.pool.query<ExpectedRow>(
    `select r.recipient, d.id as definition_id, d.key, c.field,
       case when c.field = '${LIST}' then dd.list_id end as list_id, dd.list_existing_only as existing_only,
       case d.kind when 'audience' then case when s.recipient is not null and not s.kept then 'true' else 'false' end
         else coalesce((s.value -> c.field)::text, 'null') end as json,
       case d.kind when 'audience' then 'boolean' else coalesce(d.fields ->> c.field, 'string') end as type,
       exists (select from outbox as o where o.kind = 'm' and o.recipient = r.recipient
           and o.destination_id = dd.destination_id and o.definition_id = d.id)
         or exists (select from dead_call as x where x.kind = 'm' and x.recipient = r.recipient
           and x.destination_id = dd.destination_id and x.definition_id = d.id and x.field = c.field)
         or exists (select from transition as t where t.recipient = r.recipient and t.definition_id = d.id
           and t.at > now() - interval '60 seconds') as is_open,
       s.recipient is null as is_absent
     from unnest($1::text[]) as r(recipient)
     cross join definition as d
     join definition_destination as dd on dd.definition_id = d.id and dd.destination_id = $3
     left join lateral (select * from snapshot as s
       where s.definition_id = d.id and s.recipient = r.recipient offset 0) as s on true
     cross join lateral unnest(case d.kind
       when 'audience' then case when dd.identify then array[d.key] else '{}' end
         || case when dd.list_id is not null then array['${LIST}'] else '{}' end
       else array(select jsonb_object_keys(d.fields)) end) as c(field)
     -- Of a trait, what was certainly sent: a field that wasn't may have come from elsewhere.
     where d.id = any($2) and (d.kind = 'audience' or s.value ? c.field or (s.recipient is null
       and (select count(*) from jsonb_object_keys(d.fields)) = 1
       and exists (select from transition as t where t.recipient = r.recipient and t.definition_id = d.id and t.kind = 'x')))
     order by r.recipient, d.key`,
    [recipients, pairs.map(({ definition_id }) => definition_id), pairs[0]?.destination_id ?? 0],
  );
  return rows;
}

/** Whether somebody who isn't in the definition by one name is by another: one user of the destination has both. */
async function isMember(state: State, definitionId: number | undefined, names: readonly string[]): Promise<boolean> {
  const { rowCount } = await state.pool.query('select from snapshot where definition_id = $1 and recipient = any($2)', [
    definitionId,
    names,
  ]);
  return rowCount !== null && rowCount > 0;
}

/** Marks fields of members to be sent again. */
async function repairFields(
  state: State,
  destinationId: number,
  differences: readonly (Difference & { definitionId: number })[],
): Promise<void> {
  await inTransaction(state.pool, async (client) => {
    await client.query(
      `insert into outbox (kind, destination_id, definition_id, priority, recipient, columns, with_beside)
       select 'm', $1, definition_id, 1, recipient, array_agg(field), true
       from unnest($2::int4[], $3::text[], $4::text[]) as d(definition_id, recipient, field)
       where not exists (select from forgotten where hash = ${hashOf('d.recipient')})
       group by definition_id, recipient order by recipient
       on conflict (recipient, destination_id, definition_id) where kind = 'm' do update set
         columns = ${COLUMNS_TOGETHER},
         version = nextval('version'), due_at = ${DUE_NOW}, attempts = 0`,
      [
        destinationId,
        differences.map(({ definitionId }) => definitionId),
        differences.map(({ recipient }) => recipient),
        differences.map(({ field }) => field),
      ],
    );
  });
}

interface Readable {
  id: number;
  name: string;
  compare: CompareUser;
}

type Judgement = 'same' | 'differs' | 'unjudged';

interface Found {
  /** By definition, then by recipient. */
  judged: Map<string, Map<string, Judgement>>;
  differences: (Difference & { definitionId: number })[];
}

function groupByRecipient(rows: readonly ExpectedRow[]): ReadonlyMap<string, readonly ExpectedRow[]> {
  const groups = new Map<string, ExpectedRow[]>();
  for (const row of rows) groups.set(row.recipient, [...(groups.get(row.recipient) ?? []), row]);
  return groups;
}

/** Reads users of one destination, some at once, and notes what differs. */
async function compareAll(
  deps: VerifyDeps,
  destination: Readable,
  { pairs, recipients }: { pairs: readonly Pair[]; recipients: readonly string[] },
): Promise<Found> {
  const judged: Found['judged'] = new Map(pairs.map(({ key }) => [key, new Map<string, Judgement>()]));
  const differences: Found['differences'] = [];
  let answeredAt = performance.now();
  const read = async (recipient: string, expected: readonly ExpectedValue[]): Promise<UserFound | null> => {
    for (;;) {
      const found = await destination.compare(recipient, expected);
      if (found !== 'later') {
        answeredAt = performance.now();
        return found === 'never' ? null : found;
      }
      if (deps.signal.aborted || performance.now() - answeredAt > GIVEN_UP_AFTER_MS) return null;
      await until(ONCE_MORE_AFTER_MS, deps.signal);
    }
  };
  const compareOne = async (recipient: string, rows: readonly ExpectedRow[]): Promise<void> => {
    const closed = rows.filter(({ is_open }) => !is_open);
    const expected = closed.map(({ field, json, type, list_id, existing_only }) => {
      return { field, json, type, listId: list_id, existingOnly: existing_only };
    });
    const found = expected.length === 0 ? null : await read(recipient, expected);
    const differing = new Map(found?.differing.map((each) => [each.field, each.found]));
    const otherNames = found?.names.filter((name) => name !== recipient) ?? [];
    for (const key of new Set(rows.map((row) => row.key))) {
      const own = closed.filter((row) => row.key === key);
      const wrong = own.filter(({ field }) => differing.has(field));
      const isKnownOtherwise =
        wrong.some((row) => row.is_absent) && (await isMember(deps.state, wrong[0]?.definition_id, otherNames));
      const isJudged = found !== null && own.length > 0 && !isKnownOtherwise;
      judged.get(key)?.set(recipient, !isJudged ? 'unjudged' : wrong.length > 0 ? 'differs' : 'same');
      for (const { field, json, definition_id: definitionId } of isJudged ? wrong : []) {
        const others = { definition: key, destination: destination.name, recipient, definitionId };
        differences.push({ ...others, field, expected: json, found: differing.get(field) ?? null });
      }
    }
  };
  for (let first = 0; first < recipients.length && !deps.signal.aborted; first += PAGE) {
    const page = recipients.slice(first, first + PAGE);
    const left = [...groupByRecipient(await readExpected(deps.state, pairs, page))];
    const work = async (): Promise<void> => {
      for (let next = left.pop(); next !== undefined && !deps.signal.aborted; next = left.pop())
        await compareOne(...next);
    };
    await Promise.all(Array.from({ length: AT_ONCE }, work));
    await deps.onProgress(first + page.length);
  }
  return { judged, differences };
}

async function verifyDestination(deps: VerifyDeps, destination: Readable, options: VerifyOptions): Promise<Found> {
  const pairs = await readPairs(deps.state, destination.id, options.keys);
  const seed = String(Math.random());
  const drawn = await Promise.all(pairs.map((pair) => drawSample(deps.state, pair, options.sample, seed)));
  const first = await compareAll(deps, destination, { pairs, recipients: [...new Set(drawn.flat())] });
  if (first.differences.length === 0) return first;
  // A call may have been accepted a moment ago.
  await until(ASYNCHRONOUS_MS, deps.signal);
  const doubtful = [...new Set(first.differences.map(({ recipient }) => recipient))];
  const again = await compareAll(deps, destination, { pairs, recipients: doubtful });
  for (const [key, recipients] of again.judged) {
    for (const [recipient, judgement] of recipients) first.judged.get(key)?.set(recipient, judgement);
  }
  return { judged: first.judged, differences: again.differences };
}

export async function verify(
  deps: VerifyDeps,
  options: VerifyOptions,
): Promise<{ verified: readonly Verified[]; differences: readonly Difference[] }> {
  const verified: Verified[] = [];
  const differences: Difference[] = [];
  for (const { id, name, compare } of deps.destinations) {
    if (compare === null) continue;
    const found = await verifyDestination(deps, { id, name, compare }, options);
    if (options.repair && found.differences.length > 0) await repairFields(deps.state, id, found.differences);
    for (const [definition, recipients] of found.judged) {
      const count = (wanted: Judgement): number => [...recipients.values()].filter((each) => each === wanted).length;
      const differing = count('differs');
      const repaired = options.repair ? differing : 0;
      const checked = count('same') + differing;
      verified.push({ definition, destination: name, checked, unjudged: count('unjudged'), differing, repaired });
    }
    differences.push(...found.differences.map(({ definitionId: _, ...difference }) => difference));
  }
  return { verified, differences: differences.slice(0, MOST_SHOWN) };
}
