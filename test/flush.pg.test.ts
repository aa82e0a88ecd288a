import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { openPool, type Pool } from '../src/db/connect.js';
import { createFlush } from '../src/db/flush.js';
import { Secret } from '../src/lib/secret.js';
import { startOwnServer, type OwnServer } from './support/server.js';

let server: OwnServer;
let state: Pool;

beforeAll(async () => {
  server = await startOwnServer();
  state = openPool({
    url: new Secret(server.url),
    purpose: 'state',
    max: 4,
    schema: 'public',
    onError: () => undefined,
  });
  // Nothing comes to be on disk by itself.
  await state.query(`alter system set wal_writer_delay = '10s'`);
  await state.query('select pg_reload_conf()');
  await state.query('create table told (what text)');
});

afterAll(async () => {
  await state.end();
  await server.stop();
});

/** Commits without waiting for the disk; the end of the log then. */
async function commit(what: string): Promise<string> {
  await state.query(`begin; set local synchronous_commit = off; insert into told values ('${what}'); commit`);
  const { rows } = await state.query<{ at: string }>('select pg_current_wal_insert_lsn()::text as at');
  return rows[0]?.at ?? '';
}

const isOnDisk = async (at: string): Promise<boolean> =>
  (await state.query<{ is: boolean }>('select pg_current_wal_flush_lsn() >= $1::pg_lsn as is', [at])).rows[0]?.is ===
  true;

describe('what was committed without waiting for the disk', () => {
  it('is there once it has been waited for', async () => {
    const flush = createFlush(state);
    const at = await commit('one');
    expect(await isOnDisk(at)).toBe(false);
    await flush();
    expect(await isOnDisk(at)).toBe(true);
  });

  it('is there for each of several who wait at once, also where a flush had begun before', async () => {
    const flush = createFlush(state);
    const begun = flush();
    const at = await commit('two');
    const waits = [flush(), flush()];
    await begun;
    await Promise.all(waits);
    expect(await isOnDisk(at)).toBe(true);
  });

  it('is there where the session that waits for it commits without waiting, too', async () => {
    const lent = openPool({ url: new Secret(server.url), purpose: 'state', max: 1, onError: () => undefined });
    await lent.query('set synchronous_commit = off');
    const at = await commit('lent');
    await createFlush(lent)();
    expect(await isOnDisk(at)).toBe(true);
    await lent.end();
  });

  it('survives a crash of the server from then on', async () => {
    await commit('three');
    await createFlush(state)();
    await server.crash();
    expect((await state.query('select what from told order by what')).rows).toContainEqual({ what: 'three' });
  });
});

it('where nothing can be flushed, each who waits is told, and nobody waits for ever', async () => {
  const away = openPool({
    url: new Secret('postgres://127.0.0.1:1/none'),
    purpose: 'state',
    max: 1,
    onError: () => undefined,
  });
  const flush = createFlush(away);
  const waits = await Promise.allSettled([flush(), flush(), flush()]);
  expect(waits.map(({ status }) => status)).toEqual(['rejected', 'rejected', 'rejected']);
  await expect(flush()).rejects.toThrow();
  await away.end();
});
