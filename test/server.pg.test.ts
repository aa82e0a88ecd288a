import { once } from 'node:events';
import { connect, createServer, type AddressInfo } from 'node:net';
import { afterEach, describe, expect, it } from 'vitest';
import { createSite, type Site } from './support/cli.js';
import { createDatabase } from './support/database.js';
import type { Program } from './support/program.js';

/** What `start` serves over HTTP, asked of a process of its own. */
const KEY = 'iterable-key-0123456789abcdef';
const TABLES = `
  create table people (id bigint primary key, user_id text, email text, vip boolean not null, spent numeric not null);
  insert into people select n, 'customer-' || n, 'ada.lovelace' || n || '@example.com', n % 2 = 0, n from generate_series(1, 40) as n`;
const VIP = { name: 'VIP', sql: 'SELECT id AS profile_id FROM people WHERE vip', send: 'both', poll: '1 hour' };
const SPENT = { name: 'Spent', sql: 'SELECT id AS profile_id, spent AS value FROM people', poll: '1 hour' };
const SOON = { timeout: 20_000, interval: 50 };

let site: Site;
const programs: Program[] = [];
const closers: (() => Promise<unknown>)[] = [];
afterEach(async () => {
  for (const program of programs.splice(0)) {
    program.process.kill('SIGKILL');
    await program.ended;
  }
  await site.close();
  for (const close of closers.splice(0).reverse()) await close();
});

async function begin(http: unknown, more: Readonly<Record<string, unknown>> = {}): Promise<void> {
  site = await createSite(TABLES, {}, { apiKey: KEY });
  await site.configure({
    audiences: [VIP],
    traits: [SPENT],
    destinations: { iterable: { type: 'iterable', api_key: KEY, region: site.simulator.url } },
    http,
    ...more,
  });
}

function start(): Program {
  const program = site.start('start');
  programs.push(program);
  return program;
}

/** Starts one more instance; resolves to where it serves, by its own log, once it says so. */
async function serve(): Promise<{ program: Program; url: string }> {
  const program = start();
  let log = '';
  program.process.stderr?.on('data', (chunk: Buffer) => (log += chunk.toString()));
  await program.said(/Serving at .*\n/);
  const messages = messagesOf(log.slice(0, log.lastIndexOf('\n')));
  const [, url = ''] = messages.map((message) => /^Serving at (\S+): /.exec(message)).find((found) => found) ?? [];
  expect(url).toMatch(/^http:\/\/127\.0\.0\.1:[1-9]\d*$/);
  return { program, url };
}

/** Each line of the log is a JSON object. */
const messagesOf = (log: string): string[] =>
  log
    .trim()
    .split('\n')
    .map((line) => (JSON.parse(line) as { message: string }).message);

async function ask(
  url: string,
  init: RequestInit = {},
): Promise<{ status: number; type: string | null; text: string }> {
  const response = await fetch(url, init);
  return { status: response.status, type: response.headers.get('content-type'), text: await response.text() };
}

const waiting = async (): Promise<number> =>
  Number((await site.sql('select count(*) as n from personas.outbox'))[0]?.['n']);
/** All definitions have run once, and nothing waits to be sent. */
const isSynced = async (): Promise<boolean> => {
  const [row] = await site.sql(
    `select count(*) = 2 and not exists (select from personas.definition_destination where backfill is not null)
       and not exists (select from personas.outbox) as synced
     from personas.run where outcome = 'succeeded'`,
  );
  return row?.['synced'] === true;
};

interface Sample {
  name: string;
  labels: Record<string, string>;
  value: number;
}

/** Reads Prometheus' text format: https://prometheus.io/docs/instrumenting/exposition_formats/ */
function parseMetrics(text: string): { types: Map<string, string>; samples: Sample[] } {
  const types = new Map<string, string>();
  const samples: Sample[] = [];
  for (const line of text.split('\n')) {
    const [, typed, type] = /^# TYPE (\S+) (\S+)$/.exec(line) ?? [];
    if (typed !== undefined && type !== undefined) types.set(typed, type);
    if (line === '' || line.startsWith('#')) continue;
    const [, name = '', labels = '', value = ''] = /^(\w+)(?:\{(.*)\})? (\S+)$/.exec(line) ?? [];
    expect(name, line).not.toBe('');
    const pairs = [...labels.matchAll(/(\w+)="([^"]*)"/g)].map(([, key = '', text = '']) => [key, text] as const);
    samples.push({ name, labels: Object.fromEntries(pairs), value: Number(value) });
  }
  return { types, samples };
}

