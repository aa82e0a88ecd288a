#!/usr/bin/env node
import { readFileSync } from 'node:fs';
import { Command, CommanderError, InvalidArgumentError, Option } from 'commander';
import { OperatorError, UnavailableError } from '../lib/errors.js';
import type { CommandContext } from './command.js';
import type { OpenOptions } from './open.js';
import { createOutput } from './output.js';

/**
 * The command line: what there is to type, and the only place of exit codes and signals. Commands are loaded when they
 * are called, so that `--help` is quick.
 *
 * Exit codes: 0 done · 1 a bug · 2 the operator must act · 75 try later · 130 stopped by Ctrl-C (a second one, where
 * something has to be finished first).
 */
const EXIT_BUG = 1;
const EXIT_OPERATOR = 2;
const EXIT_LATER = 75;
const EXIT_FORCED = 130;

interface GlobalOptions {
  config: string;
  json: boolean;
}

type Needs = Pick<OpenOptions, 'migrations' | 'readOnly'> & Partial<Pick<OpenOptions, 'logLevel'>>;

const LOOKS: Needs = { migrations: 'refuse', readOnly: true, logLevel: 'warn' };
/** Looks, and has something to say before anything has ever been synced. */
const LOOKS_AHEAD: Needs = { ...LOOKS, migrations: 'optional' };
const ACTS: Needs = { migrations: 'apply', readOnly: false, logLevel: 'warn' };

const program = new Command('personas-sync');

function version(): string {
  const text = readFileSync(new URL('../../package.json', import.meta.url), 'utf8');
  return (JSON.parse(text) as { version: string }).version;
}

for (const stream of [process.stdout, process.stderr]) {
  // Whoever reads the output may stop reading, as `head` does; the work goes on.
  stream.on('error', () => undefined);
}

/** Fires at the first SIGINT or SIGTERM; the second ends the process at once. */
function listenForSignals(): AbortSignal {
  const controller = new AbortController();
  const onSignal = (): void => {
    if (controller.signal.aborted) process.exit(EXIT_FORCED);
    controller.abort();
  };
  process.on('SIGINT', onSignal);
  process.on('SIGTERM', onSignal);
  return controller.signal;
}

function askPerson(json: boolean, signal: AbortSignal): CommandContext['confirm'] {
  return async (question) => {
    if (json || !process.stdin.isTTY || !process.stderr.isTTY) return null;
    if (signal.aborted) return false;
    const { createInterface } = await import('node:readline/promises');
    const prompt = createInterface({ input: process.stdin, output: process.stderr });
    const stop = (): void => prompt.close();
    signal.addEventListener('abort', stop, { once: true });
    // Ctrl-C and Ctrl-D close the prompt, and leave the question open for ever.
    const closed = new Promise<string>((resolve) => prompt.once('close', () => resolve('\n')));
    try {
      const answer = await Promise.race([prompt.question(`${question} [y/N] `), closed]);
      if (answer === '\n') process.stderr.write(answer);
      return /^y(es)?$/i.test(answer.trim());
    } finally {
      signal.removeEventListener('abort', stop);
      prompt.close();
    }
  };
}

/** What a failed command says, and its exit code. */
function explain(error: unknown): { text: string; code: number } {
  if (error instanceof OperatorError) return { text: error.message, code: EXIT_OPERATOR };
  if (error instanceof UnavailableError) return { text: error.message, code: EXIT_LATER };
  return { text: '', code: EXIT_BUG };
}

async function fail(error: unknown, json: boolean): Promise<number> {
  const { databaseFailure, isUnreachable } = await import('../db/failure.js');
  let { text, code } = explain(error);
  if (code === EXIT_BUG && isUnreachable(error)) [text, code] = ['The database is out of reach.', EXIT_LATER];
  const failure = code === EXIT_BUG ? databaseFailure(error) : null;
  if (failure !== null) {
    const more = failure.sqlstate === '42501' ? ' `personas-sync check` says which.' : '';
    [text, code] = [`A statement of personas-sync ${failure.sentence}.${more}`, EXIT_OPERATOR];
  }
  if (code === EXIT_BUG) {
    // The text of an unknown error may hold anything; its trace says where it arose.
    const trace = error instanceof Error ? (error.stack ?? '').split('\n').filter((line) => /^\s+at /.test(line)) : [];
    text = `An error in personas-sync itself (${error instanceof Error ? error.name : typeof error}). Please report it with these lines:\n${trace.slice(0, 8).join('\n')}`;
  }
  if (json) {
    const problems = error instanceof OperatorError ? error.problems : [{ message: text }];
    process.stdout.write(`${JSON.stringify({ version: 1, error: { code, problems } })}\n`);
  }
  process.stderr.write(`${text}\n`);
  return code;
}

/** Flushes what was printed and ends; nothing that lingers may hold a finished command up. */
async function leave(code: number): Promise<never> {
  await Promise.all(
    [process.stdout, process.stderr].map((stream) => new Promise((resolve) => stream.write('', resolve))),
  );
  process.exit(code);
}

