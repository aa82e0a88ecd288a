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
  expect([printed.code, printed.stderr]).toEqual([2, expect.stringContaining('Nothing has been synced yet')]);
  const uninstalled = await site.run('realtime', 'uninstall', '--json');
  expect([uninstalled.code, uninstalled.json]).toEqual([0, { version: 1, done: [] }]);
  await site.close();
});
