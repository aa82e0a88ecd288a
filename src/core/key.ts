import { refuseFieldName } from './field.js';

/**
 * The key of a definition: the name under which Iterable's users get it. It never changes, and has to be the name of a
 * field that may be written.
 */

const MAX_LENGTH = 255;

/** Lower case, spaces as underscores, characters other than a-z, 0-9 and _ dropped; empty where nothing is left. */
export function keyFromName(name: string): string {
  return name
    .trim()
    .toLowerCase()
    .replace(/\s/g, '_')
    .replace(/[^a-z0-9_]/g, '');
}

/** What is wrong with a key, to be read after the key (`is reserved …`); null where it is a good one. */
export function keyProblem(key: string): string | null {
  const refusal = refuseFieldName(key);
  if (refusal !== null) return refusal;
  if (key.length > MAX_LENGTH) return `is too long; use at most ${MAX_LENGTH} characters`;
  if (/^[a-z0-9_]+$/.test(key)) return null;
  const better = keyFromName(key);
  const instead = better === '' ? '' : `, such as \`${better}\``;
  return `has other characters than a-z, 0-9 and _; use these alone${instead}`;
}