/** Ends the running statements and says so, once there is a signal. */
async function interrupted({ opened, output, signal }: CommandContext): Promise<number> {
  await new Promise<void>((resolve) => {
    if (signal.aborted) resolve();
    else signal.addEventListener('abort', () => resolve(), { once: true });
  });
  output.say('Stopped.');
  await opened.cancel();
  return EXIT_FORCED;
}

async function perform(needs: Needs, command: (context: CommandContext) => Promise<number>): Promise<void> {
  const { config, json } = program.opts<GlobalOptions>();
  let code: number;
  try {
    const signal = listenForSignals();
    const { openResources } = await import('./open.js');
    const output = createOutput(json);
    const opened = await openResources({ configFile: config, environment: process.env, onNote: output.say, ...needs });
    const context = { opened, output, signal, confirm: askPerson(json, signal) };
    try {
      if (!needs.readOnly && needs.logLevel !== undefined) {
        signal.addEventListener('abort', () =>
          output.say('Stopping: what is under way is ended first. Once more ends at once.'),
        );
      }
      // What only looks has nothing to finish.
      code = await (needs.readOnly ? Promise.race([command(context), interrupted(context)]) : command(context));
    } finally {
      await opened.close();
    }
  } catch (error) {
    code = await fail(error, json);
  }
  await leave(code);
}

function positiveInteger(text: string): number {
  const value = Number(text);
  if (!Number.isSafeInteger(value) || value < 1) throw new InvalidArgumentError('It must be a whole number from 1.');
  return value;
}

interface FailedOptions {
  key: string[];
  reason?: string;
  destination?: string;
  olderThan?: string;
}

const deadFilter = ({ key, reason, destination, olderThan }: FailedOptions) => ({
  keys: key,
  reason: reason ?? null,
  destination: destination ?? null,
  olderThan: olderThan ?? null,
});

function addFilter(command: Command): Command {
  return command
    .addOption(
      new Option('--key <key>', 'only of this definition (repeatable)')
        .argParser((value: string, before: string[]) => [...before, value])
        .default([], 'all'),
    )
    .option('--reason <code>', 'only refused with this code, such as InvalidEmailAddressError')
    .option('--destination <name>', 'only at this destination')
    .option('--older-than <interval>', "only refused longer ago, such as '2 days'");
}

program
  .description(
    'Keeps Iterable true to PostgreSQL: computes traits and audiences where the data lives, and sends what has changed.',
  )
  .version(version(), '-V, --version')
  .option('-c, --config <file>', 'the configuration', 'config/personas.yaml')
  .option('--json', 'the result as one JSON object on stdout', false)
  .showHelpAfterError('(--help says what there is)')
  .exitOverride()
  .configureHelp({ sortSubcommands: false });

program
  .command('start')
  .description('the daemon: runs what is due, sends what has changed')
  .action(() =>
    perform({ migrations: 'apply', readOnly: false }, async (context) => (await import('./start.js')).start(context)),
  );
program
  .command('check')
  .description('configuration, SQL, privileges, key and field types against Iterable; sends nothing')
  .action(() => perform(LOOKS_AHEAD, async (context) => (await import('./check.js')).check(context)));
program
  .command('plan [keys...]')
  .description('what a run would send: counts, samples, the verdict of the guard; writes nothing')
  .action((keys: string[]) => perform(LOOKS_AHEAD, async (context) => (await import('./plan.js')).plan(context, keys)));
program
  .command('sync [keys...]')
  .description('runs definitions once, now, and ends when what they caused is delivered')
  .option('--confirm-removals', 'yes, these definitions were meant to leave the configuration', false)
  .action((keys: string[], options: { confirmRemovals: boolean }) =>
    perform(ACTS, async (context) => (await import('./sync.js')).sync(context, { keys, ...options })),
  );
program
  .command('backfill <key>')
  .description('sends every current member again; says first how many calls and how long')
  .option('--events', 'track calls too, with their original ids', false)
  .option('-y, --yes', 'without asking', false)
  .action((key: string, options: { events: boolean; yes: boolean }) =>
    perform(ACTS, async (context) => (await import('./backfill.js')).backfill(context, { key, ...options })),
  );
program
  .command('status [key]')
  .description('definitions, runs, what waits, what was refused, who leads')
  .action((key: string | undefined) =>
    perform(LOOKS, async (context) => (await import('./status.js')).status(context, key ?? null)),
  );
program
  .command('runs [key]')
  .description('the history of runs')
  .option('-n, --limit <count>', 'how many', positiveInteger, 20)
  .action((key: string | undefined, options: { limit: number }) =>
    perform(LOOKS, async (context) => (await import('./runs.js')).runs(context, { key: key ?? null, ...options })),
  );
