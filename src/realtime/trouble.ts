import { databaseFailure, isUnreachable } from '../db/failure.js';
import { OperatorError } from '../lib/errors.js';

/** What to do about a batch that failed: nothing of it was written. */
export type Trouble =
  /** Time mends it: the same again, in another session where this one may be broken. */
  | { kind: 'again'; isLost: boolean }
  /** It took longer than it may: again with fewer. */
  | { kind: 'slow' }
  /** Something in somebody's rows: the others are evaluated without them. */
  | { kind: 'data'; sentence: string }
  /** It fails for everybody, and a person has to know. `cause`: nobody had thought of it. */
  | { kind: 'stuck'; sentence: string; cause: unknown };

const PASSING = new Set(['40001', '40P01', '55P03']);
const CANCELLED = '57014';
/** By class: data exceptions, more than one row where one is expected. */
const DATA_CLASSES = new Set(['22', '21']);
/** A function's own refusal; too deep for this row. */
const DATA = new Set(['P0001', '54001']);

/** SQLSTATE decides. `raise exception` in a function is taken for something about the row at hand. */
export function judgeTrouble(error: unknown): Trouble {
  if (isUnreachable(error)) return { kind: 'again', isLost: true };
  if (error instanceof OperatorError) return { kind: 'stuck', sentence: error.message, cause: null };
  const failure = databaseFailure(error);
  if (failure === null) {
    const name = error instanceof Error ? error.name : 'unknown';
    const sentence = `An error in personas-sync itself (${name}); the log has its trace.`;
    return { kind: 'stuck', sentence, cause: error };
  }
  const { sqlstate } = failure;
  if (PASSING.has(sqlstate)) return { kind: 'again', isLost: false };
  if (sqlstate === CANCELLED) return { kind: 'slow' };
  const sentence = `Evaluating what has changed ${failure.sentence}.`;
  if (DATA_CLASSES.has(sqlstate.slice(0, 2)) || DATA.has(sqlstate)) return { kind: 'data', sentence };
  return { kind: 'stuck', sentence, cause: null };
}
