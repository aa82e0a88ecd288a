import { spawnSync } from 'node:child_process';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { z } from 'zod';
import { startSimulator, type Simulator } from '../src/demo/simulator/server.js';
import { createSite, type Site } from './support/cli.js';
import { PROGRAM } from './support/program.js';
import { until } from './support/until.js';

/** What the commands do that act, how they end, and the form of their JSON. */
const PEOPLE = `
  create table people (id bigint primary key, user_id text, email text, vip boolean not null default true);
  insert into people select n, 'u' || n, 'p' || n || '@example.com' from generate_series(1, 60) as n`;
const VIP = { name: 'VIP', sql: 'SELECT id AS profile_id FROM people WHERE vip' };

const left = {
  waiting: z.int(),
  later: z.int(),
  refused: z.int(),
  stopped: z.int(),
};
const version = z.literal(1);
const errorJson = z.strictObject({
  version,
  error: z.strictObject({ code: z.int(), problems: z.array(z.looseObject({ message: z.string() })) }),
});
const estimate = { definition: z.string(), members: z.int(), calls: z.int(), seconds: z.int(), resumed: z.boolean() };
const backfillJson = z.discriminatedUnion('begun', [
  z.strictObject({ version, ...estimate, begun: z.literal(false) }),
  z.strictObject({ version, ...estimate, begun: z.literal(true), ...left }),
]);
const counts = {
  members: z.int().nullable(),
  entered: z.int().nullable(),
  exited: z.int().nullable(),
  changed: z.int().nullable(),
};
const decided = { version, run: z.int(), definition: z.string(), ...counts };
const approveJson = z.discriminatedUnion('outcome', [
  z.strictObject({ ...decided, outcome: z.literal('succeeded'), ...left }),
  z.strictObject({ ...decided, outcome: z.enum(['held', 'failed']), error: z.string() }),
]);
const rejectJson = z.strictObject({
  version,
  run: z.int(),
  definition: z.string(),
  decision: z.literal('rejected'),
  state: z.string(),
});
const forgetJson = z.strictObject({
  version,
  recipients: z.array(z.string()),
  rows: z.int(),
  erased: z.boolean(),
});
const pauseJson = z.union([
  z.strictObject({ version, definition: z.string(), state: z.enum(['paused', 'active']), changed: z.boolean() }),
  z.strictObject({
    version,
    destination: z.string(),
    state: z.enum(['paused', 'active', 'stopped']),
    changed: z.boolean(),
    waiting: z.int().optional(),
  }),
]);
const failedJson = z.strictObject({
  version,
  failed: z.array(
    z.strictObject({
      definition: z.string(),
      destination: z.string(),
      reason: z.string(),
      count: z.int(),
      oldest: z.iso.datetime(),
      samples: z
        .array(
          z.strictObject({
            recipient: z.string(),
            field: z.string().nullable(),
            event: z.string().nullable(),
            answer: z.string(),
          }),
        )
        .max(3),
    }),
  ),
});
const retryJson = z.strictObject({ version, retried: z.int(), ...left });
const discardJson = z.strictObject({ version, discarded: z.int(), matching: z.int().optional() });

let site: Site;
const closeSite = (): Promise<void> => site.close();
const heldRun = async (): Promise<string> => {
  const [row] = await site.sql(`select id from personas.run where outcome = 'held' and decision is null`);
  return String(row?.['id']);
};

