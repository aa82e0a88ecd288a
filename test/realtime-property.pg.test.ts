import { afterEach, describe, expect, it } from 'vitest';
import { isUnreachable } from '../src/db/failure.js';
import { inspect } from '../src/realtime/catalogue.js';
import { readWatchPlan } from '../src/realtime/tables.js';
import { tableName } from '../src/realtime/trigger-sql.js';
import type { WatchPlan } from '../src/realtime/watches.js';
import { ambiguousEvents } from './support/events.js';
import { createHarness, type Harness } from './support/harness.js';
import { startProgram, type Program } from './support/program.js';
import { startOwnServer, type OwnServer } from './support/server.js';
import {
  AUDIENCES,
  DEFINITIONS,
  HOURLY,
  NEW_REGION,
  PROFILES,
  REGULAR_IDS,
  TABLES,
  TRUTH,
  WINDOWS_MOVING,
} from './support/shoppers.js';
import { until } from './support/until.js';
import { startWriters, type Writers } from './support/writers.js';

/**
 * Several write to a database at random while the connection that listens is cut, the daemon is killed and the database
 * crashes at random, while partitions come and go and windows open and close: at the end everything is as the source says,
 * and comparing everybody corrects nothing.
 */
const ROUNDS = Number(process.env['REALTIME_ROUNDS'] ?? 10);
const KEYS = [...DEFINITIONS.audiences, ...DEFINITIONS.traits].map(({ key }) => key);
const SEED = Number(process.env['REALTIME_SEED'] ?? 1);

interface Site {
  harness: Harness;
  servers: readonly OwnServer[];
  writers: Writers;
  plan: WatchPlan;
  daemon: Program | null;
}

let site: Site | null = null;
afterEach(async () => {
  if (site === null) return;
  const { harness, servers, writers, daemon } = site;
  site = null;
  daemon?.process.kill('SIGKILL');
  await daemon?.ended;
  // Its failure was the test's.
  await writers.stop().catch(() => undefined);
  await harness.close();
  for (const server of servers) await server.stop();
});

/** What a look finds, or null while the database is away. */
const unlessAway = async <T>(look: () => Promise<T>): Promise<T | null> =>
  look().catch((error: unknown) => {
    if (isUnreachable(error)) return null;
    throw error;
  });

function run(harness: Harness, ...words: string[]): Program {
  return startProgram([...words, '--config', harness.configFile], { cwd: '/' });
}

async function startDaemon(each: Site): Promise<void> {
  const daemon = run(each.harness, 'start');
  each.daemon = daemon;
  await until(() =>
    unlessAway(async () => {
      if (daemon.process.exitCode !== null) throw new Error((await daemon.ended).stderr);
      const rows = await each.harness.state('select from leader where pid = $1 and expires_at > now()', [
        daemon.process.pid,
      ]);
      return rows.length > 0;
    }),
  );
}

/** What a test may do in place of waiting until the lease of one that was killed has run out. */
async function killDaemon(each: Site): Promise<void> {
  each.daemon?.process.kill('SIGKILL');
  await each.daemon?.ended;
  each.daemon = null;
  const bury = `update leader set holder = null, expires_at = '-infinity', quiet_until = '-infinity'`;
  await until(() => unlessAway(() => each.harness.state(bury)));
}

async function open(separate: boolean): Promise<Site> {
  const servers = [await startOwnServer(), ...(separate ? [await startOwnServer()] : [])];
  const [source, state] = servers;
  const harness = await createHarness({
    tables: TABLES,
    profiles: PROFILES,
    ...DEFINITIONS,
    separate,
    simulator: { keepRequests: 1_000_000 },
    ...(source === undefined ? {} : { serverUrl: source.url }),
    ...(state === undefined ? {} : { stateServerUrl: state.url }),
  });
  const { databases, config } = harness.opened;
  const plan = await readWatchPlan(databases.source, config, 'integer');
  site = { harness, servers, writers: startWriters(harness.database.pool, SEED), plan, daemon: null };
  await installTriggers(site);
  return site;
}

