import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { readFile } from 'node:fs/promises';
import { fileURLToPath } from 'node:url';

/** The built program as a process of its own: what a user starts, measured from outside. */
export const ROOT = fileURLToPath(new URL('../../', import.meta.url));
const PROGRAM = `${ROOT}dist/cli/main.js`;

export interface Daemon {
  /** The most memory that the process has had so far, in megabytes; null where the system doesn't say. */
  peakMb: () => Promise<number | null>;
  /** Seconds of processor that the process has used so far; null where the system doesn't say. */
  cpuSeconds: () => Promise<number | null>;
  /** Throws with what the process said if it has ended. */
  requireAlive: () => void;
  /** As Ctrl-C does; resolves when it has ended. */
  stop: () => Promise<void>;
}

/** Seconds of processor that a process has used so far; null where the system doesn't say, or it has ended. */
export async function cpuSecondsOf(pid: number): Promise<number | null> {
  if (process.platform !== 'linux') return null;
  const stat = await readFile(`/proc/${pid}/stat`, 'utf8').catch(() => null);
  if (stat === null) return null;
  // The fields behind the name of the program, which may have blanks; ticks are hundredths of a second.
  const [, fields = ''] = stat.split(') ');
  const [user, system] = fields.split(' ').slice(11, 13).map(Number);
  return ((user ?? 0) + (system ?? 0)) / 100;
}

/** Starts `personas-sync start` in `folder`, without anything of this process's environment but the path. */
export function startDaemon(folder: string, configFile: string): Daemon {
  const child = spawn(process.execPath, [PROGRAM, 'start', '--config', configFile], {
    cwd: folder,
    env: { PATH: process.env['PATH'] },
    stdio: ['ignore', 'ignore', 'pipe'],
  });
  let said = '';
  child.stderr.setEncoding('utf8').on('data', (text: string) => (said = (said + text).slice(-4_000)));
  const ended = once(child, 'exit');
  return {
    peakMb: async () => {
      if (process.platform !== 'linux' || child.pid === undefined) return null;
      const kilobytes = /VmHWM:\s+(\d+) kB/.exec(await readFile(`/proc/${child.pid}/status`, 'utf8'))?.[1];
      return kilobytes === undefined ? null : Number(kilobytes) / 1024;
    },
    cpuSeconds: async () => (child.pid === undefined ? null : cpuSecondsOf(child.pid)),
    requireAlive: () => {
      if (child.exitCode !== null || child.signalCode !== null) throw new Error(`The daemon has ended:\n${said}`);
    },
    stop: async () => {
      child.kill('SIGTERM');
      await ended;
    },
  };
}

/** Runs a command to its end; returns its exit code. */
export async function runCommand(...words: readonly string[]): Promise<number | null> {
  const child = spawn(process.execPath, [PROGRAM, ...words], { stdio: 'ignore', env: { PATH: process.env['PATH'] } });
  const [code] = (await once(child, 'exit')) as [number | null];
  return code;
}

/** Looks every few milliseconds until `look` gives something. Throws when the daemon ends, or after ten minutes. */
export async function until<T>(daemon: Daemon, look: () => Promise<T | null>): Promise<T> {
  const deadline = performance.now() + 600_000;
  for (;;) {
    const found = await look();
    if (found !== null) return found;
    daemon.requireAlive();
    if (performance.now() > deadline) throw new Error('What was waited for has not come within ten minutes.');
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
}