describe('a held run', () => {
  const MANY = `
    create table people (id bigint primary key, user_id text, email text, vip boolean not null default true);
    insert into people select n, 'u' || n, null from generate_series(1, 1000) as n`;
  beforeAll(async () => {
    site = await createSite(MANY, {});
    await site.configure({
      audiences: [{ ...VIP, initial: 'skip' }],
      destinations: {
        iterable: {
          type: 'iterable',
          api_key: 'test-key',
          region: site.simulator.url,
          quotas: { users_update: 10_000 },
        },
      },
    });
    expect((await site.run('sync')).code).toBe(0);
    await site.sql('update people set vip = false where id <= 400');
  });
  afterAll(closeSite);

  it('ends sync with 2 and the two commands that decide it', async () => {
    const { code, stderr } = await site.run('sync');
    const run = await heldRun();
    expect(code).toBe(2);
    expect(stderr).toContain('400 of 1000 members would exit');
    expect(stderr).toContain(`\`approve ${run}\` or \`reject ${run}\``);
    const [status, runs, plan] = await Promise.all([site.run('status'), site.run('runs'), site.run('plan')]);
    expect(status.stdout).toMatch(/vip +audience +every 1 min +held +1,000/);
    expect(status.stdout).toContain(`\`approve ${run}\``);
    expect(runs.stdout).toContain(`Run ${run} waits for`);
    expect(plan.stdout).toContain('The run would be held: 400 of 1000 members would exit');
  });

  it('stays held, with 2, where it would now do over a tenth more than what was seen', async () => {
    const run = await heldRun();
    await site.sql('update people set vip = false where id <= 500');
    const { code, stderr, json } = await site.run('approve', run, '--json');
    expect(code).toBe(2);
    const next = await heldRun();
    expect(next).not.toBe(run);
    expect(approveJson.parse(json)).toMatchObject({ run: Number(next), outcome: 'held', exited: 500 });
    expect(stderr).toContain(`then \`approve ${next}\``);
    expect(site.simulator.userCount).toBe(0);
  });

  it('goes ahead when it is approved as it is, and is delivered', async () => {
    const run = await heldRun();
    const { code, json } = await site.run('approve', run, '--json');
    expect(code).toBe(0);
    expect(approveJson.parse(json)).toMatchObject({ outcome: 'succeeded', members: 500, exited: 500, waiting: 0 });
    expect(site.simulator.user('u500')?.fields).toMatchObject({ vip: 'false' });
  });

  it('cannot be approved twice, nor can one be that was never held', async () => {
    const [row] = await site.sql(`select id from personas.run where decision = 'approved'`);
    const [again, never, unknown] = await Promise.all([
      site.run('approve', String(row?.['id'])),
      site.run('approve', '1'),
      site.run('approve', '4711', '--json'),
    ]);
    expect([again.code, never.code, unknown.code]).toEqual([2, 2, 2]);
    expect(again.stderr).toContain('is not held any more. It was approved.');
    expect(never.stderr).toContain('Run 1 is not held.');
    expect(errorJson.parse(unknown.json).error.problems[0]?.message).toContain('There is no run 4711');
  });

  it('is dropped by reject, which pauses its definition until resume', async () => {
    await site.sql('update people set vip = false');
    expect((await site.run('sync')).code).toBe(2);
    const { code, json } = await site.run('reject', await heldRun(), '--json');
    expect(code).toBe(0);
    expect(rejectJson.parse(json)).toMatchObject({ definition: 'vip', state: 'paused' });
    const refused = await site.run('sync', 'vip');
    expect(refused.code).toBe(2);
    expect(refused.stderr).toContain('`personas-sync resume vip` first');
    expect((await site.run('status', 'vip')).stdout).toContain('vip is paused. Run');
    const resumed = await site.run('resume', 'vip', '--json');
    expect(pauseJson.parse(resumed.json)).toEqual({ version: 1, definition: 'vip', state: 'active', changed: true });
    const [row] = await site.sql(`select state, due_at is not null as due from personas.definition where key = 'vip'`);
    expect(row).toEqual({ state: 'active', due: true });
  });
});

describe('a removed definition with on_delete: exit_all', () => {
  beforeAll(async () => {
    site = await createSite(PEOPLE, { audiences: [{ ...VIP, on_delete: 'exit_all' }] });
    expect((await site.run('sync')).code).toBe(0);
    await site.configure({ audiences: [{ name: 'Other', sql: 'SELECT id AS profile_id FROM people WHERE id = 1' }] });
  });
  afterAll(closeSite);

  it('is held until approve sends the exits, and plan says so before', async () => {
    expect((await site.run('plan', 'vip')).stdout).toContain('its 60 members exit once you approve it');
    const synced = await site.run('sync');
    expect(synced.code).toBe(2);
    expect(synced.stderr).toContain(`approve ${await heldRun()}`);
    expect(site.simulator.user('u2')?.fields).toEqual({ vip: 'true' });
    expect((await site.run('approve', await heldRun())).code).toBe(0);
    expect(site.simulator.user('u2')?.fields).toEqual({ vip: 'false' });
  });
});

