import { describeProblem, OperatorError } from '../lib/errors.js';
import { inspect, type Inspection } from '../realtime/catalogue.js';
import { readProfileType } from '../realtime/judgement.js';
import { findLacking, FOREIGN, install, installScript, uninstall } from '../realtime/install.js';
import { readWatchPlan } from '../realtime/tables.js';
import { tableName, watchName } from '../realtime/trigger-sql.js';
import { followedDefinitions, type WatchPlan } from '../realtime/watches.js';
import { agrees, type CommandContext } from './command.js';
import { readInstallation } from './known.js';
import { prepareState, type Opened } from './open.js';
import { countOf, plain, SIGN, type Output } from './output.js';
import { findLackingForState } from './state-rights.js';

/** `realtime sql`, `install` and `uninstall`: the triggers in the source by which changes are followed. */
const EXIT_OPERATOR = 2;

export interface InstallChoice {
  notify: boolean;
}

async function readPlan({ config, databases }: Opened): Promise<WatchPlan> {
  return readWatchPlan(databases.source, config, await readProfileType(databases.source, config));
}

/** Says what can't be followed; returns whether there is anything. */
function sayRefused({ refused }: WatchPlan, output: Output): boolean {
  for (const { definitions, problem } of refused) {
    const keys = definitions.map((key) => `"${key}"`).join(', ');
    output.say(
      `${SIGN.bad} ${plain(describeProblem(problem))} Until then ${keys} ${definitions.length === 1 ? 'is' : 'are'} polled.`,
    );
  }
  return refused.length > 0;
}

function nothingToFollow({ config }: Opened, plan: WatchPlan): string | null {
  if (plan.tables.length > 0) return null;
  if (plan.refused.length > 0) return 'No definition can be followed.';
  if (followedDefinitions(config).length > 0) return null;
  return 'Nothing is to be followed: that takes `changes` in a definition, and in `profiles`.';
}

const factsOf = (plan: WatchPlan): Readonly<Record<string, unknown>> => ({
  tables: plan.tables.map(({ table, watches }) => ({ table: tableName(table), watches: watches.map(watchName) })),
  refused: plan.refused.map(({ definitions, problem }) => ({ definitions, problem })),
});

async function look(opened: Opened): Promise<{ plan: WatchPlan; found: Inspection; installation: string }> {
  const installation = await readInstallation(opened);
  const plan = await readPlan(opened);
  return { plan, installation, found: await inspect(opened.databases.source, plan, installation) };
}

/** Prints what `install` would run, whatever is there already, for somebody with more rights to run. */
export async function printSql({ opened, output }: CommandContext, { notify }: InstallChoice): Promise<number> {
  const { plan, found, installation } = await look(opened);
  if (found.capture.kind === 'foreign') throw new OperatorError(FOREIGN);
  const refused = sayRefused(plan, output);
  const nothing = nothingToFollow(opened, plan);
  const script = nothing === null ? installScript(found, { installation, notify }) : null;
  output.object({ ...factsOf(plan), script });
  if (script === null) output.say(nothing ?? '');
  else output.line(script.trimEnd());
  return refused ? EXIT_OPERATOR : 0;
}

/** Makes the state's tables. Throws, before anything is made, where the role lacks something for these or for the triggers. */
async function makeState(opened: Opened, plan: WatchPlan, choice: InstallChoice): Promise<void> {
  const { config, databases } = opened;
  const problems = [
    // Elsewhere a person makes them, by another role perhaps.
    ...(config.state.migrate === 'manual' ? [] : await findLackingForState(databases)),
    ...findLacking(await inspect(databases.source, plan, ''), choice),
  ];
  if (problems.length > 0) throw new OperatorError(problems);
  await prepareState(opened, 'apply');
}

/** Makes the triggers, and says what it did. What can't be followed is left out, and ends it with 2. */
export async function installTriggers(
  { opened, output, signal }: CommandContext,
  { notify }: InstallChoice,
): Promise<number> {
  const plan = await readPlan(opened);
  if (!opened.hasState) await makeState(opened, plan, { notify });
  const installation = await readInstallation(opened);
  const done: string[] = [];
  const onDone = (what: string): void => {
    done.push(what);
    output.line(`${SIGN.good} ${plain(what)}`);
  };
  await install(opened.databases.source, plan, { installation, notify, onDone, signal });
  const refused = sayRefused(plan, output);
  output.object({ ...factsOf(plan), done });
  const watched = countOf(plan.tables.length, 'table');
  const nothing = nothingToFollow(opened, plan);
  output.line(nothing ?? `Changes of ${watched} are captured${done.length === 0 ? ' already; nothing was done' : ''}.`);
  return refused ? EXIT_OPERATOR : 0;
}

/** Makes the triggers in the embedded database, which is the program's own: nobody has to be asked. */
export async function captureOwn(opened: Opened, signal: AbortSignal): Promise<void> {
  const installation = await readInstallation(opened);
  const onDone = (): void => undefined;
  await install(opened.databases.source, await readPlan(opened), { installation, notify: true, onDone, signal });
}

/** Takes everything out of the source. What another state consumes only goes with a yes. */
export async function uninstallTriggers(context: CommandContext, { yes }: { yes: boolean }): Promise<number> {
  const { opened, output, signal } = context;
  const { source } = opened.databases;
  const installation = opened.hasState ? await readInstallation(opened) : '';
  const { capture } = await inspect(
    source,
    { tables: [], routes: new Map(), refused: [], evaluates: new Map() },
    installation,
  );
  if (capture.kind === 'foreign') {
    output.say(
      'The source is captured for another personas-sync (its state has another id), which will poll from then on.',
    );
    if (!(await agrees(context, 'Uninstall it?', yes))) {
      output.object({ done: [] });
      return EXIT_OPERATOR;
    }
  }
  const done: string[] = [];
  const onDone = (what: string): void => {
    done.push(what);
    output.line(`${SIGN.good} ${plain(what)}`);
  };
  const there = await uninstall(source, { onDone, signal });
  output.object({ done });
  output.line(there ? 'Nothing of real time is left in the source.' : 'There is nothing of real time in the source.');
  return 0;
}
