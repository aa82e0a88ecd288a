import type { Definition } from '../core/definition.js';
import type { BatchOptions, BatchResult } from '../sync/batch.js';

/** A connection that evaluates batches, one at a time, for as long as it lives. */
export interface Worker {
  /** Evaluates what is due, `limit` rows at most, or those of these rows that are. Throws what the database throws. */
  evaluate: (definition: Definition, definitionId: number, options: BatchOptions) => Promise<BatchResult>;
  isOpen: () => boolean;
  close: () => void;
}
