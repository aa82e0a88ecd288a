import pc from 'picocolors';
import type { Destination } from '../config/types.js';
import type { Definition } from '../core/definition.js';
import type { FieldType } from '../core/field.js';
import { withClient, type Client } from '../db/connect.js';
import type { Answer } from '../destinations/carrier.js';
import { FIELDS_REQUEST } from '../destinations/iterable/port.js';
import { judgeAnswer } from '../destinations/iterable/verdict.js';
import { describeProblem, OperatorError, type Problem } from '../lib/errors.js';
import { fieldTypes, momentsAt, prepareInputs, refuseTypeChange, type DefinitionRow } from '../sync/comparison.js';
import { explainRunError } from '../sync/privileges.js';
import { refuseMassRemoval } from '../sync/registry.js';
import { describeDefinition, describePeople, type Shape } from '../sync/shape.js';
import { computedQuery, type Inputs } from '../sync/statement.js';
import { createRealtimeCheck, type RealtimeCheck } from './check-realtime.js';
import type { CommandContext } from './command.js';
import { readKnown, refuseKindChange, type Known } from './known.js';
import type { Opened } from './open.js';
import { countOf, plain, SIGN, type Output } from './output.js';
import { findLackingForState } from './state-rights.js';

/**
 * `check`: what is wrong, found without sending anything: the SQL is described and planned, the fields are compared with
 * each other, with what was sent and with those that Iterable has. A definition runs only where it asks for real time, for
 * some people.
 */
interface Finding {
  problems: readonly Problem[];
  /** What is fine, where nothing is wrong. */
  note: string;
}

interface DefinitionFinding {
  key: string;
  ok: boolean;
  problems: readonly Problem[];
  /** Null: it doesn't ask for real time, or something else is wrong with it. */
  realtime: { possible: boolean; because: string | null } | null;
}

interface DestinationFinding extends Finding {
  /** By name; what is of no known type isn't in it. */
  fields: ReadonlyMap<string, FieldType>;
  unreachable: boolean;
}

/** Describing and planning take milliseconds; more is a lock that somebody else holds. */
const PATIENCE_MS = 30_000;
const FIELD_TYPES: ReadonlySet<string> = new Set<FieldType>(['string', 'long', 'double', 'boolean', 'date', 'object']);

/** What an OperatorError lists; anything else is thrown on. */
async function problemsOf(work: () => unknown): Promise<readonly Problem[]> {
  try {
    await work();
    return [];
  } catch (error) {
    if (error instanceof OperatorError) return error.problems;
    throw error;
  }
}

async function checkState({ databases, hasState }: Opened): Promise<Finding> {
  const { schema } = databases.state;
  return {
    problems: await findLackingForState(databases),
    note: hasState ? `schema "${schema}"` : `schema "${schema}", made by the first sync`,
  };
}

async function checkPeople({ config, databases }: Opened): Promise<Finding> {
  const { text, key } = config.profiles;
  const problems = await problemsOf(() =>
    inReadOnly(databases.source, (client) => describePeople(client, text, key, momentsOf(null))),
  );
  const known = { email: 'by email', user_id: 'by userId', hybrid: 'by userId, else by email' };
  return { problems, note: known[key] };
}

const momentsOf = (definition: Definition | null) =>
  momentsAt(new Date().toISOString(), definition ?? { lookback: null });

async function inReadOnly<T>(pool: Opened['databases']['source'], work: (client: Client) => Promise<T>): Promise<T> {
  return withClient(pool, async (client) => {
    await client.query(`begin transaction read only; set local statement_timeout = ${PATIENCE_MS}`);
    const result = await work(client);
    await client.query('rollback');
    return result;
  });
}

/**
 * Opens the very statement of a run as a cursor, from which nothing is fetched: so it is planned, its privileges are
 * checked and a lock or a write in it is refused (EXPLAIN would let those pass), and nothing is executed.
 */
async function openStatement({ databases, config }: Opened, inputs: Inputs): Promise<void> {
  const { definition } = inputs;
  try {
    await inReadOnly(databases.source, (client) =>
      client.query(`declare looked no scroll cursor for ${computedQuery(inputs, { grouped: false, counted: false })}`),
    );
  } catch (error) {
    throw await explainRunError(databases.source, error, definition, config.profiles.text.sql);
  }
}

