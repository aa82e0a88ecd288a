import type { Definition } from '../core/definition.js';
import type { Client, Pool } from '../db/connect.js';
import { openSession, type Session } from '../db/session.js';
import { evaluateBatch, type BatchOptions, type BatchResult } from '../sync/batch.js';
import type { CompareContext } from '../sync/comparison.js';
import { openBatchSession } from '../sync/evaluation.js';

/** Connections that evaluate batches, one after the other, for as long as they live. */
export interface Worker {
  /** Throws what the databases throw; nothing has been written then. */
  evaluate: (definition: Definition, definitionId: number, options: BatchOptions) => Promise<BatchResult>;
  /** Whether it can still be used: its connections stand, and the configuration is that for which it was opened. */
  isOpen: () => boolean;
  close: () => void;
}

/** A run that applies very much holds the definition's lock for long: waiting for it is no fault of the statement's. */
const LOCK_MS = 5_000;
const prepare = (client: Client): Promise<unknown> => client.query(`set lock_timeout = ${LOCK_MS}`);

/** Opens a worker; `context` gives the same object for as long as nothing of it has changed. */
export async function openWorker(context: () => CompareContext): Promise<Worker> {
  const opened = context();
  const { direct, state, same } = opened.databases;
  const sessions: Session[] = [];
  const close = (): void => {
    for (const session of sessions) session.close();
  };
  const open = async (pool: Pool): Promise<Client> => {
    const session = await openSession(pool, prepare);
    sessions.push(session);
    return session.client;
  };
  try {
    const client = await open(same ? direct : state.pool);
    const batches = await openBatchSession(opened, client, same ? null : await open(direct));
    return {
      evaluate: (definition, definitionId, options) => evaluateBatch(batches, definition, definitionId, options),
      isOpen: () => context() === opened && sessions.every((session) => session.isOpen()),
      close,
    };
  } catch (error) {
    close();
    throw error;
  }
}
