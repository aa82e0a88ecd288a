import { afterEach, describe, expect, it } from 'vitest';
import { lead, type Leadership } from '../src/daemon.js';
import { tryLead } from '../src/db/lease.js';
import { createFeeder } from '../src/sync/cursor.js';
import { runDefinition, type RunResult } from '../src/sync/run.js';
import { createHarness, type Harness, type HarnessOptions } from './support/harness.js';
import { until } from './support/until.js';

/** Who gets a call, and what it carries, from the source's tables to the requests that Iterable gets. */
const TABLES = `
  create table people (id int, user_id text, email text);
  create table members (id int);
  create table spendings (id int primary key, spent int);`;
const PROFILES = { sql: 'SELECT id AS profile_id, user_id, email FROM people' };
const VIP = { key: 'vip', sql: 'SELECT id AS profile_id FROM members', send: 'both' };
const IDENTIFY = { ...VIP, send: 'identify' };
const SPENT = { key: 'spent', sql: 'SELECT id AS profile_id, spent AS value FROM spendings' };

let harness: Harness;
let leadership: Leadership;
const closers: (() => Promise<void>)[] = [];
afterEach(async () => {
  for (const close of closers.splice(0).reverse()) await close();
});

async function begin(
  key: 'email' | 'user_id' | 'hybrid',
  rows: string,
  options: Partial<HarnessOptions> = {},
): Promise<Ran[]> {
  harness = await createHarness({
    tables: `${TABLES} ${rows}`,
    key,
    profiles: PROFILES,
    simulator: { keepRequests: 10_000 },
    ...options,
  });
  closers.push(() => harness.close());
  await beginToLead();
  return sync();
}

/** Leads as a daemon does, but runs nothing by itself. */
async function beginToLead(): Promise<void> {
  const lease = await tryLead(harness.opened.databases.state.pool);
  leadership = await lead(harness.opened, lease!, {
    scheduled: false,
    delivers: true,
    confirmRemovals: true,
    kept: null,
  });
  closers.push(() => leadership.stop());
}

/** Runs every definition once, and waits until all that may go now has been delivered. */
async function sync(): Promise<Ran[]> {
  const { databases, config } = harness.opened;
  const context = { databases, config, leader: leadership.leader };
  const request = { trigger: 'sync', approves: null, nextDueMs: () => null } as const;
  const ran = await Promise.all(
    config.definitions.map(async (definition): Promise<Ran> => {
      const result = await runDefinition(context, definition, request);
      return { definition: definition.key, outcome: result?.outcome, error: result?.error, ...result?.counts };
    }),
  );
  const feed = createFeeder(databases.state);
  while ((await feed()).count > 0);
  await until(async () => {
    for (const { dispatcher } of leadership.deliveries()) dispatcher.nudge();
    const due = await harness.state(
      `select from outbox as o join destination as t on t.id = o.destination_id where o.due_at <= now() and t.state = 'active' limit 1`,
    );
    return due.length === 0;
  });
  return ran;
}

type Ran = { definition: string; outcome: string | undefined; error: string | null | undefined } & Partial<
  RunResult['counts']
>;

/** What has been asked of the simulator since the last look: the body of an update, or the call's name. */
function requests(): unknown[] {
  const seen = harness.simulator.requests().slice(looked);
  looked += seen.length;
  return seen.map(({ endpoint, method, path, body }) => {
    if (endpoint === 'users/update') return JSON.parse(body) as unknown;
    return method === 'GET'
      ? decodeURIComponent(path)
      : `${endpoint} ${(JSON.parse(body) as { eventName: string }).eventName}`;
  });
}
let looked = 0;
afterEach(() => {
  looked = 0;
});

const fieldsOf = (identifier: string): Record<string, string> | undefined => harness.simulator.user(identifier)?.fields;
const sorted = (bodies: unknown[]): unknown[] =>
  [...bodies].sort((a, b) => (JSON.stringify(a) < JSON.stringify(b) ? -1 : 1));

