/**
 * How a project changes. Everything that alters it is a `Change`, applied by `commit`; the changes since the last
 * `takeLines` are what the journal writes before a request is answered, and a project restored from them equals the one
 * that made them.
 */
import { randomUUID } from 'node:crypto';

import type { FieldType, Schema } from './fields.js';
import { SYSTEM_FIELDS } from './fields.js';
import { detach } from './json.js';
import type { EventType, IdentifierKind, Profile, Project, TrackedEvent, User } from './project.js';
import { eventKey, eventSchema, keyOf } from './project.js';

/** One line of the journal. Users are named by their number; an event's type `u` stands for a custom event, `p` a purchase. */
export type Change =
  | ['user', number, string | null, string | null, string, number, number]
  | ['gone', number]
  | ['type', string | null, string, FieldType]
  | ['event', 'u' | 'p', string, number, string, number, string, number | null, number | null, number]
  | ['list', number, string, string | null, number]
  | ['unlist', number]
  | ['member', number, number, boolean]
  | ['forgotten', IdentifierKind, string];

type ChangeOf<Kind extends Change[0]> = Extract<Change, readonly [Kind, ...unknown[]]>;

/** Applies a change and notes it for the journal. */
export function commit(project: Project, change: Change): void {
  applyChange(project, change);
  project.lines.push(JSON.stringify(change));
}

/** The changes since the last call, one JSON text each. */
export function takeLines(project: Project): string[] {
  const { lines } = project;
  project.lines = [];
  return lines;
}

/** Writes a user, who is new where `user` is undefined. */
export function saveUser(project: Project, user: User | undefined, { email, userId, fields }: Profile): User {
  const now = Math.floor(Date.now() / 1000);
  const id = user?.id ?? project.lastUserNumber + 1;
  if (project.options.processingMs > 0) {
    noteWrite(project, id, user && { email: user.email, userId: user.userId, fields: user.fields });
  }
  commit(project, ['user', id, email, userId, fields, user?.createdAt ?? now, now]);
  return user ?? lastUser(project);
}

export function removeUser(project: Project, user: User): void {
  commit(project, ['gone', user.id]);
}

/** Records a track call; one with a known id takes the place of the earlier one. */
export function saveEvent(
  project: Project,
  event: Omit<TrackedEvent, 'id' | 'applications'> & { id: string | undefined },
): string {
  const id = detach(event.id ?? randomUUID());
  const applications = (project.events.get(eventKey(event.type, id))?.applications ?? 0) + 1;
  const name = detach(event.name);
  commit(project, eventChange({ ...event, id, name, applications }));
  project.history.push({ id, name, identifier: keyOf(project, event.user), at: Date.now() });
  return id;
}

export function saveTypes(project: Project, eventName: string | null, added: Schema): void {
  for (const [path, type] of added) commit(project, ['type', eventName, path, type]);
}

/** A project's whole state as the changes that make it. */
export function* snapshotOf(project: Project): Generator<Change> {
  for (const [path, type] of project.userSchema) if (!SYSTEM_FIELDS.has(path)) yield ['type', null, path, type];
  for (const [name, schema] of project.eventSchemas) {
    for (const [path, type] of schema) yield ['type', name, path, type];
  }
  for (const { id, email, userId, fields, createdAt, updatedAt } of project.users.values()) {
    yield ['user', id, email, userId, fields, createdAt, updatedAt];
  }
  for (const event of project.events.values()) yield eventChange(event);
  yield ['unlist', project.lastListId];
  for (const { id, name, description, createdAt, members } of project.lists.values()) {
    yield ['list', id, name, description, createdAt];
    for (const user of members) yield ['member', id, user.id, true];
  }
  for (const kind of ['email', 'userId'] as const) {
    for (const value of project.forgotten[kind]) yield ['forgotten', kind, value];
  }
}

/** Applies a change that was made before; of what a line refers to, whatever is gone is left out. */
export function applyChange(project: Project, change: Change): void {
  switch (change[0]) {
    case 'user':
      applyUser(project, change);
      return;
    case 'gone':
      applyGone(project, change[1]);
      return;
    case 'type': {
      const [, eventName, path, type] = change;
      (eventName === null ? project.userSchema : eventSchema(project, eventName)).set(path, type);
      return;
    }
    case 'event':
      applyEvent(project, change);
      return;
    case 'list': {
      const [, id, name, description, createdAt] = change;
      project.lists.set(id, { id, name, description, createdAt, members: new Set() });
      project.lastListId = Math.max(project.lastListId, id);
      return;
    }
    case 'unlist':
      project.lists.delete(change[1]);
      project.lastListId = Math.max(project.lastListId, change[1]);
      return;
    case 'member': {
      const user = project.users.get(change[2]);
      const members = project.lists.get(change[1])?.members;
      if (user !== undefined && change[3]) members?.add(user);
      else if (user !== undefined) members?.delete(user);
      return;
    }
    case 'forgotten':
      project.forgotten[change[1]].add(change[2]);
      return;
  }
}

