import { cp, mkdir, rm, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { temporaryFolder } from './support/postgres.js';
import { startProgram } from './support/program.js';

const SAMPLE = fileURLToPath(new URL('../config', import.meta.url));

let folder: string;
beforeEach(async () => {
  folder = await temporaryFolder();
});
afterEach(() => rm(folder, { recursive: true, force: true }));

describe('what a newcomer starts', () => {
  it('the demo ends with Iterable true to the database', async () => {
    const demo = startProgram(['demo', '--customers', '400', '--seconds', '4', '--json'], { cwd: folder });
    const { code, stdout } = await demo.ended;
    const { comparisons } = JSON.parse(stdout) as {
      comparisons: { definition: string; truth: number; differing: number }[];
    };
    expect(comparisons.length).toBeGreaterThan(8);
    expect(comparisons.filter(({ differing }) => differing > 0)).toEqual([]);
    expect(comparisons.filter(({ truth }) => truth === 0)).toEqual([]);
    expect(code).toBe(0);
  }, 90_000);

  it('`start` seeds the shop, says what stands in, delivers, stops at a signal, and goes on where it stopped', async () => {
    await cp(SAMPLE, join(folder, 'config'), { recursive: true });
    const first = startProgram(['start'], { cwd: folder, environment: { PORT: '0' } });
    await first.said(/Delivering: /);
    first.process.kill('SIGTERM');
    const { code, stderr } = await first.ended;
    expect(code).toBe(0);
    const [line] = stderr.split('\n');
    expect(line).toContain('embedded PostgreSQL');
    expect(stderr).toContain('is the built-in Iterable simulator');
    expect(stderr).toContain('Stopped.');

    const second = startProgram(['status', '--json'], { cwd: folder });
    const { stdout } = await second.ended;
    const { destinations } = JSON.parse(stdout) as { destinations: { waiting: number; dead: number }[] };
    expect(destinations).toMatchObject([{ name: 'iterable', dead: 0 }]);

    const third = startProgram(['start'], { cwd: folder, environment: { PORT: '0' } });
    await third.said(/Leading/);
    third.process.kill('SIGTERM');
    expect((await third.ended).code).toBe(0);
  }, 120_000);

  it('a mistake in the configuration is told with its place, and nothing is started', async () => {
    await mkdir(join(folder, 'config'));
    await writeFile(join(folder, 'config/personas.yaml'), 'profiles:\n  sql: SELECT 1\n  kye: email\n');
    const { code, stderr } = await startProgram(['start'], { cwd: folder, environment: { PORT: '0' } }).ended;
    expect(code).toBe(2);
    expect(stderr).toMatch(/personas\.yaml:3:3: .*kye/);
  });
});
