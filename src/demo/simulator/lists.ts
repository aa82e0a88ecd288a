/** The lists' endpoints. A subscription creates unknown users, an unsubscription names them. */
import type { Answer, Failure } from './answer.js';
import { badParams, json, refusal, success } from './answer.js';
import type { Body, Call } from './call.js';
import { commit, saveUser } from './change.js';
import { mergeFields } from './fields.js';
import { identified, isUserId, normaliseEmail } from './identity.js';
import type { RawJson } from './json.js';
import type { List, Project, User } from './project.js';
import { readProfile, writeProfiles } from './profiles.js';
import { findUser, profilesAnswer } from './users.js';

const ALL_CHANNELS = 1;

export function getLists(project: Project): Answer {
  const lists = [...project.lists.values()].reverse().map(({ id, name, description, createdAt }) => {
    return { id, name, ...(description !== null && { description }), createdAt, listType: 'Standard' };
  });
  return json({ lists });
}

export function createList(project: Project, { body }: Call): Answer {
  const name = body.text('name');
  const description = body.text('description') ?? null;
  const problem = body.problem();
  if (problem !== undefined || name === undefined || name === '') return badParams(problem ?? "'name' is needed");
  const listId = project.lastListId + 1;
  commit(project, ['list', listId, name, description, Date.now()]);
  return json({ listId });
}

export function deleteList(project: Project, { argument }: Call): Answer {
  const list = findList(project, argument);
  if ('status' in list) return list;
  commit(project, ['unlist', list.id]);
  return success(`List ${list.id} was deleted.`);
}

export function subscribe(project: Project, { body }: Call): Answer {
  const request = readSubscribers(project, body);
  const existingOnly = body.flag('updateExistingUsersOnly') ?? false;
  const problem = body.problem();
  if (problem !== undefined) return badParams(problem);
  if ('status' in request) return request;
  const { list, subscribers } = request;
  const plan = { bulk: true, isUpdate: false, createNewFields: true, existingOnly };
  const written = writeProfiles(project, subscribers, plan);
  if (written.kind === 'refused') return written.answer;
  for (const user of written.users) {
    if (!list.members.has(user)) commit(project, ['member', list.id, user.id, true]);
  }
  return profilesAnswer(written.users.length, written.failures, written.draft);
}

export function unsubscribe(project: Project, { body }: Call): Answer {
  const request = readSubscribers(project, body);
  const everywhere = body.flag('channelUnsubscribe') ?? false;
  const problem = body.problem();
  if (problem !== undefined) return badParams(problem);
  if ('status' in request) return request;
  const failures: Failure[] = [];
  let successCount = 0;
  for (const sent of request.subscribers) {
    const failure = nameFailure(project, sent);
    const user = failure === undefined ? findUser(project, sent.email?.toLowerCase(), sent.userId) : undefined;
    if (user === undefined) {
      failures.push(failure ?? { ...identified(project.options.projectType, sent), kind: 'notFound', msg: '' });
      continue;
    }
    leave(project, user, everywhere ? [...project.lists.values()] : [request.list]);
    if (everywhere) unsubscribeEverywhere(project, user);
    successCount++;
  }
  return profilesAnswer(successCount, failures);
}

/** One identifier a line: the email where there is one, unless userIds are preferred. */
export function getListUsers(project: Project, { query }: Call): Answer {
  const list = findList(project, query.get('listId') ?? '');
  if ('status' in list) return list;
  const most = Number(query.get('maxResults') ?? Infinity);
  const preferUserId = query.get('preferUserId') === 'true';
  const names: string[] = [];
  for (const { email, userId } of list.members) {
    if (names.length >= most) break;
    names.push((preferUserId ? (userId ?? email) : (email ?? userId)) ?? '');
  }
  return { status: 200, text: names.map((name) => `${name}\n`).join(''), contentType: 'text/plain' };
}

export function getListSize(project: Project, { argument }: Call): Answer {
  const list = findList(project, argument);
  if ('status' in list) return list;
  return { status: 200, text: String(list.members.size), contentType: 'text/plain' };
}

function readSubscribers(
  project: Project,
  body: Body,
): Answer | { list: List; subscribers: ReturnType<typeof readProfile>[] } {
  const listId = body.whole('listId');
  const subscribers = body.objects('subscribers')?.map(readProfile);
  if (listId === undefined || subscribers === undefined) return badParams("'listId' and 'subscribers' are needed");
  if (subscribers.length > project.options.maxBatch) return refusal(400, 'BatchTooLarge', 'Too many subscribers');
  const list = findList(project, String(listId));
  return 'status' in list ? list : { list, subscribers };
}

function findList(project: Project, id: string): List | Answer {
  const list = /^\d{1,15}$/.test(id) ? project.lists.get(Number(id)) : undefined;
  return list ?? refusal(404, 'NotFound', `error.lists.invalidListId(${id})`, { listId: Number(id) || null });
}

function nameFailure({ options }: Project, { email, userId }: ReturnType<typeof readProfile>): Failure | undefined {
  if (email !== undefined && normaliseEmail(email) === undefined && !(options.projectType === 'user_id' && userId)) {
    return { kind: 'invalid', by: 'email', value: email, msg: 'Invalid email' };
  }
  if (userId === undefined || isUserId(userId)) return undefined;
  return { kind: 'invalid', by: 'userId', value: userId, msg: 'Invalid userId' };
}

function leave(project: Project, user: User, lists: readonly List[]): void {
  for (const { id, members } of lists) if (members.has(user)) commit(project, ['member', id, user.id, false]);
}

/** What `channelUnsubscribe: true` comes to: no marketing message reaches the user any more. */
function unsubscribeEverywhere(project: Project, user: User): void {
  const channels: RawJson = { kind: 'array', raw: `[${ALL_CHANNELS}]`, items: [] };
  const fields = mergeFields(user.fields, new Map([['unsubscribedChannelIds', channels]]), false);
  saveUser(project, user, { email: user.email, userId: user.userId, fields });
}