describe('backfill', () => {
  beforeAll(async () => {
    site = await createSite(PEOPLE, {});
    await slowDown(10_000);
    expect((await site.run('sync')).code).toBe(0);
  });
  afterAll(closeSite);
  const slowDown = (usersUpdate: number): Promise<void> =>
    site.configure({
      audiences: [
        { ...VIP, send: 'both' },
        { ...VIP, name: 'Tracked', send: 'track' },
      ],
      destinations: {
        iterable: {
          type: 'iterable',
          api_key: 'test-key',
          region: site.simulator.url,
          quotas: { users_update: usersUpdate },
        },
      },
    });

  it('says how many calls and how long, and does nothing without a yes', async () => {
    await slowDown(10);
    const { code, stderr } = await site.run('backfill', 'vip');
    expect(code).toBe(2);
    expect(stderr).toContain('A backfill of vip sends 60 members again: 60 calls, about 6 s at the full quota.');
    expect(stderr).toContain('`--yes` says that it is meant');
    const { json } = await site.run('backfill', 'vip', '--json');
    expect(backfillJson.parse(json)).toMatchObject({ calls: 60, seconds: 6, begun: false, resumed: false });
    expect(site.simulator.stats.count('users/update')).toBe(60);
  });

  it('asks at a terminal, and takes anything but a yes for a no', () => {
    const command = `${process.execPath} ${PROGRAM} -c personas.yaml backfill vip`;
    const { error, status, stdout } = spawnSync('script', ['-qec', command, '/dev/null'], {
      cwd: site.folder,
      env: { PATH: process.env['PATH'], TERM: 'xterm', DATABASE_URL: site.database.url },
      input: 'maybe\n',
      encoding: 'utf8',
    });
    if (error !== undefined) return; // no terminal can be made here
    expect(stdout).toContain('Send them? [y/N]');
    expect(stdout).toContain('Nothing was done.');
    expect(status).toBe(2);
    expect(site.simulator.stats.count('users/update')).toBe(60);
  });

  it('stops at Ctrl-C with 75, and the next start goes on where it stopped', async () => {
    await slowDown(20);
    const before = site.simulator.stats.count('users/update');
    const halfWay = new Promise<void>((resolve) => {
      let seen = 0;
      site.simulator.faults.failNext(1, {
        endpoint: 'users/update',
        match: () => {
          seen += 1;
          if (seen === 20) resolve();
          return false;
        },
      });
    });
    const first = site.start('backfill', 'vip', '--yes');
    await halfWay;
    first.process.kill('SIGINT');
    const { code, stdout } = await first.ended;
    expect(code).toBe(75);
    expect(stdout).toContain('`personas-sync backfill vip` goes on where it stopped');
    const sent = site.simulator.stats.count('users/update') - before;
    expect(sent).toBeGreaterThanOrEqual(20);
    expect(sent).toBeLessThan(60);

    site.simulator.faults.clear();
    await slowDown(10_000);
    const second = await site.run('backfill', 'vip', '--json');
    expect(second.code).toBe(0);
    expect(backfillJson.parse(second.json)).toMatchObject({ resumed: true, begun: true, calls: 60 - sent });
    expect(site.simulator.stats.count('users/update') - before).toBe(60);
  });

  it('sends events again only where that is asked for, with their first ids', async () => {
    const events = site.simulator.events().length;
    const { code, stderr } = await site.run('backfill', 'tracked', '--yes');
    expect(code).toBe(2);
    expect(stderr).toContain('`--events` sends those again');
    expect((await site.run('backfill', 'tracked', '--yes', '--events')).code).toBe(0);
    expect(site.simulator.events()).toHaveLength(events);
    expect(site.simulator.events('u1').map(({ applications }) => applications)).toContain(2);
  });

  it('refuses a key that there is not, and a definition that was never synced', async () => {
    const { code, stderr } = await site.run('backfill', 'vipp', '--yes');
    expect(code).toBe(2);
    expect(stderr).toContain('did you mean `vip`?');
    await site.configure({ audiences: [VIP, { ...VIP, name: 'Fresh' }] });
    expect((await site.run('backfill', 'fresh', '--yes')).stderr).toContain('has not been synced yet');
  });
});

