import pc from 'picocolors';
import { formatCount, formatDuration } from './output.js';

/**
 * Progress of a long piece of work, on stderr: a bar that is redrawn on a terminal, a line every ten seconds elsewhere,
 * nothing under `--json`. The rate is that of the last few seconds.
 */
export interface Progress {
  update: (done: number, total: number, more?: string) => void;
  /** Ends the bar's line. */
  end: () => void;
}

const LINE_EVERY_MS = 10_000;
const DRAW_EVERY_MS = 100;
const RATE_OVER_MS = 5_000;
const BAR = 24;

export function startProgress(label: string, silent: boolean, stream: NodeJS.WriteStream = process.stderr): Progress {
  const began = performance.now();
  const samples: { at: number; done: number }[] = [{ at: began, done: 0 }];
  let shownAt = stream.isTTY ? -Infinity : began;
  let drawn = false;

  const rateOf = (at: number, done: number): number => {
    samples.push({ at, done });
    while (samples.length > 2 && at - (samples[1]?.at ?? at) > RATE_OVER_MS) samples.shift();
    const first = samples[0];
    if (first === undefined || at - first.at < 200) return 0;
    return Math.max(0, ((done - first.done) / (at - first.at)) * 1000);
  };
  const describe = (done: number, total: number, rate: number): string => {
    const left = rate > 0 && total > done ? `, ${formatDuration(((total - done) / rate) * 1000)} left` : '';
    return `${formatCount(done)} of ${formatCount(total)}${rate > 0 ? `, ${formatCount(Math.round(rate))}/s` : ''}${left}`;
  };

  return {
    update: (done, total, more = '') => {
      if (silent) return;
      const at = performance.now();
      if (at - shownAt < (stream.isTTY ? DRAW_EVERY_MS : LINE_EVERY_MS)) return;
      shownAt = at;
      const text = describe(done, total, rateOf(at, done));
      if (!stream.isTTY) {
        stream.write(`${label}: ${text}${more}\n`);
        return;
      }
      const filled = total === 0 ? BAR : Math.min(BAR, Math.round((done / total) * BAR));
      stream.write(
        `\r\u001b[2K${label} ${pc.cyan('█'.repeat(filled))}${pc.dim('░'.repeat(BAR - filled))} ${text}${more}`,
      );
      drawn = true;
    },
    end: () => {
      if (drawn) stream.write('\r\u001b[2K');
      drawn = false;
    },
  };
}
