import type { RunOutcome, RunTrigger } from '../db/state.js';
import type { CommandContext } from './command.js';
import { readKeys, refuseUnknown } from './known.js';
import { formatCount, formatDuration, formatMoment, formatTable, plainLines, SIGN } from './output.js';

/** `runs`: the last runs, newest first. */
export interface RunsOptions {
  key: string | null;
  limit: number;
}

interface RunRow {
  id: number;
  definition: string;
  trigger: RunTrigger;
  /** Null while it is running. */
  outcome: RunOutcome | null;
  decision: 'approved' | 'rejected' | null;
  members: number | null;
  entered: number | null;
  exited: number | null;
  changed: number | null;
  withoutIdentifier: number | null;
  conflicting: number | null;
  skippedValues: number | null;
  /** What it found that following changes had missed; null: it can't tell. */
  corrections: number | null;
  startedAt: Date;
  finishedAt: Date | null;
  error: string | null;
}

const COLUMNS = [
  { title: 'run', align: 'right' },
  { title: 'definition' },
  { title: 'trigger' },
  { title: 'outcome' },
  { title: 'members', align: 'right' },
  { title: 'entered', align: 'right' },
  { title: 'exited', align: 'right' },
  { title: 'changed', align: 'right' },
  { title: 'corrected', align: 'right' },
  { title: 'started', align: 'right' },
  { title: 'took', align: 'right' },
] as const;

function describeRun(row: RunRow, now: Date): string[] {
  const { id, definition, trigger, outcome, decision, startedAt, finishedAt } = row;
  return [
    String(id),
    definition,
    trigger,
    decision ?? outcome ?? 'running',
    ...[row.members, row.entered, row.exited, row.changed, row.corrections].map(formatCount),
    formatMoment(startedAt, now),
    finishedAt === null ? '–' : formatDuration(finishedAt.getTime() - startedAt.getTime()),
  ];
}

/** Each error once, with the last run that met it: a definition that is polled meets the same one again and again. */
function describeErrors(rows: readonly RunRow[]): string[] {
  const seen = new Set<string>();
  return rows.flatMap(({ id, definition, error }) => {
    if (error === null || seen.has(`${definition} ${error}`)) return [];
    seen.add(`${definition} ${error}`);
    return [`${SIGN.bad} ${id} ${definition}: ${plainLines(error)}`];
  });
}

export async function runs({ opened, output }: CommandContext, { key, limit }: RunsOptions): Promise<number> {
  if (key !== null) refuseUnknown([key], await readKeys(opened), 'definition');
  const { rows } = await opened.databases.state.pool.query<RunRow & { now: Date }>(
    `select r.id, d.key as definition, r.trigger, r.outcome, r.decision, r.members, r.entered, r.exited, r.changed,
       r.without_identifier as "withoutIdentifier", r.conflicting, r.skipped_values as "skippedValues", r.corrections,
       r.started_at as "startedAt", r.finished_at as "finishedAt", r.error, now() as now
     from run as r join definition as d on d.id = r.definition_id
     where $1::text is null or d.key = $1 order by r.id desc limit $2`,
    [key, limit],
  );
  output.object({ runs: rows.map(({ now: _, ...run }) => run) });
  const [last] = rows;
  if (last === undefined) {
    output.line(`${key === null ? 'Nothing' : `"${key}"`} has run yet; \`personas-sync sync\` runs what there is.`);
    return 0;
  }
  output.line(
    formatTable(
      COLUMNS,
      rows.map((row) => describeRun(row, last.now)),
    ),
  );
  const errors = describeErrors(rows);
  if (errors.length > 0) output.line(`\n${errors.join('\n')}`);
  const held = rows.find(({ outcome, decision }) => outcome === 'held' && decision === null);
  if (held !== undefined) {
    output.line(
      `${SIGN.note} Run ${held.id} waits for \`personas-sync approve ${held.id}\` or \`reject ${held.id}\`; \`plan ${held.definition}\` shows what it would do.`,
    );
  }
  return 0;
}