describe('refused calls', () => {
  const refuse = (): void => {
    site.simulator.faults.clear();
    site.simulator.faults.failRandomly({
      share: 1,
      seed: 1,
      endpoint: 'users/update',
      status: 400,
      body: { code: 'InvalidEmailAddressError', msg: 'Invalid email: p3@example.com \u001b[31mred', params: null },
      match: ({ body }) => body.includes('"u3"'),
    });
  };
  beforeAll(async () => {
    site = await createSite(PEOPLE, {
      audiences: [VIP],
      traits: [{ key: 'rank', sql: 'SELECT id AS profile_id, id AS value FROM people' }],
    });
    refuse();
  });
  afterAll(closeSite);

  it('end sync with 2, and are listed with the answers and what can be done', async () => {
    const { code, stderr } = await site.run('sync');
    expect(code).toBe(2);
    expect(stderr).toContain('2 refused calls: `personas-sync failed list`');
    const { stdout, stderr: said } = await site.run('failed', 'list');
    expect(stdout).toMatch(/rank +iterable +InvalidEmailAddressError +1/);
    expect(stdout).toContain('u3, field vip');
    expect(stdout).toContain('correct it in your data');
    expect(stdout).not.toContain('\u001b');
    expect(said).toBe('');
    const { failed } = failedJson.parse((await site.run('failed', 'list', '--key', 'vip', '--json')).json);
    expect(failed).toMatchObject([{ definition: 'vip', reason: 'InvalidEmailAddressError', count: 1 }]);
    expect(failed[0]?.samples).toMatchObject([{ recipient: 'u:u3', field: 'vip', event: null }]);
  });

  it('can be looked at by age, and a length of time that is none is refused', async () => {
    const [old, wrong, typo] = await Promise.all([
      site.run('failed', 'list', '--older-than', '2 days'),
      site.run('failed', 'list', '--older-than', 'yesterday'),
      site.run('failed', 'list', '--destination', 'iterabel'),
    ]);
    expect(old.stdout).toContain('No refused calls like that');
    expect(wrong.code).toBe(2);
    expect(wrong.stderr).toContain("such as '2 days'");
    expect(typo.stderr).toContain('did you mean `iterable`?');
  });

  it('are explained where the destination has failed at them for hours', async () => {
    for (const [n, reason] of ['HTTP 500', 'NoAnswer', 'UnreadableAnswer', 'TooLarge'].entries())
      await site.sql(
        `insert into personas.dead_call (destination_id, definition_id, kind, recipient, field, reason, answer)
         select id, 1, 'm', 'u:w' || $1::int, 'vip', $2, '' from personas.destination`,
        [n, reason],
      );
    const { stdout } = await site.run('failed', 'list');
    for (const advice of [
      'HTTP 500: the destination failed',
      'NoAnswer: no answer',
      'UnreadableAnswer: what was',
      'TooLarge: the call',
    ])
      expect(stdout).toContain(advice);
    await site.sql(`delete from personas.dead_call where recipient like 'u:w%'`);
  });

  it('are tried again by retry, and refused again with 2 while nothing has changed', async () => {
    const { code, json } = await site.run('failed', 'retry', '--json');
    expect(code).toBe(2);
    expect(retryJson.parse(json)).toMatchObject({ retried: 2, refused: 2 });
  });

  it('are dropped by discard, once a person says so', async () => {
    const asked = await site.run('failed', 'discard', '--key', 'rank', '--json');
    expect(asked.code).toBe(2);
    expect(discardJson.parse(asked.json)).toMatchObject({ discarded: 0, matching: 1 });
    const done = await site.run('failed', 'discard', '--key', 'rank', '--yes', '--json');
    expect(done.code).toBe(0);
    expect(discardJson.parse(done.json)).toEqual({ version: 1, discarded: 1 });
  });

  it('are delivered by retry when the cause is gone', async () => {
    site.simulator.faults.clear();
    const { code, stdout } = await site.run('failed', 'retry', '--reason', 'InvalidEmailAddressError');
    expect(code).toBe(0);
    expect(stdout).toContain('All delivered');
    expect(site.simulator.user('u3')?.fields).toEqual({ vip: 'true' });
    expect((await site.run('failed', 'retry')).stdout).toContain('There were no refused calls');
  });
});

