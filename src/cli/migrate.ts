import { migrate } from '../db/migrate.js';
import type { CommandContext } from './command.js';
import { SIGN } from './output.js';

/** `migrate`: brings the state's tables to this version, also where the configuration says `state.migrate: manual`. */
export async function migrateState({ opened, output }: CommandContext): Promise<number> {
  const { pool, schema } = opened.databases.state;
  const applied = await migrate(pool, schema);
  output.object({ schema, applied });
  for (const name of applied) output.line(`${SIGN.good} ${name}`);
  output.line(
    applied.length === 0
      ? `The schema "${schema}" is up to date; nothing was done.`
      : `The schema "${schema}" is up to date. \`personas-sync plan\` shows what a sync would send.`,
  );
  return 0;
}
