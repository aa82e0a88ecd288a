import { sentence, unknownWord } from '../config/wording.js';
import type { Definition } from '../core/definition.js';
import { OperatorError } from '../lib/errors.js';
import type { DefinitionState } from '../db/state.js';
import type { DefinitionRow } from '../sync/comparison.js';
import type { Opened } from './open.js';

/** What the configuration and the state know by name, and whether what was named is among it. */
export interface Known extends DefinitionRow {
  key: string;
  kind: Definition['kind'];
  state: DefinitionState;
  onDelete: Definition['onDelete'];
  heldRun: number | null;
  /** Destinations that get identify calls for it, as `name host`. */
  identified: readonly string[];
}

/** The definitions that were ever registered, by key; none where there is no state yet. */
export async function readKnown({ databases, hasState }: Opened): Promise<ReadonlyMap<string, Known>> {
  if (!hasState) return new Map();
  const { rows } = await databases.state.pool.query<Known>(
    `select d.id, d.key, d.kind, d.state, d.on_delete as "onDelete", d.computation_id as "computationId", d.members,
       d.first_run_at is null as first, d.text_hash as "textHash", d.fields, held.id as "heldRun",
       array(select t.name || ' ' || t.host from definition_destination as dd join destination as t on t.id = dd.destination_id
             where dd.definition_id = d.id and dd.active and dd.identify) as identified
     from definition as d
     left join run as held on held.definition_id = d.id and held.outcome = 'held' and held.decision is null`,
  );
  return new Map(rows.map((row) => [row.key, row]));
}

/** Refuses names that nothing has, each with the one that was probably meant. */
export function refuseUnknown(words: readonly string[], known: readonly string[], what: string): void {
  const problems = words
    .filter((word) => !known.includes(word))
    .map((word) => ({
      message:
        known.length === 0
          ? `There is no ${what} "${word}"; there is none at all.`
          : sentence(`"${word}" ${unknownWord(word, known, what)}`),
    }));
  if (problems.length > 0) throw new OperatorError(problems);
}

/** Keys of the configuration, and of what has ever been synced. */
export async function readKeys({ config, databases }: Opened): Promise<readonly string[]> {
  const rows = await databases.state.db.selectFrom('definition').select('key').execute();
  return [...new Set([...config.definitions.map(({ key }) => key), ...rows.map(({ key }) => key)])].sort();
}

/** Names of the configuration's destinations, and of those that were ever sent to. */
export async function readDestinationNames({ config, databases }: Opened): Promise<readonly string[]> {
  const rows = await databases.state.db.selectFrom('destination').select('name').execute();
  return [...new Set([...config.destinations, ...rows].map(({ name }) => name))].sort();
}

/** The id of the state, by which a source knows who consumes what is captured in it. */
export async function readInstallation({ databases }: Opened): Promise<string> {
  const row = await databases.state.db
    .selectFrom('setting')
    .select('value')
    .where('name', '=', 'installation')
    .executeTakeFirst();
  if (typeof row?.value === 'string') return row.value;
  throw new OperatorError('The state has no id yet: run `personas-sync migrate` first.');
}

/** A field of Iterable can't turn from a membership into a value. */
export function refuseKindChange({ key, kind, place }: Definition, before: Definition['kind'] | undefined): void {
  if (before === undefined || before === kind) return;
  const article = { audience: 'an audience', trait: 'a trait' };
  const message = `"${key}" was ${article[before]} and cannot become ${article[kind]}; give it another key.`;
  throw new OperatorError([{ place, message }]);
}