program
  .command('approve')
  .argument('<run>', 'its number', positiveInteger)
  .description('lets a held run go ahead')
  .action((run: number) => perform(ACTS, async (context) => (await import('./decide.js')).approve(context, run)));
program
  .command('reject')
  .argument('<run>', 'its number', positiveInteger)
  .description('drops a held run and pauses its definition')
  .action((run: number) => perform(ACTS, async (context) => (await import('./decide.js')).reject(context, run)));
program
  .command('profile <person>')
  .description('one person by email or userId: memberships, traits, what waits, what was refused, what happened')
  .action((person: string) =>
    perform(LOOKS, async (context) => (await import('./profile.js')).profile(context, person)),
  );
program
  .command('verify [keys...]')
  .description('reads users back from Iterable and compares them with what was sent')
  .option('--sample <count>', 'how many members of each definition', positiveInteger, 500)
  .option('--repair', 'sends again what differs', false)
  .action((keys: string[], options: { sample: number; repair: boolean }) =>
    perform(ACTS, async (context) => (await import('./verify.js')).verify(context, { keys, ...options })),
  );
program
  .command('forget <person>')
  .description('erases a person, by email or userId, from every table here; nothing is sent')
  .option('-y, --yes', 'without asking', false)
  .action((person: string, options: { yes: boolean }) =>
    perform(ACTS, async (context) => (await import('./forget.js')).forget(context, { person, ...options })),
  );
for (const [name, description] of [
  ['pause', 'stops the runs and calls of a definition, or the calls to a destination'],
  ['resume', 'ends a pause, or lets a stopped destination or definition go on'],
] as const) {
  program
    .command(`${name} <name>`)
    .description(description)
    .action((target: string) => perform(LOOKS, async (context) => (await import('./pause.js'))[name](context, target)));
}
const failed = program.command('failed').description('calls that Iterable has refused');
addFilter(failed.command('list').description('by definition and reason, with samples')).action(
  (options: FailedOptions) =>
    perform(LOOKS, async (context) => (await import('./failed.js')).list(context, deadFilter(options))),
);
addFilter(failed.command('retry').description('sends them again')).action((options: FailedOptions) =>
  perform(ACTS, async (context) => (await import('./failed.js')).retry(context, deadFilter(options))),
);
addFilter(
  failed.command('discard').description('drops them for good').option('-y, --yes', 'without asking', false),
).action((options: FailedOptions & { yes: boolean }) =>
  perform(ACTS, async (context) => (await import('./failed.js')).discard(context, deadFilter(options), options.yes)),
);
const realtime = program.command('realtime').description('the triggers in the source by which changes are followed');
/** Says what the source lacks together with what the state lacks. */
const CAPTURES: Needs = { migrations: 'ignore', readOnly: true, logLevel: 'warn' };
realtime
  .command('sql')
  .description('prints what `install` runs, for somebody who may')
  .option('--no-notify', 'for a source with prepared transactions: writers never notify')
  .action((options: { notify: boolean }) =>
    perform(LOOKS, async (context) => (await import('./realtime.js')).printSql(context, options)),
  );
realtime
  .command('install')
  .description('makes what is missing or out of date; keeps no writer waiting')
  .option('--no-notify', 'for a source with prepared transactions: writers never notify')
  .action((options: { notify: boolean }) =>
    perform(CAPTURES, async (context) => (await import('./realtime.js')).installTriggers(context, options)),
  );
realtime
  .command('uninstall')
  .description('takes all of it out of the source')
  .option('-y, --yes', 'also what another personas-sync uses, without asking', false)
  .action((options: { yes: boolean }) =>
    perform(LOOKS_AHEAD, async (context) => (await import('./realtime.js')).uninstallTriggers(context, options)),
  );
program
  .command('migrate')
  .description('brings the state tables to this version')
  .action(() =>
    perform({ migrations: 'ignore', readOnly: true, logLevel: 'warn' }, async (context) =>
      (await import('./migrate.js')).migrateState(context),
    ),
  );
program
  .command('schema')
  .description("the configuration's JSON Schema, for editors")
  .action(async () => {
    const { renderConfigurationSchema } = await import('../config/json-schema.js');
    process.stdout.write(renderConfigurationSchema());
  });
program
  .command('demo')
  .description('the sample shop against the Iterable simulator: syncs, trades, and compares Iterable with the truth')
  .option('--seconds <count>', 'how long the shop trades', positiveInteger, 20)
  .option('--customers <count>', 'how many customers it begins with', positiveInteger, 20_000)
  .action((options: { seconds: number; customers: number }) =>
    import('./demo.js').then(({ demo }) => demo(options, program.opts<GlobalOptions>().json)).then(leave),
  );

try {
  await program.parseAsync();
} catch (error) {
  if (error instanceof CommanderError) process.exitCode = error.exitCode === 0 ? 0 : EXIT_OPERATOR;
  else await leave(await fail(error, program.opts<GlobalOptions>().json));
}
