import { spawn, type ChildProcess } from 'node:child_process';
import { fileURLToPath } from 'node:url';

/** The built program as people run it: a process of its own. */
export const PROGRAM = fileURLToPath(new URL('../../dist/cli/main.js', import.meta.url));

export interface Ended {
  code: number | null;
  stdout: string;
  stderr: string;
}

export interface Program {
  process: ChildProcess;
  /** Resolves once stdout and stderr together match. */
  said: (pattern: RegExp) => Promise<void>;
  ended: Promise<Ended>;
}

/** Starts it with nothing in its environment but PATH, HOME and what is given. */
export function startProgram(
  words: readonly string[],
  options: { cwd: string; environment?: NodeJS.ProcessEnv },
): Program {
  const { PATH, HOME } = process.env;
  const child = spawn(process.execPath, [PROGRAM, ...words], {
    cwd: options.cwd,
    env: { PATH, HOME, ...options.environment },
    stdio: ['ignore', 'pipe', 'pipe'],
  });
  let stdout = '';
  let stderr = '';
  const listeners = new Set<() => void>();
  const onText = (keep: (text: string) => void) => (chunk: Buffer) => {
    keep(chunk.toString());
    for (const listener of listeners) listener();
  };
  child.stdout.on(
    'data',
    onText((text) => (stdout += text)),
  );
  child.stderr.on(
    'data',
    onText((text) => (stderr += text)),
  );
  const ended = new Promise<Ended>((resolve) => child.on('close', (code) => resolve({ code, stdout, stderr })));
  return {
    process: child,
    ended,
    said: (pattern) =>
      new Promise((resolve, reject) => {
        const look = (): void => {
          if (!pattern.test(stdout + stderr)) return;
          listeners.delete(look);
          resolve();
        };
        listeners.add(look);
        look();
        void ended.then(({ code }) =>
          reject(new Error(`It ended with ${code} before it said ${pattern.source}: ${stderr}`)),
        );
      }),
  };
}
