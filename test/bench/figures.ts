import { cpus, totalmem } from 'node:os';

/**
 * What the benchmark says: a figure is a ratio or an absolute number, its bound, and whether it holds. Times are
 * compared within one run, turn by turn, by their medians, so that a busy machine slows both sides alike.
 */
export interface Figure {
  name: string;
  measured: string;
  bound: string;
  /** Null where there is no bound. */
  holds: boolean | null;
}

/** Takes what a part measures, and says meanwhile what is going on. */
export interface Report {
  add: (figure: Figure) => void;
  say: (text: string) => void;
}

export function median(values: readonly number[]): number {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = Math.floor(sorted.length / 2);
  const upper = sorted[middle];
  const lower = sorted[sorted.length % 2 === 1 ? middle : middle - 1];
  if (upper === undefined || lower === undefined) throw new Error('There is no median of nothing.');
  return (lower + upper) / 2;
}

/** Milliseconds, and what the work gave. */
export async function timed<T>(work: () => Promise<T>): Promise<{ ms: number; result: T }> {
  const began = performance.now();
  const result = await work();
  return { ms: performance.now() - began, result };
}

export const seconds = (ms: number): string => `${(ms / 1000).toFixed(2)} s`;

/** How often `ours` takes the time of `theirs`. */
export function ratio(name: string, ours: readonly number[], theirs: readonly number[], most: number | null): Figure {
  const [a, b] = [median(ours), median(theirs)];
  const share = a / b;
  return {
    name,
    measured: `${seconds(a)} / ${seconds(b)} = ${share.toFixed(2)}`,
    bound: most === null ? '' : `at most ${most}`,
    holds: most === null ? null : share <= most,
  };
}

/** A number that may not pass `most`. */
export function limit(name: string, value: number, most: number, show: (value: number) => string): Figure {
  return { name, measured: show(value), bound: `at most ${show(most)}`, holds: value <= most };
}

export function describeMachine(postgres: string | null): string {
  const cores = cpus();
  const memory = `${Math.round(totalmem() / 2 ** 30)} GB`;
  const programs = [`Node ${process.versions.node}`, ...(postgres === null ? [] : [`PostgreSQL ${postgres}`])];
  return [`${cores.length} × ${cores[0]?.model ?? 'unknown'}`, memory, ...programs].join(', ');
}

export function formatFigures(figures: readonly Figure[]): string {
  const verdict = ({ holds }: Figure): string => (holds === null ? '' : holds ? 'holds' : 'BROKEN');
  const rows = [
    ['figure', 'measured', 'bound', ''],
    ...figures.map((figure) => [figure.name, figure.measured, figure.bound, verdict(figure)]),
  ];
  const widths = [0, 1, 2].map((column) => Math.max(...rows.map((row) => row[column]?.length ?? 0)));
  return rows
    .map((row) =>
      row
        .map((cell, column) => cell.padEnd(widths[column] ?? 0))
        .join('  ')
        .trimEnd(),
    )
    .join('\n');
}
