/**
 * The commerce endpoints. A cart is the user's `shoppingCartItems`; a purchase is an event of its own kind and empties
 * the cart. Both create a user who isn't there.
 */
import type { Answer } from './answer.js';
import { badParams, failureAnswer, mismatchAnswer, refusal, success } from './answer.js';
import type { Body, Call } from './call.js';
import { saveEvent, saveTypes, saveUser } from './change.js';
import { readEventId } from './events.js';
import { admitFields, mergeFields, openDraft } from './fields.js';
import type { RawJson } from './json.js';
import { rawObject } from './json.js';
import type { Project, User } from './project.js';
import { eventSchema } from './project.js';
import { readProfile, writeProfiles } from './profiles.js';

const PURCHASE = 'purchase';

export function trackPurchase(project: Project, { body }: Call): Answer {
  const id = readEventId(body);
  const createdAt = body.seconds('createdAt');
  const campaignId = body.whole('campaignId') ?? null;
  const templateId = body.whole('templateId') ?? null;
  const fields = body.fields('dataFields');
  const items = readItems(body);
  const total = readNumber(body, 'total');
  const draft = openDraft('customEvent', eventSchema(project, PURCHASE), true);
  const admitted = admitFields(draft, fields);
  const user = writeUser(project, body, () => {
    if (admitted.kind === 'invalid') return refusal(400, admitted.code, admitted.msg);
    return draft.mismatches.size > 0 ? mismatchAnswer(draft) : undefined;
  });
  if ('status' in user) return user;

  saveTypes(project, PURCHASE, draft.added);
  const purchase = new Map(admitted.kind === 'fields' ? admitted.fields : []);
  if (total !== undefined) purchase.set('total', total);
  purchase.set('shoppingCartItems', items);
  const tracked = saveEvent(project, {
    type: 'purchase',
    id,
    user,
    name: PURCHASE,
    createdAt: createdAt ?? Math.floor(Date.now() / 1000),
    fields: rawObject(purchase).raw,
    campaignId,
    templateId,
  });
  writeCart(project, user, { kind: 'array', raw: '[]', items: [] });
  return success(`Purchase with id: ${tracked} tracked.`, { id: tracked });
}

export function updateCart(project: Project, { body }: Call): Answer {
  const items = readItems(body);
  const user = writeUser(project, body, () => undefined);
  if ('status' in user) return user;
  writeCart(project, user, items);
  return success();
}

/** The purchase's or the cart's user, written; the refusal where the request is wrong. */
function writeUser(project: Project, body: Body, check: () => Answer | undefined): User | Answer {
  const nested = body.object('user');
  const request = nested && readProfile(nested);
  const createNewFields = nested?.flag('createNewFields') ?? body.flag('createNewFields') ?? true;
  if (nested === undefined) body.refuse("'user' is needed");
  const problem = body.problem();
  if (problem !== undefined || request === undefined) return badParams(problem ?? '');
  const refused = check();
  if (refused !== undefined) return refused;
  const written = writeProfiles(project, [request], { bulk: false, isUpdate: false, createNewFields });
  if (written.kind === 'refused') return written.answer;
  const [failure] = written.failures;
  const [user] = written.users;
  if (failure !== undefined) return failureAnswer(project, failure);
  return user ?? badParams('The user could not be written');
}

function writeCart(project: Project, user: User, items: RawJson): void {
  const fields = mergeFields(user.fields, new Map([['shoppingCartItems', items]]), false);
  saveUser(project, user, { email: user.email, userId: user.userId, fields });
}

function readItems(body: Body): RawJson {
  const items = body.objects('items');
  if (items === undefined) body.refuse("'items' is needed");
  for (const item of items ?? []) {
    for (const name of ['id', 'name']) if (item.text(name) === undefined) item.refuse(`an item needs '${name}'`);
    readNumber(item, 'price');
    readNumber(item, 'quantity');
  }
  return body.raw('items') ?? { kind: 'array', raw: '[]', items: [] };
}

function readNumber(body: Body, name: string): RawJson | undefined {
  const value = body.raw(name);
  if (value?.kind !== 'number') body.refuse(`'${name}' has to be a number`);
  return value;
}