describe('which recipients a profile has', () => {
  it('makes three users of three emails in an email-based project', async () => {
    await begin(
      'email',
      `insert into people values (1, 'u1', 'a@x.de'), (1, 'u1', ' B@X.de '), (1, null, 'c@x.de'); insert into members values (1)`,
      { audiences: [VIP] },
    );
    expect(harness.simulator.userCount).toBe(3);
    for (const email of ['a@x.de', 'b@x.de', 'c@x.de']) {
      expect(fieldsOf(email)).toEqual({ vip: 'true' });
      expect(harness.simulator.events(email).map(({ name }) => name)).toEqual(['Audience Entered']);
    }
    expect(harness.simulator.user('b@x.de')?.userId).toBe('u1');
    expect(harness.simulator.user('c@x.de')?.userId).toBeNull();
  });

  it('sends a profile with only a userId to an email-based project under that userId', async () => {
    await begin('email', `insert into people values (1, 'u1', null), (1, 'u1', ''); insert into members values (1)`, {
      audiences: [IDENTIFY],
    });
    expect(requests()).toEqual([{ userId: 'u1', preferUserId: true, dataFields: { vip: true } }]);
    expect(fieldsOf('u1')).toEqual({ vip: 'true' });
  });

  it('counts a profile without any identifier, and sends the others', async () => {
    const runs = await begin(
      'hybrid',
      `insert into people values (1, '', ' '), (2, 'u2', null); insert into members values (1), (2), (3)`,
      { audiences: [VIP] },
    );
    expect(runs).toMatchObject([{ outcome: 'succeeded', members: 1, entered: 1 }]);
    expect(await harness.state('select without_identifier from run')).toEqual([{ without_identifier: 2 }]);
    expect(harness.simulator.userCount).toBe(1);
  });

  it('makes a recipient of each userId of a profile, with the email of its own row, in a userID-based project', async () => {
    await begin(
      'user_id',
      `insert into people values (1, 'u1', 'a@x.de'), (1, 'U1', null), (1, null, 'b@x.de'); insert into members values (1)`,
      { audiences: [IDENTIFY] },
    );
    expect(sorted(requests())).toEqual([
      { userId: 'U1', dataFields: { vip: true } },
      { userId: 'u1', dataFields: { email: 'a@x.de', vip: true } },
    ]);
  });

  it('takes the userId of a profile that has one, else each of its emails, in a hybrid project', async () => {
    await begin(
      'hybrid',
      `insert into people values (1, 'u1', 'a@x.de'), (1, null, 'b@x.de'), (2, null, 'c@x.de'), (2, null, 'd@x.de'); insert into members values (1), (2)`,
      { audiences: [IDENTIFY] },
    );
    expect(sorted(requests())).toEqual([
      { email: 'a@x.de', userId: 'u1', dataFields: { vip: true } },
      { email: 'c@x.de', dataFields: { vip: true } },
      { email: 'd@x.de', dataFields: { vip: true } },
    ]);
  });

  it('lets an email that some row holds beside a userId stand for that userId in a hybrid project', async () => {
    await begin(
      'hybrid',
      `insert into people values (1, null, 'A@x.de'), (2, 'u9', 'a@x.de'), (3, 'u2', 'a@x.de'); insert into members values (1)`,
      { audiences: [IDENTIFY] },
    );
    // The smallest of the two userIds; the address is that of a single user in Iterable.
    expect(requests()).toEqual([{ email: 'a@x.de', userId: 'u2', dataFields: { vip: true } }]);
    await harness.sql('insert into members values (3)');
    await sync();
    expect(requests()).toEqual([]);
  });

  it('uses identifiers that a definition gives itself as they are', async () => {
    await begin('email', '', {
      audiences: [
        {
          ...IDENTIFY,
          sql: `SELECT ' New@X.de' AS email, 'u7' AS user_id UNION ALL SELECT NULL, 'u8' UNION ALL SELECT '', ''`,
        },
      ],
    });
    expect(sorted(requests())).toEqual([
      { email: 'new@x.de', userId: 'u7', dataFields: { vip: true } },
      { userId: 'u8', preferUserId: true, dataFields: { vip: true } },
    ]);
    expect(await harness.state('select without_identifier, members from run')).toEqual([
      { without_identifier: 1, members: 2 },
    ]);
  });
});

