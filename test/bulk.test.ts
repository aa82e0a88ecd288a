import { describe, expect, it } from 'vitest';
import type { BatchVerdict } from '../src/core/verdict.js';
import type { Answer, Item } from '../src/destinations/carrier.js';
import { judgeBulk } from '../src/destinations/iterable/bulk.js';
import { createIterablePort } from '../src/destinations/iterable/port.js';
import { Secret } from '../src/lib/secret.js';

const NOW = Date.UTC(2026, 0, 1);
const HTML = '<html><body>Something</body></html>';

const user = (...names: string[]): Item => ({ text: '{}', names, fields: ['ltv', 'vip'], event: null, group: '' });
const event = (name: string, who: string): Item => ({ text: '{}', names: [who], fields: [], event: name, group: '' });
const ITEMS = [user('u:7', 'e:ada@x.de'), user('u:8'), user('e:eve@x.de')];

function answered(status: number, body: unknown = HTML, retryAfter: string | null = null): Answer {
  return { kind: 'answered', status, body: typeof body === 'string' ? body : JSON.stringify(body), retryAfter };
}
const coded = (code: string, params: unknown = null): unknown => ({ msg: '', code, params });
/** A bulk answer in which `failed` are named, by the lists of `failedUpdates`. */
function bulk(failed: Record<string, string[]>, more: Record<string, unknown> = {}, sent = ITEMS.length): Answer {
  const failCount = Object.values(failed).flat().length;
  const counts = { successCount: sent - failCount, failCount };
  return answered(200, { ...counts, createdFields: [], filteredOutFields: [], failedUpdates: failed, ...more });
}

const judge = (answer: Answer, items: readonly Item[] = ITEMS, isLeft = false): BatchVerdict =>
  judgeBulk(answer, items, NOW, isLeft);
const OK = { kind: 'acknowledged' } as const;
const refused = (about: string, reason: string): object => ({ kind: 'refused', about, reason, field: null });
const AGAIN = { kind: 'again', waitMs: null, late: false } as const;
const HALVES = { kind: 'divide', verdict: AGAIN, field: null };
const divide = (about: string, reason: string, field: string | null = null): object => ({
  kind: 'divide',
  verdict: { kind: 'refused', about, reason },
  field,
});

