import { cp, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { parse, stringify } from 'yaml';
import { loadConfig } from '../src/config/load.js';
import { startSimulator, type Simulator } from '../src/demo/simulator/server.js';
import { createDatabase, type TestDatabase } from './support/database.js';
import { startProgram } from './support/program.js';

/** Everything that the README tells people to type or to write is tried here, in the order in which it stands there. */
const ROOT = fileURLToPath(new URL('..', import.meta.url));

const readme = await readFile(join(ROOT, 'README.md'), 'utf8');
const blocks = [...readme.matchAll(/^( *)```(\w*)\n([\s\S]*?)^ *```/gm)].map(([, indent, language, text]) => ({
  language,
  text: (text ?? '').replaceAll(new RegExp(`^${indent ?? ''}`, 'gm'), ''),
}));
const commands = blocks.filter(({ language }) => language === 'sh').flatMap(({ text }) => text.trim().split('\n'));
const [configuration = '', ...more] = blocks.filter(({ language }) => language === 'yaml').map(({ text }) => text);
const others = more.find((text) => text.startsWith('destinations:')) ?? '';
const followed = more.find((text) => text.startsWith('profiles:')) ?? '';
const SCRIPTS = ['npm ci && npm start', 'npm ci && npm test'];

/** The words of a command line, quotes taken off. */
function wordsOf(line: string): string[] {
  return [...line.matchAll(/'([^']*)'|(\S+)/g)].map(([, quoted, bare]) => quoted ?? bare ?? '');
}

describe('the README', () => {
  let database: TestDatabase;
  let simulator: Simulator;
  let folder: string;
  let environment: NodeJS.ProcessEnv;

  beforeAll(async () => {
    database = await createDatabase();
    await database.pool.query(`
      create table customers (id bigint primary key, email text);
      create table orders (id bigint generated always as identity, customer_id bigint, total numeric(10, 2), placed_at timestamptz);
      insert into customers select n, case n when 1 then 'ada@example.com' else 'c' || n || '@example.com' end from generate_series(1, 30) as n;
      insert into orders (customer_id, total, placed_at)
        select n, n * 100, now() - n * interval '2 days' from generate_series(1, 30) as n`);
    simulator = await startSimulator({ projectType: 'hybrid' });
    folder = await mkdtemp(join(tmpdir(), 'personas-readme-'));
    await writeFile(join(folder, 'personas.yaml'), configuration);
    environment = {
      DATABASE_URL: database.url,
      ITERABLE_API_KEY: 'key-of-a-test',
      ITERABLE_REGION: simulator.url,
      PORT: '0',
    };
  });
  afterAll(async () => {
    await simulator.close();
    await database.drop();
    await rm(folder, { recursive: true, force: true });
  });

  it('opens with two commands that package.json knows', async () => {
    expect(commands.slice(0, 2)).toEqual(SCRIPTS);
    const { scripts } = JSON.parse(await readFile(join(ROOT, 'package.json'), 'utf8')) as {
      scripts: Record<string, string>;
    };
    expect(Object.keys(scripts)).toEqual(expect.arrayContaining(['start', 'test', 'demo', 'bench']));
  });

  /** The configuration with what is written in the block about real time in the place of its own. */
  async function follow(): Promise<void> {
    const next = parse(followed) as { profiles: unknown; audiences: { name: string }[] };
    const before = parse(configuration) as typeof next;
    const audiences = before.audiences.map((each) => next.audiences.find(({ name }) => name === each.name) ?? each);
    expect(audiences).not.toEqual(before.audiences);
    await writeFile(join(folder, 'personas.yaml'), stringify({ ...before, profiles: next.profiles, audiences }));
  }

  const typed = commands.filter((line) => line.startsWith('personas-sync ') && !line.startsWith('personas-sync start'));
  for (const line of typed) {
    it(`does what it says: ${line}`, async () => {
      if (line.startsWith('personas-sync realtime install')) await follow();
      const { code, stdout, stderr } = await startProgram(wordsOf(line).slice(1), { cwd: folder, environment }).ended;
      expect({ code, stderr: code === 0 ? '' : stderr }).toEqual({ code: 0, stderr: '' });
      expect(stdout).not.toBe('');
    });
  }

  it('names no other command than those that were tried, and starts the daemon by the one that remains', async () => {
    const rest = commands.filter((line) => !typed.includes(line) && !SCRIPTS.includes(line));
    expect([...new Set(rest)]).toEqual(['personas-sync start --config personas.yaml']);
    const daemon = startProgram(wordsOf(rest[0] ?? '').slice(1), { cwd: folder, environment });
    await daemon.said(/personas-sync starts/);
    daemon.process.kill('SIGTERM');
    expect((await daemon.ended).code).toBe(0);
  });

  it('has what it says to follow followed', async () => {
    const { stdout } = await startProgram(['check', '--json', '--config', 'personas.yaml'], {
      cwd: folder,
      environment,
    }).ended;
    const { definitions } = JSON.parse(stdout) as { definitions: { key: string; realtime: unknown }[] };
    expect(definitions.map(({ key, realtime }) => [key, realtime])).toEqual([
      ['order_completed_last_30_days', null],
      ['big_spenders', { possible: true, because: null }],
      ['lifetime_value', null],
    ]);
  });

  it('shows destinations that the configuration takes', async () => {
    const file = join(folder, 'others.yaml');
    await writeFile(file, `profiles: { table: customers, key: hybrid }\n${others}`);
    const { destinations } = loadConfig(file, { SEGMENT_WRITE_KEY: 'key' });
    expect(destinations.map(({ type }) => type)).toEqual(['segment', 'file']);
  });

  it('names every command that there is', async () => {
    const { stdout } = await startProgram(['--help'], { cwd: folder }).ended;
    const known = [...stdout.matchAll(/^ {2}([a-z]+)(?: [[<]| {2})/gm)]
      .map(([, name]) => name ?? '')
      .filter((name) => name !== 'help');
    expect(known.length).toBeGreaterThan(15);
    expect(known.filter((name) => !readme.includes(`\`${name}`))).toEqual([]);
  });

  it('told Iterable what its configuration says', () => {
    expect(simulator.user('11')?.fields).toMatchObject({
      big_spenders: 'true',
      lifetime_value: '1100.00',
      order_completed_last_30_days: 'true',
    });
    expect(simulator.events('11').map(({ name }) => name)).toEqual(['Audience Entered']);
  });
});

describe('config/', () => {
  it('is a configuration as it stands, with every file that it includes', () => {
    const config = loadConfig(join(ROOT, 'config/personas.yaml'), {});
    expect(config.definitions.map(({ kind }) => kind)).toEqual(expect.arrayContaining(['audience', 'trait']));
    expect(config.remarks).toEqual([]);
  });

  it('works from a copy, too', async () => {
    const copy = await mkdtemp(join(tmpdir(), 'personas-config-'));
    await cp(join(ROOT, 'config'), copy, { recursive: true });
    expect(loadConfig(join(copy, 'personas.yaml'), {}).definitions.length).toBeGreaterThan(5);
    await rm(copy, { recursive: true, force: true });
  });
});