describe('profiles that share a recipient', () => {
  it('keep it in an audience as long as one of them qualifies', async () => {
    await begin(
      'email',
      `insert into people values (1, null, 'a@x.de'), (2, null, 'a@x.de'); insert into members values (1), (2)`,
      { audiences: [VIP] },
    );
    expect(requests()).toEqual([{ email: 'a@x.de', dataFields: { vip: true } }, 'events/track Audience Entered']);
    await harness.sql('delete from members where id = 1');
    await sync();
    expect(requests()).toEqual([]);
    await harness.sql('delete from members where id = 2');
    await sync();
    expect(requests()).toEqual([{ email: 'a@x.de', dataFields: { vip: false } }, 'events/track Audience Exited']);
  });

  it('may carry different columns along', async () => {
    await begin(
      'email',
      `insert into people values (1, null, 'a@x.de'), (2, null, 'a@x.de'); insert into members values (1), (2)`,
      {
        audiences: [{ ...VIP, sql: 'SELECT id AS profile_id, id * 10 AS level FROM members', properties: ['level'] }],
      },
    );
    expect(harness.simulator.events('a@x.de')).toMatchObject([{ name: 'Audience Entered', fields: { level: '10' } }]);
  });

  it('that merge and keep the address cause no exit and no entry', async () => {
    await begin(
      'email',
      `insert into people values (1, null, 'a@x.de'), (2, null, 'b@x.de'); insert into members values (1), (2)`,
      { audiences: [VIP] },
    );
    requests();
    await harness.sql('update people set id = 2; delete from members where id = 1');
    const runs = await sync();
    expect(runs).toMatchObject([{ members: 2, entered: 0, exited: 0 }]);
    expect(requests()).toEqual([]);
    // The merged person leaves under both addresses.
    await harness.sql('delete from members');
    await sync();
    expect(sorted(requests())).toEqual(
      sorted([
        { email: 'a@x.de', dataFields: { vip: false } },
        { email: 'b@x.de', dataFields: { vip: false } },
        'events/track Audience Exited',
        'events/track Audience Exited',
      ]),
    );
  });

  it('and have two values of a trait keep what was sent, are counted, and fail the run above one in a hundred', async () => {
    const all = `insert into people select n, null, 'p' || n || '@x.de' from generate_series(1, 200) as n; insert into spendings select n, n from generate_series(1, 200) as n;`;
    await begin('email', `${all} insert into people values (300, null, 'p1@x.de'), (300, null, 'new@x.de')`, {
      traits: [SPENT],
    });
    requests();
    await harness.sql('insert into spendings values (300, 1000)');
    await sync();
    expect(requests()).toEqual([{ email: 'new@x.de', dataFields: { spent: 1000 } }]);
    expect(await harness.state('select conflicting, members from run order by id desc limit 1')).toEqual([
      { conflicting: 1, members: 201 },
    ]);
    expect(await harness.state('select recipient, profiles from conflict')).toEqual([
      { recipient: 'e:p1@x.de', profiles: ['1', '300'] },
    ]);

    await harness.sql('update spendings set spent = 1 where id = 300');
    await sync();
    expect(requests()).toEqual([{ email: 'new@x.de', dataFields: { spent: 1 } }]);
    expect(await harness.state('select from conflict')).toEqual([]);

    await harness.sql(`insert into people select 300, null, 'p' || n || '@x.de' from generate_series(2, 4) as n`);
    const failed = await sync();
    expect(failed).toMatchObject([{ outcome: 'failed' }]);
    expect(failed[0]?.error).toMatch(
      /personas\.yaml:\d+:\d+: "spent" gives 3 recipients two different values .*over 1 %/,
    );
    expect(requests()).toEqual([]);
  });
});

