/**
 * Writing profiles: what users/update, users/bulkUpdate, lists/subscribe and the commerce calls have in common. A request
 * is checked whole before anything is written: first who each profile is, then every field's type.
 */
import type { Answer, Failure } from './answer.js';
import { mismatchAnswer, refusal } from './answer.js';
import type { Body } from './call.js';
import { saveTypes, saveUser } from './change.js';
import type { Draft, Mismatch } from './fields.js';
import { admitFields, exceedsFieldLimit, mergeFields, openDraft } from './fields.js';
import { identified, locateProfile } from './identity.js';
import type { RawJson } from './json.js';
import type { Project, User } from './project.js';
import { notePipeline } from './project.js';

/** One profile of a request. */
export interface ProfileRequest {
  email: string | undefined;
  userId: string | undefined;
  fields: ReadonlyMap<string, RawJson>;
  preferUserId: boolean;
  mergeNested: boolean;
}

export type Written =
  { kind: 'refused'; answer: Answer } | { kind: 'done'; users: User[]; failures: Failure[]; draft: Draft };

interface Plan {
  bulk: boolean;
  createNewFields: boolean;
  /** Whether this is users/update or users/bulkUpdate, which mustn't be mixed for one user. */
  isUpdate: boolean;
  /** Unknown users are left out and named. */
  existingOnly?: boolean;
}

export function readProfile(body: Body): ProfileRequest {
  const profile = {
    email: body.text('email'),
    userId: body.text('userId'),
    fields: body.fields('dataFields'),
    preferUserId: body.flag('preferUserId') ?? false,
    mergeNested: body.flag('mergeNestedObjects') ?? false,
  };
  if (profile.email === undefined && profile.userId === undefined) body.refuse('an email or a userId is needed');
  return profile;
}

/** Writes the profiles of one request, or none of them where the request is refused whole. */
export function writeProfiles(project: Project, requests: readonly ProfileRequest[], plan: Plan): Written {
  const draft = openDraft('user', project.userSchema, plan.createNewFields);
  const failures: Failure[] = [];
  const passed: { request: ProfileRequest; fields: ReadonlyMap<string, RawJson> }[] = [];
  for (const request of requests) {
    const checked = checkProfile(project, request, draft, plan);
    if ('failure' in checked) failures.push(checked.failure);
    else passed.push({ request, fields: checked.fields });
  }
  if (draft.mismatches.size > 0) return { kind: 'refused', answer: mismatchAnswer(draft) };
  if (exceedsFieldLimit(draft)) {
    const answer = refusal(400, 'UniqueFieldsLimitExceeded', 'The project would have more than 1,000 user fields');
    return { kind: 'refused', answer };
  }

  saveTypes(project, null, draft.added);
  const users: User[] = [];
  const seen = new Set<User>();
  for (const { request, fields } of passed) {
    const located = locateProfile(project, request);
    if (located.kind === 'failed') {
      failures.push(located.failure);
      continue;
    }
    const { user, email, userId } = located;
    const merged = mergeFields(user?.fields ?? '{}', fields, request.mergeNested);
    const written = saveUser(project, user, { email, userId, fields: merged });
    if (seen.has(written)) project.violations.duplicateInBatch++;
    seen.add(written);
    if (plan.isUpdate) notePipeline(project, written, 'lastUpdate', plan.bulk);
    users.push(written);
  }
  return { kind: 'done', users, failures, draft };
}

function checkProfile(
  project: Project,
  request: ProfileRequest,
  draft: Draft,
  plan: Plan,
): { failure: Failure } | { fields: ReadonlyMap<string, RawJson> } {
  const located = locateProfile(project, request);
  if (located.kind === 'failed') return located;
  const named = identified(project.options.projectType, { ...request, email: request.email?.toLowerCase() });
  if (plan.existingOnly === true && located.user === undefined) {
    return { failure: { ...named, kind: 'notFound', msg: 'The user is unknown' } };
  }
  const own =
    project.options.bulkMismatch === 'invalidData' && plan.bulk
      ? { ...draft, mismatches: new Map<string, Mismatch>() }
      : draft;
  const admitted = admitFields(own, withoutIdentifiers(request.fields));
  if (admitted.kind === 'invalid') {
    return { failure: { ...named, kind: 'invalidData', code: admitted.code, msg: admitted.msg } };
  }
  if (own !== draft && own.mismatches.size > 0) {
    return { failure: { ...named, kind: 'invalidData', msg: 'The data types are not those of the data sent before' } };
  }
  return { fields: admitted.fields };
}

function withoutIdentifiers(fields: ReadonlyMap<string, RawJson>): ReadonlyMap<string, RawJson> {
  if (!fields.has('email') && !fields.has('userId')) return fields;
  return new Map([...fields].filter(([name]) => name !== 'email' && name !== 'userId'));
}