describe('refused calls of two destinations, for two reasons', () => {
  let other: Simulator;
  const EMAIL = 'InvalidEmailAddressError';
  const FORBIDDEN = 'ForbiddenParamsError';
  const iterable = () => ({ type: 'iterable', api_key: 'test-key', region: site.simulator.url });
  /** Refuses the updates of some users, and takes the others. */
  const refuse = ({ faults }: Simulator, refusals: Readonly<Record<string, string>>): void => {
    for (const [userId, code] of Object.entries(refusals)) {
      faults.failRandomly({
        share: 1,
        seed: 1,
        endpoint: 'users/update',
        status: 400,
        body: { code, msg: 'No.', params: null },
        match: ({ body }) => body.includes(`"${userId}"`),
      });
    }
  };
  /** All that is refused now: where, of whom, why. */
  const dead = async (): Promise<string[]> =>
    (
      await site.sql(
        `select t.name || ' ' || x.recipient || ' ' || x.reason as what from personas.dead_call as x
         join personas.destination as t on t.id = x.destination_id order by 1`,
      )
    ).map(({ what }) => String(what));

  beforeAll(async () => {
    site = await createSite(PEOPLE, {});
    other = await startSimulator({ projectType: 'hybrid', quotas: 'off' });
    await site.configure({
      audiences: [VIP],
      destinations: { iterable: iterable(), other: { ...iterable(), api_key: 'another-key', region: other.url } },
    });
    refuse(site.simulator, { u3: EMAIL, u4: FORBIDDEN, u5: EMAIL });
    refuse(other, { u3: EMAIL, u6: EMAIL, u7: FORBIDDEN });
    expect((await site.run('sync')).code).toBe(2);
    expect(await dead()).toEqual([
      `iterable u:u3 ${EMAIL}`,
      `iterable u:u4 ${FORBIDDEN}`,
      `iterable u:u5 ${EMAIL}`,
      `other u:u3 ${EMAIL}`,
      `other u:u6 ${EMAIL}`,
      `other u:u7 ${FORBIDDEN}`,
    ]);
    await site.sql(
      `update personas.dead_call set died_at = now() - interval '3 days' where recipient in ('u:u5', 'u:u6')`,
    );
    for (const { faults } of [site.simulator, other]) faults.clear();
  });
  afterAll(async () => {
    await other.close();
    await site.close();
  });
  const listed = async (...words: string[]): Promise<string[]> =>
    failedJson
      .parse((await site.run('failed', 'list', ...words, '--json')).json)
      .failed.flatMap(({ destination, reason, samples }) =>
        samples.map(({ recipient }) => `${destination} ${recipient} ${reason}`),
      )
      .sort();

  it('are listed by destination, by reason and by age', async () => {
    expect(await listed('--destination', 'other')).toEqual([
      `other u:u3 ${EMAIL}`,
      `other u:u6 ${EMAIL}`,
      `other u:u7 ${FORBIDDEN}`,
    ]);
    expect(await listed('--reason', FORBIDDEN)).toEqual([`iterable u:u4 ${FORBIDDEN}`, `other u:u7 ${FORBIDDEN}`]);
    expect(await listed('--older-than', '2 days')).toEqual([`iterable u:u5 ${EMAIL}`, `other u:u6 ${EMAIL}`]);
    expect(await listed('--older-than', '2 days', '--destination', 'other')).toEqual([`other u:u6 ${EMAIL}`]);
  });

  it('are tried again where they match, and the others stay refused', async () => {
    const old = await site.run('failed', 'retry', '--older-than', '2 days', '--destination', 'iterable', '--json');
    expect(retryJson.parse(old.json)).toMatchObject({ retried: 1, refused: 0 });
    expect(site.simulator.user('u5')?.fields).toEqual({ vip: 'true' });
    const some = await site.run('failed', 'retry', '--reason', EMAIL, '--destination', 'iterable', '--json');
    expect([old.code, some.code]).toEqual([0, 0]);
    expect(retryJson.parse(some.json)).toMatchObject({ retried: 1, refused: 0 });
    expect(site.simulator.user('u3')?.fields).toEqual({ vip: 'true' });
    expect([site.simulator.user('u4'), other.user('u3'), other.user('u6')]).toEqual([undefined, undefined, undefined]);
    expect(await dead()).toEqual([
      `iterable u:u4 ${FORBIDDEN}`,
      `other u:u3 ${EMAIL}`,
      `other u:u6 ${EMAIL}`,
      `other u:u7 ${FORBIDDEN}`,
    ]);
  });

  it('are dropped where they match, of a destination that is gone, too', async () => {
    await site.configure({ audiences: [VIP], destinations: { iterable: iterable() } });
    expect((await site.run('sync')).code).toBe(0);
    expect(await listed('--destination', 'other', '--reason', EMAIL)).toEqual([
      `other u:u3 ${EMAIL}`,
      `other u:u6 ${EMAIL}`,
    ]);
    const dropped = await site.run('failed', 'discard', '--destination', 'other', '--older-than', '2 days', '--yes');
    expect(dropped.code).toBe(0);
    expect(dropped.stdout).toContain('1 refused call dropped.');
    expect(await dead()).toEqual([`iterable u:u4 ${FORBIDDEN}`, `other u:u3 ${EMAIL}`, `other u:u7 ${FORBIDDEN}`]);
    const typo = await site.run('failed', 'list', '--destination', 'othr');
    expect(typo.code).toBe(2);
    expect(typo.stderr).toContain('did you mean `other`?');
  });

  it('wait for a destination that is gone, with 2, and go there once it is back', async () => {
    const { code, json, stderr } = await site.run('failed', 'retry', '--destination', 'other', '--json');
    expect(code).toBe(2);
    expect(retryJson.parse(json)).toMatchObject({ retried: 2, waiting: 0, refused: 0, stopped: 2 });
    expect(stderr).toContain('2 calls for a destination that is no longer configured must wait');
    expect(await dead()).toEqual([`iterable u:u4 ${FORBIDDEN}`]);
    expect(other.user('u3')).toBeUndefined();
    await site.configure({
      audiences: [VIP],
      destinations: { iterable: iterable(), other: { ...iterable(), api_key: 'another-key', region: other.url } },
    });
    expect((await site.run('sync')).code).toBe(0);
    for (const userId of ['u3', 'u7']) expect(other.user(userId)?.fields).toEqual({ vip: 'true' });
  });
});

