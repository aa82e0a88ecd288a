import { inTransaction } from '../db/connect.js';
import { wakeLeader } from '../db/wake.js';
import { OperatorError } from '../lib/errors.js';
import { reviveLeftOut } from '../outbox/dead.js';
import { resumeCalls } from '../sync/cursor.js';
import type { CommandContext } from './command.js';
import { readKeys, refuseUnknown } from './known.js';
import type { Opened } from './open.js';
import { countOf, plain, SIGN } from './output.js';

/**
 * `pause` and `resume`: a definition, whose runs and calls wait, or a destination, all of whose calls wait. It is a column
 * that whoever leads looks at, so nothing has to be asked of the leader.
 */
interface DefinitionTarget {
  kind: 'definition';
  name: string;
}

interface DestinationTarget {
  kind: 'destination';
  name: string;
}

/** `definition:name` or `destination:name` says which, where both have the name. */
async function findTarget(opened: Opened, text: string): Promise<DefinitionTarget | DestinationTarget> {
  const destinations = opened.config.destinations.map(({ name }) => name);
  const keys = await readKeys(opened);
  const [prefix = '', name] = /^(definition|destination):(.+)$/.exec(text)?.slice(1) ?? [];
  if (name !== undefined) {
    refuseUnknown([name], prefix === 'definition' ? keys : destinations, prefix);
    return prefix === 'definition' ? { kind: 'definition', name } : { kind: 'destination', name };
  }
  refuseUnknown([text], [...destinations, ...keys], 'definition or destination');
  if (!destinations.includes(text)) return { kind: 'definition', name: text };
  if (!keys.includes(text)) return { kind: 'destination', name: text };
  throw new OperatorError(
    `"${text}" is a definition and a destination; say which: definition:${text} or destination:${text}.`,
  );
}

interface DefinitionRow {
  id: number;
  state: 'active' | 'paused' | 'disabled' | 'archived';
  heldRun: number | null;
  /** Whether calls of it, or some of its fields, wait for a person. */
  hasStopped: boolean;
}

async function readDefinition({ databases }: Opened, key: string): Promise<DefinitionRow> {
  const { rows } = await databases.state.pool.query<DefinitionRow>(
    `select d.id, d.state, held.id as "heldRun", exists (select from definition_destination as dd
       where dd.definition_id = d.id and (dd.stopped is not null or dd.stopped_fields <> '{}')) as "hasStopped"
     from definition as d
     left join run as held on held.definition_id = d.id and held.outcome = 'held' and held.decision is null
     where d.key = $1`,
    [key],
  );
  const row = rows[0];
  if (row === undefined)
    throw new OperatorError(`"${key}" has not been synced yet; \`personas-sync sync\` takes it up.`);
  return row;
}

function refuseInactive(key: string, { state }: DefinitionRow): void {
  if (state === 'disabled')
    throw new OperatorError(`"${key}" is disabled: remove \`enabled: false\` from its definition.`);
  if (state === 'archived') throw new OperatorError(`"${key}" is no longer in the configuration.`);
}

interface DestinationRow {
  id: number;
  state: 'active' | 'paused' | 'stopped';
  reason: string | null;
  waiting: number;
}

async function readDestination(opened: Opened, name: string): Promise<DestinationRow> {
  const { config, databases, targetOf } = opened;
  const destination = config.destinations.find((each) => each.name === name);
  const { rows } = await databases.state.pool.query<DestinationRow>(
    `select t.id, t.state, t.reason, (select count(*) from outbox where destination_id = t.id) as waiting
     from destination as t where t.name = $1 and t.host = $2`,
    [name, destination === undefined ? '' : targetOf(destination).host],
  );
  const row = rows[0];
  if (row === undefined)
    throw new OperatorError(`Nothing has been synced to "${name}" yet; \`personas-sync sync\` begins.`);
  return row;
}

async function pauseDefinition({ opened, output }: CommandContext, key: string): Promise<void> {
  const definition = await readDefinition(opened, key);
  refuseInactive(key, definition);
  const { state } = definition;
  await opened.databases.state.pool.query(
    `update definition set state = 'paused', paused_because = 'Paused by hand.' where key = $1 and state = 'active'`,
    [key],
  );
  output.object({ definition: key, state: 'paused', changed: state === 'active' });
  output.line(
    state === 'paused'
      ? `${SIGN.good} ${key} is paused already.`
      : `${SIGN.good} ${key} is paused: it isn't run, and its calls wait. \`personas-sync resume ${key}\` ends that.`,
  );
}

