/**
 * Who a request means. It depends on the project's type: an email-based project knows users by email, a userID-based one
 * by userId, a hybrid one by both, where a request whose two identifiers stand for different users is a conflict.
 */
import { createHash } from 'node:crypto';

import type { ProjectKey } from '../../core/definition.js';
import type { Failure } from './answer.js';
import type { RawJson } from './json.js';
import type { IdentifierKind, Profile, Project, User } from './project.js';
import { userByEmail, userByUserId, visibleProfile } from './project.js';

/** The identifiers of a request as they were sent. */
export interface Identifiers {
  email: string | undefined;
  userId: string | undefined;
}

/** The user that is meant, undefined where there is none yet, with the identifiers that they are to have. */
export type Located =
  | { kind: 'located'; user: User | undefined; email: string | null; userId: string | null }
  | { kind: 'failed'; failure: Failure };

interface Wanted {
  type: ProjectKey;
  email: string | undefined;
  userId: string | undefined;
  /** From `dataFields`; null removes. */
  newEmail: string | null | undefined;
  newUserId: string | null | undefined;
}

const EMAIL =
  /^[a-z0-9!#$%&'*+/=?^_`{|}~-]+(?:\.[a-z0-9!#$%&'*+/=?^_`{|}~-]+)*@(?:[a-z0-9](?:[a-z0-9-]*[a-z0-9])?\.)+[a-z][a-z0-9-]*[a-z0-9]$/;

/** The address as Iterable keeps it, in lower case; undefined where it isn't one. */
export function normaliseEmail(text: string): string | undefined {
  const email = text.toLowerCase();
  return email.length <= 254 && email.indexOf('@') <= 64 && EMAIL.test(email) ? email : undefined;
}

/** 1 to 52 printable ASCII characters, no space at the end. */
export function isUserId(text: string): boolean {
  return /^[\x20-\x7e]{0,51}[\x21-\x7e]$/.test(text);
}

/** The address that a user without one gets in an email-based project; the same for the same userId. */
export function placeholderEmail(userId: string): string {
  return `${createHash('sha256').update(userId).digest('hex').slice(0, 32)}@placeholder.email`;
}

/** The identifier that an answer names: where both were sent, the one that identifies. */
export function identified(type: ProjectKey, { email, userId }: Identifiers): Pick<Failure, 'by' | 'value'> {
  const byEmail = email !== undefined && (type === 'email' || userId === undefined);
  return byEmail ? { by: 'email', value: email } : { by: 'userId', value: userId ?? '' };
}

/** For a write of a profile, which may create it and, through `dataFields`, change its identifiers. */
export function locateProfile(
  project: Project,
  sent: Identifiers & { fields: ReadonlyMap<string, RawJson>; preferUserId: boolean },
): Located {
  const wanted = readIdentifiers(project, sent, sent.fields);
  if ('kind' in wanted) return { kind: 'failed', failure: wanted };
  const located = locateIn(project, wanted, sent.preferUserId);
  return located.kind === 'located' && isForgotten(project, located) ? forgottenFailure(wanted) : located;
}

/** For a track call: an unknown user is refused in an email-based project and created in the others. */
export function locateForTrack(project: Project, sent: Identifiers): Located {
  const wanted = readIdentifiers(project, sent, new Map());
  if ('kind' in wanted) return { kind: 'failed', failure: wanted };
  const { email, userId, type } = wanted;
  if (type === 'user_id') return locateByUserId(project, wanted);
  const byEmail = email === undefined ? undefined : userByEmail(project, email);
  const byUserId = userId === undefined ? undefined : userByUserId(project, userId);
  const user = type === 'email' && email !== undefined ? byEmail : (byUserId ?? byEmail);
  if (type === 'hybrid' && user === undefined) {
    return { kind: 'located', user, email: email ?? null, userId: userId ?? null };
  }
  if (user === undefined || (type === 'email' && visibleProfile(project, user) === undefined)) {
    return failed('notFound', wanted, 'The user is unknown, and track creates none in an email-based project');
  }
  return { kind: 'located', user, email: user.email, userId: user.userId };
}

function locateIn(project: Project, wanted: Wanted, preferUserId: boolean): Located {
  switch (wanted.type) {
    case 'email':
      return locateByEmail(project, wanted, preferUserId);
    case 'user_id':
      return locateByUserId(project, wanted);
    case 'hybrid':
      return locateByEither(project, wanted);
  }
}

function locateByEmail(project: Project, wanted: Wanted, preferUserId: boolean): Located {
  const { email, userId, newEmail, newUserId } = wanted;
  const user = email === undefined ? userByUserId(project, userId ?? '') : userByEmail(project, email);
  if (user === undefined && email === undefined && !preferUserId) {
    return failed('notFound', wanted, 'The userId is unknown; preferUserId would create the user');
  }
  const address = email ?? user?.email ?? placeholderEmail(userId ?? '');
  if (newEmail !== undefined && newEmail !== address) {
    return failed('invalidData', wanted, 'users/updateEmail changes the email in an email-based project');
  }
  const next = newUserId === undefined ? (user?.userId ?? null) : newUserId;
  return { kind: 'located', user, email: address, userId: userId ?? next };
}

function locateByUserId(project: Project, wanted: Wanted): Located {
  const { userId, newEmail, newUserId } = wanted;
  if (userId === undefined) return failed('notFound', wanted, 'A userID-based project identifies users by userId');
  if (newUserId !== undefined && newUserId !== userId) {
    return failed('invalidData', wanted, "A userId can't be changed in a userID-based project");
  }
  const user = userByUserId(project, userId);
  return { kind: 'located', user, userId, email: newEmail === undefined ? (user?.email ?? null) : newEmail };
}

function locateByEither(project: Project, wanted: Wanted): Located {
  const { newEmail, newUserId } = wanted;
  const holder = wanted.userId === undefined ? undefined : userByUserId(project, wanted.userId);
  const owner = wanted.email === undefined ? undefined : userByEmail(project, wanted.email);
  if (holder !== undefined && owner !== undefined && holder !== owner) {
    return failed('conflict', wanted, 'The email and the userId belong to different users');
  }
  const user = holder ?? owner;
  const known = wanted.userId ?? user?.userId ?? null;
  if (known !== null && newUserId !== undefined && newUserId !== known) {
    return failed('invalidData', wanted, "A userId can't be changed in a hybrid project");
  }
  const userId = known ?? newUserId ?? null;
  const email = newEmail === undefined ? (wanted.email ?? user?.email ?? null) : newEmail;
  if (email === null && userId === null) return failed('invalidData', wanted, 'A user needs an email or a userId');
  const inTheWay = [email !== null && userByEmail(project, email), userId !== null && userByUserId(project, userId)];
  const isTaken = inTheWay.some((other) => other && other !== user);
  const isOthers = user !== undefined && user.userId !== null && user.userId !== userId;
  if (isTaken || isOthers) return failed('conflict', wanted, 'The email or the userId belongs to another user');
  return { kind: 'located', user, email, userId };
}

function readIdentifiers(project: Project, sent: Identifiers, fields: ReadonlyMap<string, RawJson>): Wanted | Failure {
  const isIgnored = project.options.projectType === 'user_id' && sent.userId !== undefined;
  const email = sent.email === undefined || isIgnored ? undefined : normaliseEmail(sent.email);
  if (sent.email !== undefined && !isIgnored && email === undefined) {
    return { kind: 'invalid', by: 'email', value: sent.email, msg: `Invalid email: ${sent.email}` };
  }
  if (sent.userId !== undefined && !isUserId(sent.userId)) {
    return { kind: 'invalid', by: 'userId', value: sent.userId, msg: `Invalid userId: ${sent.userId}` };
  }
  const type = project.options.projectType;
  const wanted: Wanted = { type, email, userId: sent.userId, newEmail: undefined, newUserId: undefined };
  for (const by of ['email', 'userId'] as const) {
    const value = fields.get(by);
    if (value === undefined) continue;
    const text = value.kind === 'null' ? null : identifierIn(by, value);
    if (text === undefined) {
      return { ...identified(type, wanted), kind: 'invalidData', msg: `The ${by} in dataFields is invalid` };
    }
    wanted[by === 'email' ? 'newEmail' : 'newUserId'] = text;
  }
  const isGone = isForgotten(project, { email: wanted.email ?? null, userId: wanted.userId ?? null });
  return isGone ? forgottenFailure(wanted).failure : wanted;
}

function identifierIn(by: IdentifierKind, value: RawJson): string | undefined {
  if (value.kind !== 'string') return undefined;
  if (by === 'email') return normaliseEmail(value.text);
  return isUserId(value.text) ? value.text : undefined;
}

function isForgotten({ forgotten }: Project, { email, userId }: Pick<Profile, 'email' | 'userId'>): boolean {
  return (email !== null && forgotten.email.has(email)) || (userId !== null && forgotten.userId.has(userId));
}

function forgottenFailure(wanted: Wanted): Located & { kind: 'failed' } {
  return failed('forgotten', wanted, 'The user has been forgotten');
}

function failed(kind: Failure['kind'], wanted: Wanted, msg: string): Located & { kind: 'failed' } {
  return { kind: 'failed', failure: { ...identified(wanted.type, wanted), kind, msg } };
}
