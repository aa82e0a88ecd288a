import { statSync } from 'node:fs';
import { dirname } from 'node:path';

/**
 * Notices that the files of a configuration have changed: by looking at their times and those of their folders, since
 * editors, mounted volumes and secrets replace files in ways that file-system events tell of differently everywhere.
 * A change counts after two seconds of stillness, so that an upload of several files is seen whole.
 */
export interface ConfigWatch {
  /** True once after each change. */
  hasChanged: () => boolean;
}

const STILL_MS = 2_000;

function fingerprint(files: readonly string[]): string {
  const paths = [...new Set([...files, ...files.map((file) => dirname(file))])];
  return paths
    .map((path) => {
      const stats = statSync(path, { throwIfNoEntry: false });
      return stats === undefined ? `${path}:-` : `${path}:${stats.mtimeMs}:${stats.isDirectory() ? '' : stats.size}`;
    })
    .join('\n');
}

/** Watches what `files` names at each look. */
export function watchConfig(files: () => readonly string[], now: () => number = Date.now): ConfigWatch {
  let seen = fingerprint(files());
  let changing: { print: string; since: number } | null = null;
  return {
    hasChanged: () => {
      const print = fingerprint(files());
      if (print === seen) {
        changing = null;
        return false;
      }
      if (changing?.print !== print) {
        changing = { print, since: now() };
        return false;
      }
      if (now() - changing.since < STILL_MS) return false;
      seen = print;
      changing = null;
      return true;
    },
  };
}
