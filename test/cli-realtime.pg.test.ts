import { afterEach, describe, expect, it } from 'vitest';
import type { CommandContext } from '../src/cli/command.js';
import { installTriggers, printSql, uninstallTriggers } from '../src/cli/realtime.js';
import { definitionOf, describe as describeConfig, type Written } from './support/changes.js';
import { createSite } from './support/cli.js';
import { createHarness, type Harness } from './support/harness.js';

const TABLES = `
  create table people (id bigint primary key, user_id text, email text);
  create table orders (id bigint primary key, customer_id bigint, total numeric);
  create view recent as select * from orders`;
const INSTALLED = `select tgrelid::regclass::text as table, count(*)::int as triggers from pg_trigger where not tgisinternal group by 1 order by 1`;

let harness: Harness | undefined;
afterEach(async () => {
  await harness?.close();
  harness = undefined;
});

interface Said {
  lines: string[];
  said: string[];
  objects: Readonly<Record<string, unknown>>[];
}

/** A command's context over a configuration with these changes, and what it will have printed. */
async function open(changes: readonly Written[], answer: boolean | null = null): Promise<CommandContext & Said> {
  harness ??= await createHarness({ tables: TABLES });
  await harness.state(
    `insert into setting (name, value) values ('installation', to_jsonb(gen_random_uuid()::text)) on conflict do nothing`,
  );
  const { definitions, profiles } = describeConfig([definitionOf('d', changes)], [['people', 'id']]);
  const { config } = harness.opened;
  const said: Said = { lines: [], said: [], objects: [] };
  return {
    opened: {
      ...harness.opened,
      config: { ...config, definitions, profiles: { ...config.profiles, changes: profiles.changes } },
    },
    output: {
      json: false,
      line: (text = '') => said.lines.push(text),
      object: (result) => said.objects.push(result),
      objectWith: () => Promise.resolve(),
      say: (text) => said.said.push(text),
    },
    signal: new AbortController().signal,
    confirm: () => Promise.resolve(answer),
    ...said,
  };
}

describe('realtime', () => {
  it('installs what the configuration asks for, says so, and does nothing the second time', async () => {
    const first = await open([['orders', 'customer_id']]);
    expect(await installTriggers(first, { notify: true })).toBe(0);
    expect(first.lines.at(-1)).toBe('Changes of 2 tables are captured.');
    expect(first.objects).toMatchObject([
      {
        tables: [
          { table: 'public.orders', watches: ['public.orders(customer_id)'] },
          { table: 'public.people', watches: ['public.people(id)'] },
        ],
        refused: [],
      },
    ]);
    expect(await harness?.sql(INSTALLED)).toEqual([
      { table: 'orders', triggers: 4 },
      { table: 'people', triggers: 4 },
    ]);
    const second = await open([['orders', 'customer_id']]);
    expect(await installTriggers(second, { notify: true })).toBe(0);
    expect(second.lines).toEqual(['Changes of 2 tables are captured already; nothing was done.']);
  });

  it('leaves out what can not be followed, says why, and ends with 2', async () => {
    const context = await open([['recent', 'customer_id']]);
    expect(await installTriggers(context, { notify: true })).toBe(2);
    expect(context.said).toEqual([
      expect.stringMatching(
        /personas\.yaml:1:1: The table `recent` of `changes` is a view, .*: name the tables that it reads\. Until then "d" is polled\.$/,
      ),
    ]);
    expect(context.lines).toEqual(['No definition can be followed.']);
    expect(await harness?.sql(INSTALLED)).toEqual([]);
  });

  it('prints what it would run, which another may run instead', async () => {
    const context = await open([['orders', 'customer_id']]);
    expect(await printSql(context, { notify: false })).toBe(0);
    const [script = ''] = context.lines;
    expect(script).not.toContain('pg_notify');
    await harness?.sql(script);
    const installing = await open([['orders', 'customer_id']]);
    expect(await installTriggers(installing, { notify: false })).toBe(0);
    expect(installing.lines).toEqual(['Changes of 2 tables are captured already; nothing was done.']);
  });

  it('uninstalls everything, what another state uses only with a yes', async () => {
    await installTriggers(await open([['orders', 'customer_id']]), { notify: true });
    await harness?.state(`update setting set value = to_jsonb(gen_random_uuid()::text) where name = 'installation'`);
    await expect(installTriggers(await open([['orders', 'customer_id']]), { notify: true })).rejects.toThrow(
      'The source is captured for another personas-sync',
    );
    const asked = await open([], false);
    expect(await uninstallTriggers(asked, { yes: false })).toBe(2);
    expect(asked.said.at(-1)).toBe('Nothing was done.');
    const sure = await open([]);
    expect(await uninstallTriggers(sure, { yes: true })).toBe(0);
    expect(sure.lines.at(-1)).toBe('Nothing of real time is left in the source.');
    expect(await harness?.sql(INSTALLED)).toEqual([]);
    const again = await open([]);
    expect(await uninstallTriggers(again, { yes: false })).toBe(0);
    expect(again.lines).toEqual(['There is nothing of real time in the source.']);
  });

  it('says what it takes where nothing is to be followed', async () => {
    const context = await open([]);
    expect(await installTriggers(context, { notify: true })).toBe(0);
    expect(context.lines).toEqual([
      'Nothing is to be followed: that takes `changes` in a definition, and in `profiles`.',
    ]);
  });
});

