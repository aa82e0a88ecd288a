import { spawnSync } from 'node:child_process';
import { readFile, writeFile } from 'node:fs/promises';
import { createServer } from 'node:net';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { z } from 'zod';
import { createSite, parseResult, type Site } from './support/cli.js';
import { PROGRAM, startProgram, type Ended } from './support/program.js';

/** What a newcomer gets wrong, and what they are told: in words, with an exit code, and never with a secret. */
const PEOPLE = `
  create table people (id bigint primary key, user_id text, email text);
  insert into people select n, 'u' || n, 'p' || n || '@example.com' from generate_series(1, 5) as n`;
const VIP = { name: 'VIP', sql: 'SELECT id AS profile_id FROM people' };

const errorJson = z.strictObject({
  version: z.literal(1),
  error: z.strictObject({
    code: z.union([z.literal(1), z.literal(2), z.literal(75)]),
    problems: z
      .array(
        z.strictObject({
          place: z.strictObject({ file: z.string(), line: z.number(), column: z.number() }).optional(),
          message: z.string(),
        }),
      )
      .min(1),
  }),
});
const migrateJson = z.strictObject({ version: z.literal(1), schema: z.string(), applied: z.array(z.string()) });

let site: Site;
beforeAll(async () => {
  site = await createSite(PEOPLE, { audiences: [VIP] });
});
afterAll(() => site.close());

const program = (words: readonly string[], environment: NodeJS.ProcessEnv = {}): Promise<Ended> =>
  startProgram(words, { cwd: site.folder, environment }).ended;

/** A port on which nothing listens. */
async function freePort(): Promise<number> {
  const server = createServer();
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  const address = server.address();
  await new Promise((resolve) => server.close(resolve));
  return typeof address === 'object' && address !== null ? address.port : 0;
}

describe('--help', () => {
  const COMMANDS = [
    'start',
    'check',
    'plan',
    'sync',
    'backfill',
    'status',
    'runs',
    'approve',
    'reject',
    'profile',
    'forget',
    'pause',
    'resume',
    'failed',
    'realtime',
    'migrate',
    'schema',
    'demo',
  ];

  it('lists every command, and each explains itself', async () => {
    const whole = await program(['--help']);
    expect(whole.code).toBe(0);
    for (const command of COMMANDS) expect(whole.stdout).toMatch(new RegExp(`^  ${command}\\b`, 'm'));
    const each = await Promise.all(COMMANDS.map((command) => program([command, '--help'])));
    for (const [index, { code, stdout }] of each.entries()) {
      expect(code).toBe(0);
      expect(stdout).toContain(`Usage: personas-sync ${COMMANDS[index] ?? ''}`);
    }
  });

  it('is hinted at with 2 where a command or an argument is wrong', async () => {
    const [unknown, missing, wrong] = await Promise.all([
      program(['synch']),
      program(['backfill']),
      program(['approve', 'last']),
    ]);
    expect(unknown.code).toBe(2);
    expect(unknown.stderr).toContain('Did you mean sync?');
    expect(missing.code).toBe(2);
    expect(missing.stderr).toContain("missing required argument 'key'");
    expect(wrong.code).toBe(2);
    expect(wrong.stderr).toContain('It must be a whole number from 1.');
  });
});

