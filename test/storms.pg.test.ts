import { rm } from 'node:fs/promises';
import { afterEach, describe, expect, it } from 'vitest';
import { act } from '../src/cli/act.js';
import type { Leadership } from '../src/daemon.js';
import type { Endpoint } from '../src/demo/simulator/endpoints.js';
import { startSimulator, type Simulator } from '../src/demo/simulator/server.js';
import type { LaneFigures } from '../src/delivery/lane.js';
import { startDaemon } from './support/daemon.js';
import { ambiguousEvents } from './support/events.js';
import { createHarness, type Harness, type HarnessOptions } from './support/harness.js';
import { temporaryFolder } from './support/postgres.js';
import { differences } from './support/truth.js';
import { endBackoffs, endWaits } from './support/waits.js';

/** Iterable on its worst days, with more people waiting than go singly: whatever happens meanwhile, the end is the truth. */
const MANY = 3_000;
const FEW = 400;
const insertPeople = (first: number, last: number): string =>
  `insert into people select n, 'u' || n, 'p' || n || '@example.com', n % 2 = 0, n from generate_series(${first}, ${last}) as n`;
const NOBODY =
  'create table people (id bigint primary key, user_id text, email text, vip boolean not null, spent int not null)';
const DEFINITIONS = {
  audiences: [
    {
      name: 'VIP',
      sql: 'SELECT id AS profile_id FROM people WHERE vip',
      send: 'both',
      guard: 'off',
      schedule: 'manual',
    },
  ],
  traits: [
    { name: 'Spent', sql: 'SELECT id AS profile_id, spent AS value FROM people', guard: 'off', schedule: 'manual' },
  ],
};
const NEVER = new AbortController().signal;
/** More than there are: each is looked at in the end. */
const KEEP = 100_000;

let harness: Harness;
/** Those who are told of as members by the first run, which leaves no history. */
let firstMembers: string[] = [];
let stopDaemon: () => Promise<void>;
let cleanUp: (() => Promise<unknown>)[] = [];
afterEach(async () => {
  await stopDaemon();
  for (const clean of cleanUp) await clean();
  cleanUp = [];
  await harness.close();
});

async function begin(people: number, options: Partial<HarnessOptions> = {}): Promise<void> {
  const { simulator, ...more } = options;
  stopDaemon = () => Promise.resolve();
  harness = await createHarness({
    tables: `${NOBODY}; ${insertPeople(1, people)}`,
    ...DEFINITIONS,
    ...more,
    simulator: { keepRequests: KEEP, ...simulator },
  });
  const members = await harness.sql('select coalesce(user_id, email) as person from people where vip');
  firstMembers = members.map(({ person }) => String(person));
}

/** One leader all the while, which knows by which pipeline it has sent somebody. */
async function lead(): Promise<Leadership> {
  const { leadership, stop } = await startDaemon(harness.opened);
  stopDaemon = stop;
  return leadership;
}

/** Has the leader run all definitions, and waits for no delivery. */
async function run(): Promise<void> {
  const args = { keys: [], confirmRemovals: true };
  const { outcome, progress } = await act(harness.opened, { kind: 'sync', args, signal: NEVER });
  expect(outcome).toBe('done');
  for (const each of progress.runs) expect(each).toMatchObject({ outcome: 'succeeded' });
}

/** Looks now and then until `work` has ended. */
async function meanwhile<T>(work: Promise<T>, look: () => Promise<unknown>): Promise<T> {
  let isOver = false;
  const end = (): void => {
    isOver = true;
  };
  work.then(end, end);
  const looked = async (): Promise<boolean> => {
    await look();
    return isOver;
  };
  await expect.poll(looked, { interval: 100, timeout: 100_000 }).toBe(true);
  return work;
}

const hurry = (): Promise<unknown> => endBackoffs(harness.state);

const countOutbox = async (): Promise<number> =>
  Number((await harness.state('select count(*)::int4 as n from outbox'))[0]?.['n']);

