/** The events' endpoints: track, trackBulk, and the reads of a user's events. */
import type { Answer, Failure } from './answer.js';
import { badParams, bulkAnswer, failureAnswer, json, mismatchAnswer, refusal, success } from './answer.js';
import type { Body, Call } from './call.js';
import { saveEvent, saveTypes, saveUser } from './change.js';
import type { Draft } from './fields.js';
import { admitFields, exceedsFieldLimit, openDraft } from './fields.js';
import { isUserId, locateForTrack, normaliseEmail } from './identity.js';
import type { RawJson } from './json.js';
import { rawObject } from './json.js';
import type { Project, TrackedEvent, User } from './project.js';
import { eventSchema, notePipeline, userByEmail, userByUserId, visibleProfile } from './project.js';
import { dateText } from './users.js';

interface EventRequest {
  email: string | undefined;
  userId: string | undefined;
  name: string;
  id: string | undefined;
  createdAt: number | undefined;
  fields: ReadonlyMap<string, RawJson>;
  campaignId: number | undefined;
  templateId: number | undefined;
  createNewFields: boolean;
}

type Tracked =
  | { kind: 'refused'; answer: Answer }
  | { kind: 'done'; ids: string[]; failures: Failure[]; draft: Draft; disallowed: string[] };

const MOST_READ = 200;
const READ_BY_DEFAULT = 30;

export function track(project: Project, { body }: Call): Answer {
  const request = readEvent(body);
  const problem = body.problem();
  if (problem !== undefined) return badParams(problem);
  const tracked = trackEvents(project, [request], false);
  if (tracked.kind === 'refused') return tracked.answer;
  const [failure] = tracked.failures;
  if (failure !== undefined) return failureAnswer(project, failure);
  const [id] = tracked.ids;
  if (id === undefined) return success(`${request.name} is disallowed from tracking`);
  return success(`Event with id: ${id} tracked.`, { id });
}

export function trackBulk(project: Project, { body }: Call): Answer {
  const requests = body.objects('events')?.map(readEvent);
  if (requests === undefined) body.refuse("'events' is needed");
  const problem = body.problem();
  if (problem !== undefined || requests === undefined) return badParams(problem ?? '');
  if (requests.length > project.options.maxBatch)
    return refusal(400, 'BatchTooLarge', 'Too many events in one request');
  const tracked = trackEvents(project, requests, true);
  if (tracked.kind === 'refused') return tracked.answer;
  const { ids, failures, draft, disallowed } = tracked;
  const answer = { successCount: ids.length, draft, more: { disallowedEventNames: [...new Set(disallowed)] } };
  return bulkAnswer(['invalid', 'notFound', 'forgotten'], failures, answer);
}

export function eventsByEmail(project: Project, { argument, query }: Call): Answer {
  const email = normaliseEmail(argument);
  if (email === undefined) return refusal(400, 'InvalidEmailAddressError', `Invalid email: ${argument}`);
  return eventsAnswer(project, userByEmail(project, email), query);
}

export function eventsByUserId(project: Project, { argument, query }: Call): Answer {
  if (!isUserId(argument)) return refusal(400, 'InvalidUserIdError', `Invalid userId: ${argument}`);
  return eventsAnswer(project, userByUserId(project, argument), query);
}

/** An event's or a purchase's own id: letters, digits and hyphens, at most 512 of them. */
export function readEventId(body: Body): string | undefined {
  const id = body.text('id');
  if (id !== undefined && !/^[A-Za-z0-9-]{1,512}$/.test(id)) {
    body.refuse("'id' has to be 1 to 512 letters, digits and hyphens");
  }
  return id;
}

function readEvent(body: Body): EventRequest {
  const name = body.text('eventName') ?? '';
  const event = {
    email: body.text('email'),
    userId: body.text('userId'),
    name,
    id: readEventId(body),
    createdAt: body.seconds('createdAt'),
    fields: body.fields('dataFields'),
    campaignId: body.whole('campaignId'),
    templateId: body.whole('templateId'),
    createNewFields: body.flag('createNewFields') ?? true,
  };
  if (name === '') body.refuse("'eventName' is needed");
  if (event.email === undefined && event.userId === undefined) body.refuse('an email or a userId is needed');
  return event;
}

