import { spawn, spawnSync, type ChildProcess, type ChildProcessByStdio } from 'node:child_process';
import { once } from 'node:events';
import { chmod, mkdir, readFile, realpath, rm, stat, writeFile } from 'node:fs/promises';
import { createServer } from 'node:net';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import type { Readable, Writable } from 'node:stream';
import pg from 'pg';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { startEmbedded } from '../src/demo/embedded.js';
import { OperatorError } from '../src/lib/errors.js';
import { temporaryFolder } from './support/postgres.js';

let directory: string;
const undo: (() => Promise<unknown>)[] = [];

beforeEach(async () => {
  directory = await temporaryFolder();
});

afterEach(async () => {
  for (const step of undo.splice(0).reverse()) await step();
  await rm(directory, { recursive: true, force: true, maxRetries: 10, retryDelay: 100 });
});

/** A server that is given up after the test, whatever happens. */
async function start(options: { directory: string } = { directory }) {
  const server = await startEmbedded(options);
  undo.push(() => server.stop());
  return server;
}

async function ask<T extends pg.QueryResultRow>(url: string, ...statements: string[]): Promise<T[]> {
  const client = new pg.Client({ connectionString: url });
  await client.connect();
  try {
    let rows: T[] = [];
    for (const statement of statements) ({ rows } = await client.query<T>(statement));
    return rows;
  } finally {
    await client.end();
  }
}

async function postmaster(): Promise<number> {
  return Number((await readFile(join(directory, 'postgres', 'data', 'postmaster.pid'), 'utf8')).split('\n')[0]);
}

/** One that has ended, and that nobody has asked about yet, isn't running. */
function isRunning(pid: number): boolean {
  const { stdout } = spawnSync('ps', ['-o', 'stat=', '-p', String(pid)], { encoding: 'utf8' });
  return /^[^Z]/.test(stdout.trim());
}

/** Another process that starts the server of `directory`. */
function startIn(rest: string): ChildProcessByStdio<Writable, Readable, null> {
  const script = `
    import { startEmbedded } from './src/demo/embedded.ts';
    const server = await startEmbedded({ directory: process.argv[1] });
    console.log(JSON.stringify(server));
    ${rest}`;
  const args = ['--import', 'tsx', '--input-type=module', '--eval', script, directory];
  const child = spawn(process.execPath, args, { stdio: ['pipe', 'pipe', 'inherit'] });
  undo.push(() => end(child, 'SIGKILL'));
  return child;
}

/** One that stops the server when told to. */
async function startElsewhere() {
  const child = startIn(`
    process.stdin.once('data', async () => {
      await server.stop();
      process.exit(0);
    });`);
  const [line] = (await once(createInterface(child.stdout), 'line')) as [string];
  const { url, created } = JSON.parse(line) as { url: string; created: boolean };
  return { url, created, child, stop: () => (child.stdin.write('stop\n'), ended(child)) };
}

async function ended(child: ChildProcess): Promise<void> {
  if (child.exitCode === null && child.signalCode === null) await once(child, 'exit');
}

async function end(child: ChildProcess, signal: NodeJS.Signals): Promise<void> {
  child.kill(signal);
  await ended(child);
}