/** Delivers all; what may be applied late is sent by other leaders. */
async function syncToTheEnd(): Promise<void> {
  for (let syncs = 0; syncs < 10; syncs += 1) {
    const { delivery } = await harness.sync();
    expect(delivery).toMatchObject({ waiting: 0, ahead: 0, stopped: 0, refused: 0, stalled: false });
    if ((await countOutbox()) === 0) return;
    await endWaits(harness.state);
  }
  throw new Error('Something waits for ever.');
}

const flip = (condition: string): Promise<unknown> =>
  harness.sql(`update people set vip = not vip, spent = spent + 1 where ${condition}`);

const count = (endpoint: Endpoint, outcome?: number | 'reset'): number =>
  harness.simulator.stats.count(endpoint, outcome);

interface Person {
  person: string;
  recipient: string;
  vip: boolean;
  spent: number;
}

async function people(): Promise<Person[]> {
  const rows = await harness.sql(
    `select coalesce(user_id, email) as person, vip, spent, coalesce('u:' || user_id, 'e:' || email) as recipient from people`,
  );
  return rows as unknown as Person[];
}

/** Names of the events that each person is to have, in their order: one for each change of the membership. */
async function expectedEvents(isReachable: (person: string) => boolean): Promise<Map<string, string>> {
  const changes = await harness.state(
    `select substr(t.recipient, 3) as person, t.kind::text as kind from transition as t join definition as d on d.id = t.definition_id
     where d.key = 'vip' and t.kind in ('e', 'x') order by t.at`,
  );
  const names = new Map(firstMembers.filter(isReachable).map((person) => [person, 'Audience Entered']));
  for (const { person, kind } of changes as unknown as { person: string; kind: string }[]) {
    const name = kind === 'e' ? 'Audience Entered' : 'Audience Exited';
    if (isReachable(person)) names.set(person, [names.get(person), name].filter(Boolean).join());
  }
  return names;
}

interface Expected {
  /** All that stood in Iterable's place, the last one with what is to be compared. */
  simulators?: readonly Simulator[];
  isReachable?: (person: string) => boolean;
  /** Several that led after each other: who leads knows when something was last sent in bulk, and not who was sent singly. */
  leaders?: 'one' | 'several';
}

/** Iterable and the snapshot have what the tables say, each change of a membership is one event, and nothing waits. */
async function expectTruth({
  simulators = [harness.simulator],
  isReachable = () => true,
  leaders = 'one',
}: Expected = {}): Promise<void> {
  expect(await countOutbox()).toBe(0);
  const truth = await people();
  const last = simulators.at(-1) ?? harness.simulator;

  const users = [...last.users()].map(({ key, fields }): [string, string] => {
    const { vip = 'false', spent, ...others } = fields;
    return [key, JSON.stringify({ vip, spent, ...others })];
  });
  const expectedUsers = truth
    .filter(({ person }) => isReachable(person))
    .map(({ person, vip, spent }): [string, string] => [person, JSON.stringify({ vip: `${vip}`, spent: `${spent}` })]);
  expect(differences(new Map(expectedUsers), new Map(users))).toEqual([]);
  expect(users).toHaveLength(expectedUsers.length);

  const snapshot = await harness.state(
    `select d.key || ' ' || s.recipient as name, coalesce(s.value ->> 'spent', '') as value
     from snapshot as s join definition as d on d.id = s.definition_id`,
  );
  const expectedSnapshot = truth.flatMap(({ recipient, vip, spent }): [string, string][] => [
    ...(vip ? [[`vip ${recipient}`, ''] satisfies [string, string]] : []),
    [`spent ${recipient}`, `${spent}`],
  ]);
  const found = snapshot.map(({ name, value }): [string, string] => [String(name), String(value)]);
  expect(differences(new Map(expectedSnapshot), new Map(found))).toEqual([]);

  const events = new Map<string, string>();
  for (const { identifier, name } of last.events()) {
    events.set(identifier, [events.get(identifier), name].filter(Boolean).join());
  }
  expect(differences(await expectedEvents(isReachable), events)).toEqual([]);
  expect(ambiguousEvents(simulators.flatMap((each) => each.requests()))).toEqual([]);
  for (const { violations } of simulators) {
    expect(violations.duplicateInBatch).toBe(0);
    if (leaders === 'one') expect(violations.mixedPipelines).toBe(0);
  }
}