describe('status while a daemon delivers', () => {
  const MANY = 20_000;
  beforeAll(async () => {
    site = await createSite(PEOPLE.replace('60', String(MANY)), { audiences: [VIP] });
    await site.configure({
      audiences: [VIP],
      destinations: {
        iterable: {
          type: 'iterable',
          api_key: 'test-key',
          region: site.simulator.url,
          quotas: { users_bulk_update: 1 },
        },
      },
    });
  });
  afterAll(closeSite);

  it('says how fast it goes, how long it still takes, and which fields are left out', async () => {
    const answer = { successCount: 0, failCount: 0, createdFields: [], filteredOutFields: ['vip'], failedUpdates: {} };
    site.simulator.faults.failNext(1, {
      endpoint: 'users/bulkUpdate',
      match: ({ body }) => {
        answer.successCount = (JSON.parse(body) as { users: unknown[] }).users.length;
        return true;
      },
      afterApplying: true,
      status: 200,
      body: answer,
    });
    interface Looked {
      waiting: number;
      drainsInSeconds: number | null;
      lanes: { name: string; quota: number; callsPerSecond: number }[];
    }
    /** What is left to deliver, and how many were acknowledged a second. */
    const readTold = async (): Promise<{ left: number; perSecond: number }> => {
      const [row] = await site.sql(
        `select delivery ->> 'acknowledgedPerSecond' as rate,
           (select count(*) from personas.outbox)
             + (select coalesce(sum(backfill_total - backfill_done) filter (where backfill is not null), 0)
                from personas.definition_destination) as left
         from personas.destination`,
      );
      return { left: Number(row?.['left']), perSecond: Number(row?.['rate']) };
    };
    const daemon = site.start('start');
    const look = async (): Promise<unknown> => {
      const { json } = await site.run('status', '--json');
      const [iterable] = (json as { destinations?: Record<string, unknown>[] }).destinations ?? [];
      return iterable;
    };
    try {
      await expect.poll(look, { interval: 200, timeout: 30_000 }).toMatchObject({
        state: 'active',
        waiting: expect.any(Number) as number,
        drainsInSeconds: expect.any(Number) as number,
        droppedFields: ['vip'],
      });
      const { told, status } = await until(async () => {
        // Nothing moves while it is looked at. Who stands still for too long leads no more, and tells nothing.
        daemon.process.kill('SIGSTOP');
        try {
          const seen = (await look()) as Looked;
          return seen.drainsInSeconds === null ? null : { told: await readTold(), status: seen };
        } finally {
          daemon.process.kill('SIGCONT');
        }
      });
      expect(status.waiting).toBeGreaterThan(0);
      expect(status.drainsInSeconds).toBe(Math.ceil(told.left / told.perSecond));
      // The rate is that of the last nine whole seconds: no more than Iterable has taken at all.
      expect(told.perSecond * 9).toBeGreaterThan(0);
      expect(Math.round(told.perSecond * 9)).toBeLessThanOrEqual(site.simulator.userCount);
      const { lanes } = status;
      const bulk = lanes.find(({ name }) => name === 'users_bulk_update');
      expect(bulk).toMatchObject({ quota: 1 });
      expect(bulk?.callsPerSecond).toBeGreaterThan(0);
      // What waits for a person doesn't drain.
      expect((await site.run('pause', 'vip')).code).toBe(0);
      expect(await look()).toMatchObject({ waiting: expect.any(Number) as number, drainsInSeconds: 0 });
      expect((await site.run('resume', 'vip')).code).toBe(0);
      const text = (await site.run('status')).stdout;
      expect(text).toContain('iterable has left out these fields of what it was sent, within the last week: vip.');
      expect(text).toMatch(/users_bulk_update/);
    } finally {
      daemon.process.kill('SIGTERM');
    }
    expect((await daemon.ended).stderr).toContain('Fields of what is sent are left out there: vip.');
    // Whoever leads next has heard nothing of it, and nor has the next version.
    expect((await site.run('sync')).code).toBe(0);
    expect(await look()).toMatchObject({ droppedFields: ['vip'] });
    await site.sql(`update personas.destination set left_out = jsonb_build_object('vip', now() - interval '8 days')`);
    expect(await look()).toMatchObject({ droppedFields: [] });
  });
});

