import type { Definition } from '../core/definition.js';

/** What became of a batch: `evaluateBatch` of sync/batch.ts. */
export type BatchResult =
  | { kind: 'nothing' }
  | { kind: 'waits'; because: string }
  | { kind: 'holds'; because: string }
  | { kind: 'written'; profiles: number; changed: number; more: boolean };

/** A connection that evaluates batches, one at a time, for as long as it lives. */
export interface Worker {
  /** Evaluates what is due, `limit` rows at most, or those of these rows that are. Throws what the database throws. */
  evaluate: (
    definition: Definition,
    definitionId: number,
    options: { limit: number; only?: readonly number[] },
  ) => Promise<BatchResult>;
  isOpen: () => boolean;
  close: () => void;
}