async function installTriggers({ harness }: Site): Promise<void> {
  const installed = await run(harness, 'realtime', 'install').ended;
  expect(installed.code, installed.stderr).toBe(0);
}

/** Whether the daemon has seen the tables and triggers as they are. */
async function knowsTables({ harness, plan }: Site): Promise<boolean> {
  const { tables } = await inspect(harness.opened.databases.source, plan, '');
  const watched = await harness.state('select name, signature from watched where problem is null');
  return tables.every(({ watched: { table }, signature }) =>
    watched.some((known) => known['name'] === tableName(table) && String(known['signature']).startsWith(signature)),
  );
}

/** Why it isn't quiet yet; null: what was written has been told of, and nothing is under way. */
async function stirs({ harness }: Site): Promise<string | null> {
  const captured = await harness.sql('select from personas_capture.capture');
  if (captured.length > 0) return `${captured.length} captured rows`;
  const [windows] = await harness.sql(WINDOWS_MOVING);
  if (windows?.['count'] !== 0) return `${String(windows?.['count'])} windows that open or close`;
  const [state] = await harness.state(
    `select ${KEYS.length} - (select count(*)::int from definition) as unknown, (select count(*)::int from due) as due, (select count(*)::int from outbox) as outbox,
       (select count(*)::int from validity where until <= now() + interval '1 minute') as windows,
       (select count(*)::int from run where outcome is null) as runs, (select count(*)::int from definition_destination where backfill is not null) as backfills,
       (select string_agg(key || ' is ' || tracking || coalesce(': ' || polled_because, ''), ', ') from definition where tracking <> 'live' or first_run_at is null) as untracked,
       (select string_agg(key, ', ') from definition where full_wanted > full_done or full_run is not null) as unsettled`,
  );
  const stirring = Object.entries(state ?? {}).filter(([, value]) => value !== 0 && value !== null);
  return stirring.length === 0 ? null : JSON.stringify(Object.fromEntries(stirring));
}

/** Resolves when nothing stirs. What waits for a time gets it now. */
async function becomesQuiet(each: Site): Promise<void> {
  let last = '';
  let since = Date.now();
  await until(() =>
    unlessAway(async () => {
      // What the daemon sees of the tables may have everybody compared.
      const stirring = (await stirs(each)) ?? ((await knowsTables(each)) ? await stirs(each) : 'changed tables');
      if (stirring === null) return true;
      if (stirring !== last) [last, since] = [stirring, Date.now()];
      if (Date.now() - since > 60_000) throw new Error(`It does not become quiet: ${stirring}`);
      await each.harness.state(
        `update outbox set due_at = now(), not_before = null where due_at > now() + interval '20 seconds';
         update definition as d set due_at = now() where due_at > now() and (full_wanted > full_done
           or cadence = 'hourly' and (exists (select from due where definition_id = d.id)
             or exists (select from validity where definition_id = d.id and until <= now())))`,
      );
      return false;
    }),
  );
}

type Facts = Readonly<Record<string, Readonly<Record<string, string>>>>;

function byRecipient(rows: readonly Record<string, unknown>[]): Facts {
  const facts: Record<string, Record<string, string>> = {};
  for (const { recipient, field, value } of rows as readonly { recipient: string; field: string; value: string }[])
    facts[recipient] = { ...facts[recipient], [field]: value };
  return facts;
}

/** Snapshot and Iterable are as the source says. */
async function expectTrue({ harness }: Site): Promise<void> {
  const truth = byRecipient(await harness.sql(TRUTH));
  const snapshot = byRecipient(
    await harness.state(
      `select s.recipient, coalesce(v.field, d.key) as field, coalesce(trim_scale(v.value::numeric)::text, 'true') as value
       from snapshot as s join definition as d on d.id = s.definition_id
       left join lateral jsonb_each_text(case d.kind when 'trait' then s.value end) as v (field, value) on true
       order by 1, 2`,
    ),
  );
  expect(snapshot).toEqual(truth);
  const fields = [...AUDIENCES, 'home', 'items', 'pieces', 'lately'];
  const held: Record<string, Record<string, string>> = {};
  for (const recipient of Object.keys(truth)) {
    const user = harness.simulator.user(recipient.slice(2))?.fields ?? {};
    const known = fields.map((field) => [field, (user[field] ?? 'false').replace(/\.0$/, '')] as const);
    held[recipient] = Object.fromEntries(known.filter(([, value]) => value !== 'false'));
  }
  expect(held).toEqual(truth);
  expect(await harness.state('select recipient, reason from dead_call')).toEqual([]);
  expect(await harness.state('select * from conflict')).toEqual([]);
}

