/** The users' endpoints: update, bulkUpdate, updateEmail, delete, forget, and the reads. */
import type { Answer } from './answer.js';
import { badParams, bulkAnswer, failureAnswer, json, refusal, success } from './answer.js';
import type { Call } from './call.js';
import { commit, removeUser, saveUser } from './change.js';
import { fieldsOf } from './fields.js';
import { isUserId, normaliseEmail, placeholderEmail } from './identity.js';
import type { RawJson } from './json.js';
import { rawObject, rawString } from './json.js';
import type { Profile, Project, User } from './project.js';
import { userByEmail, userByUserId, visibleProfile } from './project.js';
import { readProfile, writeProfiles } from './profiles.js';

export function updateUser(project: Project, { body }: Call): Answer {
  const request = readProfile(body);
  const createNewFields = body.flag('createNewFields') ?? true;
  const problem = body.problem();
  if (problem !== undefined) return badParams(problem);
  const written = writeProfiles(project, [request], { bulk: false, isUpdate: true, createNewFields });
  if (written.kind === 'refused') return written.answer;
  const [failure] = written.failures;
  return failure === undefined ? success() : failureAnswer(project, failure);
}

export function bulkUpdateUsers(project: Project, { body }: Call): Answer {
  const requests = body.objects('users')?.map(readProfile);
  const createNewFields = body.flag('createNewFields') ?? true;
  if (requests === undefined) body.refuse("'users' is needed");
  const problem = body.problem();
  if (problem !== undefined || requests === undefined) return badParams(problem ?? '');
  if (requests.length > project.options.maxBatch) return refusal(400, 'BatchTooLarge', 'Too many users in one request');
  const written = writeProfiles(project, requests, { bulk: true, isUpdate: true, createNewFields });
  if (written.kind === 'refused') return written.answer;
  const { users, failures, draft } = written;
  return profilesAnswer(users.length, failures, draft);
}

/** The answer of bulkUpdate, lists/subscribe and lists/unsubscribe. */
export function profilesAnswer(
  successCount: number,
  failures: Parameters<typeof bulkAnswer>[1],
  draft?: Parameters<typeof bulkAnswer>[2]['draft'],
): Answer {
  const kinds = ['invalid', 'notFound', 'invalidData', 'conflict', 'forgotten'] as const;
  return bulkAnswer(kinds, failures, { successCount, draft });
}

export function updateEmail(project: Project, { body }: Call): Answer {
  const currentEmail = body.text('currentEmail')?.toLowerCase();
  const currentUserId = body.text('currentUserId');
  const sent = body.text('newEmail');
  const problem = body.problem();
  if (problem !== undefined || sent === undefined) return badParams(problem ?? "'newEmail' is needed");
  if (project.options.projectType !== 'email') {
    return badParams('Only an email-based project has this call; in others users/update takes dataFields.email');
  }
  const newEmail = normaliseEmail(sent);
  if (newEmail === undefined) return refusal(400, 'InvalidEmailAddressError', `Invalid email: ${sent}`);
  if (project.forgotten.email.has(newEmail)) {
    return refusal(project.options.forgottenStatus, 'ForgottenUserError', 'The user has been forgotten');
  }
  const user = findUser(project, currentEmail, currentUserId);
  if (user === undefined) return badParams(`Cannot change to ${newEmail}. User does not exist`);
  if (user.email === newEmail) return success();
  if (userByEmail(project, newEmail) !== undefined) {
    return refusal(400, 'EmailAlreadyExists', `${newEmail} belongs to another user`);
  }
  saveUser(project, user, { ...user, email: newEmail });
  return success();
}

/** An unknown email is no error, an unknown userId is one. */
export function deleteByEmail(project: Project, { argument }: Call): Answer {
  const user = userByEmail(project, argument.toLowerCase());
  if (user !== undefined) removeUser(project, user);
  return success();
}

export function deleteByUserId(project: Project, { argument }: Call): Answer {
  if (userByUserId(project, argument) === undefined) return badParams('User does not exist');
  for (let user = userByUserId(project, argument); user !== undefined; user = userByUserId(project, argument)) {
    removeUser(project, user);
  }
  return success();
}

export function forget(project: Project, { body }: Call): Answer {
  const email = body.text('email')?.toLowerCase();
  const userId = body.text('userId');
  const problem = body.problem();
  if (problem !== undefined) return badParams(problem);
  const user = findUser(project, email, userId);
  if (user === undefined) return refusal(400, 'GenericError', 'User does not exist');
  forgetUser(project, user);
  return success();
}

/** Deletes a user and refuses their identifiers from then on: those that are unique in a project of this type. */
export function forgetUser(project: Project, user: Pick<Profile, 'email' | 'userId'> | User): void {
  const { projectType } = project.options;
  const { userId } = user;
  const email = user.email ?? (projectType === 'email' && userId !== null ? placeholderEmail(userId) : null);
  if (email !== null && projectType !== 'user_id') commit(project, ['forgotten', 'email', email]);
  if (userId !== null && projectType !== 'email') commit(project, ['forgotten', 'userId', userId]);
  if ('id' in user) removeUser(project, user);
}

export function getByEmail(project: Project, { argument, query }: Call): Answer {
  const email = argument || (query.get('email') ?? '');
  if (normaliseEmail(email) === undefined) return refusal(400, 'InvalidEmailAddressError', `Invalid email: ${email}`);
  return userAnswer(project, userByEmail(project, email.toLowerCase()));
}

export function getByUserId(project: Project, { argument, query }: Call): Answer {
  const userId = argument || (query.get('userId') ?? '');
  if (!isUserId(userId)) return refusal(400, 'InvalidUserIdError', `Invalid userId: ${userId}`);
  return userAnswer(project, userByUserId(project, userId));
}

export function getFields(project: Project): Answer {
  return json({ fields: Object.fromEntries(project.userSchema) });
}

/** The user that an email or a userId belongs to; where the two disagree, the one that identifies in the project. */
export function findUser(project: Project, email: string | undefined, userId: string | undefined): User | undefined {
  const byEmail = email === undefined ? undefined : userByEmail(project, email);
  const byUserId = userId === undefined ? undefined : userByUserId(project, userId);
  return project.options.projectType === 'email' ? (byEmail ?? byUserId) : (byUserId ?? byEmail);
}

/** Seconds since 1970 as Iterable writes a date. */
export function dateText(seconds: number): string {
  return `${new Date(seconds * 1000).toISOString().slice(0, 19).replace('T', ' ')} +00:00`;
}

/** A user who isn't there, or not yet, is an empty object. */
function userAnswer(project: Project, user: User | undefined): Answer {
  const profile = user && visibleProfile(project, user);
  if (user === undefined || profile === undefined) return json({});
  const { email, userId } = profile;
  const members = new Map<string, RawJson>([
    ['signupDate', rawString(dateText(user.createdAt))],
    ['signupSource', rawString('API')],
    ['profileUpdatedAt', rawString(dateText(user.updatedAt))],
    ...fieldsOf(profile.fields),
  ]);
  const lists = [...project.lists.values()].filter((list) => list.members.has(user));
  if (lists.length > 0) members.set('emailListIds', { kind: 'number', raw: JSON.stringify(lists.map(({ id }) => id)) });
  if (email !== null) members.set('email', rawString(email));
  if (userId !== null) members.set('userId', rawString(userId));
  const known = userId === null ? '' : `,"userId":${JSON.stringify(userId)}`;
  return {
    status: 200,
    text: `{"user":{"email":${JSON.stringify(email ?? '')}${known},"dataFields":${rawObject(members).raw}}}`,
  };
}