const deadCalls = async (): Promise<string[]> => {
  const rows = await harness.state(
    `select concat_ws(' ', recipient, coalesce(field, event), reason) as dead from dead_call order by 1`,
  );
  return rows.map(({ dead }) => String(dead));
};

/** The share of 429 among the requests to some endpoints. */
function throttledShare(endpoints: readonly Endpoint[]): number {
  const sum = (outcome?: number): number => endpoints.reduce((all, endpoint) => all + count(endpoint, outcome), 0);
  return sum(429) / sum();
}

describe('a storm of 429s', () => {
  it('slows the sender down, uses up no attempt and loses nothing', async () => {
    const quotas = { 'users/update': 50, 'users/bulkUpdate': 2, 'events/track': 100, 'events/trackBulk': 2 };
    await begin(FEW, { simulator: { quotas } });
    await lead();
    const attempts = new Set<unknown>();
    const look = async (): Promise<void> => {
      const [most] = await harness.state('select max(attempts)::int4 as attempts from outbox');
      attempts.add(most?.['attempts'] ?? 0);
    };
    const sync = async (): Promise<void> => {
      const { delivery } = await meanwhile(harness.sync(), look);
      expect(delivery).toMatchObject({ waiting: 0, ahead: 0, later: 0, refused: 0, stalled: false });
    };
    await sync();
    expect(count('users/update')).toBeGreaterThan(FEW);
    expect(count('users/bulkUpdate')).toBe(0);
    await harness.sql(insertPeople(FEW + 1, FEW + MANY));
    await sync();
    for (let changes = 0; changes < 2; changes += 1) {
      await flip(`id > ${FEW}`);
      await sync();
    }

    // At the rates of the configuration it would be nine in ten, and three in five.
    expect(throttledShare(['users/update'])).toBeLessThan(0.3);
    expect(throttledShare(['users/bulkUpdate', 'events/trackBulk'])).toBeLessThan(0.4);
    expect([...attempts]).toEqual([0]);
    await expectTruth();
    expect(await deadCalls()).toEqual([]);
  });
});

describe('a storm of failures', () => {
  it('of which some were applied loses nothing and tells nothing with another content', async () => {
    await begin(FEW);
    await lead();
    const { faults, stats } = harness.simulator;
    // Nearly a third of all requests.
    faults.failRandomly({ share: 0.11, seed: 1, status: 500 });
    faults.failRandomly({ share: 0.11, seed: 2, status: 503, body: '<html>', afterApplying: true });
    faults.failRandomly({ share: 0.11, seed: 3, status: 500, afterApplying: true });
    const sync = async (): Promise<void> => {
      const { delivery } = await meanwhile(harness.sync(), hurry);
      expect(delivery).toMatchObject({ waiting: 0, ahead: 0, refused: 0, stalled: false });
      // One that has failed very often may wait for a minute when nothing else is left.
      if ((delivery?.later ?? 0) > 0) await sync();
    };
    await sync();
    expect(count('users/bulkUpdate')).toBe(0);
    // Few requests go in bulk: of each kind one that was applied and carries very many is among those that fail.
    for (const endpoint of ['users/bulkUpdate', 'events/trackBulk'] as const) {
      const match = ({ body }: { body: string }): boolean => body.length > 50_000;
      faults.failNext(1, { endpoint, match, status: 503, body: '<html>', afterApplying: true });
    }
    await harness.sql(insertPeople(FEW + 1, FEW + MANY));
    await sync();
    await flip('id % 4 = 0');
    await sync();

    const failed = (endpoint?: Endpoint): number => stats.count(endpoint, 500) + stats.count(endpoint, 503);
    for (const endpoint of ['users/update', 'users/bulkUpdate', 'events/track', 'events/trackBulk'] as const) {
      expect(failed(endpoint)).toBeGreaterThan(0);
    }
    expect(failed() / stats.count()).toBeGreaterThan(0.25);
    expect(stats.count(undefined, 503)).toBeGreaterThan(50);
    expect(harness.simulator.events().filter(({ applications }) => applications > 1).length).toBeGreaterThan(100);
    await expectTruth();
    expect(await deadCalls()).toEqual([]);
  });
});