describe('pause and resume', () => {
  beforeAll(async () => {
    site = await createSite(PEOPLE, { audiences: [VIP, { ...VIP, name: 'iterable' }] });
    expect((await site.run('sync')).code).toBe(0);
    await site.configure({ audiences: [VIP] });
    expect((await site.run('sync')).code).toBe(0);
  });
  afterAll(closeSite);

  it('keep the calls to a destination back, and let them go', async () => {
    const paused = await site.run('pause', 'destination:iterable', '--json');
    expect(paused.code).toBe(0);
    expect(pauseJson.parse(paused.json)).toMatchObject({ destination: 'iterable', state: 'paused', changed: true });
    await site.sql('update people set vip = false where id <= 10');
    const synced = await site.run('sync');
    expect(synced.code).toBe(2);
    expect(synced.stderr).toContain('10 calls must wait');
    expect((await site.run('status')).stdout).toContain('Destination iterable is paused');
    const resumed = await site.run('resume', 'destination:iterable');
    expect(resumed.stdout).toContain('10 waiting calls are sent by the daemon, or by `personas-sync sync`');
    expect((await site.run('sync')).code).toBe(0);
    expect(site.simulator.user('u1')?.fields).toMatchObject({ vip: 'false' });
  });

  it('have a field sent again that was refused for everybody', async () => {
    await site.sql(
      `update personas.definition_destination set stopped_fields = '{"vip": "It was refused."}'
       where definition_id = (select id from personas.definition where key = 'vip')`,
    );
    await site.sql('update people set vip = not vip where id between 11 and 14');
    const synced = await site.run('sync');
    expect(synced.code).toBe(2);
    expect(synced.stderr).toContain('4 refused calls');
    expect((await site.run('failed', 'list')).stdout).toContain('was not sent any more; when that is mended');
    expect((await site.run('status')).stdout).toContain(
      'The field vip of vip is not sent to iterable any more: It was refused. When that is mended, `personas-sync resume vip` sends it.',
    );
    const resumed = await site.run('resume', 'vip');
    expect(resumed.stdout).toContain('and the calls that waited go on, with 4 values that had been left out');
    expect((await site.run('sync')).code).toBe(0);
    expect((await site.run('status')).stdout).not.toContain('The field vip');
    const [{ vip } = {}] = await site.sql('select vip from people where id = 11');
    expect(site.simulator.user('u11')?.fields).toMatchObject({ vip: String(vip) });
  });

  it('say how long they wait where the last leader may still have requests open', async () => {
    await site.sql(`update personas.leader set quiet_until = now() + interval '4 seconds'`);
    await site.sql('update people set vip = not vip where id = 1');
    const { code, stderr } = await site.run('sync');
    expect(code).toBe(0);
    expect(stderr).toMatch(/Sending begins in [34] s: until then a request of the last leader may be open/);
  });

  it('let a destination go on that stopped, since its key was refused', async () => {
    await site.sql('update people set vip = true');
    site.simulator.faults.failRandomly({ share: 1, seed: 1, endpoint: 'users/update', status: 401 });
    const { code, stderr } = await site.run('sync');
    expect(code).toBe(2);
    expect(stderr).toContain('refused the API key');
    expect((await site.run('status')).stdout).toContain('Destination iterable has stopped');
    site.simulator.faults.clear();
    expect((await site.run('resume', 'destination:iterable')).code).toBe(0);
    expect((await site.run('sync')).code).toBe(0);
  });

  it('ask which is meant where a definition and a destination have one name', async () => {
    const [both, gone, typo] = await Promise.all([
      site.run('pause', 'iterable'),
      site.run('pause', 'definition:iterable'),
      site.run('pause', 'vpi'),
    ]);
    expect(both.code).toBe(2);
    expect(both.stderr).toContain('definition:iterable or destination:iterable');
    expect(gone.stderr).toContain('is no longer in the configuration');
    expect(typo.stderr).toContain('did you mean `vip`?');
  });
});

