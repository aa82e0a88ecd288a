/**
 * The types that Iterable gives to a field, for ever, by the first value that it sees
 * (https://support.iterable.com/hc/en-us/articles/208183076).
 */
export type FieldType = 'string' | 'long' | 'double' | 'boolean' | 'date' | 'object';

/**
 * Names that Iterable fills or reads itself; writing one would change who a user is or what they are subscribed to.
 * Compared without regard to case.
 */
const RESERVED = new Set(
  [
    'email',
    'userId',
    'itblInternal',
    'itblDS',
    'itblUserId',
    'profileUpdatedAt',
    'signupSource',
    'devices',
    'browserTokens',
    'emailListIds',
    'userListIds',
    'unsubscribedChannelIds',
    'unsubscribedMessageTypeIds',
    'subscribedMessageTypeIds',
  ].map((name) => name.toLowerCase()),
);

/** Why a field must not have this name, as the end of a sentence; null where it may. */
export function refuseFieldName(name: string): string | null {
  if (name === '') return 'is empty';
  if (RESERVED.has(name.toLowerCase())) return 'is reserved by Iterable; choose another name';
  if (name.includes('.')) return 'has a dot, which addresses a nested field in Iterable; use an underscore';
  return null;
}
