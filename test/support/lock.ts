import { lockDefinition } from '../../src/db/locks.js';
import type { Client, Pool } from '../../src/db/connect.js';

/** Holds the lock of the one definition that there is, in a transaction of its own, so that a run waits before it applies. */
export async function holdDefinition(pool: Pool): Promise<{ client: Client; release: () => Promise<void> }> {
  const client = await pool.connect();
  await client.query('begin');
  const { rows } = await client.query<{ id: number }>('select id from definition');
  await lockDefinition(client, rows[0]?.id ?? 0);
  return {
    client,
    release: async () => {
      await client.query('commit');
      client.release();
    },
  };
}
