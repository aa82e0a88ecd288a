import { parseRecipient } from './recipient.js';
import type { FieldType } from './field.js';

/**
 * Calls in Segment's form (https://segment.com/docs/connections/spec/), as Personas sends them. Values stay the JSON
 * text that PostgreSQL made: a call carries text to be spliced, never a number that JavaScript has parsed.
 */
export interface Computation {
  kind: 'audience' | 'trait';
  id: string;
  key: string;
}

/** A trait and its value as JSON text; `null` removes the field. */
export interface TraitValue {
  field: string;
  json: string;
  type: FieldType;
}

interface Addressed {
  recipient: string;
  /** The identifier beside the key; null where the call carries the key alone. */
  beside: string | null;
}

export interface IdentifyCall extends Addressed {
  type: 'identify';
  /** The same whenever the same change is sent; null where none is sent. */
  messageId: string | null;
  computation: Computation;
  traits: readonly TraitValue[];
}

export interface TrackCall extends Addressed {
  type: 'track';
  computation: Computation;
  event: string;
  messageId: string;
  /** Seconds since 1970. */
  occurredAt: number;
  /** A JSON object as text. */
  properties: string;
  /** The properties that are dates by their type; a text that only looks like one is none. */
  dates: readonly string[];
}

/** The identify calls that wait for one recipient: one update of that user, in the order in which they arose. */
export type UserUpdate = readonly [IdentifyCall, ...IdentifyCall[]];

/** A field as it should be at the destination; for the place on a list, the list's id. */
export interface ExpectedValue extends TraitValue {
  listId: number | null;
  /** Nobody is made only to be on the list. */
  existingOnly: boolean;
}

/** What a destination has in place of an expected value, as JSON text; null: nothing. */
export interface FieldFound {
  field: string;
  found: string | null;
}

/** A user as it was read back. */
export interface UserFound {
  /** The recipients that it is: by its userId and by its address. */
  names: readonly string[];
  /** The fields that aren't as expected. */
  differing: readonly FieldFound[];
}

/** Whether somebody is to be on a static list. */
export interface ListChange {
  recipient: string;
  listId: number;
  member: boolean;
  /** Nobody is made only to be on the list. */
  existingOnly: boolean;
}

/** The userId and email of a call: the recipient's own, and what rides along with it. */
export function identifiersOf({ recipient, beside }: Addressed): { userId: string | null; email: string | null } {
  const { kind, id } = parseRecipient(recipient);
  return kind === 'user_id' ? { userId: id, email: beside } : { userId: beside, email: id };
}

function contextOf({ kind, id, key }: Computation, namespace: string): string {
  const personas = {
    computation_class: kind,
    computation_id: id,
    computation_key: key,
    namespace,
    space_id: namespace,
  };
  return JSON.stringify({ personas }).slice(1, -1);
}

/**
 * A call as one JSON text in Segment's form, for looking at it and for destinations that take that form. Those insist on
 * a userId or an `anonymous` one; the email stands for it.
 */
export function formatCall(
  call: IdentifyCall | TrackCall,
  namespace: string,
  { anonymous = false }: { anonymous?: boolean } = {},
): string {
  const { userId, email } = identifiersOf(call);
  const stranger = anonymous ? `"anonymousId": ${JSON.stringify(email)}, ` : '';
  const user = userId === null ? stranger : `"userId": ${JSON.stringify(userId)}, `;
  const context = contextOf(call.computation, namespace);
  if (call.type === 'track') {
    const traits = email === null ? '' : `, "traits": ${JSON.stringify({ email })}`;
    return `{"type": "track", ${user}"event": ${JSON.stringify(call.event)}, "messageId": ${JSON.stringify(call.messageId)}, "timestamp": "${new Date(call.occurredAt * 1000).toISOString()}", "properties": ${call.properties}, "context": {${context}${traits}}}`;
  }
  const traits = call.traits.map(({ field, json }) => `${JSON.stringify(field)}: ${json}`);
  if (email !== null) traits.unshift(`"email": ${JSON.stringify(email)}`);
  const id = call.messageId === null ? '' : `"messageId": ${JSON.stringify(call.messageId)}, `;
  return `{"type": "identify", ${user}${id}"traits": {${traits.join(', ')}}, "context": {${context}}}`;
}
