import type { Opened } from './open.js';
import type { Output } from './output.js';

/** What every command is given. It returns its exit code: 0 done, 2 the operator must act, 75 try later. */
export interface CommandContext {
  opened: Opened;
  output: Output;
  /** Fires at the first SIGINT or SIGTERM. */
  signal: AbortSignal;
  /** Asks a person for a yes; null where nobody can be asked. */
  confirm: (question: string) => Promise<boolean | null>;
}

/** Whether a person says yes, at the terminal or by `--yes`; says what comes of it where they don't. */
export async function agrees({ confirm, output }: CommandContext, question: string, yes: boolean): Promise<boolean> {
  const answer = yes || (await confirm(question));
  if (answer === true) return true;
  output.say(
    answer === null ? 'Nothing was done: without a terminal, `--yes` says that it is meant.' : 'Nothing was done.',
  );
  return false;
}
