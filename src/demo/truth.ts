import type { Config } from '../config/types.js';
import type { Definition } from '../core/definition.js';
import { bindMoments } from '../core/moments.js';
import { quoteLiteral, type Pool, type Queryable } from '../db/connect.js';
import type { Simulator } from './simulator/server.js';

/**
 * Compares what Iterable holds with the truth: each definition's own SQL, joined to the people by a query of its own that
 * shares nothing with the comparison that the daemon makes. For a project of the `hybrid` kind, and definitions that are
 * sent as fields: of events, a changed address sends none.
 */
export interface Comparison {
  definition: string;
  /** Users who should have it, by the database. */
  truth: number;
  /** Users who have it, by Iterable. */
  iterable: number;
  /** Users for whom the two differ. */
  differing: number;
}

/** (recipient, value) of a definition: the userId where a person has one, else each address. */
async function readTruth(
  source: Pool,
  config: Config,
  definition: Definition,
  now: string,
): Promise<Map<string, unknown>> {
  const sql = bindMoments(definition.text.sql, {
    now: `${quoteLiteral(now)}::timestamptz`,
    lookback: `${quoteLiteral(definition.lookback ?? '0')}::interval`,
  }).text;
  const { rows } = await source.query<{ recipient: string; value: string }>(
    `with people as materialized (select profile_id, nullif(user_id::text, '') as user_id, nullif(lower(trim(email)), '') as email from (${config.profiles.text.sql}
     ) as p),
     owners as (select email, min(user_id) as user_id from people where user_id is not null and email is not null group by email),
     members as (select to_jsonb(m) as row, m.profile_id from (${sql}
     ) as m)
     select distinct on (1) coalesce(p.user_id, o.user_id, p.email) as recipient, m.row - 'profile_id' as value
     from members as m join people as p on p.profile_id = m.profile_id left join owners as o on o.email = p.email
     where coalesce(p.user_id, o.user_id, p.email) is not null
       and (p.user_id is not null or not exists (select from people as q where q.profile_id = p.profile_id and q.user_id is not null))
     order by 1, m.profile_id::text`,
  );
  return new Map(rows.map(({ recipient, value }) => [recipient, JSON.parse(value) as unknown]));
}

function sameValue(json: string | undefined, value: unknown): boolean {
  if (value === null || value === undefined) return json === undefined;
  if (json === undefined) return false;
  const parsed: unknown = JSON.parse(json);
  if (typeof value === 'number' && typeof parsed === 'number')
    return Math.abs(parsed - value) <= 1e-9 * Math.abs(value);
  if (typeof value === 'string' && typeof parsed === 'string' && /^\d{4}-\d\d-\d\dT/.test(value)) {
    return Math.floor(Date.parse(value) / 1000) === Math.floor(Date.parse(parsed.replace(' +', '+')) / 1000);
  }
  return JSON.stringify(parsed) === JSON.stringify(value);
}

/** Compares each definition as of its last run, `moments` by key, with the simulator. */
export async function compareWithTruth(
  source: Pool,
  state: Queryable,
  config: Config,
  simulator: Simulator,
): Promise<readonly Comparison[]> {
  const moments = await state.query<{ key: string; now: string }>(
    `select d.key, max(r.started_at)::text as now from run as r join definition as d on d.id = r.definition_id where r.outcome = 'succeeded' group by 1`,
  );
  const nowOf = new Map(moments.rows.map(({ key, now }) => [key, now]));
  const users = new Map([...simulator.users()].map((user) => [user.userId ?? user.email ?? '', user.fields]));
  const comparisons: Comparison[] = [];
  for (const definition of config.definitions) {
    const truth = await readTruth(source, config, definition, nowOf.get(definition.key) ?? '');
    let held: Set<string>;
    const differing = new Set<string>();
    if (definition.kind === 'audience') {
      const isMember = ([, fields]: [string, Record<string, string>]): boolean => fields[definition.key] === 'true';
      held = new Set([...users].filter(isMember).map(([recipient]) => recipient));
      for (const recipient of held) if (!truth.has(recipient)) differing.add(recipient);
      for (const recipient of truth.keys()) if (!held.has(recipient)) differing.add(recipient);
    } else {
      const columns = [...new Set([...truth.values()].flatMap((value) => Object.keys(value as object)))].filter(
        (column) => !definition.properties.includes(column),
      );
      const fieldOf = (column: string): string =>
        column === 'value' ? definition.key : `${definition.prefix}${column}`;
      const keeps = definition.onMissing === 'keep';
      held = new Set(
        [...users]
          .filter(
            ([recipient, fields]) =>
              columns.some((column) => fields[fieldOf(column)] !== undefined) && (!keeps || truth.has(recipient)),
          )
          .map(([recipient]) => recipient),
      );
      for (const recipient of new Set([...held, ...truth.keys()])) {
        const value = (truth.get(recipient) ?? {}) as Record<string, unknown>;
        if (columns.some((column) => !sameValue(users.get(recipient)?.[fieldOf(column)], value[column])))
          differing.add(recipient);
      }
    }
    comparisons.push({ definition: definition.key, truth: truth.size, iterable: held.size, differing: differing.size });
  }
  return comparisons;
}