describe('start', () => {
  it('says in its log where it serves, that it is alive, and that it leads or stands by', async () => {
    await begin({ port: 0 });
    const first = await serve();
    await expect.poll(() => ask(`${first.url}/readyz`), SOON).toMatchObject({ status: 200, text: 'leading\n' });
    const second = await serve();
    expect(second.url).not.toBe(first.url);
    await second.program.said(/standing by/);
    expect(await ask(`${second.url}/readyz`)).toMatchObject({ status: 200, text: 'standing by\n' });
    for (const { url } of [first, second]) {
      const alive = { status: 200, type: 'text/plain; charset=utf-8', text: 'alive\n' };
      expect(await ask(`${url}/healthz`)).toEqual(alive);
      expect(await ask(`${url}/healthz?from=balancer`)).toEqual(alive);
      expect(await ask(`${url}/healthz`, { method: 'HEAD' })).toEqual({ ...alive, text: '' });
    }
    const leading = async ({ url }: { url: string }): Promise<unknown> =>
      parseMetrics((await ask(`${url}/metrics`)).text).samples.find(({ name }) => name === 'personas_leading')?.value;
    expect([await leading(first), await leading(second)]).toEqual([1, 0]);

    first.program.process.kill('SIGTERM');
    expect((await first.program.ended).code).toBe(0);
    await expect(ask(`${first.url}/healthz`)).rejects.toThrow();
    await expect.poll(() => ask(`${second.url}/readyz`), SOON).toMatchObject({ status: 200, text: 'leading\n' });
    expect(await leading(second)).toBe(1);
  });

  it('is alive but not ready while the state database is out of reach, and ready again afterwards', async () => {
    const state = await createDatabase();
    closers.push(state.drop);
    await begin({ port: 0 }, { state: { url: state.url } });
    const { url, program } = await serve();
    const ready = (): Promise<unknown> => ask(`${url}/readyz`);
    await expect.poll(ready, SOON).toMatchObject({ status: 200, text: 'leading\n' });
    const name = new URL(state.url).pathname.slice(1);
    await site.sql(`alter database ${name} allow_connections false`);
    await site.sql('select pg_terminate_backend(pid) from pg_stat_activity where datname = $1', [name]);
    expect(await ready()).toMatchObject({ status: 503, text: 'The state database is out of reach.\n' });
    expect(await ask(`${url}/healthz`)).toMatchObject({ status: 200 });
    await site.sql(`alter database ${name} allow_connections true`);
    await expect.poll(ready, SOON).toMatchObject({ status: 200, text: 'leading\n' });
    program.process.kill('SIGTERM');
    expect((await program.ended).code).toBe(0);
  });

  it('gives Prometheus what is true after a sync, under names of its own, and nothing of any person', async () => {
    await begin({ port: 0 });
    site.simulator.forget('customer-7');
    const before = Date.now();
    const { url } = await serve();
    await expect.poll(isSynced, SOON).toBe(true);
    await site.sql(
      `update personas.destination set left_out = jsonb_build_object('spent', now(), 'vip', now() - interval '8 days');
       update personas.definition_destination set stopped_fields = '{"spent": "It was refused."}'
       where definition_id = (select id from personas.definition where key = 'spent')`,
    );
    const { status, type, text } = await ask(`${url}/metrics`);
    expect({ status, type }).toEqual({ status: 200, type: 'text/plain; version=0.0.4; charset=utf-8' });
    expect(text.endsWith('\n')).toBe(true);
    const { types, samples } = parseMetrics(text);

    for (const [name, kind] of types) {
      expect(name).toMatch(/^(personas|process|nodejs)_[a-z0-9_]+$/);
      if (name.startsWith('personas_')) expect(name.endsWith('_total'), name).toBe(kind === 'counter');
    }
    const own = samples.filter(({ name }) => name.startsWith('personas_'));
    for (const { name } of own) expect([...types.keys()]).toContain(name);
    const labels = new Set(own.flatMap((sample) => Object.keys(sample.labels)));
    expect([...labels].sort()).toEqual(['definition', 'destination', 'lane', 'outcome']);
    for (const secret of [KEY, new URL(site.database.url).host, 'customer-']) expect(text).not.toContain(secret);
    expect(text).not.toMatch(/lovelace|example\.com|@/i);

    const all = (name: string): Pick<Sample, 'labels' | 'value'>[] =>
      own.filter((sample) => sample.name === name).map(({ labels, value }) => ({ labels, value }));
    const sum = (name: string, lane?: string): number =>
      all(name)
        .filter(({ labels }) => lane === undefined || labels['lane'] === lane)
        .reduce((total, { value }) => total + value, 0);
    const destination = 'iterable';
    const { stats } = site.simulator;
    expect(all('personas_leading')).toEqual([{ labels: {}, value: 1 }]);
    expect(all('personas_waiting_calls')).toEqual([{ labels: { destination }, value: 0 }]);
    expect(all('personas_oldest_waiting_call_seconds')).toEqual([{ labels: { destination }, value: 0 }]);
    expect(all('personas_dead_calls')).toEqual([{ labels: { destination }, value: 1 }]);
    expect(all('personas_destination_stopped')).toEqual([{ labels: { destination }, value: 0 }]);
    expect(all('personas_fields_left_out')).toEqual([{ labels: { destination }, value: 1 }]);
    expect(all('personas_definition_calls_stopped')).toEqual([
      { labels: { destination, definition: 'spent' }, value: 1 },
      { labels: { destination, definition: 'vip' }, value: 0 },
    ]);
    expect(all('personas_definition_members')).toEqual(
      expect.arrayContaining([
        { labels: { definition: 'vip' }, value: 20 },
        { labels: { definition: 'spent' }, value: 40 },
      ]),
    );
    expect(all('personas_runs_total')).toEqual(
      expect.arrayContaining([
        { labels: { definition: 'vip', outcome: 'succeeded' }, value: 1 },
        { labels: { definition: 'spent', outcome: 'succeeded' }, value: 1 },
      ]),
    );
    expect(all('personas_definition_held').map(({ value }) => value)).toEqual([0, 0]);
    for (const { value } of all('personas_definition_last_success_timestamp_seconds')) {
      expect(value).toBeGreaterThanOrEqual(Math.floor(before / 1000));
      expect(value).toBeLessThanOrEqual(Date.now() / 1000);
    }
    // Who is forgotten was sent by both identifiers, then by the key alone, and refused.
    expect(sum('personas_calls_total', 'users_update')).toBe(stats.count('users/update', 200));
    expect(sum('personas_calls_total', 'events_track')).toBe(20);
    expect(sum('personas_calls_total')).toBe(stats.count(undefined, 200));
    expect(sum('personas_requests_total')).toBe(stats.count());
    expect(stats.count()).toBe(stats.count(undefined, 200) + 2);
    expect(sum('personas_requests_throttled_total')).toBe(0);
    expect(all('personas_lane_quota_requests_per_second')).toContainEqual({
      labels: { destination, lane: 'users_update' },
      value: 500,
    });
  });

  it('has no other pages, and lets nobody do anything but look', async () => {
    await begin({ port: 0 });
    const { url } = await serve();
    for (const path of ['/', '/metrics/', '/constructor', '/__proto__', '/healthz/..%2fmetrics']) {
      expect(await ask(`${url}${path}`), path).toMatchObject({ status: 404 });
    }
    for (const method of ['POST', 'PUT', 'DELETE', 'OPTIONS']) {
      for (const path of ['/healthz', '/readyz', '/metrics']) {
        expect(await ask(`${url}${path}`, { method }), `${method} ${path}`).toMatchObject({ status: 405 });
      }
    }
    expect(await ask(`${url}/nowhere`, { method: 'POST', body: 'x'.repeat(100_000) })).toMatchObject({ status: 404 });
    expect(await ask(`${url}/healthz`)).toMatchObject({ status: 200 });
  });

  it('gives Prometheus what real time does, and what waits for it', async () => {
    const profiles = {
      sql: 'SELECT id AS profile_id, user_id, email FROM people',
      key: 'hybrid',
      changes: { people: 'id' },
    };
    await begin({ port: 0 }, { profiles, audiences: [{ ...VIP, changes: { people: 'id' } }] });
    expect((await site.run('realtime', 'install')).code).toBe(0);
    const { url } = await serve();
    const definition = 'vip';
    /** By name, those of the definition that is followed and those without labels; undefined where there is none. */
    const read = async (): Promise<Record<string, number>> => {
      const { samples } = parseMetrics((await ask(`${url}/metrics`)).text);
      const own = samples.filter(({ labels }) => (labels['definition'] ?? definition) === definition);
      return Object.fromEntries(own.map(({ name, value }) => [name.replace('personas_', ''), value]));
    };
    await expect.poll(read, SOON).toMatchObject({
      realtime_live: 1,
      due_profiles: 0,
      due_parked: 0,
      realtime_lag_seconds: 0,
      captured_waiting: 0,
    });
    await expect.poll(isSynced, SOON).toBe(true);
    // Somebody who is missing though nothing has changed.
    await site.sql(`delete from personas.snapshot where recipient = 'u:customer-2'`);
    await site.sql(`update personas.definition set due_at = now() where key = 'vip'`);
    await expect.poll(read, SOON).toMatchObject({ reconcile_corrections_total: 1, realtime_live: 0 });

    expect((await site.run('resume', 'vip')).code).toBe(0);
    await expect.poll(read, SOON).toMatchObject({ realtime_live: 1 });
    expect((await site.run('pause', 'vip')).code).toBe(0);
    await site.sql('update people set vip = not vip where id <= 3');
    await expect.poll(async () => (await read())['due_profiles'], SOON).toBe(3);
    expect((await read())['realtime_lag_seconds']).toBeGreaterThan(0);

    // As if another state had taken the source over: nobody here takes what is captured.
    await site.sql('update personas_capture.listener set installation = gen_random_uuid()');
    await site.sql('update people set vip = not vip where id <= 3');
    await expect.poll(read, SOON).toMatchObject({ captured_waiting: 1, realtime_live: 0 });
    await site.sql('drop schema personas_capture cascade');
    await expect.poll(read, SOON).not.toHaveProperty('captured_waiting');
  });

  it('stops though somebody is still connected to what it serves', async () => {
    await begin({ port: 0 });
    const { url, program } = await serve();
    await program.said(/Leading\./);
    const silent = connect(Number(new URL(url).port), '127.0.0.1');
    await once(silent, 'connect');
    silent.on('error', () => undefined);
    silent.write('GET /healthz HTTP/1.1\r\n');
    program.process.kill('SIGTERM');
    const { code, stderr } = await program.ended;
    expect(code).toBe(0);
    expect(messagesOf(stderr).at(-1)).toBe('Stopped.');
    silent.destroy();
  });

  it('ends with 2 where the port is taken, and says which, and how to do without', async () => {
    const other = createServer().listen(0, '127.0.0.1');
    await once(other, 'listening');
    closers.push(() => new Promise((resolve) => other.close(resolve)));
    const { port } = other.address() as AddressInfo;
    await begin({ port });
    const { code, stdout, stderr } = await start().ended;
    expect({ code, stdout }).toEqual({ code: 2, stdout: '' });
    expect(stderr).toContain(`Port ${port} of 127.0.0.1 is taken.`);
    expect(stderr).toContain('`http: off`');
    expect(site.simulator.requests()).toEqual([]);
    expect(await site.sql('select holder from personas.leader')).toEqual([{ holder: null }]);
  });

  it('serves nothing where the configuration says `http: off`, and does its work all the same', async () => {
    await begin('off');
    const program = start();
    await program.said(/Leading\./);
    await expect.poll(isSynced, SOON).toBe(true);
    expect(await waiting()).toBe(0);
    program.process.kill('SIGTERM');
    const { code, stderr } = await program.ended;
    expect(code).toBe(0);
    expect(messagesOf(stderr)).not.toContainEqual(expect.stringContaining('Serving'));
    expect(site.simulator.user('customer-2')?.fields).toEqual({ vip: 'true', spent: '2.0' });
  });
});
