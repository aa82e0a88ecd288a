/**
 * The file that a simulator's users survive in: one change a line, appended before the request that made it is answered,
 * so that a process killed at any moment has lost nothing that it answered. At start the file is replayed and replaced by
 * the shortest one that makes the same state. Its first line names the version and the project's type. A last line that
 * was cut off is left out: its request was never answered.
 *
 * One process at a time may write; others may replay.
 */
import { closeSync, existsSync, fsyncSync, mkdirSync, openSync, readSync, renameSync, writeSync } from 'node:fs';
import { join } from 'node:path';

import type { ProjectKey } from '../../core/definition.js';
import { OperatorError } from '../../lib/errors.js';
import type { Change } from './change.js';
import { applyChange, snapshotOf } from './change.js';
import type { Project } from './project.js';

export interface Journal {
  /** Returns when the lines are with the operating system. */
  append: (lines: readonly string[]) => void;
  close: () => void;
}

const FILE = 'iterable.jsonl';
const VERSION = 1;
const CHUNK_BYTES = 1 << 20;

/** Fills the project from the directory, where there is anything, and keeps it there from now on. */
export function openJournal(directory: string, project: Project): Journal {
  mkdirSync(directory, { recursive: true });
  replay(directory, project);
  const path = join(directory, FILE);
  writeSnapshot(path, project);
  const file = openSync(path, 'a');
  return {
    append: (lines) => {
      if (lines.length > 0) writeWhole(file, `${lines.join('\n')}\n`);
    },
    close: () => closeSync(file),
  };
}

/** Fills the project from the directory and writes nothing. An OperatorError where the file isn't what it has to be. */
export function replay(directory: string, project: Project): void {
  const path = join(directory, FILE);
  if (!existsSync(path)) return;
  let number = 0;
  for (const { text, isLast } of readLines(path)) {
    number++;
    const line = parseLine(text);
    if (line === undefined) {
      if (isLast) return;
      throw new OperatorError(
        `${path}:${number}: not a line that the simulator wrote; delete the folder to begin anew`,
      );
    }
    if (line[0] === 'project') checkHeader(path, line, project.options.projectType);
    else applyChange(project, line);
  }
}

/** Takes the old file's place in one step, so that a process killed here leaves one or the other whole. */
function writeSnapshot(path: string, project: Project): void {
  const fresh = `${path}.new`;
  const file = openSync(fresh, 'w');
  let chunk = `${JSON.stringify(['project', VERSION, project.options.projectType])}\n`;
  for (const change of snapshotOf(project)) {
    chunk += `${JSON.stringify(change)}\n`;
    if (chunk.length < CHUNK_BYTES) continue;
    writeWhole(file, chunk);
    chunk = '';
  }
  writeWhole(file, chunk);
  fsyncSync(file);
  closeSync(file);
  renameSync(fresh, path);
}

type Header = ['project', number, ProjectKey];

function parseLine(text: string): Header | Change | undefined {
  try {
    const line: unknown = JSON.parse(text);
    return Array.isArray(line) ? (line as Header | Change) : undefined;
  } catch (error) {
    if (error instanceof SyntaxError) return undefined;
    throw error;
  }
}

function checkHeader(path: string, [, version, type]: Header, wanted: ProjectKey): void {
  if (version !== VERSION) {
    throw new OperatorError(`${path}: written by another version of the simulator; delete the folder to begin anew`);
  }
  if (type === wanted) return;
  throw new OperatorError(
    `${path}: holds a project of type ${type}, the configuration has ${wanted}; delete the folder or name another one`,
  );
}

function* readLines(path: string): Generator<{ text: string; isLast: boolean }> {
  const file = openSync(path, 'r');
  try {
    const chunk = Buffer.alloc(CHUNK_BYTES);
    let rest: Buffer[] = [];
    let before: string | undefined;
    for (let size = readSync(file, chunk); size > 0; size = readSync(file, chunk)) {
      let start = 0;
      for (let end = chunk.indexOf(10); end !== -1 && end < size; end = chunk.indexOf(10, start)) {
        if (before !== undefined) yield { text: before, isLast: false };
        before = Buffer.concat([...rest, chunk.subarray(start, end)]).toString();
        rest = [];
        start = end + 1;
      }
      rest.push(Buffer.from(chunk.subarray(start, size)));
    }
    const torn = Buffer.concat(rest).toString();
    if (before !== undefined) yield { text: before, isLast: torn === '' };
    if (torn !== '') yield { text: torn, isLast: true };
  } finally {
    closeSync(file);
  }
}

function writeWhole(file: number, text: string): void {
  const bytes = Buffer.from(text);
  for (let written = 0; written < bytes.length; written += writeSync(file, bytes, written));
}