/** Each event id had one content; who has one userId for ever entered and exited each audience in turn, up to where they are. */
async function expectEvents({ harness }: Site): Promise<void> {
  const requests = harness.simulator.requests();
  expect(ambiguousEvents(requests)).toEqual([]);
  const told = new Map<string, string[]>();
  const seen = new Set<string>();
  for (const { id, name, identifier, audience } of trackedEvents(harness)) {
    if (seen.has(id)) continue;
    seen.add(id);
    const who = `${identifier} ${audience}`;
    told.set(who, [...(told.get(who) ?? []), name]);
  }
  const truth = byRecipient(await harness.sql(TRUTH));
  for (const id of REGULAR_IDS) {
    for (const audience of AUDIENCES) {
      const names = told.get(`${id} ${audience}`) ?? [];
      const expected = names.map((_, index) => (index % 2 === 0 ? 'Audience Entered' : 'Audience Exited'));
      expect({ id, audience, names }).toEqual({ id, audience, names: expected });
      const isMember = truth[`u:${id}`]?.[audience] === 'true';
      expect({ id, audience, isMember: names.length % 2 === 1 }).toEqual({ id, audience, isMember });
    }
  }
}

/** The events in the order in which they were applied, repeats included. */
function* trackedEvents({
  simulator,
}: Harness): Generator<{ id: string; name: string; identifier: string; audience: string }> {
  const audiences = new Map(
    simulator.events().map(({ id, fields }) => [id, JSON.parse(fields['audience_key'] ?? '""') as string]),
  );
  for (const { id, name, identifier } of simulator.eventHistory)
    yield { id, name, identifier, audience: audiences.get(id) ?? '' };
}

const cut = (pool: Harness['sql'], which: string): Promise<unknown> =>
  pool(
    `select pg_terminate_backend(pid) from pg_stat_activity
     where application_name like 'personas-sync%' and datname = current_database() and ${which}`,
  );
const some = <T>(list: readonly T[], random: () => number): T => list[Math.floor(random() * list.length)]!;

const ATTACH = `alter table orders attach partition orders_2 for values in (2)`;

/**
 * What a table has and loses by its partitions is captured by nobody; the daemon looks for it every few seconds. Until it
 * knows, nobody is compared to prove that nothing was missed.
 */
async function changePartitions(each: Site, change: string): Promise<void> {
  // They would keep the table from whoever changes it for long.
  await each.writers.rest();
  await until(async () => {
    const comparisons = await each.harness.state(
      `select from definition as d where due_at <= now() or exists (select from run where definition_id = d.id and outcome is null)`,
    );
    return comparisons.length === 0;
  });
  await each.harness.sql(change);
}

