import { spawn } from 'node:child_process';
import { writeFile } from 'node:fs/promises';
import { fileURLToPath } from 'node:url';
import { PassThrough } from 'node:stream';
import { inspect } from 'node:util';
import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest';
import { createLogger } from '../src/lib/logger.js';
import { Secret } from '../src/lib/secret.js';
import { createDatabase, type TestDatabase } from './support/database.js';
import { createHarness, type Harness } from './support/harness.js';

/** Secrets and people's data, in whatever shape they come: never in a log, an error, a status, or what is kept of them. */
const PROGRAM = fileURLToPath(new URL('../dist/cli/main.js', import.meta.url));
const KEY = 'iterable-key-0123456789abcdef';
const PASSWORD = 'pa"ss\\wörd of the database/@:';
const TABLES = `
  create table people (id bigint primary key, user_id text, email text unique, vip boolean not null default true);
  insert into people select n, 'u' || n, 'ada.lovelace' || n || '@example.com' from generate_series(1, 5) as n;
  create function shout(email text) returns boolean language plpgsql as $$ begin
    raise exception 'Nobody knows %', email using detail = 'Key (email)=(' || email || ') already exists.', hint = email, errcode = '23505';
  end $$`;
const AUDIENCES = [
  { name: 'Cast', sql: 'SELECT id AS profile_id FROM people WHERE email::int > 0' },
  { name: 'Date', sql: 'SELECT id AS profile_id FROM people WHERE email::timestamptz > :now' },
  { name: 'Unique', sql: 'SELECT id AS profile_id FROM people WHERE shout(email)' },
  { name: 'Syntax', sql: `SELECT id AS profile_id FROM people WHERE email = 'ada.lovelace1@example.com' AND` },
  { name: 'VIP', sql: 'SELECT id AS profile_id FROM people WHERE vip', send: 'both' },
];

const ROLE = `leaky_${process.pid}`;

let other: TestDatabase;
beforeAll(async () => {
  other = await createDatabase();
  await other.pool.query(`create role ${ROLE} superuser login password '${PASSWORD}'`);
});
afterAll(async () => {
  await other.pool.query(`drop role ${ROLE}`);
  await other.drop();
});

let harness: Harness | undefined;
afterEach(async () => {
  await harness?.close();
  harness = undefined;
});

interface Ended {
  code: number | null;
  text: string;
}

/** Everything that a command writes, until it ends; it is told to stop when it has said all of `until`. */
async function run(config: string, args: readonly string[], until?: readonly string[]): Promise<Ended> {
  const child = spawn(process.execPath, [PROGRAM, ...args, '--config', config], { env: { PATH: process.env['PATH'] } });
  let text = '';
  for (const stream of [child.stdout, child.stderr]) {
    stream.on('data', (chunk: Buffer) => {
      text += chunk.toString();
      // A second signal would end it at once.
      if (!child.killed && until?.every((said) => text.includes(said)) === true) child.kill('SIGTERM');
    });
  }
  return new Promise((resolve) => child.once('close', (code) => resolve({ code, text })));
}

function expectNoLeak(text: string, more: readonly string[] = []): void {
  const forms = [KEY, PASSWORD, ...more].flatMap((secret) => [
    secret,
    encodeURIComponent(secret),
    JSON.stringify(secret).slice(1, -1),
  ]);
  for (const form of forms) expect(text).not.toContain(form);
  expect(text).not.toMatch(/lovelace|example\.com/i);
}

function withPassword(url: string): string {
  const address = new URL(url);
  [address.username, address.password] = [ROLE, PASSWORD];
  return address.toString();
}

/** All that is kept of runs, requests, settings and answers, as text. */
async function kept(): Promise<string> {
  const rows = await harness?.state(
    `select error as t from run union all select answer from request union all select progress::text from request
     union all select value::text from setting where name <> 'forget_key' union all select reason from destination
     union all select reason || ' ' || answer from dead_call union all select paused_because from definition`,
  );
  return JSON.stringify(rows);
}

