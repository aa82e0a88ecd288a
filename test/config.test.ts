import { mkdirSync, mkdtempSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { inspect } from 'node:util';
import { afterAll, describe, expect, it } from 'vitest';
import { loadConfig } from '../src/config/load.js';
import type { Config } from '../src/config/types.js';
import type { Definition } from '../src/core/definition.js';
import { OperatorError, UnavailableError } from '../src/lib/errors.js';

const root = mkdtempSync(join(tmpdir(), 'personas-config-'));
afterAll(() => rmSync(root, { recursive: true }));

type Files = Record<string, string>;

let folders = 0;

/** A new folder with these files; returns the path of `personas.yaml` in it. */
function write(files: Files): string {
  const folder = join(root, String(folders++));
  for (const [name, content] of Object.entries(files)) {
    mkdirSync(dirname(join(folder, name)), { recursive: true });
    writeFileSync(join(folder, name), content);
  }
  return join(folder, 'personas.yaml');
}

const BASE = `profiles: { table: customers, key: hybrid }
destinations: { iterable: { type: iterable } }
`;

function load(files: Files | string, environment: NodeJS.ProcessEnv = {}) {
  return loadConfig(write(typeof files === 'string' ? { 'personas.yaml': files } : files), environment);
}

/** The messages of what is wrong, each after its file's name, line and column. */
const keyOf = ({ destinations: [destination] }: Config): string | undefined =>
  destination?.type === 'iterable' ? destination.apiKey?.reveal() : undefined;

function problemsOf(files: Files | string, environment: NodeJS.ProcessEnv = {}): string[] {
  const file = write(typeof files === 'string' ? { 'personas.yaml': files } : files);
  try {
    loadConfig(file, environment);
  } catch (error) {
    if (!(error instanceof OperatorError)) throw error;
    return error.message.replaceAll(`${dirname(file)}/`, '').split('\n');
  }
  return [];
}

function definitionOf(entry: string, kind: 'audiences' | 'traits' = 'audiences'): Definition {
  const [definition] = load(`${BASE}${kind}:\n  - { ${entry} }\n`).definitions;
  if (definition === undefined) throw new Error('no definition');
  return definition;
}

/** A definition of a configuration in which the changes of profiles are followed. */
function followed(entry: string): Definition {
  const [definition] = load(`profiles: { table: customers, key: hybrid, changes: { customers: id } }
destinations: { iterable: { type: iterable } }
audiences:
  - { name: x, ${entry.includes('sql:') ? '' : 'table: stats, '}${entry} }
`).definitions;
  if (definition === undefined) throw new Error('no definition');
  return definition;
}

/** What is wrong with one definition, without places. */
function definitionProblems(entry: string, kind: 'audiences' | 'traits' = 'audiences'): string[] {
  return problemsOf(`${BASE}${kind}:\n  - { ${entry} }\n`).map((problem) => problem.replace(/^[^ ]*: /, ''));
}

/** What is wrong with a main file whose sections are replaced or added, without places. */
function sectionProblems(yaml: string, environment: NodeJS.ProcessEnv = {}): string[] {
  const own = /^(\w+):/.exec(yaml)?.[1] ?? '';
  const rest = BASE.split('\n').filter((line) => !line.startsWith(`${own}:`));
  return problemsOf([...rest, yaml].join('\n'), environment).map((problem) => problem.replace(/^[^ ]*: /, ''));
}

describe('a configuration', () => {
  it('with what is required alone gets every default', () => {
    const config = load(BASE);
    expect(config).toMatchObject({
      source: { url: null, directUrl: null },
      state: { url: null, schema: 'personas', migrate: 'auto' },
      profiles: { key: 'hybrid', text: { sql: 'SELECT * FROM "customers"' }, changes: [] },
      destinations: [
        {
          type: 'iterable',
          name: 'iterable',
          apiKey: null,
          region: { kind: 'host', baseUrl: 'https://api.iterable.com' },
          quotas: {
            usersUpdate: 500,
            usersBulkUpdate: 5,
            eventsTrack: 2000,
            eventsTrackBulk: 10,
            lists: 5,
            reads: 100,
          },
          place: { file: config.file, line: 2, column: 17 },
        },
      ],
      definitions: [],
      runs: { parallel: 2, memoryMb: 256, timeoutMs: 3_600_000 },
      logging: { level: 'info', format: 'auto' },
      remarks: [],
      files: [config.file],
    });
  });

  it('may set everything', () => {
    const config = load(
      `
source: { url: "postgres://a:b@c/d", direct_url: "postgresql:///d?host=/run" }
state: { url: "\${STATE}", schema: sync, migrate: manual }
profiles: { sql: SELECT 1 AS profile_id, key: email, changes: { customers: id } }
events: { table: shop.events, columns: { profile_id: customer_id, name: name, timestamp: at, properties: p, message_id: m } }
destinations:
  one: { type: iterable, api_key: k1, region: eu, quotas: { users_update: 100, users_bulk_update: 1, events_track: 7, events_track_bulk: 2, lists: 3 } }
  two: { type: iterable, api_key: k2, region: "http://127.0.0.1:99/", quota: 50% }
  three: { type: iterable, region: simulator }
runs: { parallel: "\${PARALLEL}", memory: 2 GB, timeout: 90s }
http: { host: 0.0.0.0, port: 80 }
logging: { level: debug, format: json }
`,
      { STATE: 'postgres://state', PARALLEL: '4' },
    );
    expect(config.source.url?.reveal()).toBe('postgres://a:b@c/d');
    expect(config.source.directUrl?.reveal()).toBe('postgresql:///d?host=/run');
    expect(config.state.url?.reveal()).toBe('postgres://state');
    expect(config.state).toMatchObject({ schema: 'sync', migrate: 'manual' });
    expect(config.profiles).toMatchObject({
      key: 'email',
      text: { sql: 'SELECT 1 AS profile_id' },
      changes: [{ table: '"customers"', way: { kind: 'column', column: '"id"' } }],
    });
    expect(config.destinations).toMatchObject([
      {
        name: 'one',
        region: { kind: 'host', baseUrl: 'https://api.eu.iterable.com' },
        quotas: { usersUpdate: 100, usersBulkUpdate: 1, eventsTrack: 7, eventsTrackBulk: 2, lists: 3, reads: 100 },
      },
      {
        name: 'two',
        region: { kind: 'host', baseUrl: 'http://127.0.0.1:99' },
        quotas: {
          usersUpdate: 250,
          usersBulkUpdate: 2.5,
          eventsTrack: 1000,
          eventsTrackBulk: 5,
          lists: 2.5,
          reads: 50,
        },
      },
      { name: 'three', region: { kind: 'simulator' }, apiKey: null },
    ]);
    expect(keyOf(config)).toBe('k1');
    expect(config.http).toEqual({ host: '0.0.0.0', port: 80 });
    expect(config.runs).toEqual({ parallel: 4, memoryMb: 2048, timeoutMs: 90_000 });
    expect(config.logging).toEqual({ level: 'debug', format: 'json' });
    expect(config.remarks).toEqual(['`events` has no effect in this version: definitions are written in SQL.']);
  });

  it('takes empty sections, urls and API keys for left out', () => {
    const config = load(
      `
source: { url: "\${DATABASE_URL:-}", direct_url: }
state: { url: "" }
profiles: { table: customers, key: user_id }
destinations: { iterable: { type: iterable, api_key: "\${KEY}" } }
include:
audiences:
traits:
events:
http: off
runs:
logging:
`,
      { KEY: '' },
    );
    expect(config.source).toEqual({ url: null, directUrl: null });
    expect(config.state.url).toBeNull();
    expect(config.destinations[0]).toMatchObject({ apiKey: null });
    expect(config.remarks).toEqual([]);
  });

  it('whose state has the url of the source keeps it in the source', () => {
    const config = load(`${BASE}source: { url: "postgres://a/b" }\nstate: { url: "postgres://a/b" }\n`);
    expect(config.state.url).toBeNull();
  });

  it.each([
    ['', { host: '127.0.0.1', port: 8080 }],
    ['http: { port: "0" }', { host: '127.0.0.1', port: 0 }],
    ['http: off', null],
    ['http:', { host: '127.0.0.1', port: 8080 }],
  ])('with %j serves at %j', (section, http) => {
    expect(load(`${BASE}${section}\n`).http).toEqual(http);
  });

  it('may send to what takes the calls of Segment, and into a file', () => {
    const config = load(`profiles: { table: customers, key: hybrid }
destinations:
  one: { type: segment, write_key: k1 }
  two: { type: segment, write_key: k2, url: "https://events.example.com/", quotas: { batch: 3 } }
  three: { type: file, path: out/calls.jsonl }
`);
    expect(config.destinations).toMatchObject([
      { type: 'segment', baseUrl: 'https://api.segment.io', quotas: { batch: 10 } },
      { type: 'segment', baseUrl: 'https://events.example.com', quotas: { batch: 3 } },
      { type: 'file', path: join(dirname(config.file), 'out/calls.jsonl'), quotas: { batch: 100 } },
    ]);
  });

  it('finds its variables in the environment and in mounted secrets', () => {
    const file = write({
      'personas.yaml': `source: { url: "\${DATABASE_URL}" }\n${BASE.replace('iterable }', 'iterable, api_key: "${KEY}" }')}`,
      key: 'from-a-file\n',
    });
    const config = loadConfig(file, { DATABASE_URL: 'postgres://a/b', KEY_FILE: join(dirname(file), 'key') });
    expect(config.source.url?.reveal()).toBe('postgres://a/b');
    expect(keyOf(config)).toBe('from-a-file');
  });
});

describe('a definition', () => {
  it('has these defaults as an audience', () => {
    const config = load(`${BASE}audiences:\n  - name: Big Spenders\n    sql: SELECT 1\n`);
    expect(config.definitions).toEqual([
      {
        key: 'big_spenders',
        name: 'Big Spenders',
        kind: 'audience',
        text: { sql: 'SELECT 1', placeOf: expect.any(Function) as unknown },
        lookback: null,
        cadence: { kind: 'poll', everyMs: 60_000 },
        changes: [],
        reconcileMs: 86_400_000,
        sends: new Map([
          [
            'iterable',
            {
              identify: true,
              track: false,
              entered: 'Audience Entered',
              exited: 'Audience Exited',
              computed: 'Trait Computed',
              list: null,
            },
          ],
        ]),
        initial: 'send',
        onMissing: 'null',
        onDelete: 'leave',
        enabled: true,
        guard: { exits: 0.3, growth: 1, nulls: 0.3 },
        properties: [],
        prefix: '',
        place: { file: config.file, line: 4, column: 5 },
      },
    ]);
  });

  it('may set everything as a trait', () => {
    const definition = definitionOf(
      `name: Stats, key: order_stats, table: shop.stats, lookback: 1 month, schedule: 0 3 * * *, changes: { orders: id }, reconcile: 6 hours,
        send: { iterable: both, computed: Stats changed }, destinations: [iterable], enabled: false, initial: skip,
        on_missing: keep, on_delete: exit_all, guard: { exits: off, growth: 2.5, nulls: 5% }, properties: [a, b], prefix: shop_`,
      'traits',
    );
    expect(definition).toMatchObject({
      key: 'order_stats',
      name: 'Stats',
      kind: 'trait',
      text: { sql: 'SELECT * FROM "shop"."stats"' },
      lookback: '1 month',
      cadence: { kind: 'cron', expression: '0 3 * * *' },
      changes: [{ table: '"orders"', written: 'orders', way: { kind: 'column', column: '"id"' } }],
      reconcileMs: 21_600_000,
      initial: 'skip',
      onMissing: 'keep',
      onDelete: 'exit_all',
      enabled: false,
      guard: { exits: null, growth: 2.5, nulls: 0.05 },
      properties: ['a', 'b'],
      prefix: 'shop_',
    });
    expect(definition.sends.get('iterable')).toMatchObject({ identify: true, track: true, computed: 'Stats changed' });
  });

  it.each([
    ['name: Big spenders', 'big_spenders', 'Big spenders'],
    ['name: Big spenders, key: whales', 'whales', 'Big spenders'],
    ['key: whales', 'whales', 'whales'],
  ])('with %s has the key %s and the name %s', (entry, key, name) => {
    expect(definitionOf(`${entry}, sql: SELECT 1`)).toMatchObject({ key, name });
  });

  it.each([
    ['', { kind: 'poll', everyMs: 60_000 }, null],
    ['poll: 5s', { kind: 'poll', everyMs: 5_000 }, null],
    ['poll: 1 second', { kind: 'poll', everyMs: 1_000 }, null],
    ['lookback: 30d', { kind: 'hourly' }, '30 days'],
    ['lookback: 30 days, schedule: manual', { kind: 'manual' }, '30 days'],
    ['schedule: manual', { kind: 'manual' }, null],
    ['schedule: " 0 3 * * MON "', { kind: 'cron', expression: '0 3 * * MON' }, null],
    ['schedule: "*/10 * * * * *"', { kind: 'cron', expression: '*/10 * * * * *' }, null],
    ['changes: { orders: customer_id }', { kind: 'poll', everyMs: 60_000 }, null],
  ])('with %j is computed %j', (entry, cadence, lookback) => {
    expect(definitionOf(`name: x, sql: SELECT 1, ${entry}`)).toMatchObject({ cadence, lookback });
  });

  it.each([
    ['changes: { orders: id }', { kind: 'poll', everyMs: 60_000 }],
    ['changes: { orders: id }, poll: 5s', { kind: 'poll', everyMs: 5_000 }],
    ['changes: { orders: id }, schedule: realtime', { kind: 'poll', everyMs: 60_000 }],
    ['changes: { orders: id }, schedule: " realtime ", poll: 5s', { kind: 'poll', everyMs: 5_000 }],
    ['changes: { orders: id }, schedule: realtime, lookback: 30 days', { kind: 'hourly' }],
  ])('with %j, the changes of profiles being followed, is computed in real time, or else %j', (entry, fallback) => {
    const asked = entry.includes('schedule');
    expect(followed(`sql: SELECT 1, ${entry}`).cadence).toEqual({ kind: 'realtime', fallback, asked });
  });

  it.each([
    ['', { kind: 'poll', everyMs: 60_000 }],
    ['changes: { orders: id }, lookback: 30 days', { kind: 'hourly' }],
    ['changes: { orders: id }, schedule: 0 3 * * *', { kind: 'cron', expression: '0 3 * * *' }],
    ['changes: { orders: id }, schedule: manual', { kind: 'manual' }],
  ])('with %j is computed %j although the changes of profiles are followed', (entry, cadence) => {
    expect(followed(`sql: SELECT 1, ${entry}`).cadence).toEqual(cadence);
  });

  it.each([
    ['orders: customer_id', '"orders"', 'orders', '"customer_id"'],
    ['shop.Orders: " Customer_ID "', '"shop"."Orders"', 'shop.Orders', '"Customer_ID"'],
    [`'"my shop".orders': '"customer id"'`, '"my shop"."orders"', '"my shop".orders', '"customer id"'],
    ['orders: select', '"orders"', 'orders', '"select"'],
    ['orders: selected_for', '"orders"', 'orders', '"selected_for"'],
  ])('follows the table in `changes: { %s }` by its column', (entry, table, written, column) => {
    const { changes, place } = followed(`changes: { ${entry} }`);
    const at = { ...place, column: place.column + '{ name: x, table: stats, changes: { '.length };
    expect(changes).toEqual([{ table, written, place: at, way: { kind: 'column', column } }]);
  });

  it('follows a table by a SELECT, keeps what looks like a variable in it, and knows its places', () => {
    const sql = `with c as (select * from "changed") SELECT o.customer_id FROM orders o JOIN c USING (id) WHERE n <> '\${NAME}'`;
    const config = load(`profiles: { table: customers, key: hybrid, changes: { customers: id } }
destinations: { iterable: { type: iterable } }
audiences:
  - name: x
    table: stats
    changes:
      orders: customer_id
      order_lines: |
        ${sql}
`);
    const [, lines] = config.definitions[0]?.changes ?? [];
    if (lines?.way.kind !== 'sql') throw new Error('not followed by SQL');
    expect(lines).toMatchObject({ table: '"order_lines"', written: 'order_lines' });
    expect(lines.way.text.sql).toBe(`${sql}\n`);
    expect(lines.way.text.placeOf(5)).toEqual({ file: config.file, line: 9, column: 14 });
  });

  it('whose `changes` can have no effect says so, as does a `reconcile` without them', () => {
    const config = load(`${BASE}audiences:
  - { name: x, sql: SELECT 1, changes: { orders: customer_id } }
  - { name: y, sql: SELECT 1, reconcile: 1 hour }
`);
    expect(config.remarks).toEqual([
      '`changes` of `x` has no effect while `profiles` has none: it is polled.',
      '`reconcile` of `y` has no effect without `changes`: all its runs are for everyone.',
    ]);
  });

  it.each([
    ['', 'identify'],
    ['send: identify', 'identify'],
    ['send: track', 'track'],
    ['send: both', 'identify track'],
    ['send: [identify]', 'identify'],
    ['send: [track, identify]', 'identify track'],
    ['send: [both, track]', 'identify track'],
    ['send: { iterable: [identify, track] }', 'identify track'],
    ['send: { iterable: track, entered: In, exited: Out }', 'track'],
  ])('with %j is sent as %s', (entry, expected) => {
    const send = definitionOf(`name: x, sql: SELECT 1, ${entry}`).sends.get('iterable');
    expect([send?.identify && 'identify', send?.track && 'track'].filter(Boolean).join(' ')).toBe(expected);
  });

  it.each([
    ['send: list', { name: 'x', existingOnly: false }, false],
    ['send: [identify, list]', { name: 'x', existingOnly: false }, true],
    ['send: { iterable: [both, list] }, list: Big ones', { name: 'Big ones', existingOnly: false }, true],
    ['send: list, list: { existing_only: true }', { name: 'x', existingOnly: true }, false],
    ['send: list, list: { name: Y, existing_only: "true" }', { name: 'Y', existingOnly: true }, false],
  ])('with %j fills the list %j', (entry, list, identify) => {
    expect(definitionOf(`name: x, sql: SELECT 1, ${entry}`).sends.get('iterable')).toMatchObject({ list, identify });
  });

  it('fills no list where there is none, and none with a trait', () => {
    const problems = problemsOf(`profiles: { table: customers, key: hybrid }
destinations: { iterable: { type: iterable }, look: { type: file, path: calls.jsonl } }
audiences: [{ name: x, sql: SELECT 1, send: { look: list } }]
traits: [{ name: y, sql: SELECT 1, send: { iterable: list } }]`);
    expect(problems).toEqual([
      "personas.yaml:3:45: `look` has no lists: `send` can't be `list` there.",
      "personas.yaml:4:42: `send` of a trait can't be `list`: a list holds the members of an audience.",
    ]);
  });

  it('shares a list with no other', () => {
    const problems = problemsOf(`profiles: { table: customers, key: hybrid }
destinations: { iterable: { type: iterable } }
audiences: [{ name: x, sql: SELECT 1, send: list }, { name: y, sql: SELECT 1, send: list, list: x }]`);
    expect(problems).toEqual(['personas.yaml:3:53: `y` and `x` fill one list, `x`: give one of them another `list`.']);
  });

  it('names its own events', () => {
    const send = definitionOf('name: x, sql: SELECT 1, send: { iterable: track, entered: " In ", exited: Out }').sends;
    expect(send.get('iterable')).toMatchObject({ entered: 'In', exited: 'Out', computed: 'Trait Computed' });
  });

  it.each([
    ['', ['one', 'two']],
    ['send: track', ['one', 'two']],
    ['destinations: [two]', ['two']],
    ['destinations: [two], send: track', ['two']],
    ['send: { one: track }', ['one']],
    ['send: { one: track, two: identify }', ['one', 'two']],
  ])('with %j goes to the destinations %j', (entry, names) => {
    const config = load(`profiles: { table: customers, key: hybrid }
destinations: { one: { type: iterable }, two: { type: iterable } }
audiences: [{ name: x, sql: SELECT 1, ${entry} }]`);
    expect([...(config.definitions[0]?.sends.keys() ?? [])]).toEqual(names);
  });

  it.each([
    ['guard: off', null],
    ['guard: "off"', null],
    ['guard: false', null],
    ['guard: {}', { exits: 0.3, growth: 1, nulls: 0.3 }],
    ['guard: { exits: 0.5 }', { exits: 0.5, growth: 1, nulls: 0.3 }],
    ['guard: { exits: "0.5", growth: 250 %, nulls: 33.3% }', { exits: 0.5, growth: 2.5, nulls: 0.333 }],
    ['guard: { exits: off, growth: false, nulls: 0 }', { exits: null, growth: null, nulls: 0 }],
  ])('with %s has the limits %j', (entry, guard) => {
    expect(definitionOf(`name: x, sql: SELECT 1, ${entry}`).guard).toEqual(guard);
  });

  it.each([
    ['on_missing: null', 'null'],
    ['on_missing: "null"', 'null'],
    ['on_missing: ~', 'null'],
    ['on_missing: keep', 'keep'],
    ['', 'null'],
  ])('with %j does %s for somebody whose row has gone', (entry, onMissing) => {
    expect(definitionOf(`name: x, sql: SELECT 1, ${entry}`, 'traits').onMissing).toBe(onMissing);
  });

  it.each([
    ['customers', 'SELECT * FROM "customers"'],
    ['Shop.Customers', 'SELECT * FROM "Shop"."Customers"'],
    [`'shop."odd ""name"". x"'`, 'SELECT * FROM "shop"."odd ""name"". x"'],
    ["shop.x;drop'table", 'SELECT * FROM "shop"."x;drop\'table"'],
  ])('from the table %s is %s', (table, sql) => {
    const { text, place } = definitionOf(`name: x, table: ${table}`);
    expect(text.sql).toBe(sql);
    expect(text.placeOf(17)).toEqual({ ...place, column: place.column + '{ name: x, table: '.length });
  });

  it('keeps what looks like a variable in its SQL', () => {
    expect(definitionOf('name: x, sql: "SELECT \'${NAME}\'"').text.sql).toBe("SELECT '${NAME}'");
  });

  it('finds its SQL file beside the file that names it, and the places in it', () => {
    const config = load({
      'personas.yaml': `${BASE}include: [audiences/a.yaml]`,
      'audiences/a.yaml': 'audiences: [{ name: x, sql_file: ../sql/x.sql }]',
      'sql/x.sql': '\uFEFFSELECT 1,\n  ${NAME}\n',
    });
    const [definition] = config.definitions;
    const file = join(dirname(config.file), 'sql/x.sql');
    expect(definition?.text.sql).toBe('SELECT 1,\n  ${NAME}\n');
    expect(definition?.text.placeOf(12)).toEqual({ file, line: 2, column: 3 });
    expect(config.files).toContain(file);
  });
});

describe('an include', () => {
  it('takes in each file once, in the order of the patterns and of their names, and never itself', () => {
    const one = (name: string) => `audiences: [{ name: ${name}, sql: SELECT 1 }]`;
    const config = load({
      'personas.yaml': `${BASE}include: [audiences/*.yaml, "**/*.yaml", b.yaml, nothing/*.yaml]\n${one('main')}`,
      'audiences/b.yaml': one('b'),
      'audiences/a.yaml': one('a'),
      'audiences/.hidden.yaml': one('hidden'),
      'audiences/readme.md': 'nothing',
      'b.yaml': one('c'),
      'deep/er/d.yaml': 'traits: [{ name: d, sql: SELECT 1 }]',
      'empty.yaml': '# nothing yet\n',
    });
    expect(config.definitions.map(({ key }) => key)).toEqual(['main', 'a', 'b', 'c', 'd']);
    expect(config.remarks).toEqual(['The include `nothing/*.yaml` matches no file.']);
    expect(config.files.map((file) => file.slice(dirname(config.file).length + 1))).toEqual([
      'personas.yaml',
      'audiences/*.yaml',
      'audiences/a.yaml',
      'audiences/b.yaml',
      '**/*.yaml',
      'b.yaml',
      'deep/er/d.yaml',
      'empty.yaml',
      'nothing/*.yaml',
    ]);
  });

  it('follows links to files, as mounted folders have them', () => {
    const file = write({
      'personas.yaml': `${BASE}include: [mounted/*.yaml]`,
      'mounted/..data/x.yaml': 'audiences: [{ name: x, sql: SELECT 1 }]',
    });
    symlinkSync('..data/x.yaml', join(dirname(file), 'mounted/x.yaml'));
    expect(loadConfig(file, {}).definitions).toHaveLength(1);
  });

  it.each([
    ['- name: x\n  sql: SELECT 1', 'A list alone does not say what it holds: put it below `audiences:` or `traits:`.'],
    [
      'name: x\nsql: SELECT 1',
      'A single definition is put into the list below `audiences:` or `traits:`, after a dash.',
    ],
    ['just text', 'An included file must be a mapping with `audiences:` and `traits:`.'],
    ['profiles: {}', '`profiles` belongs in the main file: included files hold `audiences` and `traits`.'],
    ['audience: []', "`audience` isn't a known section of an included file: did you mean `audiences`?"],
    ['traits: { name: x }', '`traits` must be a list, each entry beginning with a dash: `- name: Big spenders`.'],
  ])('of %j is refused with its place', (content, message) => {
    const [problem, ...others] = problemsOf({ 'personas.yaml': `${BASE}include: [a.yaml]`, 'a.yaml': content });
    expect(problem?.replace(/^a\.yaml:1:\d+: /, '')).toBe(message);
    expect(others).toEqual([]);
  });

  it('of a file that is missing is refused in its place', () => {
    expect(problemsOf(`${BASE}include:\n  - gone.yaml\n`)).toEqual([
      "personas.yaml:4:5: The file gone.yaml can't be read: there is no such file.",
    ]);
  });
});

describe('what is wrong', () => {
  it('comes all at once, by file, line and column', () => {
    const problems = problemsOf({
      'personas.yaml': `source:
  url: \${DATABASE_URL}
profiles:
  sql: ''
  key: hybird
destinations:
  iterable:
    type: iterable
    api_key: \${KEY}
    reigon: us
include: [a.yaml, b.yaml, gone.yaml]
audiences:
  - name: Big spenders
    sql: SELECT 1
    guard: { exits: 200% }
    send: { iterabel: track, entered: In }
  - name: Big spenders
    table: a.b.c
runs: { parallel: none }
loging: {}
`,
      'a.yaml': 'traits:\n  - name: email\n    sql_file: gone.sql\n    poll: 10\n',
      'b.yaml': 'traits:\n  - name: "x\n',
    });
    expect(problems).toEqual([
      'personas.yaml:2:8: The variable DATABASE_URL is not set: set DATABASE_URL or DATABASE_URL_FILE, or write `${DATABASE_URL:-default}`.',
      'personas.yaml:4:8: `profiles.sql` is empty: it must be text, such as `SELECT id AS profile_id FROM customers`.',
      'personas.yaml:5:8: `profiles.key` must be `email`, `user_id` or `hybrid`: did you mean `hybrid`?',
      'personas.yaml:9:14: The variable KEY is not set: set KEY or KEY_FILE, or write `${KEY:-default}`.',
      "personas.yaml:10:5: `destinations.iterable.reigon` isn't a known key of an Iterable destination: did you mean `region`?",
      "personas.yaml:11:27: The file gone.yaml can't be read: there is no such file.",
      'personas.yaml:15:21: `guard.exits` must be `off` or a share such as `30%`, at most `100%`.',
      "personas.yaml:16:13: `iterabel` isn't a known destination: did you mean `iterable`?",
      'personas.yaml:17:11: The key `big_spenders` is taken by the definition at personas.yaml:13:11: choose another.',
      'personas.yaml:18:12: `table` must be a table with its schema, such as `public.customers`, or the name of a table alone.',
      'personas.yaml:19:19: `runs.parallel` must be a whole number from 1 to 32.',
      "personas.yaml:20:1: `loging` isn't a known section: did you mean `logging`?",
      'a.yaml:2:11: The key `email` is reserved by Iterable; choose another name, or add a `key`.',
      "a.yaml:3:15: The file gone.sql can't be read: there is no such file.",
      'a.yaml:4:11: `poll` must be a length of time from `1 second` to `7 days`, such as `1 minute`.',
      'b.yaml:3:1: Something is missing here: a closing quote or bracket, a comma, or the space behind a colon.',
    ]);
  });

  it('is a problem of the operator, with places as data', () => {
    const file = write({ 'personas.yaml': `${BASE}runs: { parallel: 0 }` });
    const thrown: unknown = (() => {
      try {
        return loadConfig(file, {});
      } catch (error) {
        return error;
      }
    })();
    expect(thrown).toBeInstanceOf(OperatorError);
    expect(thrown).not.toBeInstanceOf(UnavailableError);
    expect(thrown).toMatchObject({ problems: [{ place: { file, line: 3, column: 19 } }] });
  });

  it.each([
    ['a missing file', 'gone.yaml', 'there is no such file'],
    ['a folder', '.', 'it is a folder'],
  ])('with the configuration as %s says so', (_, name, reason) => {
    const file = join(root, name);
    expect(() => loadConfig(file, {})).toThrow(
      new OperatorError(`The configuration ${file} can't be read: ${reason}.`),
    );
  });

  it.each([
    [
      '',
      'personas.yaml:1:1: The configuration must be a mapping with sections such as `profiles:` and `destinations:`.',
    ],
    [
      '- a',
      'personas.yaml:1:1: The configuration must be a mapping with sections such as `profiles:` and `destinations:`.',
    ],
    [
      'a: [',
      'personas.yaml:1:5: The indentation is wrong, or a bracket before it is open: indent what belongs together by the same spaces.',
    ],
  ])('with the content %j is one problem', (content, problem) => {
    expect(problemsOf(content)).toEqual([problem]);
  });

  it('with empty profiles and destinations is said of both', () => {
    expect(problemsOf('profiles:\ndestinations:\n')).toEqual([
      'personas.yaml:1:1: `profiles` is missing: say who people are, such as `profiles: { table: customers, key: hybrid }`.',
      'personas.yaml:2:1: A destination is missing: name one, such as `iterable: { type: iterable, api_key: ... }`.',
    ]);
  });

  it('with a key is found across files, and for a definition that is off', () => {
    expect(
      problemsOf({
        'personas.yaml': `${BASE}include: [a.yaml]\naudiences:\n  - { name: A b, sql: SELECT 1, enabled: false }\n`,
        'a.yaml': 'traits:\n  - { key: a_b, sql: SELECT 1 }\n',
      }),
    ).toEqual(['a.yaml:2:12: The key `a_b` is taken by the definition at personas.yaml:5:13: choose another.']);
  });
});

describe('a section', () => {
  const connection =
    'must be a connection string such as `postgres://user:password@host:5432/database`, with other characters than letters and digits in the password percent-encoded.';
  const region =
    '`destinations.x.region` must be `us`, `eu`, `simulator`, or a base URL without `/api` such as `https://api.iterable.com` (http on this machine only).';
  const key = 'must be an API key, text without spaces (put it in quotes if it looks like a number).';
  const calls = (name: string) => `\`destinations.x.quotas.${name}\` must be a whole number from 1 to 100000.`;
  const destination = (fields: string) => `destinations: { x: { type: iterable, ${fields} } }`;

  const table: [yaml: string, ...problems: string[]][] = [
    ['source: text', '`source` must be a mapping with keys such as `url` and `direct_url`.'],
    ['source: []', '`source` must be a mapping with keys such as `url` and `direct_url`.'],
    ['source: { url: 5 }', `\`source.url\` ${connection}`],
    ['source: { url: host=localhost }', `\`source.url\` ${connection}`],
    ['source: { url: "https://host/db" }', `\`source.url\` ${connection}`],
    ['source: { url: "postgres://u:pa#ss@host/db" }', `\`source.url\` ${connection}`],
    [
      'source: { direct_url: "postgres://a/b" }',
      '`source.direct_url` is a way past the pooler of `source.url`: set `source.url` too.',
    ],
    ['source: { uri: x }', "`source.uri` isn't a known key of `source`: did you mean `url`?"],
    ['source: { "a\\nb": x }', "`source.a\\nb` isn't a known key of `source`: use `direct_url` or `url`."],
    [
      'state: { schema: pg_x }',
      '`state.schema` must be the name of a schema: lower-case letters, digits and _, not beginning with a digit or `pg_`.',
    ],
    [
      'state: { schema: My State }',
      '`state.schema` must be the name of a schema: lower-case letters, digits and _, not beginning with a digit or `pg_`.',
    ],
    ['state: { migrate: never }', '`state.migrate` must be `auto` or `manual`.'],
    ['state: { migrate: Manual }', '`state.migrate` must be `auto` or `manual`: did you mean `manual`?'],
    [
      'profiles: {}',
      'One of `sql`, `sql_file` or `table` is missing here: write what selects the rows.',
      '`profiles.key` is missing: it must be `email`, `user_id` or `hybrid`.',
    ],
    ['profiles: customers', '`profiles` must be a mapping with keys such as `sql`, `sql_file` and `table`.'],
    ['profiles: { query: x, key: email }', '`profiles.query` is not supported here: write `sql`.'],
    ['profiles: { sql: SELECT 1, table: x, key: email }', 'Only one of `sql` and `table` can stand here: keep one.'],
    [
      'profiles: { sql: SELECT 1, key: userid }',
      '`profiles.key` must be `email`, `user_id` or `hybrid`: did you mean `user_id`?',
    ],
    [
      'profiles: { sql: SELECT 1, key: email, changes: [x] }',
      '`profiles.changes` must be a mapping of names and values.',
    ],
    [
      'profiles: { sql: SELECT 1, key: email, changes: {} }',
      '`profiles.changes` names no table: write one with its profile column, such as `changes: { orders: customer_id }`.',
    ],
    [
      'profiles: { sql: SELECT 1, key: email, changes: { a.b.c: id, a.b: "x y" } }',
      'The key `a.b.c` of `profiles.changes` must be a table with its schema, such as `public.orders`, or the name of a table alone.',
      '`profiles.changes.a.b` must be a column, such as `customer_id`, or a SELECT that finds profiles from the rows in `changed`.',
    ],
    [
      'events: { table: a.b.c }',
      '`events.table` must be a table with its schema, such as `public.customers`, or the name of a table alone.',
    ],
    ['events: { columns: { nmae: x } }', "`events.columns.nmae` isn't a known key of `columns`: did you mean `name`?"],
    ['destinations: {}', 'A destination is missing: name one, such as `iterable: { type: iterable, api_key: ... }`.'],
    [
      'destinations: [x]',
      '`destinations` must be a mapping of names and destinations, such as `iterable: { type: iterable, api_key: ... }`.',
    ],
    ['destinations: { x: }', '`destinations.x` must be a mapping with keys such as `type`, `api_key` and `region`.'],
    ['destinations: { x: {} }', '`destinations.x.type` is missing: it must be `iterable`, `segment` or `file`.'],
    ['destinations: { x: { type: segment } }', '`write_key` of destination `x` is missing.'],
    [
      'destinations: { x: { type: segment, write_key: k, url: "http://api.segment.io" } }',
      '`destinations.x.url` must be a base URL such as `https://api.segment.io` (http on this machine only).',
    ],
    [
      'destinations: { x: { type: segment, write_key: k, region: us } }',
      "`destinations.x.region` isn't a known key of a Segment destination: use `quotas`, `type`, `url` or `write_key`.",
    ],
    [
      'destinations: { x: { type: segment, write_key: k }, y: { type: segment, write_key: k } }',
      'The API key is the same as that of the destination in line 3: one project is one destination.',
    ],
    [
      'destinations: { x: { type: file } }',
      '`destinations.x.path` is missing: it must be text, such as `calls.jsonl` (put it in quotes if it looks like a number).',
    ],
    ['destinations: { x: { type: webhook } }', '`destinations.x.type` must be `iterable`, `segment` or `file`.'],
    [
      'destinations: { entered: { type: iterable } }',
      "`entered` can't be the name of a destination: use letters, digits, _ and - beginning with a letter, and none of entered, exited, computed.",
    ],
    [
      'destinations: { a b: { type: iterable } }',
      "`a b` can't be the name of a destination: use letters, digits, _ and - beginning with a letter, and none of entered, exited, computed.",
    ],
    [destination('api_key: 123'), `\`destinations.x.api_key\` ${key}`],
    [destination('api_key: a b'), `\`destinations.x.api_key\` ${key}`],
    [destination('region: usa'), region],
    [destination('region: "http://api.iterable.com"'), region],
    [destination('region: "https://api.iterable.com/api"'), region],
    [destination('region: "https://user:secret@api.iterable.com"'), region],
    [destination('region: "http://localhost.example.com"'), region],
    [destination('region: 5'), region],
    [destination('quotas: { users_update: 0 }'), calls('users_update')],
    [destination('quotas: { users_bulk_update: 1.5 }'), calls('users_bulk_update')],
    [destination('quotas: { events_track: many }'), calls('events_track')],
    [destination('quotas: { events_track_bulk: -1 }'), calls('events_track_bulk')],
    [destination('quotas: { lists: 9999999 }'), calls('lists')],
    [
      destination('quotas: { list: 1 }'),
      "`destinations.x.quotas.list` isn't a known key of `quotas`: did you mean `lists`?",
    ],
    [destination('quota: 200%'), '`destinations.x.quota` must be a share, such as `50%`, and at most `100%`.'],
    [destination('quota: 0%'), '`destinations.x.quota` must be more than `0%`.'],
    [destination('quota: 50%, quotas: { lists: 1 }'), "`quota` and `quotas` can't stand together: keep one."],
    ['include: a.yaml', '`include` must be a list of files, such as `[audiences/*.yaml]`.'],
    [
      'include: [a.yaml, 5]',
      'entry 2 of `include` must be text, such as `audiences/*.yaml` (put it in quotes if it looks like a number).',
      "The file a.yaml can't be read: there is no such file.",
    ],
    ['audiences: { name: x }', '`audiences` must be a list, each entry beginning with a dash: `- name: Big spenders`.'],
    [
      'audiences: [Big spenders]',
      'entry 1 of `audiences` must be a mapping with keys such as `name`, `key` and `sql`.',
    ],
    ['runs: { memory: 256 }', '`runs.memory` must be an amount of memory from 1 MB to 1024 GB, such as `256 MB`.'],
    ['runs: { memory: 0 MB }', '`runs.memory` must be an amount of memory from 1 MB to 1024 GB, such as `256 MB`.'],
    [
      'runs: { timeout: 1 month }',
      '`runs.timeout` must be a length of time from `1 second` to `7 days`, such as `1 hour`.',
    ],
    ['runs: { parallel: 33 }', '`runs.parallel` must be a whole number from 1 to 32.'],
    ['http: on', '`http` must be `off` or a mapping such as `{ host: 127.0.0.1, port: 8080 }`.'],
    ['http: { port: -1 }', '`http.port` must be a whole number from 0 to 65535.'],
    ['http: { prot: 1 }', "`http.prot` isn't a known key of `http`: did you mean `port`?"],
    ['logging: { level: loud }', '`logging.level` must be `error`, `warn`, `info` or `debug`.'],
    ['logging: { format: jsno }', '`logging.format` must be `auto`, `pretty` or `json`: did you mean `json`?'],
    [
      'metrics: {}',
      "`metrics` isn't a known section: use `audiences`, `destinations`, `events`, `http`, `include`, `logging`, `profiles`, `runs`, `source`, `state` or `traits`.",
    ],
    ['Profile: {}', "`Profile` isn't a known section: did you mean `profiles`?"],
  ];

  it.each(table)('such as %s is refused in words', (yaml, ...expected) => {
    expect(sectionProblems(yaml).sort()).toEqual(expected.sort());
  });

  it('with one API key for two destinations is refused at the second', () => {
    expect(
      problemsOf(`profiles: { table: customers, key: hybrid }
destinations:
  one: { type: iterable, api_key: hunter2 }
  two: { type: iterable, api_key: hunter2 }
  three: { type: iterable }
  four: { type: iterable }
`),
    ).toEqual([
      'personas.yaml:4:35: The API key is the same as that of the destination in line 3: one project is one destination.',
    ]);
  });
});

describe('a definition is refused', () => {
  const missingSql = 'One of `sql`, `sql_file` or `table` is missing here: write what selects the rows.';
  const send =
    '`send` must be `identify`, `track`, `both` or `list`, several of these in brackets, or a mapping such as `{ iterable: track }`';
  const schedule =
    '`schedule` must be `realtime`, `manual` or a cron expression that names an existing time, such as `0 3 * * *` (minute, hour, day, month, weekday).';
  const reconcile = '`reconcile` must be a length of time from `1 hour` to `7 days`, such as `1 day`.';
  const neither =
    '`changes.orders` must be a column, such as `customer_id`, or a SELECT that finds profiles from the rows in `changed`.';
  const poll = '`poll` must be a length of time from `1 second` to `7 days`, such as `1 minute`.';
  const lookback = '`lookback` must be a length of time, such as `30 days`, `12 hours` or `1 month`.';
  const x = 'name: x, sql: SELECT 1';

  const table: [entry: string, ...problems: string[]][] = [
    ['sql: SELECT 1', 'A `name` is missing here, such as `name: Big spenders`.'],
    [
      'name: 5, sql: SELECT 1',
      '`name` must be text, such as `Big spenders` (put it in quotes if it looks like a number).',
    ],
    ['name: "", sql: SELECT 1', '`name` is empty: it must be text, such as `Big spenders`.'],
    [
      'name: "!?", sql: SELECT 1',
      'The `name` has none of the characters a-z, 0-9 and _, which make the key: add a `key`.',
    ],
    ['name: Devices, sql: SELECT 1', 'The key `devices` is reserved by Iterable; choose another name, or add a `key`.'],
    ['key: itblDS, sql: SELECT 1', 'The key `itblDS` is reserved by Iterable; choose another name.'],
    [
      'key: a.b, sql: SELECT 1',
      'The key `a.b` has a dot, which addresses a nested field in Iterable; use an underscore.',
    ],
    [
      'key: Big one, sql: SELECT 1',
      'The key `Big one` has other characters than a-z, 0-9 and _; use these alone, such as `big_one`.',
    ],
    [
      `name: ${'a'.repeat(256)}, sql: SELECT 1`,
      `The key \`${'a'.repeat(256)}\` is too long; use at most 255 characters, or add a \`key\`.`,
    ],
    ['name: x', missingSql],
    ['name: x, sql: ""', '`sql` is empty: it must be text, such as `SELECT id AS profile_id FROM customers`.'],
    [
      'name: x, sql: ',
      '`sql` must be text, such as `SELECT id AS profile_id FROM customers` (put it in quotes if it looks like a number).',
    ],
    [
      'name: x, sql: SELECT 1, sql_file: x, table: y',
      'Only one of `sql`, `sql_file` and `table` can stand here: keep one.',
    ],
    ['name: x, query: event(1)', '`query` is not supported by this version: write the definition as `sql`.'],
    [
      'name: x, query: event(1), sql: SELECT 1',
      '`query` is not supported by this version: write the definition as `sql`.',
    ],
    [
      'name: x, sql: "SELECT id FROM a WHERE at > :now - :lookback"',
      '`:lookback` stands for an interval that `x` lacks: add it, such as `lookback: 30 days`.',
    ],
    ['name: x, sql_file: gone.sql', "The file gone.sql can't be read: there is no such file."],
    [`${x}, list: vip`, '`list` names a list, but no `send` is `list`: add it, such as `send: [identify, list]`.'],
    [
      `${x}, send: list, list: 5`,
      '`list` must be the name of a list, or a mapping such as `{ name: Big spenders, existing_only: true }`.',
    ],
    [`${x}, send: list, list: { nam: y }`, "`list.nam` isn't a known key of `list`: did you mean `name`?"],
    [`${x}, nmae: y`, "`nmae` isn't a known key of an audience: did you mean `name`?"],
    [`${x}, looback: 30 days`, "`looback` isn't a known key of an audience: did you mean `lookback`?"],
    [`${x}, onDelete: leave`, "`onDelete` isn't a known key of an audience: did you mean `on_delete`?"],
    [`${x}, on_missing: keep`, '`on_missing` is for traits alone: leave it out.'],
    [`${x}, prefix: y`, '`prefix` is for traits alone: leave it out.'],
    [`${x}, lookback: 30`, lookback],
    [`${x}, lookback: 30 moons`, lookback],
    [`${x}, poll: 60`, poll],
    [`${x}, poll: 100 ms`, poll],
    [`${x}, poll: 8 days`, poll],
    [`${x}, poll: 1 month`, poll],
    [`${x}, poll: 1 minute, schedule: manual`, "`poll` and `schedule` can't stand together: leave one out."],
    [
      `${x}, poll: 1 minute, lookback: 30 days`,
      "`poll` and `lookback` can't stand together: leave one out, or use `schedule` for other times than every hour.",
    ],
    [
      `${x}, schedule: realtime`,
      '`schedule: realtime` needs `changes`: the tables that it depends on, such as `changes: { orders: customer_id }`.',
    ],
    [
      `${x}, schedule: realtime, changes: { orders: customer_id }`,
      "`schedule: realtime` needs `profiles.changes` too: the tables that hold people's userIds and emails, such as `changes: { customers: id }`.",
    ],
    [
      `${x}, schedule: realtime, changes: orders`,
      "`schedule: realtime` needs `profiles.changes` too: the tables that hold people's userIds and emails, such as `changes: { customers: id }`.",
      '`changes` must be a mapping of names and values.',
    ],
    [
      `${x}, lookback: 30 days, schedule: manual, poll: 1 minute`,
      "`poll` and `lookback` can't stand together: leave one out, or use `schedule` for other times than every hour.",
      "`poll` and `schedule` can't stand together: leave one out.",
    ],
    [`${x}, reconcile: 30 minutes`, reconcile],
    [`${x}, reconcile: 8 days`, reconcile],
    [`${x}, reconcile: daily`, reconcile],
    [
      `${x}, changes: {}`,
      '`changes` names no table: write one with its profile column, such as `changes: { orders: customer_id }`.',
    ],
    [
      `${x}, changes: { a.b.c: customer_id }`,
      'The key `a.b.c` of `changes` must be a table with its schema, such as `public.orders`, or the name of a table alone.',
    ],
    [`${x}, changes: { orders: customer_id, '"orders"': id }`, '`changes` names the table `"orders"` twice: keep one.'],
    [`${x}, changes: { orders: lower(email) }`, neither],
    [`${x}, changes: { orders: "customer_id, shop_id" }`, neither],
    [`${x}, changes: { orders: o.customer_id }`, neither],
    [`${x}, changes: { orders: "\${COLUMN}" }`, neither],
    [`${x}, changes: { orders: "DELETE FROM changed" }`, neither],
    [
      `${x}, changes: { orders: SELECT customer_id FROM orders WHERE note <> 'changed' }`,
      'The SQL of `changes.orders` reads nothing from `changed`, the rows that have changed: join it.',
    ],
    [
      `${x}, lookback: 1 day, changes: { orders: "SELECT id FROM changed WHERE at > :now - :lookback" }`,
      '`:now` has no meaning in `changes`: it only finds whose rows have changed.',
      '`:lookback` has no meaning in `changes`: it only finds whose rows have changed.',
    ],
    [`${x}, schedule: daily`, schedule],
    [`${x}, schedule: 0 0 30 2 *`, schedule],
    [`${x}, schedule: 5`, schedule],
    [`${x}, changes: orders`, '`changes` must be a mapping of names and values.'],
    [
      `${x}, changes: { orders: 5 }`,
      '`changes.orders` must be text, such as `customer_id` (put it in quotes if it looks like a number).',
    ],
    [`${x}, send: trakc`, `${send}: did you mean \`track\`?`],
    [`${x}, send: true`, `${send}.`],
    [`${x}, send: []`, `${send}.`],
    [`${x}, send: {}`, '`send` names no destination: add one, such as `iterable: track`.'],
    [
      `${x}, send: { entered: In }`,
      '`entered` names the event of a track call, but nothing is sent as one: add `iterable: track`.',
    ],
    [
      `${x}, send: { iterable: identify, exited: Out }`,
      '`exited` names the event of a track call, but nothing is sent as one: add `iterable: track`.',
    ],
    [
      `${x}, send: { iterable: track, computed: X }`,
      '`computed` is for the other kind of definition: use `entered` and `exited`.',
    ],
    [
      `${x}, send: { iterable: track, entered: 5 }`,
      '`send.entered` must be text, such as `Became big spender` (put it in quotes if it looks like a number).',
    ],
    [
      `${x}, send: { iterable: track, enterd: In }`,
      "`enterd` isn't a known destination: did you mean `entered`?",
      '`send.enterd` must be `identify`, `track`, `both` or `list`, or several of these in brackets.',
    ],
    [`${x}, send: { other: track }`, "`other` isn't a known destination: use `entered`, `exited` or `iterable`."],
    [`${x}, destinations: iterable`, '`destinations` must be a list of destinations, such as `[iterable]`.'],
    [
      `${x}, destinations: []`,
      '`destinations` must name a destination: write `enabled: false` for a definition that is not wanted.',
    ],
    [`${x}, destinations: [braze]`, "`braze` isn't a known destination: use `iterable`."],
    [
      `${x}, destinations: [iterable, 5]`,
      'entry 2 of `destinations` must be text, such as `iterable` (put it in quotes if it looks like a number).',
    ],
    [`${x}, enabled: maybe`, '`enabled` must be `true` or `false`.'],
    [`${x}, initial: none`, '`initial` must be `send` or `skip`.'],
    [`${x}, on_delete: exit`, '`on_delete` must be `leave` or `exit_all`.'],
    [`${x}, guard: on`, '`guard` must be `off` or a mapping such as `{ exits: 30%, growth: 100%, nulls: 30% }`.'],
    [`${x}, guard: { exits: 30 }`, '`guard.exits` must be `off` or a share such as `30%`, at most `100%`.'],
    [`${x}, guard: { exits: -1 }`, '`guard.exits` must be `off` or a share such as `30%`, at most `100%`.'],
    [`${x}, guard: { growth: 100 }`, '`guard.growth` must be `off` or a share such as `100%`, at most `1000%`.'],
    [`${x}, guard: { nulls: some }`, '`guard.nulls` must be `off` or a share such as `30%`, at most `100%`.'],
    [`${x}, guard: { exit: 30% }`, "`guard.exit` isn't a known key of `guard`: did you mean `exits`?"],
    [`${x}, properties: total`, '`properties` must be a list of columns, such as `[last_order_at]`.'],
    [
      `${x}, properties: [1]`,
      'entry 1 of `properties` must be text, such as `last_order_at` (put it in quotes if it looks like a number).',
    ],
  ];

  it.each(table)('with { %s }, in words', (entry, ...expected) => {
    expect(definitionProblems(entry)).toEqual(expected);
  });

  it.each([
    [`${x}, on_missing: drop`, '`on_missing` must be `null` or `keep`.'],
    [`${x}, prefix: a.b`, '`prefix` must be letters, digits and _, such as `shop_`.'],
    [`${x}, send: { iterable: track, entered: In }`, '`entered` is for the other kind of definition: use `computed`.'],
    [`${x}, nmae: y`, "`nmae` isn't a known key of a trait: did you mean `name`?"],
  ])('as a trait with { %s }, in words', (entry, expected) => {
    expect(definitionProblems(entry, 'traits')).toEqual([expected]);
  });

  it('for a destination that its own `destinations` leaves out', () => {
    expect(
      problemsOf(`profiles: { table: customers, key: hybrid }
destinations: { one: { type: iterable }, two: { type: iterable } }
audiences:
  - { ${x}, destinations: [one], send: { one: track, two: track } }
`),
    ).toEqual(['personas.yaml:4:72: `two` is not among the `destinations` of this definition: add it there.']);
  });

  it('with an empty SQL file', () => {
    const files = { 'personas.yaml': `${BASE}traits: [{ name: x, sql_file: x.sql }]`, 'x.sql': ' \n' };
    expect(problemsOf(files)).toEqual([
      'personas.yaml:3:31: The file x.sql is empty: write a SELECT statement into it.',
    ]);
  });
});

describe('a secret', () => {
  const secrets = {
    KEY: 'hunter2-key',
    URL: 'postgres://u:hunter2-pass@host/db',
    STATE: 'postgres://u:hunter2-state@host/db',
  };

  it('is not in the text of a configuration, however it is printed', () => {
    const config = load(
      `source: { url: "\${URL}", direct_url: "\${STATE}" }
state: { url: "\${STATE}" }
profiles: { table: customers, key: hybrid }
destinations: { iterable: { type: iterable, api_key: "\${KEY}" } }
audiences: [{ name: x, sql: SELECT 1 }]
`,
      secrets,
    );
    expect(keyOf(config)).toBe('hunter2-key');
    for (const text of [
      JSON.stringify(config),
      inspect(config, { depth: 20, showHidden: true, getters: true }),
      inspect(config, { depth: 20, customInspect: false }),
      String(config.source.url),
    ]) {
      expect(text).not.toContain('hunter2');
    }
  });

  it('is in no message, wherever it was put by mistake', () => {
    const places = [
      'source: { url: "SECRET" }',
      'source: { url: "https://u:SECRET@host" }',
      'source: { url: "postgres://u:SECRET#SECRET@host/db", direct_url: "SECRET SECRET" }',
      'source: "SECRET"',
      'state: { schema: "SECRET!", migrate: "SECRET" }',
      'profiles: { table: "SECRET.SECRET.SECRET", key: "SECRET", changes: "SECRET" }',
      'profiles: { sql: SELECT 1, key: ["SECRET"] }',
      'destinations: { x: { type: "SECRET", api_key: "SECRET SECRET", region: "SECRET", quota: "SECRET" } }',
      'destinations: { x: { type: iterable, api_key: ["SECRET"], quotas: { lists: "SECRET" } } }',
      'destinations: { x: { type: iterable, region: "https://x:SECRET@host" } }',
      'destinations: "SECRET"',
      'include: "SECRET"',
      'audiences: "SECRET"',
      'audiences: ["SECRET"]',
      'audiences: [{ name: x, sql: SELECT 1, lookback: "SECRET", poll: "SECRET", schedule: "SECRET", send: "SECRET" }]',
      'audiences: [{ name: x, sql: SELECT 1, guard: "SECRET", enabled: "SECRET", initial: "SECRET", on_delete: "SECRET" }]',
      'audiences: [{ name: x, table: "SECRET.SECRET.SECRET", send: { iterable: "SECRET" }, destinations: "SECRET" }]',
      'traits: [{ name: x, sql: SELECT 1, send: ["SECRET"], on_missing: "SECRET", prefix: "SECRET-" }]',
      'traits: [{ name: x, sql: SELECT 1, guard: { exits: "SECRET", growth: "SECRET" }, properties: "SECRET" }]',
      'runs: { parallel: "SECRET", memory: "SECRET", timeout: "SECRET" }',
      'http: "SECRET"',
      'http: { host: ["SECRET"], port: "SECRET" }',
      'logging: { level: "SECRET", format: "SECRET" }',
      'events: { columns: "SECRET" }',
      'a: "SECRET',
      'a: SECRET: SECRET',
      'a: *SECRET',
      'a: !SECRET x',
    ];
    for (const place of places) {
      for (const value of ['hunter2', '${VALUE}', '${GONE:-hunter2}', '${VALUE', '${VALUE} ${GONE}']) {
        const messages = sectionProblems(place.replaceAll('SECRET', value), { VALUE: 'hunter2' }).join('\n');
        expect(messages).not.toBe('');
        expect(messages).not.toContain('hunter2');
      }
    }
  });

  it('of a file that can not be read is not taken for a path to show', () => {
    const problems = problemsOf(`${BASE}source: { url: "\${URL}" }`, { URL_FILE: '/hunter2' });
    expect(problems).toEqual(["personas.yaml:3:16: The file that URL_FILE names can't be read (ENOENT)."]);
  });
});
