/** What a simulator shows to those who hold it in their hands, as against those who call it over HTTP. */
import { fieldsOf } from './fields.js';
import type { EventType, List, Project, TrackedEvent, User } from './project.js';
import { keyOf } from './project.js';
import { findUser } from './users.js';

export interface SimulatedUser {
  /** What identifies the user in a project of this type. */
  key: string;
  email: string | null;
  userId: string | null;
  /** Field to the JSON text of its value, with the digits it was sent with. */
  fields: Record<string, string>;
  /** Seconds since 1970. */
  createdAt: number;
  updatedAt: number;
}

export interface SimulatedEvent {
  type: EventType;
  id: string;
  name: string;
  /** The key of the user. */
  identifier: string;
  /** Seconds since 1970. */
  createdAt: number;
  fields: Record<string, string>;
  campaignId: number | null;
  templateId: number | null;
  /** How often a call with this id was applied. */
  applications: number;
}

export interface SimulatedList {
  id: number;
  name: string;
  description: string | null;
  size: number;
  /** The keys of its users. */
  members: () => string[];
}

export function* viewUsers(project: Project): Generator<SimulatedUser> {
  for (const user of project.users.values()) yield viewUser(project, user);
}

/** The user with this email or userId. */
export function viewUserOf(project: Project, identifier: string): SimulatedUser | undefined {
  const user = findUser(project, identifier.toLowerCase(), identifier);
  return user && viewUser(project, user);
}

/** All events, or those of one user, in the order in which they were first tracked. */
export function viewEvents(project: Project, identifier?: string): SimulatedEvent[] {
  if (identifier === undefined) return Array.from(project.events.values(), (event) => viewEvent(project, event));
  const user = findUser(project, identifier.toLowerCase(), identifier);
  return (user?.events ?? []).map((event) => viewEvent(project, event));
}

export function viewLists(project: Project): SimulatedList[] {
  return Array.from(project.lists.values(), (list) => viewList(project, list));
}

function viewUser(project: Project, user: User): SimulatedUser {
  const { email, userId, fields, createdAt, updatedAt } = user;
  return { key: keyOf(project, user), email, userId, fields: viewFields(fields), createdAt, updatedAt };
}

function viewEvent(project: Project, event: TrackedEvent): SimulatedEvent {
  const { type, id, user, name, createdAt, fields, campaignId, templateId, applications } = event;
  const identifier = keyOf(project, user);
  return { type, id, name, identifier, createdAt, fields: viewFields(fields), campaignId, templateId, applications };
}

function viewList(project: Project, { id, name, description, members }: List): SimulatedList {
  return {
    id,
    name,
    description,
    size: members.size,
    members: () => Array.from(members, (user) => keyOf(project, user)),
  };
}

function viewFields(text: string): Record<string, string> {
  return Object.fromEntries(Array.from(fieldsOf(text), ([name, { raw }]) => [name, raw]));
}