async function resumeDefinition({ opened, output }: CommandContext, key: string): Promise<void> {
  const definition = await readDefinition(opened, key);
  // Somebody may still have to be told of one that has left the configuration (`on_delete: exit_all`).
  if (!definition.hasStopped) refuseInactive(key, definition);
  const { id, state, heldRun } = definition;
  const { resumed, isJudged } = await inTransaction(opened.databases.state.pool, async (client) => {
    // In the order in which a run writes the two.
    const calls = await resumeCalls(client, id);
    await client.query(
      `update definition set state = 'active', paused_because = null,
         due_at = case when due_at is null and cadence <> 'manual' then now() else due_at end
       where id = $1 and state = 'paused'`,
      [id],
    );
    // Whoever leads looks anew whether its changes can be followed.
    const judged = await client.query(
      `update definition set distrusted_at = null, evaluates = null where id = $1 and tracking = 'polled'`,
      [id],
    );
    return { resumed: calls, isJudged: judged.rowCount === 1 };
  });
  const count = await reviveLeftOut(opened.databases.state.pool);
  output.object({ definition: key, state: 'active', changed: state === 'paused' || resumed > 0 || isJudged });
  const sent = count === 0 ? '' : `, with ${countOf(count, 'value')} that had been left out`;
  const calls = resumed === 0 ? '' : `, and the calls that waited go on${sent}`;
  if (state === 'disabled' || state === 'archived') {
    const why = state === 'disabled' ? 'is disabled' : 'is no longer in the configuration';
    output.line(`${SIGN.good} ${key} ${why}${calls}.`);
    return;
  }
  const done = `${state === 'paused' ? 'is run again when it is due' : 'is not paused'}${calls}`;
  const next =
    heldRun === null
      ? `\`personas-sync sync ${key}\` runs it now.`
      : `Run ${heldRun} is held: \`personas-sync approve ${heldRun}\` or \`reject ${heldRun}\`.`;
  output.line(`${SIGN.good} ${key} ${done}. ${next}`);
  if (isJudged) {
    output.line(
      `${SIGN.good} Whether its changes can be followed is looked at anew by the daemon; \`personas-sync status ${key}\` says what it has found.`,
    );
  }
}

async function pauseDestination({ opened, output }: CommandContext, name: string): Promise<void> {
  const { id, state, reason } = await readDestination(opened, name);
  await opened.databases.state.pool.query(
    `update destination set state = 'paused' where id = $1 and state = 'active'`,
    [id],
  );
  output.object({ destination: name, state: state === 'stopped' ? 'stopped' : 'paused', changed: state === 'active' });
  if (state === 'stopped') output.line(`${SIGN.note} ${name} has stopped already: ${plain(reason ?? '')}`);
  else if (state === 'paused') output.line(`${SIGN.good} ${name} is paused already.`);
  else
    output.line(`${SIGN.good} ${name} is paused: nothing is sent to it. \`personas-sync resume ${name}\` ends that.`);
}

async function resumeDestination({ opened, output }: CommandContext, name: string): Promise<void> {
  const { id, state, waiting } = await readDestination(opened, name);
  await opened.databases.state.pool.query(
    `update destination set state = 'active', reason = null where id = $1 and state <> 'active'`,
    [id],
  );
  output.object({ destination: name, state: 'active', changed: state !== 'active', waiting });
  if (state === 'active') output.line(`${SIGN.good} ${name} is not paused; ${countOf(waiting, 'call')} waiting.`);
  else {
    const left =
      waiting === 0
        ? 'nothing waits'
        : `${countOf(waiting, 'waiting call')} ${waiting === 1 ? 'is' : 'are'} sent by the daemon, or by \`personas-sync sync\``;
    output.line(`${SIGN.good} ${name} goes on; ${left}.`);
  }
}

export async function pause(context: CommandContext, text: string): Promise<number> {
  const { kind, name } = await findTarget(context.opened, text);
  await (kind === 'definition' ? pauseDefinition(context, name) : pauseDestination(context, name));
  await wakeLeader(context.opened.databases.state.pool);
  return 0;
}

export async function resume(context: CommandContext, text: string): Promise<number> {
  const { kind, name } = await findTarget(context.opened, text);
  await (kind === 'definition' ? resumeDefinition(context, name) : resumeDestination(context, name));
  await wakeLeader(context.opened.databases.state.pool);
  return 0;
}