/** Applies the events of one request in their order, or none of them where the request is refused whole. */
function trackEvents(project: Project, requests: readonly EventRequest[], bulk: boolean): Tracked {
  const drafts = new Map<string, Draft>();
  const failures: Failure[] = [];
  const disallowed: string[] = [];
  const passed: { request: EventRequest; fields: ReadonlyMap<string, RawJson> }[] = [];
  for (const request of requests) {
    if (project.options.disallowedEventNames.includes(request.name)) {
      disallowed.push(request.name);
      continue;
    }
    const located = locateForTrack(project, request);
    if (located.kind === 'failed') {
      failures.push(located.failure);
      continue;
    }
    const draft = drafts.get(request.name) ?? openDraft('customEvent', eventSchema(project, request.name), true);
    drafts.set(request.name, draft);
    const admitted = admitFields({ ...draft, createNew: request.createNewFields }, request.fields);
    if (admitted.kind === 'invalid') return { kind: 'refused', answer: refusal(400, admitted.code, admitted.msg) };
    passed.push({ request, fields: admitted.fields });
  }
  const refused = [...drafts.values()].find((draft) => draft.mismatches.size > 0 || exceedsFieldLimit(draft));
  if (refused !== undefined) {
    const tooMany = refusal(400, 'UniqueFieldsLimitExceeded', 'An event name would have more than 8,000 fields');
    return { kind: 'refused', answer: refused.mismatches.size > 0 ? mismatchAnswer(refused) : tooMany };
  }

  for (const [name, { added }] of drafts) saveTypes(project, name, added);
  const ids = passed.map(({ request, fields }) => applyEvent(project, request, fields, bulk));
  const all = openDraft('customEvent', new Map(), true);
  for (const { added, filtered } of drafts.values()) {
    for (const [path, type] of added) all.added.set(path, type);
    for (const path of filtered) all.filtered.add(path);
  }
  return { kind: 'done', ids, failures, draft: all, disallowed };
}

function applyEvent(
  project: Project,
  request: EventRequest,
  fields: ReadonlyMap<string, RawJson>,
  bulk: boolean,
): string {
  const located = locateForTrack(project, request);
  if (located.kind === 'failed') throw new Error('A user vanished within one request');
  const { email, userId } = located;
  const user = located.user ?? saveUser(project, undefined, { email, userId, fields: '{}' });
  notePipeline(project, user, 'lastTrack', bulk);
  return saveEvent(project, {
    type: 'customEvent',
    id: request.id,
    user,
    name: request.name,
    createdAt: request.createdAt ?? Math.floor(Date.now() / 1000),
    fields: rawObject(fields).raw,
    campaignId: request.campaignId ?? null,
    templateId: request.templateId ?? null,
  });
}

/** The newest first, 200 at most. */
function eventsAnswer(project: Project, user: User | undefined, query: URLSearchParams): Answer {
  const limit = Number(query.get('limit') ?? READ_BY_DEFAULT);
  if (!Number.isInteger(limit) || limit < 1) return badParams("'limit' has to be a whole number from 1");
  if (user === undefined || visibleProfile(project, user) === undefined) return json({ events: [] });
  const newest = [...user.events].sort((a, b) => b.createdAt - a.createdAt).slice(0, Math.min(limit, MOST_READ));
  return { status: 200, text: `{"events":[${newest.map(eventText).join(',')}]}` };
}

function eventText({ type, id, user, name, createdAt, fields, campaignId, templateId }: TrackedEvent): string {
  const known = {
    _id: id,
    eventType: type,
    eventName: name,
    createdAt: dateText(createdAt),
    ...(user.email !== null && { email: user.email }),
    ...(user.userId !== null && { userId: user.userId }),
    ...(campaignId !== null && { campaignId }),
    ...(templateId !== null && { templateId }),
  };
  return `${JSON.stringify(known).slice(0, -1)},"dataFields":${fields}}`;
}
