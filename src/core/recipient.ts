/**
 * A recipient is what a destination keys a user by, in one text: `u:` and a userId, or `e:` and an email (trimmed and
 * lower-cased).
 */
export interface Identifier {
  kind: 'user_id' | 'email';
  id: string;
}

export function parseRecipient(recipient: string): Identifier {
  return { kind: recipient.startsWith('u:') ? 'user_id' : 'email', id: recipient.slice(2) };
}

/** The recipients that a person at a keyboard may mean by `text`. */
export function recipientsMeant(text: string): readonly string[] {
  const id = text.trim();
  return id.includes('@') ? [`e:${id.toLowerCase()}`, `u:${id}`] : [`u:${id}`];
}