describe('failures with which nobody moves the time', () => {
  it('are waited out by back-offs that end by themselves, and nothing is lost', async () => {
    await begin(FEW / 2);
    await lead();
    const { faults, stats } = harness.simulator;
    faults.failRandomly({ share: 0.1, seed: 1, status: 500 });
    faults.failRandomly({ share: 0.1, seed: 2, status: 503, body: '<html>', afterApplying: true });
    for (const condition of ['false', 'id % 2 = 0', 'id % 3 = 0']) {
      await flip(condition);
      await run();
      await expect.poll(countOutbox, { interval: 100, timeout: 60_000 }).toBe(0);
    }
    expect(stats.count('users/update', 500)).toBeGreaterThan(20);
    expect(stats.count('events/track', 503)).toBeGreaterThan(10);
    expect(harness.simulator.events().some(({ applications }) => applications > 1)).toBe(true);
    await expectTruth();
    expect(await deadCalls()).toEqual([]);
  });
});

describe('connections that are cut after the request was applied', () => {
  const cut = { share: 0.1, reset: true, afterApplying: true };

  it('have whole batches sent again by another leader, and nobody has an event twice', async () => {
    await begin(MANY + 1_000);
    // The second and the fourth of the first twenty requests.
    harness.simulator.faults.failRandomly({ ...cut, seed: 75, endpoint: ['users/bulkUpdate', 'events/trackBulk'] });
    await syncToTheEnd();
    expect(count('users/bulkUpdate', 'reset') + count('events/trackBulk', 'reset')).toBeGreaterThanOrEqual(2);
    await expectTruth({ leaders: 'several' });
    expect(await deadCalls()).toEqual([]);
  });

  it('have single calls sent again by another leader, and nobody has an event twice', async () => {
    await begin(1.5 * FEW);
    harness.simulator.faults.failRandomly({ ...cut, seed: 1 });
    await syncToTheEnd();
    await flip('id % 3 = 0');
    await syncToTheEnd();
    expect(count('users/update', 'reset')).toBeGreaterThan(30);
    expect(count('events/track', 'reset')).toBeGreaterThan(15);
    expect(harness.simulator.events().some(({ applications }) => applications > 1)).toBe(true);
    await expectTruth();
    expect(await deadCalls()).toEqual([]);
  });
});

describe('an answer that comes too late', () => {
  it('holds up nobody else, and a newer value wins over the one that was applied late', async () => {
    await begin(100);
    await lead();
    await harness.sync();
    await harness.sql('update people set spent = 1000 where id = 1');
    const arrived = new Promise<string>((resolve) => {
      // Not applied, until it is sent once more below: the simulator itself applies at once or never.
      harness.simulator.faults.failNext(1, {
        status: 503,
        delayMs: 11_000,
        match: ({ body }) => (resolve(body), true),
      });
    });
    await run();
    const late = await arrived;
    const isUnanswered = (): boolean =>
      harness.simulator.requests().some(({ body, outcome }) => body === late && outcome === undefined);
    await flip('true');
    const syncing = harness.sync();
    const held = (): number => [...harness.simulator.users()].filter(({ fields }) => fields['vip'] === 'false').length;
    await expect.poll(held, { timeout: 9_000 }).toBe(50);
    expect(isUnanswered()).toBe(true);
    const { delivery } = await syncing;
    expect(delivery).toMatchObject({ waiting: 0, refused: 0, later: await countOutbox() });
    expect(await harness.state('select distinct recipient from outbox')).toEqual([{ recipient: 'u:u1' }]);
    expect(harness.simulator.user('u1')?.fields).toEqual({ spent: '1' });
    await stopDaemon();

    const answer = await fetch(`${harness.simulator.url}/api/users/update`, {
      method: 'POST',
      headers: { 'Api-Key': 'test-key', 'Content-Type': 'application/json' },
      body: late,
    });
    expect(answer.status).toBe(200);
    expect(harness.simulator.user('u1')?.fields).toEqual({ spent: '1000' });
    await endWaits(harness.state);
    await harness.sync();
    expect(harness.simulator.user('u1')?.fields).toEqual({ vip: 'true', spent: '1001' });
    await expectTruth();
    expect(await deadCalls()).toEqual([]);
  });
});

