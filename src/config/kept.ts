import { OperatorError } from '../lib/errors.js';
import type { Config } from './types.js';
import { watchConfig } from './watch.js';

/**
 * The configuration that is in force: the last that could be read and applied. What changes while another instance leads
 * is read, too: whoever led by what the files said when it was started would undo what has been applied since.
 */
export interface KeptConfig {
  config: () => Config;
  /** Why the files aren't what is in force; null where they are. */
  problem: () => string | null;
  /** True once after each change of the files. */
  hasChanged: () => boolean;
  /** Reads the files where they have changed; what is bad leaves the last that was good. */
  refresh: () => void;
  keep: (config: Config) => void;
}

export function keepConfig(first: Config, reread: () => Config, onProblem: (problem: string) => void): KeptConfig {
  let config = first;
  let problem: string | null = null;
  const watch = watchConfig(() => config.files);
  const keep = (next: Config): void => {
    config = next;
    problem = null;
  };
  return {
    config: () => config,
    problem: () => problem,
    hasChanged: watch.hasChanged,
    refresh: () => {
      if (!watch.hasChanged()) return;
      try {
        keep(reread());
      } catch (error) {
        if (!(error instanceof OperatorError)) throw error;
        problem = error.message;
        onProblem(problem);
      }
    },
    keep,
  };
}