/** What happens to it. */
const DISTURBANCES: Readonly<Record<string, (each: Site, random: () => number) => Promise<unknown>>> = {
  'the connection that listens is cut': ({ harness }) => cut(harness.sql, `query ilike 'listen%'`),
  'some connections are cut': ({ harness }, random) =>
    cut(some([harness.sql, harness.state], random), `pid % 3 = ${Math.floor(random() * 3)}`),
  'a new partition is written to before it has triggers': async (each) => {
    await changePartitions(each, `drop table orders_2; ${NEW_REGION} ${ATTACH}`);
    await each.writers.go(20);
    await installTriggers(each);
  },
  'the daemon is killed': async (each, random) => {
    await killDaemon(each);
    await each.writers.go(Math.ceil(random() * 80));
    await startDaemon(each);
  },
  'a partition is detached, or attached again': async (each) => {
    const attached = await each.harness.sql(`select from pg_inherits where inhrelid = 'orders_2'::regclass`);
    await changePartitions(each, attached.length > 0 ? 'alter table orders detach partition orders_2' : ATTACH);
  },
  'the daemon is stopped': async (each, random) => {
    each.daemon?.process.kill('SIGTERM');
    const ended = await each.daemon?.ended;
    expect(ended?.code, ended?.stderr).toBe(0);
    await each.writers.go(Math.ceil(random() * 40));
    await startDaemon(each);
  },
  'everybody is compared': async (each, random) => {
    await until(() => knowsTables(each));
    await each.harness.state(
      `update definition set due_at = now(), reconcile_at = now() where id % 2 = ${Math.floor(random() * 2)} or cadence = 'hourly'`,
    );
  },
  'an hour has passed': ({ harness }) => harness.state(`update definition set due_at = now() where cadence = 'hourly'`),
  'a database crashes': ({ servers }, random) => some(servers, random).crash(),
  // The daemon goes to sleep, and has to be woken.
  'nobody writes for a while': async (each) => {
    await each.writers.rest();
    await becomesQuiet(each);
    await expectTrue(each);
    await until(() =>
      unlessAway(async () => {
        const rows = await each.harness.sql(
          `select where pg_sequence_last_value('personas_capture.asleep_until') > extract(epoch from now())`,
        );
        return rows.length > 0;
      }),
    );
  },
};

/** Always the same numbers from 0 up to 1. */
function randomNumbers(seed: number): () => number {
  let state = seed;
  return () => {
    state = (state * 1_103_515_245 + 12_345) % 2 ** 31;
    return state / 2 ** 31;
  };
}

describe.each([
  ['one database', false],
  ['two databases', true],
])('changes in %s', (_, separate) => {
  it(
    'are all followed, whatever happens to connections, daemon and database meanwhile',
    async () => {
      const each = await open(separate);
      const random = randomNumbers(SEED);
      await startDaemon(each);
      await becomesQuiet(each);
      await expectTrue(each);

      const names = Object.keys(DISTURBANCES);
      const happened: string[] = [];
      try {
        for (let round = 0; round < ROUNDS; round += 1) {
          await each.writers.go(10 + Math.floor(random() * 100));
          const name = round < names.length ? names[round]! : some(names, random);
          happened.push(name);
          await until(() => unlessAway(async () => (await DISTURBANCES[name]?.(each, random), true)));
        }
      } catch (cause) {
        throw new Error(`With the seed ${SEED}, after: ${happened.join('; ')}.`, { cause });
      }
      await each.writers.rest();
      expect(each.writers.committed().all).toBeGreaterThan(ROUNDS * 10);
      expect(each.writers.committed().late).toBeGreaterThan(0);

      await becomesQuiet(each);
      await expectTrue(each);
      await expectEvents(each);

      // Comparing everybody finds nothing that was missed, nor has it ever.
      for (let isTold = false; !isTold;) {
        await becomesQuiet(each);
        const [before] = await each.harness.state('select max(id) as id from run');
        expect(await each.harness.sync()).toMatchObject({ outcome: 'done' });
        const found = await each.harness.state(
          `select d.key, r.outcome, r.entered, r.exited, r.changed, r.corrections, d.tracking, d.distrusted_at
         from definition as d left join run as r on r.definition_id = d.id and r.id > $1 order by 1`,
          [before?.['id']],
        );
        const nothing = {
          outcome: 'succeeded',
          entered: 0,
          exited: 0,
          changed: 0,
          tracking: 'live',
          distrusted_at: null,
        };
        for (const each of found) expect(each).toMatchObject(nothing);
        // A table that was truncated is seen to be another within five seconds: everybody is compared once more, for that reason.
        // One that waits for its hour has nothing that waits, and corrections only when it is time for them.
        isTold = KEYS.filter((key) => !HOURLY.includes(key)).every((key) =>
          found.some((run) => run['key'] === key && run['corrections'] === 0),
        );
      }
      expect(await each.harness.state('select id, error, corrections from run where corrections > 0')).toEqual([]);
      await expectTrue(each);
    },
    600_000 + ROUNDS * 10_000,
  );
});