describe('one process', () => {
  it('makes the data at the first start, and finds it at the next, at the same address', async () => {
    const first = await start();
    expect(first.created).toBe(true);
    await ask(first.url, 'create table kept as select 7 as value');
    await first.stop();

    const second = await start();
    expect(second).toMatchObject({ created: false, url: first.url });
    expect(await ask(second.url, 'select value from kept')).toEqual([{ value: 7 }]);
  });

  it('has stopped the server when stop returns, and may stop it twice', async () => {
    const server = await start();
    const pid = await postmaster();
    expect(isRunning(pid)).toBe(true);
    await Promise.all([server.stop(), server.stop()]);
    expect(isRunning(pid)).toBe(false);
  });

  it('loses no commit to a kill -9 of the server', async () => {
    const killed = await start();
    await ask(killed.url, 'create table kept as select 7 as value');
    process.kill(await postmaster(), 'SIGKILL');

    const next = await start();
    expect(next.created).toBe(false);
    expect(await ask(next.url, 'select value from kept')).toEqual([{ value: 7 }]);
  });

  it('moves to another port while its own is taken', async () => {
    await (await start()).stop();
    const port = (await readFile(join(directory, 'postgres', 'port'), 'utf8')).trim();
    const other = createServer().listen(Number(port), '127.0.0.1');
    undo.push(() => new Promise((resolve) => other.close(resolve)));
    await once(other, 'listening');

    const server = await start();
    expect(new URL(server.url).port).not.toBe(port);
    expect(await ask(server.url, 'select 1 as one')).toEqual([{ one: 1 }]);
  });

  it('admits nobody without the password, which only its owner can read', async () => {
    const server = await start();
    const guess = new URL(server.url);
    guess.password = 'guess';
    await expect(ask(guess.toString(), 'select 1')).rejects.toMatchObject({ code: '28P01' });
    expect((await stat(join(directory, 'postgres', 'password'))).mode & 0o777).toBe(0o600);
    expect((await stat(join(directory, 'postgres', 'data'))).mode & 0o777).toBe(0o700);
  });

  it('keeps the server out of reach of Ctrl-C, in a process group of its own', async () => {
    await start();
    const pid = await postmaster();
    const { stdout } = spawnSync('ps', ['-o', 'pgid=', '-p', String(pid)], { encoding: 'utf8' });
    expect(Number(stdout)).toBe(pid);
  });

  it('answers several starts at once with one server', async () => {
    const servers = await Promise.all([start(), start(), start()]);
    expect(new Set(servers.map(({ url }) => url)).size).toBe(1);
    expect(servers.filter(({ created }) => created)).toHaveLength(1);
  });

  it('takes the lock of a process that died with it', async () => {
    const dead = spawn(process.execPath, ['--version']);
    await ended(dead);
    await writeFile(join(directory, 'postgres.lock'), `${dead.pid ?? 0} 1`);
    expect((await start()).created).toBe(true);
  });

  it('begins anew after a first start that died halfway', async () => {
    await mkdir(join(directory, 'postgres', 'data.new', 'base'), { recursive: true });
    await chmod(join(directory, 'postgres'), 0o700);
    expect((await start()).created).toBe(true);
  });

  it('says what the server said where it refuses to start, without the password', async () => {
    await (await start()).stop();
    const password = await readFile(join(directory, 'postgres', 'password'), 'utf8');
    await writeFile(join(directory, 'postgres', 'data', 'PG_VERSION'), '9.6\n');

    const failure = await startEmbedded({ directory }).catch((error: unknown) => error);
    expect(failure).toBeInstanceOf(OperatorError);
    expect(String(failure)).toMatch(/database files are incompatible with server/);
    expect(String(failure)).not.toContain(password);
  });

  it('names the file where the password is gone', async () => {
    await (await start()).stop();
    await rm(join(directory, 'postgres', 'password'));
    await expect(startEmbedded({ directory })).rejects.toThrow(/postgres\/password. Put the file back/);
  });

  it.runIf(process.getuid?.() === 0)("keeps the data elsewhere where the server's user can't reach it", async () => {
    const closed = join(directory, 'closed');
    await mkdir(closed, { mode: 0o700 });
    const first = await start({ directory: closed });
    const home = await realpath(join(closed, 'postgres'));
    undo.unshift(() => rm(home, { recursive: true }));
    expect(home.startsWith('/var/lib/personas-sync/')).toBe(true);
    await first.stop();
    expect(await start({ directory: closed })).toMatchObject({ created: false, url: first.url });
  });
});

describe('several processes', () => {
  it('share one server when they start at once, and the last to stop stops it', async () => {
    const [one, two] = await Promise.all([startElsewhere(), startElsewhere()]);
    expect(one.url).toBe(two.url);
    expect([one.created, two.created].toSorted()).toEqual([false, true]);

    const pid = await postmaster();
    await one.stop();
    expect(await ask(two.url, 'select 1 as one')).toEqual([{ one: 1 }]);
    await two.stop();
    expect(isRunning(pid)).toBe(false);
  });

  it('end by themselves while the server runs, and leave it to the next', async () => {
    const child = startIn('');
    await ended(child);
    expect(child.exitCode).toBe(0);
    const pid = await postmaster();
    expect((await start()).created).toBe(false);
    expect(await postmaster()).toBe(pid);
  });

  it('find the server that a killed process has left, and stop it', async () => {
    const killed = await startElsewhere();
    const pid = await postmaster();
    await end(killed.child, 'SIGKILL');
    expect(isRunning(pid)).toBe(true);

    const next = await start();
    expect(next).toMatchObject({ created: false, url: killed.url });
    expect(await postmaster()).toBe(pid);
    await next.stop();
    await expect.poll(() => isRunning(pid)).toBe(false);
  });

  it('stay users of the server when their connections are cut', async () => {
    const here = await start();
    const other = await startElsewhere();
    await ask(here.url, 'select pg_terminate_backend(pid) from pg_stat_activity where pid <> pg_backend_pid()');
    await ask(here.url, holders(2));
    await other.stop();
    expect(await ask(here.url, 'select 1 as one')).toEqual([{ one: 1 }]);
  });
});

/** Waits, in the server, until that many sessions hold the lock of its users. */
function holders(count: number): string {
  return `do $$ begin
    while (select count(*) from pg_locks where locktype = 'advisory' and granted) < ${count} loop
      perform pg_sleep(0.01);
    end loop;
  end $$`;
}
