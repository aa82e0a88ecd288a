/**
 * One PostgreSQL server in one place: made, found, launched, stopped. The data lies in `data`, beside it the superuser's
 * `password` (mode 0600), the `port` that is taken again while it is free, and `server.log`. It listens on 127.0.0.1
 * only. Nothing here is safe from several processes: the caller holds the lock of the place's directory.
 */
import { execFile, spawn } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { mkdir, open, readFile, rename, rm, stat, statfs, writeFile, type FileHandle } from 'node:fs/promises';
import { createServer, Socket } from 'node:net';
import { join, resolve } from 'node:path';
import { setTimeout as wait } from 'node:timers/promises';
import { promisify } from 'node:util';
import pg from 'pg';
import { OperatorError, UnavailableError } from '../lib/errors.js';
import { asUser, giveTo, ignoreMissing, type Place } from './place.js';

export interface Connection {
  url: string;
  client: pg.Client;
  socket: Socket;
}

/** What came of an attempt to connect; `absent`: our server doesn't listen there. */
export type Answer = { kind: 'open'; connection: Connection } | { kind: 'starting' } | { kind: 'absent' };

/** Not the name of the state's schema, which would come first in its search_path. */
const ROLE = 'postgres';
const PAUSE_MS = 15;
/** How long a server that was killed may take to let go of what it held. */
const STALE_MS = 5_000;
/** How long a server may take to recover, or to stop. */
const PATIENCE_MS = 60_000;
/** SQLSTATE of a server that is starting, recovering or stopping. */
const CANNOT_CONNECT_NOW = '57P03';

/** The server that is running in the place, once it answers; null where there is none. */
export async function findServer(place: Place): Promise<Connection | null> {
  const begun = performance.now();
  for (;;) {
    const file = await readPidFile(place);
    if (file === null || !isAlive(file.pid)) return null;
    const answer = await tryToConnect(place, file.port);
    if (answer.kind === 'open') return answer.connection;
    const waited = performance.now() - begun;
    if (answer.kind === 'absent' && waited > STALE_MS) {
      // The machine was restarted, or the container: another program has the number that the server had. PostgreSQL
      // couldn't know, and would refuse to start.
      await rm(join(place.home, 'data', 'postmaster.pid'), { force: true });
      return null;
    }
    if (waited > PATIENCE_MS) throw await notYet(place);
    await wait(PAUSE_MS);
  }
}

/** Makes data and password where there are none; complete, or not at all. */
export async function createData(place: Place, programs: string): Promise<boolean> {
  const data = join(place.home, 'data');
  if ((await stat(data).catch(ignoreMissing)) !== undefined) return false;

  const unfinished = join(place.home, 'data.new');
  await rm(unfinished, { recursive: true, force: true });
  await mkdir(unfinished, { mode: 0o700 });
  const password = join(place.home, 'password');
  await rm(password, { force: true });
  await writeFile(password, randomBytes(24).toString('base64url'), { mode: 0o600, flag: 'wx' });
  for (const path of [unfinished, password]) await giveTo(place.user, path);
  const args = ['-D', unfinished, '--locale=C', '--encoding=UTF8', '--no-sync', '--no-instructions'];
  args.push(`--username=${ROLE}`, `--pwfile=${password}`, '--auth=scram-sha-256');
  try {
    await promisify(execFile)(join(programs, 'initdb'), args, asUser(place));
  } catch (error) {
    const said = error instanceof Error && 'stderr' in error ? String(error.stderr) : '';
    throw new OperatorError(`initdb could not make the embedded PostgreSQL in ${place.home}:\n${lastLines(said)}`, {
      cause: error,
    });
  }
  await rename(unfinished, data);
  return true;
}

/** What initdb left to the operating system goes to the disk while the server is in use already: half a second less. */
export function flushInBackground(place: Place, programs: string): void {
  const args = ['--sync-only', '-D', join(place.home, 'data')];
  const child = spawn(join(programs, 'initdb'), args, { ...asUser(place), detached: true, stdio: 'ignore' });
  child.on('error', () => undefined); // the next checkpoints and the operating system do the same, later
  child.unref();
}