/** Whether a field of Iterable takes what a column gives. A JSON column may hold anything, so it may fit. */
function takes(there: FieldType, sent: FieldType): boolean {
  if (there === sent || sent === 'object') return true;
  return (there === 'double' && sent === 'long') || (there === 'string' && sent === 'date');
}

/** Looks after the fields of all definitions, one after the other. */
function createFieldCheck(destinations: ReadonlyMap<string, DestinationFinding>) {
  const filledBy = new Map<string, Definition>();
  return (
    definition: Definition,
    types: Readonly<Record<string, FieldType>>,
    sent: DefinitionRow['fields'],
  ): Problem[] => {
    const place = definition.text.placeOf(0);
    const problems: Problem[] = [];
    const identified = [...definition.sends].filter(([, { identify }]) => identify).map(([name]) => name);
    for (const [field, type] of Object.entries(types)) {
      const other = identified.map((name) => filledBy.get(`${name} ${field}`)).find((each) => each !== undefined);
      if (other !== undefined) {
        const { file, line, column } = other.place;
        problems.push({
          place: definition.place,
          message: `The field \`${field}\` of "${definition.key}" is filled by "${other.key}" too (${file}:${line}:${column}): one would overwrite the other. Give one of them another name.`,
        });
      }
      for (const name of identified) {
        filledBy.set(`${name} ${field}`, definition);
        const there = destinations.get(name)?.fields.get(field);
        // What was sent as another type has been told already.
        if (there === undefined || takes(there, type) || (sent[field] ?? type) !== type) continue;
        problems.push({
          place,
          message: `The field \`${field}\` is ${there} in Iterable (destination "${name}") and would be sent as ${type}, which is refused there. Cast it to what becomes ${there}, or give it another name.`,
        });
      }
    }
    return problems;
  };
}

async function checkDefinition(
  opened: Opened,
  definition: Definition,
  {
    known,
    peopleAreFine,
    checkFields,
  }: { known: Known | undefined; peopleAreFine: boolean; checkFields: ReturnType<typeof createFieldCheck> },
): Promise<readonly Problem[]> {
  const moments = momentsOf(definition);
  const fields: Record<string, FieldType> = {};
  const found = await problemsOf(async () => {
    refuseKindChange(definition, known?.kind);
    const inputs = peopleAreFine ? await prepareInputs(opened, definition, moments) : null;
    const describe = (client: Client): Promise<Shape> => describeDefinition(client, definition, moments);
    const shape = inputs?.shape ?? (await inReadOnly(opened.databases.source, describe));
    Object.assign(fields, fieldTypes(shape));
    if (inputs !== null) await openStatement(opened, inputs);
    if (known !== undefined) refuseTypeChange(definition, known, shape);
  });
  if (definition.kind === 'audience') fields[definition.key] = 'boolean';
  return [...found, ...checkFields(definition, fields, known?.fields ?? {})];
}

/** The fields in an answer of getFields; null where it is none. */
function readFields(answer: Answer): ReadonlyMap<string, FieldType> | null {
  if (answer.kind !== 'answered') return null;
  try {
    const { fields } = JSON.parse(answer.body) as { fields?: unknown };
    if (typeof fields !== 'object' || fields === null) return null;
    const entries: [string, unknown][] = Object.entries(fields);
    return new Map(entries.filter((entry): entry is [string, FieldType] => FIELD_TYPES.has(String(entry[1]))));
  } catch {
    return null;
  }
}

async function checkDestination({ targetOf }: Opened, destination: Destination): Promise<DestinationFinding> {
  const { name, place, type } = destination;
  const { host, connect } = targetOf(destination);
  if (type !== 'iterable') {
    return { problems: [], note: `${host}, which can't be asked anything`, fields: new Map(), unreachable: false };
  }
  const port = await connect();
  const answer = await port.transmit(FIELDS_REQUEST).finally(() => port.close());
  const finding = (message: string, unreachable: boolean): DestinationFinding => ({
    problems: [{ place, message }],
    note: '',
    fields: new Map(),
    unreachable,
  });
  const verdict = judgeAnswer(answer, [], Date.now());
  switch (verdict.kind) {
    case 'again':
    case 'slower': {
      const because = answer.kind === 'lost' ? answer.because : `HTTP ${answer.status}`;
      return finding(`Iterable is out of reach at ${host} (${because}); try again later.`, true);
    }
    case 'gone':
    case 'stop':
      return finding(`${verdict.reason} Look at \`api_key\` and \`region\` of "${name}".`, false);
    case 'refused':
      return finding(`Iterable at ${host} refused to list its fields (${verdict.reason}).`, false);
    case 'acknowledged': {
      const fields = readFields(answer);
      if (fields === null)
        return finding(`What answers at ${host} is not Iterable; look at \`region\` of "${name}".`, false);
      return {
        problems: [],
        note: `${host} takes the key; ${countOf(fields.size, 'field')} there`,
        fields,
        unreachable: false,
      };
    }
  }
}

