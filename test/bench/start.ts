import { readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { temporaryFolder } from '../support/postgres.js';
import { ROOT, runCommand, startDaemon, until } from './daemon.js';
import { limit, median, seconds, timed, type Report } from './figures.js';

/** How long a person waits: for the help, and for the first call in an empty folder with the sample configuration. */
const HELP_TURNS = 9;
const HELP_MS = 150;
const FIRST_CALL_MS = 15_000;
/** What the simulator has taken, one change a line, after a line that says what the file is. */
const JOURNAL = '.personas/iterable-iterable/iterable.jsonl';

export async function measureStart(report: Report): Promise<void> {
  const helps: number[] = [];
  for (let turn = 0; turn < HELP_TURNS; turn += 1) {
    const { ms, result } = await timed(() => runCommand('--help'));
    if (result !== 0) throw new Error(`--help ended with ${result ?? 'a signal'}.`);
    helps.push(ms);
  }
  report.add(limit('--help', median(helps), HELP_MS, (ms) => `${Math.round(ms)} ms`));

  const folder = await temporaryFolder(tmpdir());
  try {
    report.say('A first start in an empty folder');
    const { ms } = await timed(() => deliverFirstCall(folder));
    report.add(limit('start in an empty folder, to the first call', ms, FIRST_CALL_MS, seconds));
  } finally {
    await rm(folder, { recursive: true, force: true });
  }
}

async function deliverFirstCall(folder: string): Promise<void> {
  const daemon = startDaemon(folder, join(ROOT, 'config/personas.yaml'));
  try {
    await until(daemon, async () => {
      const journal = await readFile(join(folder, JOURNAL), 'utf8').catch(() => '');
      return journal.split('\n').length > 2 ? true : null;
    });
  } finally {
    await daemon.stop();
  }
}
