import type { ExpectedValue, UserFound } from '../core/call.js';
import type { FieldType } from '../core/field.js';
import type { State } from '../db/state.js';
import { UnavailableError } from '../lib/errors.js';
import { until } from '../lib/until.js';
import { LIST } from '../outbox/queue.js';
import type { Findings, Found } from './findings.js';

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
  /** Whom is read and what differs; what an earlier attempt has left there is dropped. */
  findings: Findings;
  /** The destinations that are sent to; `compare` null where users can't be read. */
  destinations: readonly { id: number; name: string; compare: CompareUser | null }[];
  /** Nothing more is read. */
  signal: AbortSignal;
  onProgress: (done: number) => Promise<void>;
}

const AT_ONCE = 50;
const ASYNCHRONOUS_MS = 60_000;
/** A destination that answers nobody for so long is given up. */
const GIVEN_UP_AFTER_MS = 60_000;
const ONCE_MORE_AFTER_MS = 250;

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

interface Readable {
  id: number;
  name: string;
  compare: CompareUser;
}

type Judgement = 'same' | 'differs' | 'unjudged';

interface Judged {
  key: string;
  judgement: Judgement;
  found: readonly Found[];
}

/** By definition. */
type Counts = ReadonlyMap<string, Record<Judgement, number>>;

function groupByRecipient(rows: readonly ExpectedRow[]): ReadonlyMap<string, readonly ExpectedRow[]> {
  const groups = new Map<string, ExpectedRow[]>();
  for (const row of rows) groups.set(row.recipient, [...(groups.get(row.recipient) ?? []), row]);
  return groups;
}

/** Reads users of one destination, some at once, and judges them for each definition; in the order of their names. */
function createComparison(
  deps: VerifyDeps,
  destination: Readable,
): (rows: readonly ExpectedRow[]) => Promise<readonly (readonly Judged[])[]> {
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
  const judge = async (recipient: string, rows: readonly ExpectedRow[]): Promise<readonly Judged[]> => {
    const closed = rows.filter(({ is_open }) => !is_open);
    const expected = closed.map(({ field, json, type, list_id, existing_only }) => {
      return { field, json, type, listId: list_id, existingOnly: existing_only };
    });
    const user = expected.length === 0 ? null : await read(recipient, expected);
    const differing = new Map(user?.differing.map((each) => [each.field, each.found]));
    const otherNames = user?.names.filter((name) => name !== recipient) ?? [];
    const judged: Judged[] = [];
    for (const key of new Set(rows.map((row) => row.key))) {
      const own = closed.filter((row) => row.key === key);
      const wrong = own.filter(({ field }) => differing.has(field));
      const isKnownOtherwise =
        wrong.some((row) => row.is_absent) && (await isMember(deps.state, wrong[0]?.definition_id, otherNames));
      const isJudged = user !== null && own.length > 0 && !isKnownOtherwise;
      const found = (isJudged ? wrong : []).map(({ definition_id: definitionId, field, json }) => {
        return { definitionId, recipient, field, expected: json, found: differing.get(field) ?? null };
      });
      judged.push({ key, judgement: !isJudged ? 'unjudged' : found.length > 0 ? 'differs' : 'same', found });
    }
    return judged;
  };
  return async (rows) => {
    const left = [...groupByRecipient(rows)].entries();
    const judged: (readonly Judged[])[] = [];
    const work = async (): Promise<void> => {
      for (const [place, [recipient, expected]] of left) {
        if (deps.signal.aborted) return;
        judged[place] = await judge(recipient, expected);
      }
    };
    await Promise.all(Array.from({ length: AT_ONCE }, work));
    return judged;
  };
}

async function verifyDestination(
  deps: VerifyDeps,
  destination: Readable,
  options: VerifyOptions,
): Promise<readonly Verified[]> {
  const { state, findings, signal } = deps;
  const pairs = await readPairs(state, destination.id, options.keys);
  const counts: Counts = new Map(pairs.map(({ key }) => [key, { same: 0, differs: 0, unjudged: 0 }]));
  const seed = String(Math.random());
  for (const { definition_id } of pairs)
    await findings.draw(definition_id, destination.id, { sample: options.sample, seed });
  const compare = createComparison(deps, destination);
  /** A page after the other; gives whether anything differs. Of whom something does counts by the last look alone. */
  const look = async (from: 'sample' | 'difference', isLast: boolean): Promise<boolean> => {
    let done = 0;
    let differs = false;
    let page = await findings.page(from, destination.id, '');
    for (let last = page.at(-1); last !== undefined; last = page.at(-1)) {
      const judged = await compare(await readExpected(state, pairs, page));
      if (signal.aborted) return false;
      const found = judged.map((each) => each.flatMap((one) => one.found));
      judged.forEach((each, place) => {
        if (!isLast && (found[place]?.length ?? 0) > 0) return;
        for (const { key, judgement } of each) {
          const count = counts.get(key);
          if (count !== undefined) count[judgement] += 1;
        }
      });
      await findings.note(destination.id, page, found.flat());
      differs ||= found.some((each) => each.length > 0);
      done += page.length;
      await deps.onProgress(done);
      page = await findings.page(from, destination.id, last);
    }
    return differs;
  };
  if (await look('sample', false)) {
    // A call may have been accepted a moment ago.
    await until(ASYNCHRONOUS_MS, signal);
    await look('difference', true);
  }
  if (options.repair && !signal.aborted) await findings.repair(destination.id);
  return [...counts].map(([definition, { same, differs, unjudged }]) => {
    const repaired = options.repair ? differs : 0;
    return {
      definition,
      destination: destination.name,
      checked: same + differs,
      unjudged,
      differing: differs,
      repaired,
    };
  });
}

/** What differs is in `findings` afterwards. Where it fails or is stopped, nothing is left there. */
export async function verify(deps: VerifyDeps, options: VerifyOptions): Promise<readonly Verified[]> {
  await deps.findings.clear();
  const verified: Verified[] = [];
  try {
    for (const { id, name, compare } of deps.destinations) {
      if (compare !== null) verified.push(...(await verifyDestination(deps, { id, name, compare }, options)));
      if (deps.signal.aborted) throw new UnavailableError('Stopped.');
    }
  } catch (error) {
    await deps.findings.clear();
    throw error;
  }
  return verified;
}