describe('an answer to users in bulk', () => {
  const table: readonly [name: string, answer: Answer, judged: object][] = [
    ['with all accepted', bulk({}), { kind: 'each', verdicts: [OK, OK, OK], dropped: [] }],
    [
      'with an invalid email',
      bulk({ invalidEmails: ['eve@x.de'] }),
      { verdicts: [OK, OK, refused('person', 'InvalidEmailAddressError')] },
    ],
    [
      'with an invalid userId',
      bulk({ invalidUserIds: ['8'] }),
      { verdicts: [OK, refused('person', 'InvalidUserIdError'), OK] },
    ],
    [
      'with an unknown email',
      bulk({ notFoundEmails: ['eve@x.de'] }),
      { verdicts: [OK, OK, refused('unknown', 'UnknownEmailError')] },
    ],
    [
      'with an unknown userId',
      bulk({ notFoundUserIds: ['8'] }),
      { verdicts: [OK, refused('unknown', 'UnknownUserIdError'), OK] },
    ],
    [
      'with invalid data',
      bulk({ invalidDataUserIds: ['8'] }),
      { verdicts: [OK, refused('content', 'InvalidData'), OK] },
    ],
    [
      'with invalid data by email',
      bulk({ invalidDataEmails: ['eve@x.de'] }),
      { verdicts: [OK, OK, refused('content', 'InvalidData')] },
    ],
    [
      'with a conflict',
      bulk({ conflictUserIds: ['7'] }),
      { verdicts: [refused('conflict', 'ExternalKeyConflict'), OK, OK] },
    ],
    [
      'with a conflict by the email beside',
      bulk({ conflictEmails: ['ada@x.de'] }),
      { verdicts: [refused('conflict', 'ExternalKeyConflict'), OK, OK] },
    ],
    [
      'with somebody forgotten',
      bulk({ forgottenEmails: ['eve@x.de'] }),
      { verdicts: [OK, OK, refused('person', 'ForgottenUserError')] },
    ],
    [
      'with a forgotten userId',
      bulk({ forgottenUserIds: ['8'] }),
      { verdicts: [OK, refused('person', 'ForgottenUserError'), OK] },
    ],
    ['with an email in capitals', bulk({ invalidEmails: ['EVE@X.DE'] }), { verdicts: [OK, OK, { kind: 'refused' }] }],
    [
      'that names the invalid ones at its top alone',
      answered(200, { successCount: 2, failCount: 1, invalidEmails: ['eve@x.de'] }),
      { verdicts: [OK, OK, { kind: 'refused' }] },
    ],
    [
      'that names one by both identifiers',
      answered(200, {
        successCount: 2,
        failCount: 1,
        failedUpdates: { conflictUserIds: ['7'], conflictEmails: ['ada@x.de'] },
      }),
      { verdicts: [{ kind: 'refused' }, OK, OK] },
    ],
    [
      'in which everybody failed',
      bulk({ forgottenUserIds: ['7', '8'], invalidEmails: ['eve@x.de'] }),
      { verdicts: [{ kind: 'refused' }, { kind: 'refused' }, { kind: 'refused' }] },
    ],
    ['with fields left out', bulk({}, { filteredOutFields: ['ltv'] }), { kind: 'each', dropped: ['ltv'] }],
    [
      'that doesn’t count the failed',
      answered(200, { successCount: 2, failedUpdates: { invalidUserIds: ['8'] } }),
      { kind: 'each' },
    ],
    ['that names a stranger', bulk({ invalidUserIds: ['9'] }), HALVES],
    ['that spells a userId otherwise', bulk({ invalidUserIds: ['08'] }), HALVES],
    ['that counts too few', bulk({}, { successCount: 2 }), HALVES],
    ['that counts too many', bulk({}, { successCount: 4 }), HALVES],
    ['that counts a failure and names nobody', bulk({}, { successCount: 2, failCount: 1 }), HALVES],
    [
      'that names a failure and counts none',
      bulk({ invalidUserIds: ['8'] }, { successCount: 3, failCount: 0 }),
      HALVES,
    ],
    ['without counts', answered(200, coded('Success')), HALVES],
    ['with HTML and 200', answered(200), { kind: 'whole', verdict: AGAIN }],
    ['cut off', answered(200, '{"successCount": 3'), { kind: 'whole', verdict: AGAIN }],
    ['of 204', answered(204, ''), { kind: 'whole', verdict: AGAIN }],
    ['400 BatchTooLarge', answered(400, coded('BatchTooLarge')), divide('content', 'BatchTooLarge')],
    ['413 with HTML', answered(413), divide('content', 'BatchTooLarge')],
    [
      '400 for the type of a field',
      answered(400, coded('RequestFieldsTypesMismatched', { validationErrors: { ltv: {} } })),
      divide('content', 'RequestFieldsTypesMismatched', 'ltv'),
    ],
    [
      '400 for the type of no field',
      answered(400, coded('RequestFieldsTypesMismatched')),
      divide('content', 'RequestFieldsTypesMismatched'),
    ],
    [
      '400 for one bad address',
      answered(400, coded('InvalidEmailAddressError')),
      divide('person', 'InvalidEmailAddressError'),
    ],
    ['409 for somebody forgotten', answered(409, coded('ForgottenUserError')), divide('person', 'ForgottenUserError')],
    ['400 with HTML', answered(400), divide('content', 'HTTP 400')],
    [
      '429',
      answered(429, coded('RateLimitExceeded', { rateLimitReset: 3 })),
      { kind: 'whole', verdict: { kind: 'slower', waitMs: 3_000 } },
    ],
    [
      '429 with plain text',
      answered(429, 'Too many', '2'),
      { kind: 'whole', verdict: { kind: 'slower', waitMs: 2_000 } },
    ],
    ['401', answered(401, coded('BadApiKey')), { kind: 'whole', verdict: { kind: 'stop' } }],
    ['403 with HTML', answered(403), { kind: 'whole', verdict: { kind: 'stop' } }],
    ['404', answered(404), { kind: 'whole', verdict: { kind: 'stop' } }],
    ['307', answered(307, ''), { kind: 'whole', verdict: { kind: 'stop' } }],
    ['500', answered(500), { kind: 'failed', verdict: AGAIN }],
    ['503 with Retry-After', answered(503, HTML, '7'), { kind: 'failed', verdict: { ...AGAIN, waitMs: 7_000 } }],
    [
      '400 GenericError',
      answered(400, coded('GenericError')),
      { kind: 'failed', verdict: { kind: 'refused', about: 'trouble', reason: 'GenericError' } },
    ],
    ['504', answered(504), { kind: 'whole', verdict: { kind: 'again', waitMs: 60_000, late: true } }],
    [
      'lost before it was sent',
      { kind: 'lost', because: 'ECONNREFUSED', reached: false },
      { kind: 'whole', verdict: AGAIN },
    ],
    [
      'lost after it was sent',
      { kind: 'lost', because: 'ETIMEDOUT', reached: true },
      { kind: 'whole', verdict: { kind: 'again', waitMs: 60_000, late: true } },
    ],
  ];
  it.each(table)('%s', (_, answer, judged) => {
    expect(judge(answer)).toMatchObject(judged);
  });

  it('is kept for each call without what it says of other people', () => {
    const judged = judge(bulk({ invalidEmails: ['eve@x.de'], forgottenUserIds: ['8'] }));
    expect(JSON.stringify(judged)).not.toMatch(/eve|"8"/);
  });
});