function applyUser(project: Project, [, id, email, userId, fields, createdAt, updatedAt]: ChangeOf<'user'>): void {
  let user = project.users.get(id);
  if (user === undefined) {
    const unused = { events: NO_EVENTS, lastUpdate: 0, lastTrack: 0 };
    user = { id, email: null, userId: null, fields, createdAt, updatedAt, ...unused };
    project.users.set(id, user);
    project.lastUserNumber = Math.max(project.lastUserNumber, id);
  }
  if (user.email !== email) {
    unindex(project.byEmail, user.email, user);
    user.email = email === null ? null : detach(email);
    index(project.byEmail, user.email, user);
  }
  if (user.userId !== userId) {
    unindex(project.byUserId, user.userId, user);
    user.userId = userId === null ? null : detach(userId);
    index(project.byUserId, user.userId, user);
  }
  user.fields = fields;
  user.updatedAt = updatedAt;
}

function applyGone(project: Project, id: number): void {
  const user = project.users.get(id);
  if (user === undefined) return;
  unindex(project.byEmail, user.email, user);
  unindex(project.byUserId, user.userId, user);
  for (const event of user.events) project.events.delete(eventKey(event.type, event.id));
  for (const { members } of project.lists.values()) members.delete(user);
  project.users.delete(id);
  project.processing.delete(id);
}

function applyEvent(project: Project, change: ChangeOf<'event'>): void {
  const [, mark, id, userNumber, name, createdAt, fields, campaignId, templateId, applications] = change;
  const user = project.users.get(userNumber);
  if (user === undefined) return;
  const type: EventType = mark === 'p' ? 'purchase' : 'customEvent';
  const key = eventKey(type, id);
  const known = project.events.get(key);
  if (known === undefined) {
    const event = { type, id, user, name, createdAt, fields, campaignId, templateId, applications };
    project.events.set(key, event);
    addEvent(user, event);
    return;
  }
  if (known.user !== user) {
    known.user.events = known.user.events.filter((event) => event !== known);
    addEvent(user, known);
  }
  Object.assign(known, { user, name, createdAt, fields, campaignId, templateId, applications });
}

function eventChange(event: TrackedEvent): ChangeOf<'event'> {
  const { type, id, user, name, createdAt, fields, campaignId, templateId, applications } = event;
  const mark = type === 'purchase' ? 'p' : 'u';
  return ['event', mark, id, user.id, name, createdAt, fields, campaignId, templateId, applications];
}

/** Shared by all users without events, and never written to. */
const NO_EVENTS: TrackedEvent[] = [];

function addEvent(user: User, event: TrackedEvent): void {
  if (user.events === NO_EVENTS) user.events = [event];
  else user.events.push(event);
}

function lastUser(project: Project): User {
  const user = project.users.get(project.lastUserNumber);
  if (user === undefined) throw new Error(`User number ${project.lastUserNumber} was written but isn't there`);
  return user;
}

function noteWrite(project: Project, id: number, before: Profile | undefined): void {
  const { processing, options } = project;
  const now = Date.now();
  for (const [oldest, writes] of processing) {
    if (writes.some(({ at }) => at + options.processingMs > now)) break;
    processing.delete(oldest);
  }
  const writes = processing.get(id) ?? [];
  processing.delete(id);
  processing.set(id, [...writes, { at: now, before: before ?? null }]);
}

function index(map: Map<string, User | User[]>, key: string | null, user: User): void {
  if (key === null) return;
  const entry = map.get(key);
  if (entry === undefined) map.set(key, user);
  else map.set(key, Array.isArray(entry) ? [...entry, user] : [entry, user]);
}

function unindex(map: Map<string, User | User[]>, key: string | null, user: User): void {
  if (key === null) return;
  const entry = map.get(key);
  const others = Array.isArray(entry) ? entry.filter((other) => other !== user) : [];
  const [first] = others;
  if (first === undefined) map.delete(key);
  else map.set(key, others.length === 1 ? first : others);
}