describe('forget', () => {
  beforeAll(async () => {
    site = await createSite(PEOPLE, { audiences: [VIP] });
    expect((await site.run('sync')).code).toBe(0);
  });
  afterAll(closeSite);

  it('says what it would erase, and erases nothing without a yes', async () => {
    const { code, stderr, json } = await site.run('forget', 'p7@example.com', '--json');
    expect(code).toBe(2);
    expect(stderr).toContain('Nothing is sent to Iterable');
    expect(stderr).not.toContain('p7@example.com');
    expect(forgetJson.parse(json)).toMatchObject({ rows: 1, erased: false });
  });

  it('erases a person for good: a sync does not bring them back', async () => {
    const requests = site.simulator.stats.count();
    const { code, json } = await site.run('forget', 'p7@example.com', '--yes', '--json');
    expect(code).toBe(0);
    expect(forgetJson.parse(json)).toMatchObject({ rows: 1, erased: true });
    expect((await site.run('sync')).code).toBe(0);
    expect(site.simulator.stats.count()).toBe(requests);
    const { stdout } = await site.run('profile', 'u7');
    expect(stdout).toContain('This person was erased on request');
    expect(await site.sql(`select arguments from personas.request where kind = 'forget'`)).toEqual([{ arguments: {} }]);
  });
});

describe('beside a running daemon', () => {
  beforeAll(async () => {
    site = await createSite(PEOPLE, { audiences: [VIP] });
  });
  afterAll(closeSite);

  it('commands are carried out by it, and it is shown as the leader', async () => {
    const daemon = site.start('start');
    await daemon.said(/All delivered|Synced/);
    const status = await site.run('status');
    expect(status.stdout).toContain(`(process ${daemon.process.pid})`);
    const backfilled = await site.run('backfill', 'vip', '--yes');
    expect(backfilled.code).toBe(0);
    expect(backfilled.stdout).toContain('60 members are sent');
    await site.sql('update people set vip = false where id = 1');
    expect((await site.run('sync', 'vip')).stdout).toContain('All delivered.');
    expect(site.simulator.user('u1')?.fields).toMatchObject({ vip: 'false' });
    // All but one can be delivered.
    site.simulator.faults.failRandomly({
      share: 1,
      seed: 1,
      endpoint: 'users/update',
      status: 503,
      match: ({ body }) => body.includes('"u2"'),
    });
    await site.sql('update people set vip = false where id between 2 and 9');
    const syncing = site.start('sync', 'vip');
    await daemon.said(/Delivering: 1 call waits, \d+ calls? a second/);
    site.simulator.faults.clear();
    expect((await syncing.ended).code).toBe(0);
    daemon.process.kill('SIGTERM');
    expect((await daemon.ended).code).toBe(0);
  });
});