describe('the program', () => {
  for (const format of ['json', 'pretty'] as const) {
    it(`tells nothing of what the database says of people, nor of what Iterable answers (${format})`, async () => {
      harness = await createHarness({ tables: TABLES, audiences: AUDIENCES });
      const { configFile, simulator, database } = harness;
      await harness.reconfigure({
        source: { url: withPassword(database.url) },
        destinations: { iterable: { type: 'iterable', api_key: KEY, region: simulator.url } },
        audiences: AUDIENCES,
        logging: { level: 'debug', format },
      });
      const echo = `No: ada.lovelace1@example.com, ada.lovelace1%40example.com, "ada.lovelace1\\u0040example.com", ${KEY}`;
      simulator.faults.failNext(3, { status: 400, body: { code: 'BadParams', msg: echo, params: { echo } } });
      simulator.faults.failNext(1, { status: 409, body: `<p>${echo}</p>` });
      simulator.faults.failNext(1, { status: 500, body: echo });
      simulator.faults.failRandomly({ share: 1, seed: 1, status: 403, body: { code: echo, msg: echo } });

      const failures = ['22P02', '22007', '23505', '42601'].map((sqlstate) => `[SQLSTATE ${sqlstate}]`);
      const daemon = await run(configFile, ['start'], [...failures, 'Iterable refused the API key']);
      expect(daemon.code).toBe(0);
      expectNoLeak(daemon.text);
      if (format === 'json') {
        const commands = [['sync'], ['runs'], ['status', '--json'], ['failed', 'list', '--reason', 'none']];
        const ended = await Promise.all(commands.map((args) => run(configFile, args)));
        for (const { text } of ended) expectNoLeak(text);
        for (const failure of failures) expect(ended[0]?.text).toContain(failure);
        expect(ended.map(({ code }) => code)).toEqual([2, 0, 0, 0]);
      }
      const all = await kept();
      expectNoLeak(all);
      expect(all).toContain('No: [email], [email]');
      expect(all).toContain('[redacted]');
    }, 60_000);
  }

  it('tells no password of a database that can’t be reached, lets nobody in, or has no such address', async () => {
    harness = await createHarness({ tables: TABLES, audiences: [] });
    const { configFile, database } = harness;
    const address = new URL(withPassword(database.url));
    const urls: [url: string, code: number][] = [];
    address.pathname = '/nowhere';
    urls.push([address.toString(), 2]);
    address.port = '9';
    urls.push([address.toString(), 75]);
    urls.push([address.toString().replace(':9/', ':port/'), 2]);
    await Promise.all(
      urls.map(async ([url, code], index) => {
        const destinations = { iterable: { type: 'iterable', api_key: KEY, region: 'eu' } };
        const profiles = { sql: 'SELECT 1 AS profile_id', key: 'hybrid' };
        const file = `${configFile}.${index}`;
        await writeFile(file, JSON.stringify({ source: { url }, profiles, destinations }));
        const ended = await run(file, ['sync', '--json']);
        expectNoLeak(ended.text);
        expect({ index, code: ended.code, said: ended.text.length > 20 }).toEqual({ index, code, said: true });
      }),
    );
  });

  it('tells no key that stands in a broken configuration', async () => {
    harness = await createHarness({ tables: TABLES, audiences: [] });
    const { configFile, database } = harness;
    const broken = [
      `destinations: { iterable: { type: iterable, api_key: "${KEY}, region: eu } }`,
      `destinations: { iterable: { type: iterable, api_key: [${KEY}] } }`,
      `destinations: { iterable: { type: iterable, apikey: ${KEY} } }`,
      `destinations: { iterable: ${KEY} }`,
      `source: { url: "mysql://root:${KEY}@localhost/db" }`,
    ];
    await Promise.all(
      broken.map(async (text, index) => {
        const file = `${configFile}.${index}`;
        const start = `source: { url: "${database.url}" }\nprofiles: { sql: SELECT 1 AS profile_id, key: hybrid }`;
        await writeFile(file, `${start}\n${text}\n`);
        const ended = await run(file, ['sync']);
        expectNoLeak(ended.text);
        expect({ text, code: ended.code }).toEqual({ text, code: 2 });
      }),
    );
  });
});

describe('a log', () => {
  async function logged(
    format: 'json' | 'pretty',
    write: (log: ReturnType<typeof createLogger>) => void,
  ): Promise<string> {
    const stream = new PassThrough();
    let text = '';
    stream.on('data', (chunk: Buffer) => (text += chunk.toString()));
    const log = createLogger({ level: 'debug', format, secrets: [PASSWORD, KEY, KEY.slice(0, 12), 'ab'], stream });
    write(log);
    await log.close();
    return text;
  }
  const email = 'ada.lovelace1@example.com';
  const failure = Object.assign(new Error(`no: ${email}\n    at ${email} of John Doe`), {
    code: 'E1 ' + email,
    detail: `Key (email)=(${email})`,
    headers: { 'api-key': KEY },
  });

  for (const format of ['json', 'pretty'] as const) {
    it(`holds no secret and no address, wherever they are thrown in (${format})`, async () => {
      const url = `postgres://me:${encodeURIComponent(PASSWORD)}@localhost/shop`;
      const text = await logged(format, (log) => {
        for (const told of [
          KEY,
          PASSWORD,
          email,
          url,
          encodeURIComponent(PASSWORD),
          JSON.stringify({ email, KEY }),
          `${KEY}${KEY}`,
        ]) {
          log.error(`It is ${told}.`);
          log.warn('It is', { told });
          log.info('x', { [told]: 1 });
          log.debug(inspect({ nested: { told, secret: new Secret(KEY) } }));
          log.failure(`It is ${told}`, new Error(told, { cause: failure }));
        }
        log.failure('It', failure);
        log.failure('It', email);
        log.failure('It', { email });
        log.failure('It', Object.assign(new Error(''), { name: email }));
      });
      expectNoLeak(text, [KEY.slice(0, 12), 'John Doe']);
      expect(text).toContain('[redacted]');
      expect(text).toContain('[email]');
      if (format === 'json')
        for (const line of text.trimEnd().split('\n')) expect(() => JSON.parse(line) as unknown).not.toThrow();
    });

    it(`says of an error what it is and where it arose (${format})`, async () => {
      const text = await logged(format, (log) => {
        log.failure('It failed', Object.assign(new TypeError('with this'), { code: '57P01' }));
      });
      expect(text).toMatch(/It failed\..*TypeError.*57P01.*leak\.pg\.test\.ts/);
      expect(text).not.toContain('with this');
    });
  }

  it('lets nothing steer a terminal', async () => {
    const text = await logged('pretty', (log) => log.info('a\u001b[2Jb', { c: 'd\u001b]0;e\u0007' }));
    expect(text.replaceAll(/\u001b\[\d+m/g, '')).not.toContain('\u001b');
  });

  it('takes what comes too late', async () => {
    const stream = new PassThrough();
    const log = createLogger({ level: 'debug', format: 'json', secrets: [], stream });
    await log.close();
    log.info('late');
    expect(stream.read()).toBeNull();
  });
});
