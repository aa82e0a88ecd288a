import { existsSync, readdirSync, readFileSync } from 'node:fs';
import { dirname, join, relative, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';
import ts from 'typescript';
import { describe, expect, it } from 'vitest';

/** The shape of src/, held by reading its imports; types count. What each folder is for: src/ARCHITECTURE.md. */
const ROOT = fileURLToPath(new URL('..', import.meta.url));
const SRC = join(ROOT, 'src');

/** A folder imports only folders of a lower rank, and itself. */
const RANKS: Readonly<Record<string, number>> = {
  lib: 0,
  core: 1,
  query: 1,
  config: 2,
  db: 2,
  outbox: 3,
  destinations: 3,
  sync: 4,
  delivery: 4,
  realtime: 5,
  server: 6,
  'daemon.ts': 7,
  demo: 8,
  cli: 9,
};
/** Folders of one rank that may not see each other: the outbox table is the seam between them. */
const SEAMS = [
  ['sync', 'delivery'],
  ['outbox', 'destinations'],
  // What opens long transactions can't send: no request is made while one is open.
  ['sync', 'destinations'],
  ['realtime', 'delivery'],
  ['realtime', 'destinations'],
];
/** Where each package is at home; `*` stands for any file of a folder. */
const HOMES: Readonly<Record<string, readonly string[]>> = {
  pg: ['db/', 'demo/postgres.ts'],
  'pg-copy-streams': ['db/'],
  'pg-cursor': ['db/'],
  kysely: ['db/', 'sync/scheduler.ts'],
  got: ['destinations/client.ts'],
  bottleneck: ['delivery/slots.ts'],
  'node-cron': ['sync/scheduler.ts'],
  winston: ['lib/logger.ts'],
  'prom-client': ['server/metrics.ts'],
  zod: ['config/'],
  yaml: ['config/'],
  commander: ['cli/main.ts'],
  'libpg-query': ['db/parse.ts'],
};
const LONGEST = 400;

interface Import {
  from: string;
  to: string;
}

function sourceFiles(folder: string): string[] {
  return readdirSync(folder, { withFileTypes: true, recursive: true })
    .filter((entry) => entry.isFile() && entry.name.endsWith('.ts'))
    .map((entry) => relative(SRC, join(entry.parentPath, entry.name)));
}

const files = sourceFiles(SRC);
const imports: Import[] = files.flatMap((from) => {
  const text = readFileSync(join(SRC, from), 'utf8');
  return ts.preProcessFile(text, true, true).importedFiles.map(({ fileName }) => ({
    from,
    to: fileName.startsWith('.')
      ? relative(SRC, resolve(SRC, dirname(from), fileName)).replace(/\.js$/, '.ts')
      : fileName,
  }));
});
const local = imports.filter(({ to }) => files.includes(to));
const folderOf = (file: string): string => file.split('/')[0] ?? file;

describe('src/', () => {
  it('imports downwards only: a stage knows the stages below it', () => {
    const upwards = local.filter(({ from, to }) => {
      const [a, b] = [RANKS[folderOf(from)], RANKS[folderOf(to)]];
      expect(a, `${from} is in a folder without a rank`).toBeDefined();
      expect(b, `${to} is in a folder without a rank`).toBeDefined();
      // `cli` and the composition root open the stand-ins; nothing else knows them.
      return folderOf(from) !== folderOf(to) && (a ?? 0) < (b ?? 0);
    });
    expect(upwards).toEqual([]);
  });

  it('keeps computing and delivering apart: the outbox table is the seam', () => {
    const across = local.filter(({ from, to }) =>
      SEAMS.some(
        (seam) => seam.includes(folderOf(from)) && seam.includes(folderOf(to)) && folderOf(from) !== folderOf(to),
      ),
    );
    expect(across).toEqual([]);
  });

  it('has no circle of imports, types included', () => {
    const next = new Map(files.map((file) => [file, local.filter(({ from }) => from === file).map(({ to }) => to)]));
    const done = new Set<string>();
    const findCircle = (file: string, path: readonly string[]): readonly string[] | null => {
      if (path.includes(file)) return [...path.slice(path.indexOf(file)), file];
      if (done.has(file)) return null;
      for (const to of next.get(file) ?? []) {
        const circle = findCircle(to, [...path, file]);
        if (circle !== null) return circle;
      }
      done.add(file);
      return null;
    };
    expect(files.map((file) => findCircle(file, [])).find((circle) => circle !== null) ?? []).toEqual([]);
  });

  it('gives each package one home, so that it can be exchanged there', () => {
    const abroad = imports.filter(({ from, to }) => {
      const homes = HOMES[to];
      return homes !== undefined && !homes.some((home) => from.startsWith(home));
    });
    expect(abroad).toEqual([]);
  });

  it('reads the environment in the command line alone', () => {
    const reading = files.filter((file) => /\bprocess\.env\b/.test(readFileSync(join(SRC, file), 'utf8')));
    expect(reading.filter((file) => folderOf(file) !== 'cli' && folderOf(file) !== 'demo')).toEqual([]);
  });

  it('ends the process in the command line alone', () => {
    const ending = files.filter((file) => /\bprocess\.exit\(/.test(readFileSync(join(SRC, file), 'utf8')));
    expect(ending.filter((file) => folderOf(file) !== 'cli')).toEqual([]);
  });

  it('has no file past 400 lines, which would hold two things', () => {
    const long = files.filter((file) => readFileSync(join(SRC, file), 'utf8').split('\n').length > LONGEST);
    expect(long).toEqual([]);
  });
});

describe('the invariants', () => {
  it('each name a test that there is', () => {
    const page = readFileSync(join(SRC, 'ARCHITECTURE.md'), 'utf8');
    const named = [...page.matchAll(/`(test\/[\w./-]+\.test\.ts)`/g)].map(([, file]) => file ?? '');
    expect(named.length).toBeGreaterThan(0);
    expect(named.filter((file) => !existsSync(join(ROOT, file)))).toEqual([]);
  });
});
