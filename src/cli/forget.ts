import { previewForget } from '../sync/forget.js';
import { act } from './act.js';
import { agrees, type CommandContext } from './command.js';
import { countOf, SIGN } from './output.js';
import { exitOf } from './sync.js';

/** `forget`: erases a person from the state, and keeps them from being queued again. Iterable is told nothing. */
export interface ForgetOptions {
  person: string;
  yes: boolean;
}

export async function forget(context: CommandContext, { person, yes }: ForgetOptions): Promise<number> {
  const { opened, output, signal } = context;
  const { recipients, rows } = await previewForget(opened.databases.state, person);
  const facts = { recipients, rows };
  const known =
    rows === 0
      ? 'Nothing is known here of this person'
      : `This erases ${countOf(rows, 'row')} about this person here, for good`;
  output.say(`${known}; from then on they are never sent again. Nothing is sent to Iterable.`);
  if (!(await agrees(context, 'Erase them?', yes))) {
    output.object({ ...facts, erased: false });
    return 2;
  }
  const acted = await act(opened, { kind: 'forget', args: { person }, signal });
  if (acted.outcome === 'done') {
    const erased = acted.progress.count ?? rows;
    output.object({ recipients, rows: erased, erased: true });
    output.line(
      `${SIGN.good} ${countOf(erased, 'row')} erased. What Iterable and your own tables hold of this person is untouched.`,
    );
  }
  return exitOf(context, acted, 0);
}
