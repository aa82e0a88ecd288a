import { describe, expect, it } from 'vitest';
import type { Change, Definition } from '../src/core/definition.js';
import { watchName, type SourceTable } from '../src/realtime/trigger-sql.js';
import { followedChanges, planWatches, type ResolvedChange, type WatchPlan } from '../src/realtime/watches.js';
import { definitionOf, describe as describeConfig, sqlText, type Described, type Written } from './support/changes.js';

const table = (name: string): SourceTable => ({
  schema: 'public',
  name,
  columns: ['id', 'customer_id', 'order_id'].map((column) => ({ name: column, type: 'bigint' })),
});
const OF_LINES = 'SELECT customer_id FROM orders JOIN changed ON order_id = orders.id';
const ofProfiles: readonly Written[] = [['customers', 'id']];

/** As the source would say: an SQL way needs `order_id`, the table `gone` isn't there. */
function resolve(config: Described): ReadonlyMap<Change, ResolvedChange> {
  return new Map(
    followedChanges(config).map((change): [Change, ResolvedChange] => {
      const { written, place, way } = change;
      if (written === 'gone')
        return [change, { kind: 'refused', problem: { place, message: 'It is gone.' }, isMistake: true }];
      const name = way.kind === 'column' ? way.column : 'order_id';
      const statement = way.kind === 'column' ? null : `look up: ${way.text.sql}`;
      const watch = { table: table(written), columns: [{ name, type: 'bigint' }] };
      return [change, { kind: 'known', watch, statement }];
    }),
  );
}
const planOf = (config: Described): WatchPlan => planWatches(config, resolve(config));
const routesOf = (plan: WatchPlan): Record<string, unknown> => Object.fromEntries(plan.routes);

describe('a watch', () => {
  it('leads to the definitions that depend on its table, one of `profiles` to all', () => {
    const plan = planOf(
      describeConfig(
        [
          definitionOf('spent', [['orders', 'customer_id']]),
          definitionOf('bought', [
            ['orders', 'customer_id'],
            ['order_lines', OF_LINES],
          ]),
          definitionOf('known', [['customers', 'id']]),
        ],
        ofProfiles,
      ),
    );
    expect(routesOf(plan)).toEqual({
      'public.customers(id)': [{ statement: null, definitions: ['spent', 'bought', 'known'] }],
      'public.orders(customer_id)': [{ statement: null, definitions: ['spent', 'bought'] }],
      'public.order_lines(order_id)': [{ statement: `look up: ${OF_LINES}`, definitions: ['bought'] }],
    });
  });

  it('serves several ways, and a table has one for each tuple of columns', () => {
    const other = 'SELECT order_id FROM changed';
    const plan = planOf(
      describeConfig(
        [
          definitionOf('a', [['orders', OF_LINES]]),
          definitionOf('b', [['orders', other]]),
          definitionOf('c', [['orders', 'customer_id']]),
        ],
        ofProfiles,
      ),
    );
    expect(plan.routes.get('public.orders(order_id)')).toEqual([
      { statement: `look up: ${OF_LINES}`, definitions: ['a'] },
      { statement: `look up: ${other}`, definitions: ['b'] },
    ]);
    expect(plan.tables.map(({ watches }) => watches.map(watchName))).toEqual([
      ['public.customers(id)'],
      ['public.orders(customer_id)', 'public.orders(order_id)'],
    ]);
  });

  it('is the same in whatever order the configuration names the tables', () => {
    const definitions = [definitionOf('a', [['orders', OF_LINES]]), definitionOf('b', [['orders', 'customer_id']])];
    const plans = [definitions, [...definitions].reverse()].map((each) => planOf(describeConfig(each, ofProfiles)));
    expect(plans[0]?.tables).toEqual(plans[1]?.tables);
  });
});

describe('a definition is followed', () => {
  const orders: readonly Written[] = [['orders', 'customer_id']];
  it.each<[string, boolean, Definition, readonly Written[]]>([
    ['in real time', true, definitionOf('a', orders), ofProfiles],
    ['by the hour', true, definitionOf('a', orders, { kind: 'hourly' }), ofProfiles],
    [
      'not by its own schedule',
      false,
      definitionOf('a', orders, { kind: 'cron', expression: '0 3 * * *' }),
      ofProfiles,
    ],
    ['not while it is polled', false, definitionOf('a', orders, { kind: 'poll', everyMs: 60_000 }), ofProfiles],
    ['not by hand', false, definitionOf('a', orders, { kind: 'manual' }), ofProfiles],
    ['not without changes', false, definitionOf('a', []), ofProfiles],
    ['not while it is disabled', false, { ...definitionOf('a', orders), enabled: false }, ofProfiles],
    ['not where the changes of `profiles` are unknown', false, definitionOf('a', orders), []],
  ])('%s', (_, expected, definition, profiles) => {
    const plan = planOf(describeConfig([definition], profiles));
    expect([plan.evaluates.has('a'), plan.tables.length > 0]).toEqual([expected, expected]);
  });
});

describe('a change that is refused', () => {
  it('takes its definition along, and the tables that nobody else needs', () => {
    const plan = planOf(
      describeConfig(
        [
          definitionOf('a', [
            ['gone', 'id'],
            ['order_lines', OF_LINES],
          ]),
          definitionOf('b', [['orders', 'customer_id']]),
        ],
        ofProfiles,
      ),
    );
    expect(plan.refused).toMatchObject([{ definitions: ['a'], problem: { message: 'It is gone.' } }]);
    expect([...plan.evaluates.keys()]).toEqual(['b']);
    expect([...plan.routes.keys()].sort()).toEqual(['public.customers(id)', 'public.orders(customer_id)']);
  });

  it('of `profiles` takes all along', () => {
    const definitions = [definitionOf('a', [['orders', 'customer_id']]), definitionOf('b', [['orders', 'id']])];
    const plan = planOf(describeConfig(definitions, [['gone', 'id']]));
    expect(plan.refused).toMatchObject([{ definitions: ['a', 'b'] }]);
    expect([plan.tables, [...plan.routes], [...plan.evaluates]]).toEqual([[], [], []]);
  });
});

it('tells by a hash whether a definition would be evaluated otherwise', () => {
  const base = describeConfig([definitionOf('a', [['orders', 'customer_id']])], ofProfiles);
  const [definition] = base.definitions;
  const hashOf = (config: Described): string | undefined => planOf(config).evaluates.get('a');
  const withDefinition = (more: Partial<Definition>): Described => ({
    ...base,
    definitions: definition === undefined ? [] : [{ ...definition, ...more }],
  });
  const different = [
    base,
    withDefinition({ text: sqlText('SELECT 1 AS profile_id') }),
    withDefinition({ lookback: '1 day' }),
    withDefinition({ kind: 'trait' }),
    withDefinition({ changes: definitionOf('a', [['orders', 'id']]).changes }),
    withDefinition({ changes: definitionOf('a', [['orders', OF_LINES]]).changes }),
    { ...base, profiles: { ...base.profiles, text: sqlText('SELECT 2 AS profile_id') } },
    { ...base, profiles: { ...base.profiles, changes: describeConfig([], [['orders', 'id']]).profiles.changes } },
  ];
  expect(new Set(different.map(hashOf)).size).toBe(different.length);
  expect(hashOf(withDefinition({ name: 'Another', guard: null, properties: ['x'], initial: 'skip' }))).toBe(
    hashOf(base),
  );
});