describe('batches of which every second user is invalid', () => {
  it('are acknowledged for the others, and the calls of the invalid ones are dead, each with its reason', async () => {
    const isReachable = (person: string): boolean => person.includes('@');
    await begin(MANY, {
      key: 'email',
      tables: `${NOBODY}; ${insertPeople(1, MANY)};
        update people set user_id = null, vip = id % 3 = 0; update people set email = 'nobody' || id where id % 2 = 0`,
    });
    const { delivery } = await harness.sync();
    const invalid = (await people()).filter(({ person }) => !isReachable(person));
    const dead = invalid.flatMap(({ recipient, vip }) =>
      ['spent', ...(vip ? ['vip', 'Audience Entered'] : [])].map(
        (what) => `${recipient} ${what} InvalidEmailAddressError`,
      ),
    );
    expect(invalid).toHaveLength(MANY / 2);
    expect(
      differences(new Map(dead.map((each) => [each, ''])), new Map((await deadCalls()).map((each) => [each, '']))),
    ).toEqual([]);
    expect(delivery).toMatchObject({ waiting: 0, ahead: 0, later: 0, stopped: 0, refused: dead.length });
    expect(count('users/bulkUpdate')).toBeGreaterThan(2);
    await expectTruth({ isReachable });
  });
});

describe('an outage', () => {
  it('is probed now and then while changes pile up, and all is delivered by itself when it is over', async () => {
    const directory = await temporaryFolder();
    cleanUp.push(() => rm(directory, { recursive: true }));
    await begin(MANY, { simulator: { directory } });
    const { simulator } = harness;
    const leadership = await lead();
    await harness.sync();
    const lanes = (): LaneFigures[] => leadership.deliveries().flatMap(({ dispatcher }) => dispatcher.lanes());
    const requests = (): number => lanes().reduce((sum, lane) => sum + lane.requests, 0);
    /** Nothing is sent for a while yet, and nothing is under way. */
    const areClosed = (): boolean =>
      lanes().some(({ pausedMs }) => pausedMs > 100) &&
      simulator.requests().every(({ outcome }) => outcome !== undefined);
    const quick = { interval: 10, timeout: 20_000 };
    const sizes: number[] = [];
    const change = async (condition: string): Promise<void> => {
      await flip(condition);
      await run();
      sizes.push(await countOutbox());
    };
    const atFirst = requests();

    simulator.faults.failRandomly({ share: 1, seed: 1, status: 503 });
    for (const condition of ['true', 'id % 3 = 0']) await change(condition);
    await expect.poll(() => count('users/bulkUpdate', 503) >= 4 && areClosed(), quick).toBe(true);
    const [whenClosed, began] = [requests(), performance.now()];
    for (const condition of ['id % 2 = 0', 'id % 7 = 0']) await change(condition);
    await expect.poll(() => requests() - whenClosed >= 3 && areClosed(), quick).toBe(true);
    await simulator.close();
    const whenRefused = requests();
    for (const condition of ['id % 5 = 0', 'id % 3 = 1']) await change(condition);
    await expect.poll(() => requests() - whenRefused, quick).toBeGreaterThanOrEqual(1);

    expect((requests() - whenClosed) / ((performance.now() - began) / 1000)).toBeLessThan(5);
    expect(requests() - atFirst).toBeLessThan(200);
    expect(sizes).toEqual([...new Set(sizes)].sort((a, b) => a - b));
    expect(sizes.at(-1)).toBeGreaterThan(4 * MANY);

    const port = Number(new URL(simulator.url).port);
    const back = await startSimulator({ projectType: 'hybrid', quotas: 'off', keepRequests: KEEP, directory, port });
    cleanUp.unshift(back.close);
    // Nobody moves the time: what has failed while it was away comes again by itself.
    await expect.poll(countOutbox, { interval: 100, timeout: 60_000 }).toBe(0);
    await expectTruth({ simulators: [simulator, back] });
    expect(await deadCalls()).toEqual([]);
  });
});