function show(output: Output, name: string, { problems, note }: Finding): void {
  if (problems.length === 0) output.line(`${SIGN.good} ${pc.bold(name)} ${pc.dim(plain(note))}`.trimEnd());
  else output.line(`${SIGN.bad} ${pc.bold(name)}`);
  for (const problem of problems) output.line(`    ${plain(describeProblem(problem))}`);
}

/** What is wrong with the triggers: no problem by itself, since what they are for is polled. */
function showCapture(output: Output, { captured }: RealtimeCheck): void {
  if (captured === null) return;
  if (captured.length === 0) output.line(`${SIGN.good} ${pc.bold('triggers')} ${pc.dim('changes are captured')}`);
  for (const sentence of captured) output.line(`${SIGN.note} ${plain(sentence)}`);
}

const judged = ({ problems }: Finding) => ({ ok: problems.length === 0, problems });

export async function check({ opened, output, signal }: CommandContext): Promise<number> {
  const { config } = opened;
  const known = await readKnown(opened);
  const state = await checkState(opened);
  const removals = await problemsOf(() => refuseMassRemoval(config, [...known.values()]));
  const configuration = { problems: removals, note: countOf(config.files.length, 'file') };
  show(output, 'configuration', configuration);
  for (const remark of config.remarks) output.line(`${SIGN.note} ${plain(remark)}`);
  show(output, 'state', state);
  const destinations = new Map<string, DestinationFinding>();
  for (const destination of config.destinations) {
    const finding = await checkDestination(opened, destination);
    destinations.set(destination.name, finding);
    show(output, `destination ${destination.name}`, finding);
  }
  const described = await checkPeople(opened);
  const peopleAreFine = described.problems.length === 0;
  const realtime = peopleAreFine ? await createRealtimeCheck(opened) : null;
  const people = { ...described, problems: [...described.problems, ...(realtime?.problems ?? [])] };
  show(output, 'profiles', people);
  if (realtime !== null) showCapture(output, realtime);
  const checkFields = createFieldCheck(destinations);
  const definitions: DefinitionFinding[] = [];
  const disabled = config.definitions.filter(({ enabled }) => !enabled).map(({ key }) => key);
  for (const definition of config.definitions) {
    if (!definition.enabled) continue;
    const { key } = definition;
    const found = await checkDefinition(opened, definition, { known: known.get(key), peopleAreFine, checkFields });
    // What is wrong anyway isn't tried.
    const followed = found.length === 0 && realtime !== null ? await realtime.judge(definition) : null;
    if (signal.aborted) return 0;
    const problems = [...found, ...(followed?.problems ?? [])];
    const { possible = false, because = null } = followed ?? {};
    definitions.push({
      key,
      ok: problems.length === 0,
      problems,
      realtime: followed === null ? null : { possible, because },
    });
    show(output, key, { problems, note: possible ? `${definition.kind}, real time` : definition.kind });
    if (because !== null && problems.length === 0) output.line(`    ${pc.dim(`polled: ${plain(because)}`)}`);
  }
  for (const key of disabled) output.line(pc.dim(`– ${key} is disabled`));

  const found = [configuration, state, people, ...definitions, ...destinations.values()];
  const away = [...destinations.values()].filter(({ unreachable }) => unreachable).length;
  const problems = found.reduce((sum, each) => sum + each.problems.length, 0);
  output.object({
    definitions,
    disabled,
    triggers: realtime?.captured ?? null,
    destinations: [...destinations].map(([name, finding]) => ({ name, ...judged(finding) })),
    profiles: judged(people),
    state: judged(state),
    configuration: judged(configuration),
    remarks: config.remarks,
  });
  output.line();
  output.line(
    problems === 0
      ? 'All is well. `personas-sync plan` shows what a sync would send.'
      : `${countOf(problems, 'problem')}.`,
  );
  return problems === 0 ? 0 : problems === away ? 75 : 2;
}