describe('a key that changes', () => {
  it('is an exit of the email and then an entry of the userId, without events, where a known email gains a userId', async () => {
    await begin('hybrid', `insert into people values (1, null, 'a@x.de'); insert into members values (1)`, {
      audiences: [VIP],
    });
    expect(requests()).toEqual([{ email: 'a@x.de', dataFields: { vip: true } }, 'events/track Audience Entered']);
    await harness.sql(`update people set user_id = 'u1'`);
    const runs = await sync();
    expect(runs).toMatchObject([{ members: 1, entered: 1, exited: 1 }]);
    expect(requests()).toEqual([
      { email: 'a@x.de', dataFields: { vip: false } },
      { email: 'a@x.de', userId: 'u1', dataFields: { vip: true } },
    ]);
    expect(fieldsOf('u1')).toEqual({ vip: 'true' });
    expect(harness.simulator.userCount).toBe(1);
    // The one user has the event of the day on which the person entered.
    expect(harness.simulator.events('u1').map(({ name }) => name)).toEqual(['Audience Entered']);
  });

  it('is an exit of the old address and an entry of the new one, without events', async () => {
    await begin('email', `insert into people values (1, null, 'old@x.de'); insert into members values (1)`, {
      audiences: [VIP],
    });
    requests();
    await harness.sql(`update people set email = 'new@x.de'`);
    await sync();
    expect(requests()).toEqual([
      { email: 'old@x.de', dataFields: { vip: false } },
      { email: 'new@x.de', dataFields: { vip: true } },
    ]);
  });

  it('takes the values of a trait from the old address to the new one', async () => {
    await begin('email', `insert into people values (1, null, 'old@x.de'); insert into spendings values (1, 7)`, {
      traits: [SPENT],
    });
    requests();
    await harness.sql(`update people set email = 'new@x.de'`);
    await sync();
    expect(requests()).toEqual([
      { email: 'old@x.de', dataFields: { spent: null } },
      { email: 'new@x.de', dataFields: { spent: 7 } },
    ]);
  });

  it('is an entry alone where an address is added, an exit alone where one is lost, and the events are those of the person', async () => {
    await begin('email', `insert into people values (1, null, 'a@x.de'); insert into members values (1)`, {
      audiences: [VIP],
    });
    requests();
    await harness.sql(`insert into people values (1, null, 'b@x.de')`);
    await sync();
    expect(requests()).toEqual([{ email: 'b@x.de', dataFields: { vip: true } }]);
    await harness.sql(`delete from people where email = 'a@x.de'`);
    await sync();
    expect(requests()).toEqual([{ email: 'a@x.de', dataFields: { vip: false } }]);
    await harness.sql('delete from members');
    await sync();
    expect(requests()).toEqual([{ email: 'b@x.de', dataFields: { vip: false } }, 'events/track Audience Exited']);
  });

  it('causes no calls for an audience where two people swap their addresses', async () => {
    await begin(
      'email',
      `insert into people values (1, null, 'a@x.de'), (2, null, 'b@x.de'); insert into members values (1), (2)`,
      { audiences: [VIP] },
    );
    requests();
    await harness.sql(`update people set id = 3 - id`);
    await sync();
    expect(requests()).toEqual([]);
  });

  it('swaps the values of a trait where two people swap their addresses', async () => {
    await begin(
      'email',
      `insert into people values (1, 'u1', 'a@x.de'), (2, 'u2', 'b@x.de'); insert into spendings values (1, 10), (2, 20)`,
      { traits: [SPENT] },
    );
    requests();
    await harness.sql(`update people set email = case id when 1 then 'b@x.de' else 'a@x.de' end`);
    await sync();
    expect(sorted(requests())).toEqual([
      { email: 'a@x.de', userId: 'u2', dataFields: { spent: 20 } },
      { email: 'b@x.de', userId: 'u1', dataFields: { spent: 10 } },
    ]);
  });
});

describe('a person who has been deleted from the source', () => {
  /** As if the minute had passed after which Iterable is asked again. */
  async function passAMinute(): Promise<void> {
    const waits = await harness.state('select extract(epoch from due_at - now())::int4 as wait, confirm from outbox');
    expect(waits).not.toHaveLength(0);
    for (const { wait, confirm } of waits) {
      expect(confirm).toBe(2);
      expect(wait).toBeGreaterThan(50);
      expect(wait).toBeLessThanOrEqual(60);
    }
    await harness.state(`update outbox set due_at = now() - interval '1 second'`);
  }

  it('is told of the exit where Iterable still has them', async () => {
    await begin('email', `insert into people values (1, null, 'a@x.de'); insert into members values (1)`, {
      audiences: [VIP],
    });
    requests();
    await harness.sql('delete from people; delete from members');
    await sync();
    expect(requests()).toEqual([
      '/api/users/a@x.de',
      { email: 'a@x.de', dataFields: { vip: false } },
      'events/track Audience Exited',
    ]);
  });

  it('is asked for twice, a minute apart, and not made anew where Iterable has them no more', async () => {
    await begin(
      'hybrid',
      `insert into people values (1, 'u1', 'a@x.de'), (2, 'u2', null); insert into members values (1), (2)`,
      { audiences: [VIP] },
    );
    requests();
    harness.simulator.deleteUser('u1');
    await harness.sql('delete from people where id = 1; delete from members');
    await sync();
    // Whoever left the audience but not the source is told without being asked for.
    expect(sorted(requests())).toEqual(
      sorted(['/api/users/byUserId/u1', { userId: 'u2', dataFields: { vip: false } }, 'events/track Audience Exited']),
    );
    await passAMinute();
    await sync();
    expect(requests()).toEqual(['/api/users/byUserId/u1']);
    expect(await harness.state('select from outbox')).toEqual([]);
    expect(harness.simulator.user('u1')).toBeUndefined();
  });

  it('is told where Iterable comes to know them within the minute', async () => {
    await begin('hybrid', `insert into people values (1, 'u1', null); insert into spendings values (1, 5)`, {
      traits: [SPENT],
    });
    requests();
    harness.simulator.deleteUser('u1');
    await harness.sql('delete from people; delete from spendings');
    await sync();
    expect(requests()).toEqual(['/api/users/byUserId/u1']);
    const body = JSON.stringify({ userId: 'u1', dataFields: { spent: 5 } });
    await fetch(`${harness.simulator.url}/api/users/update`, {
      method: 'POST',
      body,
      headers: { 'api-key': 'k', 'content-type': 'application/json' },
    });
    requests();
    await passAMinute();
    await sync();
    expect(requests()).toEqual(['/api/users/byUserId/u1', { userId: 'u1', dataFields: { spent: null } }]);
    expect(fieldsOf('u1')).toEqual({});
  });

  it('is told at once where they are back before the minute has passed', async () => {
    await begin('hybrid', `insert into people values (1, 'u1', null); insert into members values (1)`, {
      audiences: [IDENTIFY],
    });
    requests();
    harness.simulator.deleteUser('u1');
    await harness.sql('delete from people; delete from members');
    await sync();
    await harness.sql(`insert into people values (1, 'u1', null); insert into members values (1)`);
    await sync();
    expect(requests()).toEqual(['/api/users/byUserId/u1', { userId: 'u1', dataFields: { vip: true } }]);
  });
});