/** Starts the server of a place that has data and, as far as `findServer` could see, no server. */
export async function launch(place: Place, programs: string): Promise<Connection> {
  const begun = performance.now();
  for (;;) {
    const port = await choosePort(place);
    const isLeftOver = (await readPidFile(place)) !== null;
    const log = await openLog(place);
    const failureOf = await spawnServer(place, programs, port, log.file);
    const connection = await firstAnswer(place, port, failureOf);
    if (connection !== null) {
      await writeFile(join(place.home, 'port'), `${port}\n`);
      return connection;
    }
    // Two reasons pass: another program took the port in between, or processes of a killed server still hold its
    // memory, which they notice within seconds.
    const mayPass = isLeftOver || !(await isFree(port));
    if (!mayPass || performance.now() - begun > STALE_MS) {
      const said = (await readFile(join(place.home, 'server.log'), 'utf8')).slice(log.size);
      throw new OperatorError(
        `The embedded PostgreSQL in ${place.home} doesn't start (${failureOf() ?? 'no reason'}):\n${lastLines(said)}`,
      );
    }
    await wait(PAUSE_MS * 4);
  }
}

/** The connection to a server that was just launched; null if that has ended. */
async function firstAnswer(place: Place, port: number, failureOf: () => string | null): Promise<Connection | null> {
  const begun = performance.now();
  while (failureOf() === null) {
    const answer = await tryToConnect(place, port);
    if (answer.kind === 'open') return answer.connection;
    if (performance.now() - begun > PATIENCE_MS) throw await notYet(place);
    await wait(PAUSE_MS);
  }
  return null;
}

/** Returns a function that says why the server has ended; null while it runs. */
async function spawnServer(
  place: Place,
  programs: string,
  port: number,
  log: FileHandle,
): Promise<() => string | null> {
  const data = join(place.home, 'data');
  const settings = (await serverSettings(port)).flatMap((setting) => ['-c', setting]);
  // On Windows it is pg_ctl that takes an administrator's rights away, with which the server refuses to run. It ends
  // with 0 as soon as the server answers.
  const isWindows = process.platform === 'win32';
  const [program, args] = isWindows
    ? ['pg_ctl', ['start', '-w', '-D', data, '-l', join(place.home, 'server.log'), '-o', settings.join(' ')]]
    : ['postgres', ['-D', data, ...settings]];
  const output = isWindows ? 'ignore' : log.fd;
  const child = spawn(join(programs, program), args, {
    ...asUser(place),
    detached: true,
    windowsHide: true,
    stdio: ['ignore', output, output],
  });
  let failure: string | null = null;
  child.once('error', (error) => (failure = error.message));
  child.once('exit', (code, signal) => {
    if (!isWindows || code !== 0) failure ??= signal ?? `exit code ${code ?? 0}`;
  });
  child.unref();
  await log.close();
  return () => failure;
}

/**
 * For a small machine, and durable. Nothing but the server's own life is logged: statements and the details of errors
 * hold people's data.
 */
async function serverSettings(port: number): Promise<string[]> {
  const settings = [
    'listen_addresses=127.0.0.1',
    `port=${port}`,
    'unix_socket_directories=',
    'max_connections=150',
    'wal_level=minimal',
    'max_wal_senders=0',
    'max_wal_size=512MB',
    'jit=off',
    'timezone=UTC',
    'log_timezone=UTC',
    'log_min_messages=log',
    'log_checkpoints=off',
  ];
  // Containers have 64 MB there, which a parallel hash join outgrows.
  const sharedMemory = process.platform === 'linux' ? await statfs('/dev/shm').catch(ignoreMissing) : undefined;
  const isSmall = sharedMemory !== undefined && sharedMemory.bsize * sharedMemory.blocks < 2 ** 30;
  return isSmall ? [...settings, 'dynamic_shared_memory_type=sysv'] : settings;
}

/** A fast shutdown: open transactions are rolled back, what was committed is on the disk. */
export async function shutDown(place: Place, programs: string): Promise<void> {
  const file = await readPidFile(place);
  if (file === null) return;
  const args = ['stop', '-m', 'fast', '-W', '-D', join(place.home, 'data')];
  await promisify(execFile)(join(programs, 'pg_ctl'), args, asUser(place));
  const begun = performance.now();
  while (isAlive(file.pid) && (await readPidFile(place))?.pid === file.pid) {
    if (performance.now() - begun > PATIENCE_MS) {
      throw new UnavailableError(`The embedded PostgreSQL in ${place.home} is still stopping after a minute.`);
    }
    await wait(PAUSE_MS);
  }
}