describe('the configuration', () => {
  it('is missed by its name', async () => {
    const [text, json] = await Promise.all([program(['check']), program(['--json', 'check'])]);
    expect(text.code).toBe(2);
    expect(text.stderr).toContain('There is no configuration at config/personas.yaml; name one with --config.');
    expect(errorJson.parse(parseResult(json.stdout)).error.code).toBe(2);
  });

  it('tells all of its mistakes at once, each with its line', async () => {
    await writeFile(
      join(site.folder, 'wrong.yaml'),
      'profile:\n  key: email\nprofiles:\n  table: people\n  key: emial\ndestinations:\n  iterable: { type: iterable }\n',
    );
    const { code, stdout } = await program(['-c', 'wrong.yaml', 'check', '--json']);
    expect(code).toBe(2);
    const { problems } = errorJson.parse(parseResult(stdout)).error;
    expect(problems.map(({ place, message }) => [place?.line, message])).toEqual([
      [1, expect.stringContaining('did you mean `profiles`?')],
      [5, expect.stringContaining('`email`')],
    ]);
  });

  it('with a variable that is not set names the variable', async () => {
    const { code, stderr } = await program(['-c', 'personas.yaml', 'check']);
    expect(code).toBe(2);
    expect(stderr).toContain('DATABASE_URL is not set');
  });

  it('without a key for a database of its own is refused: nothing may be taken for synced', async () => {
    await writeFile(
      join(site.folder, 'keyless.yaml'),
      (await readFile(join(site.folder, 'personas.yaml'), 'utf8')).replace(/api_key: .*/, "api_key: ''"),
    );
    const { code, stderr } = await program(['-c', 'keyless.yaml', 'sync'], { DATABASE_URL: site.database.url });
    expect(code).toBe(2);
    expect(stderr).toContain('Set ITERABLE_API_KEY, or write `region: simulator`');
    expect(stderr).toMatch(/keyless\.yaml:\d+:\d+: /);
  });

  it('with region: simulator says first that nothing reaches Iterable', async () => {
    await writeFile(
      join(site.folder, 'simulated.yaml'),
      (await readFile(join(site.folder, 'personas.yaml'), 'utf8')).replace(/region: .*/, 'region: simulator'),
    );
    const { code, stderr, stdout } = await program(['-c', 'simulated.yaml', 'check'], {
      DATABASE_URL: site.database.url,
    });
    expect(code).toBe(0);
    expect(stderr).toContain('Destination "iterable" is the built-in Iterable simulator (region: simulator)');
    expect(stdout).toContain('✓ destination iterable');
  });
});

describe('the database', () => {
  it('that is out of reach ends every command with 75', async () => {
    const url = `postgresql://someone:hush-hush@127.0.0.1:${await freePort()}/shop`;
    const commands = [['check'], ['plan'], ['sync'], ['status'], ['migrate']];
    const all = await Promise.all(
      commands.map((words) => program(['-c', 'personas.yaml', ...words], { DATABASE_URL: url })),
    );
    for (const { code, stdout, stderr } of all) {
      expect({ code, stdout, stderr }).toEqual({
        code: 75,
        stdout: '',
        stderr: 'The source database is out of reach.\n',
      });
    }
  });

  it('that lets nobody in ends with 2, without the password', async () => {
    const url = new URL(site.database.url);
    url.pathname = '/no_such_database';
    url.password = 'hush-hush';
    const { code, stdout, stderr } = await program(['-c', 'personas.yaml', 'check', '--json'], {
      DATABASE_URL: url.toString(),
    });
    expect(code).toBe(2);
    expect(stderr).toContain('lets nobody in with this URL');
    expect(stdout + stderr).not.toContain('hush-hush');
  });
});

describe('a key', () => {
  beforeAll(async () => {
    expect((await site.run('sync')).code).toBe(0);
  });

  it('with a typo is answered with the one that was meant, by every command that takes one', async () => {
    const commands = [
      ['plan', 'vpi'],
      ['sync', 'vpi'],
      ['status', 'vpi'],
      ['runs', 'vpi'],
      ['pause', 'vpi'],
      ['backfill', 'vpi'],
      ['failed', 'list', '--key', 'vpi'],
    ];
    const all = await Promise.all(commands.map((words) => site.run(...words)));
    for (const [index, { code, stderr }] of all.entries()) {
      expect({ command: commands[index], code, stderr }).toMatchObject({
        code: 2,
        stderr: expect.stringContaining('vip') as string,
      });
    }
  });
});

describe('output', () => {
  it('has no colours where it is no terminal, and none with NO_COLOR', async () => {
    const plain = await site.run('plan');
    expect(plain.stdout).not.toContain('\u001b');
    const script = `${process.execPath} ${PROGRAM} -c personas.yaml plan`;
    const onTerminal = (environment: NodeJS.ProcessEnv) =>
      spawnSync('script', ['-qec', script, '/dev/null'], {
        cwd: site.folder,
        env: { PATH: process.env['PATH'], TERM: 'xterm', DATABASE_URL: site.database.url, ...environment },
        encoding: 'utf8',
      });
    const colourful = onTerminal({});
    if (colourful.error !== undefined) return; // no terminal can be made here
    expect(colourful.stdout).toContain('\u001b[');
    expect(onTerminal({ NO_COLOR: '1' }).stdout).not.toContain('\u001b[');
  });

  it('keeps control characters of the data from the terminal', async () => {
    await site.sql(`insert into people values (66, E'red\\u001b[31m', null)`);
    const { stdout } = await site.run('plan', 'vip');
    expect(stdout).toContain('red\uFFFD[31m');
    expect(stdout).not.toContain('\u001b');
  });

  it('may be cut off by its reader', () => {
    const { status, stderr } = spawnSync(
      'sh',
      ['-c', `"$0" "$1" -c personas.yaml plan | head -c 1`, process.execPath, PROGRAM],
      { cwd: site.folder, env: { PATH: process.env['PATH'], DATABASE_URL: site.database.url }, encoding: 'utf8' },
    );
    expect({ status, stderr }).toEqual({ status: 0, stderr: '' });
  });
});