describe('the identifier beside the key', () => {
  const spend = async (spent: number): Promise<unknown[]> => {
    await harness.sql('update spendings set spent = $1', [spent]);
    await sync();
    return requests();
  };

  it('goes with an entry and with the first call after it has changed, and with no other call', async () => {
    await begin('hybrid', `insert into people values (1, 'u1', 'a@x.de'); insert into spendings values (1, 1)`, {
      traits: [SPENT],
    });
    expect(requests()).toEqual([{ email: 'a@x.de', userId: 'u1', dataFields: { spent: 1 } }]);
    expect(await spend(2)).toEqual([{ userId: 'u1', dataFields: { spent: 2 } }]);
    await harness.sql(`update people set email = 'b@x.de'`);
    await sync();
    expect(requests()).toEqual([]);
    expect(await spend(3)).toEqual([{ email: 'b@x.de', userId: 'u1', dataFields: { spent: 3 } }]);
    expect(await spend(4)).toEqual([{ userId: 'u1', dataFields: { spent: 4 } }]);
    expect(harness.simulator.user('u1')?.email).toBe('b@x.de');
    await harness.sql(`update people set email = 'c@x.de'`);
    expect(await spend(5)).toEqual([{ email: 'c@x.de', userId: 'u1', dataFields: { spent: 5 } }]);
    await harness.sql('delete from spendings');
    await sync();
    expect(requests()).toEqual([{ userId: 'u1', dataFields: { spent: null } }]);
  });

  it('is an email among the fields in a userID-based project', async () => {
    await begin('user_id', `insert into people values (1, 'u1', 'a@x.de'); insert into spendings values (1, 1)`, {
      traits: [SPENT],
    });
    expect(requests()).toEqual([{ userId: 'u1', dataFields: { email: 'a@x.de', spent: 1 } }]);
    expect(await spend(2)).toEqual([{ userId: 'u1', dataFields: { spent: 2 } }]);
    await harness.sql(`update people set email = 'b@x.de'`);
    expect(await spend(3)).toEqual([{ userId: 'u1', dataFields: { email: 'b@x.de', spent: 3 } }]);
  });

  it('goes with the Entered event of a destination that gets no identify', async () => {
    await begin('hybrid', `insert into people values (1, 'u1', 'a@x.de'); insert into members values (1)`, {
      audiences: [{ ...VIP, send: 'track' }],
    });
    const [entered] = harness.simulator.requests();
    expect(JSON.parse(entered!.body)).toMatchObject({ email: 'a@x.de', userId: 'u1', eventName: 'Audience Entered' });
    await harness.sql('delete from members');
    await sync();
    const exited = harness.simulator.requests()[1];
    expect(JSON.parse(exited!.body)).toMatchObject({ userId: 'u1', eventName: 'Audience Exited' });
    expect(exited!.body).not.toContain('a@x.de');
  });
});