export async function tryToConnect(place: Place, port: number): Promise<Answer> {
  const url = `postgresql://${ROLE}:${await readPassword(place)}@127.0.0.1:${port}/postgres?sslmode=disable`;
  const socket = new Socket();
  const client = new pg.Client({
    connectionString: url,
    application_name: 'personas-sync embedded',
    connectionTimeoutMillis: 2_000,
    stream: () => socket,
  });
  client.on('error', () => undefined); // a cut connection also ends, which is what `enter` waits for
  try {
    await client.connect();
    const { rows } = await client.query<{ data: string }>(`select current_setting('data_directory') as data`);
    if (rows[0] !== undefined && resolve(rows[0].data) === join(place.home, 'data'))
      return { kind: 'open', connection: { url, client, socket } };
    await client.end();
    return { kind: 'absent' };
  } catch (error) {
    socket.destroy();
    if (!(error instanceof pg.DatabaseError)) return { kind: isRefusal(error) ? 'absent' : 'starting' };
    if (error.code === CANNOT_CONNECT_NOW) return { kind: 'starting' };
    throw new UnavailableError(
      `The embedded PostgreSQL in ${place.home} admits no connection (SQLSTATE ${error.code ?? 'unknown'}).`,
      { cause: error },
    );
  }
}

function isRefusal(error: unknown): boolean {
  return error instanceof Error && 'code' in error && error.code === 'ECONNREFUSED';
}

async function readPassword({ home }: Place): Promise<string> {
  const password = await readFile(join(home, 'password'), 'utf8').catch(ignoreMissing);
  if (password !== undefined) return password.trim();
  throw new OperatorError(
    `The password of the embedded PostgreSQL is gone: ${join(home, 'password')}. Put the file back, or delete ${home} ` +
      `to begin with an empty database.`,
  );
}

// Files, ports and processes.

/** The server's own note of who it is; its first line is the process, its fourth the port. */
async function readPidFile({ home }: Place): Promise<{ pid: number; port: number } | null> {
  const text = await readFile(join(home, 'data', 'postmaster.pid'), 'utf8').catch(ignoreMissing);
  const lines = text?.split('\n') ?? [];
  const pid = Number(lines[0]);
  return pid > 0 ? { pid, port: Number(lines[3] ?? 0) } : null;
}

export function isAlive(pid: number): boolean {
  try {
    return process.kill(pid, 0);
  } catch (error) {
    return error instanceof Error && 'code' in error && error.code === 'EPERM';
  }
}

async function choosePort({ home }: Place): Promise<number> {
  const remembered = Number(await readFile(join(home, 'port'), 'utf8').catch(ignoreMissing));
  if (remembered > 0 && (await isFree(remembered))) return remembered;
  return listenOn(0);
}

async function isFree(port: number): Promise<boolean> {
  return listenOn(port).then(
    () => true,
    () => false,
  );
}

async function listenOn(port: number): Promise<number> {
  const server = createServer();
  return new Promise((resolve, reject) => {
    server.once('error', reject);
    server.listen(port, '127.0.0.1', () => {
      const address = server.address();
      server.close(() => resolve(typeof address === 'object' && address !== null ? address.port : port));
    });
  });
}

/** The log goes on from start to start, until it has grown to a megabyte. `size` is where what is new begins. */
async function openLog({ home }: Place): Promise<{ file: FileHandle; size: number }> {
  const path = join(home, 'server.log');
  const before = (await stat(path).catch(ignoreMissing))?.size ?? 0;
  const size = before < 2 ** 20 ? before : 0;
  return { file: await open(path, size === before ? 'a' : 'w', 0o600), size };
}

async function notYet(place: Place): Promise<UnavailableError> {
  const said = (await readFile(join(place.home, 'server.log'), 'utf8').catch(ignoreMissing)) ?? '';
  return new UnavailableError(
    `The embedded PostgreSQL in ${place.home} is not ready after a minute:\n${lastLines(said)}`,
  );
}

function lastLines(text: string): string {
  return text.trim().split('\n').slice(-8).join('\n');
}