describe('a command that looks', () => {
  it('ends at once at Ctrl-C, and takes its query off the database', async () => {
    await site.configure({
      audiences: [{ name: 'Slow', sql: 'SELECT id AS profile_id FROM people WHERE pg_sleep(30) IS NOT NULL' }],
    });
    const planning = site.start('plan');
    const running = `select count(*)::int as n from pg_stat_activity where datname = current_database() and wait_event = 'PgSleep'`;
    await expect.poll(() => site.sql(running), { timeout: 10_000 }).toEqual([{ n: 1 }]);
    planning.process.kill('SIGINT');
    expect(await planning.ended).toMatchObject({ code: 130, stderr: 'Stopped.\n' });
    await expect.poll(() => site.sql(running)).toEqual([{ n: 0 }]);
    await site.configure({ audiences: [VIP] });
  });
});

describe('migrations', () => {
  let fresh: Site;
  beforeAll(async () => {
    fresh = await createSite(PEOPLE, { audiences: [VIP], state: { migrate: 'manual' } });
  });
  afterAll(() => fresh.close());

  it('with state.migrate: manual wait for `migrate`, though plan and check have no need of them', async () => {
    const [start, sync, plan] = await Promise.all([fresh.run('start'), fresh.run('sync'), fresh.run('plan')]);
    for (const { code, stderr } of [start, sync]) {
      expect(code).toBe(2);
      expect(stderr).toContain(
        '(0001_create_state, 0002_add_real_time, 0003_order_marks_of_one_person, 0004_remember_what_had_triggers, 0005_stop_fields_apart, 0006_keep_differences, 0007_pass_exits_on). Run `personas-sync migrate` first.',
      );
    }
    expect(plan.code).toBe(0);
    expect(plan.stdout).toContain('5 would enter');
  });

  it('are applied by migrate, once, and named', async () => {
    const first = await fresh.run('migrate', '--json');
    expect(first.code).toBe(0);
    expect(migrateJson.parse(first.json)).toEqual({
      version: 1,
      schema: 'personas',
      applied: [
        '0001_create_state',
        '0002_add_real_time',
        '0003_order_marks_of_one_person',
        '0004_remember_what_had_triggers',
        '0005_stop_fields_apart',
        '0006_keep_differences',
        '0007_pass_exits_on',
      ],
    });
    expect((await fresh.run('migrate')).stdout).toContain('is up to date; nothing was done');
    expect((await fresh.run('sync')).code).toBe(0);
  });

  it('of a newer version are refused by all', async () => {
    await fresh.sql(`insert into personas.migration (name, timestamp) values ('9999_from_the_future', '2099-01-01')`);
    const all = await Promise.all([['sync'], ['plan'], ['migrate']].map((words) => fresh.run(...words)));
    for (const { code, stderr } of all) {
      expect(code).toBe(2);
      expect(stderr).toContain('was made by a newer version of personas-sync (9999_from_the_future)');
    }
  });
});

describe('a sync in which one definition fails', () => {
  it('ends with 2, shows what has run, and does not say that all is delivered', async () => {
    const fresh = await createSite(PEOPLE, {
      audiences: [
        { name: 'Fine', sql: 'SELECT id AS profile_id FROM people' },
        { name: 'Broken', sql: 'SELECT 1 / 0 AS profile_id' },
      ],
    });
    try {
      const { code, stdout, stderr } = await fresh.run('sync');
      expect(code).toBe(2);
      expect(stderr).toContain('broken: ');
      expect(stdout).toMatch(/^definition[^]*\nfine +\d+[^]*\nWhat has run is delivered\.\n$/);
      expect((await fresh.run('sync', 'broken')).stdout).toBe('');
    } finally {
      await fresh.close();
    }
  });
});
