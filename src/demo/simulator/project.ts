/**
 * The state of one Iterable project, and how it is looked up. It is altered in `change.ts` alone. A user is one record
 * for as long as it lives; its fields are one JSON text, so that a million users stay affordable.
 */
import type { ProjectKey } from '../../core/definition.js';
import type { Schema } from './fields.js';
import { SYSTEM_FIELDS } from './fields.js';
import { detach } from './json.js';

/** Seconds since 1970 in `createdAt` and `updatedAt`. */
export interface User {
  readonly id: number;
  email: string | null;
  userId: string | null;
  /** A JSON object's text, each value with the digits it was sent with. */
  fields: string;
  createdAt: number;
  updatedAt: number;
  events: TrackedEvent[];
  /** When and through which pipeline the user was last updated and tracked: see `notePipeline`. */
  lastUpdate: number;
  lastTrack: number;
}

export type EventType = 'customEvent' | 'purchase';

export interface TrackedEvent {
  readonly type: EventType;
  readonly id: string;
  user: User;
  name: string;
  createdAt: number;
  fields: string;
  campaignId: number | null;
  templateId: number | null;
  /** How often a call with this id was applied. */
  applications: number;
}

export interface List {
  readonly id: number;
  readonly name: string;
  readonly description: string | null;
  /** Milliseconds since 1970. */
  readonly createdAt: number;
  readonly members: Set<User>;
}

/** What a project may be made to do otherwise than by default. */
export interface ProjectOptions {
  projectType: ProjectKey;
  /** Milliseconds until a written user is seen by reads and by track. */
  processingMs: number;
  /** The status of a refusal for a forgotten user: both have been seen. */
  forgottenStatus: 400 | 409;
  /** What a type mismatch does to a bulk update: refuse it whole, or name the user under `invalidData`. */
  bulkMismatch: 'refuse' | 'invalidData';
  /** Most users, events or subscribers in a bulk request; more is `BatchTooLarge`. */
  maxBatch: number;
  disallowedEventNames: readonly string[];
}

/** Identifiers and fields as they are to be, whether or not the user existed before. */
export interface Profile {
  email: string | null;
  userId: string | null;
  fields: string;
}

/** One application of a track call, in the order of application. */
export interface Application {
  readonly id: string;
  readonly name: string;
  /** The key of the user at that moment. */
  readonly identifier: string;
  /** Milliseconds since 1970. */
  readonly at: number;
}

export type IdentifierKind = 'email' | 'userId';

interface Write {
  at: number;
  before: Profile | null;
}

export interface Project {
  readonly options: ProjectOptions;
  readonly users: Map<number, User>;
  readonly byEmail: Map<string, User | User[]>;
  readonly byUserId: Map<string, User | User[]>;
  readonly userSchema: Schema;
  readonly eventSchemas: Map<string, Schema>;
  readonly events: Map<string, TrackedEvent>;
  readonly history: Application[];
  readonly lists: Map<number, List>;
  readonly forgotten: Record<IdentifierKind, Set<string>>;
  /** What a sender did that Iterable answers with success but may get wrong. */
  readonly violations: { duplicateInBatch: number; mixedPipelines: number };
  /** Writes that are still being processed, oldest first. */
  readonly processing: Map<number, Write[]>;
  readonly startedAt: number;
  lastUserNumber: number;
  lastListId: number;
  lines: string[];
}

const PIPELINE_REST_SECONDS = 60;

export function createProject(options: ProjectOptions): Project {
  return {
    options,
    users: new Map(),
    byEmail: new Map(),
    byUserId: new Map(),
    userSchema: new Map(SYSTEM_FIELDS),
    eventSchemas: new Map(),
    events: new Map(),
    history: [],
    lists: new Map(),
    forgotten: { email: new Set(), userId: new Set() },
    violations: { duplicateInBatch: 0, mixedPipelines: 0 },
    processing: new Map(),
    startedAt: Date.now(),
    lastUserNumber: 0,
    lastListId: 1000,
    lines: [],
  };
}

export function eventSchema(project: Project, name: string): Schema {
  const known = project.eventSchemas.get(name);
  if (known !== undefined) return known;
  const schema: Schema = new Map();
  project.eventSchemas.set(detach(name), schema);
  return schema;
}

export function userByEmail(project: Project, email: string): User | undefined {
  return firstOf(project.byEmail.get(email));
}

export function userByUserId(project: Project, userId: string): User | undefined {
  return firstOf(project.byUserId.get(userId));
}

/** What identifies the user in a project of this type; in a hybrid one the userId where there is one. */
export function keyOf({ options }: Project, { email, userId }: Pick<Profile, 'email' | 'userId'>): string {
  return (options.projectType === 'email' ? email : (userId ?? email)) ?? '';
}

/** The user as reads and track see it: without the writes that are still being processed. */
export function visibleProfile(project: Project, user: User): Profile | undefined {
  const writes = project.processing.get(user.id) ?? [];
  const first = writes.find(({ at }) => at + project.options.processingMs > Date.now());
  return first === undefined ? user : (first.before ?? undefined);
}

/**
 * Notes through which pipeline a user was written. For one user within 60 s only one kind may be used, single or bulk:
 * Iterable answers a mixture with success, and its results may be inconsistent.
 */
export function notePipeline(project: Project, user: User, field: 'lastUpdate' | 'lastTrack', bulk: boolean): void {
  const second = Math.floor((Date.now() - project.startedAt) / 1000) + 1;
  const stamp = second * 2 + Number(bulk);
  const last = user[field];
  const recent = last > 0 && second - (last >> 1) < PIPELINE_REST_SECONDS;
  if (recent && last % 2 !== stamp % 2) project.violations.mixedPipelines++;
  user[field] = stamp;
}

/** A purchase's id and a custom event's are different things; a colon is part of neither. */
export function eventKey(type: EventType, id: string): string {
  return type === 'purchase' ? `purchase:${id}` : id;
}

function firstOf(entry: User | User[] | undefined): User | undefined {
  return Array.isArray(entry) ? entry[0] : entry;
}