describe('an answer to events in bulk', () => {
  const events = [event('Opened', 'u:7'), event('Closed', 'u:8'), event('Opened', 'e:eve@x.de')];
  it('bars the events whose names are disallowed, whether or not they count as failed', () => {
    const verdicts = [refused('content', 'DisallowedEventName'), OK, refused('content', 'DisallowedEventName')];
    for (const failCount of [0, 2]) {
      const answer = answered(200, { successCount: 1, failCount, disallowedEventNames: ['Opened'], failedUpdates: {} });
      expect(judge(answer, events)).toMatchObject({ kind: 'each', verdicts });
    }
  });

  it('tells who is unknown', () => {
    expect(judge(bulk({ notFoundUserIds: ['8'] }), events)).toMatchObject({
      verdicts: [OK, refused('unknown', 'UnknownUserIdError'), OK],
    });
  });
});

describe('an answer that a list is not there', () => {
  it('stops what fills that list and nothing else, whatever the body is', () => {
    const quotas = { usersUpdate: 1, usersBulkUpdate: 1, eventsTrack: 1, eventsTrackBulk: 1, lists: 1, reads: 1 };
    const apiKey = new Secret('key');
    const { lists, close } = createIterablePort({ baseUrl: 'http://127.0.0.1', apiKey, projectKey: 'hybrid', quotas });
    if (lists === null) throw new Error('There are no lists.');
    const item = lists.change({ recipient: 'u:1', listId: 7, member: true, existingOnly: false });
    for (const body of [coded('NotFound'), HTML, 'no such list', '']) {
      expect(lists.carrier.judge(answered(404, body), [item], NOW)).toMatchObject({
        kind: 'whole',
        verdict: { kind: 'gone', reason: 'The list 7 is no longer in Iterable.' },
      });
    }
    close();
  });
});

describe('a batch', () => {
  it('is of a thousand calls and four million bytes at most, each lane at its quota', () => {
    const quotas = { usersUpdate: 1, usersBulkUpdate: 2, eventsTrack: 3, eventsTrackBulk: 4, lists: 5, reads: 6 };
    const apiKey = new Secret('key');
    const port = createIterablePort({ baseUrl: 'http://127.0.0.1', apiKey, projectKey: 'hybrid', quotas });
    const { update, track, lists, users } = port;
    const sizes = [update.single, update.bulk, track.single, track.bulk, lists?.carrier, users?.carrier].map(
      (carrier) => [carrier?.perSecond, carrier?.most, carrier?.bytes],
    );
    expect(sizes.map(([perSecond]) => perSecond)).toEqual([1, 2, 3, 4, 5, 6]);
    expect(sizes.map(([, most]) => most)).toEqual([1, 1_000, 1, 1_000, 1_000, 1]);
    for (const [, , bytes] of sizes) expect(bytes).toBe(4_000_000);
    port.close();
  });
});

describe('an answer to an unsubscription', () => {
  it('takes whoever is unknown for one who has left', () => {
    expect(judge(bulk({ notFoundUserIds: ['8'], invalidEmails: ['eve@x.de'] }), ITEMS, true)).toMatchObject({
      verdicts: [OK, OK, refused('person', 'InvalidEmailAddressError')],
    });
  });
});