it('`realtime` asks for a state before it prints, and needs none to uninstall', async () => {
  const site = await createSite(TABLES, { audiences: [{ name: 'All', sql: 'SELECT id AS profile_id FROM people' }] });
  const printed = await site.run('realtime', 'sql');
  expect([printed.code, printed.stderr]).toEqual([
    2,
    'Nothing has been synced yet: the database has no schema "personas". `personas-sync sync`, `start` or `migrate` makes it; `plan` shows what a sync would send.\n',
  ]);
  const uninstalled = await site.run('realtime', 'uninstall', '--json');
  expect([uninstalled.code, uninstalled.json]).toEqual([0, { version: 1, done: [] }]);
  await site.close();
});

it('`realtime install` names at once all that a role lacks, before anything is made, and makes the state with the triggers', async () => {
  const changes = { people: 'id' };
  const site = await createSite(TABLES, {
    profiles: { sql: 'SELECT id AS profile_id, user_id, email FROM people', key: 'hybrid', changes },
    audiences: [{ name: 'All', sql: 'SELECT id AS profile_id FROM people', changes }],
  });
  const [row] = await site.sql('select current_database() as name');
  const database = String(row?.['name']);
  const role = `role_${database}`;
  await site.sql(
    `revoke all on database ${database} from public; create role ${role} login password 'r'; grant connect, temporary on database ${database} to ${role}`,
  );
  const owner = site.database.url;
  const url = new URL(owner);
  [url.username, url.password] = [role, 'r'];
  site.database.url = url.toString();
  const refused = await site.run('realtime', 'install');
  expect([refused.code, refused.stderr.trimEnd().split('\n')]).toEqual([
    2,
    [
      `The role may not make the state's tables in the schema "personas": GRANT CREATE ON DATABASE "${database}" TO "${role}", or another database under \`state.url\`.`,
      `The role may not make the schema \`personas_capture\`: GRANT CREATE ON DATABASE "${database}" TO "${role}", or run what \`personas-sync realtime sql\` prints as a role that may.`,
      `The role may make no triggers on public.people: GRANT TRIGGER ON public.people TO "${role}".`,
    ],
  ]);
  await site.sql(`grant create on database ${database} to ${role}`);
  expect((await site.run('realtime', 'install')).code).toBe(2);
  expect(await site.sql(`select nspname from pg_namespace where nspname like 'personas%'`)).toEqual([]);
  await site.sql(`grant trigger on people to ${role}`);
  const installed = await site.run('realtime', 'install');
  expect([installed.code, installed.stderr]).toEqual([0, '']);
  site.database.url = owner;
  await site.sql(`drop owned by ${role} cascade; drop role ${role}`);
  await site.close();
});
