import { identifiersOf, type ListChange, type TrackCall, type TraitValue, type UserUpdate } from '../../core/call.js';
import { membersOf } from '../../core/json.js';
import { parseRecipient } from '../../core/recipient.js';
import type { ProjectKey } from '../../core/definition.js';

/**
 * Calls as Iterable takes them (https://api.iterable.com/api/docs): each the JSON object of a single request, and of a
 * bulk request one of its array. They are put together as text, so that a value arrives with the digits that PostgreSQL
 * gave it.
 */

/** `yyyy-MM-dd HH:mm:ss +00:00`, the form that Iterable takes for a date with a time; a date without one stays. */
export function dateText(json: string): string {
  const match = /^"(\d{4}-\d{2}-\d{2})T(\d{2}:\d{2}:\d{2})(?:\.\d+)?Z"$/.exec(json);
  return match === null ? json : `"${match[1] ?? ''} ${match[2] ?? ''} +00:00"`;
}

/** The properties of an event, their dates in Iterable's form. */
function withDates({ properties, dates }: TrackCall): string {
  if (dates.length === 0) return properties;
  const members = Array.from(membersOf(properties), ({ name, json }) => {
    return `${JSON.stringify(name)}:${dates.includes(name) ? dateText(json) : json}`;
  });
  return `{${members.join(',')}}`;
}

function fieldText({ field, json, type }: TraitValue): string {
  return `${JSON.stringify(field)}:${type === 'date' ? dateText(json) : json}`;
}

interface Address {
  /** Members of the request itself, each with a comma behind it. */
  top: string;
  /** The same of its `dataFields`. */
  fields: string;
}

/**
 * Who a request is about. The key alone names the user; what rides along goes beside it where the project type has a
 * place for it there, and into `dataFields` in a userID-based project.
 */
function addressOf(call: { recipient: string; beside: string | null }, projectKey: ProjectKey): Address {
  const { userId, email } = identifiersOf(call);
  const emailText = email === null ? '' : `"email":${JSON.stringify(email)},`;
  const userIdText = userId === null ? '' : `"userId":${JSON.stringify(userId)},`;
  return projectKey === 'user_id'
    ? { top: userIdText, fields: emailText }
    : { top: emailText + userIdText, fields: '' };
}

/** Whom a call names, as an answer names its failures: emails may come back in lower case. */
export function namesOf(call: { recipient: string; beside: string | null }): readonly string[] {
  const { userId, email } = identifiersOf(call);
  const names: string[] = [];
  if (userId !== null) names.push(`u:${userId}`);
  if (email !== null) names.push(`e:${email.toLowerCase()}`);
  return names;
}

/** Where two definitions know different identifiers beside the key, the newer one is right. */
export function addresseeOf(calls: UserUpdate): { recipient: string; beside: string | null } {
  const beside = calls.findLast((call) => call.beside !== null)?.beside ?? null;
  return { recipient: calls[0].recipient, beside };
}

/** A userId alone gets a placeholder address in an email-based project, which `preferUserId` asks for. */
const preferred = (recipient: string, projectKey: ProjectKey): string =>
  projectKey === 'email' && parseRecipient(recipient).kind === 'user_id' ? '"preferUserId":true,' : '';

export function updateText(calls: UserUpdate, projectKey: ProjectKey): string {
  const { recipient, beside } = addresseeOf(calls);
  const { top, fields } = addressOf({ recipient, beside }, projectKey);
  let dataFields = fields;
  for (const { traits } of calls) for (const trait of traits) dataFields += `${fieldText(trait)},`;
  return `{${top}${preferred(recipient, projectKey)}"dataFields":{${dataFields.slice(0, -1)}}}`;
}

/** The email of a userID-based project is left out: an event has no place for it but its own fields. */
export function eventText(call: TrackCall, projectKey: ProjectKey): string {
  const members = [
    `"eventName":${JSON.stringify(call.event)}`,
    // Letters, digits and hyphens alone.
    `"id":${JSON.stringify(call.messageId.replaceAll('_', '-'))}`,
    `"createdAt":${Math.floor(call.occurredAt)}`,
    `"dataFields":${withDates(call)}`,
  ];
  return `{${addressOf(call, projectKey).top}${members.join(',')}}`;
}

/** A subscriber of a list, by the key alone. */
export function subscriberText({ recipient, member }: ListChange, projectKey: ProjectKey): string {
  const { top } = addressOf({ recipient, beside: null }, projectKey);
  const members = `${top}${member ? preferred(recipient, projectKey) : ''}`;
  return `{${members.slice(0, -1)}}`;
}

export function userPath(recipient: string): string {
  const { kind, id } = parseRecipient(recipient);
  return kind === 'user_id' ? `/api/users/byUserId/${encodeURIComponent(id)}` : `/api/users/${encodeURIComponent(id)}`;
}
