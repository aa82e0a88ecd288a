import { describe, expect, it } from 'vitest';
import type { Verdict } from '../src/core/verdict.js';
import { scrubAnswer } from '../src/destinations/answer.js';
import type { Answer } from '../src/destinations/carrier.js';
import { judgeSegment } from '../src/destinations/segment/port.js';
import { isUserThere, judgeAnswer, judgeOne, judgeTrack, judgeUser } from '../src/destinations/iterable/verdict.js';

const NOW = Date.UTC(2026, 0, 1, 12, 0, 0);
const HTML = '<html><body><h1>Something</h1></body></html>';

function answered(status: number, body: unknown = HTML, retryAfter: string | null = null): Answer {
  return { kind: 'answered', status, body: typeof body === 'string' ? body : JSON.stringify(body), retryAfter };
}
const coded = (code: string, params: unknown = null, msg = ''): unknown => ({ msg, code, params });
const judge = (answer: Answer, fields: readonly string[] = ['ltv', 'orders']): Verdict =>
  judgeAnswer(answer, fields, NOW);

const ACKNOWLEDGED = { kind: 'acknowledged' } as const;
const AGAIN = { kind: 'again', waitMs: null, late: false } as const;
const refusal = (about: string, reason: string): object => ({ kind: 'refused', about, reason });
const stopFor = (reason: RegExp): object => ({ kind: 'stop', reason: expect.stringMatching(reason) as string });

/** Every code that Iterable's page of the API names, under 400. */
const CODES: Readonly<Record<string, object>> = {
  BadApiKey: stopFor(/BadApiKey/),
  BadAuthorizationHeader: stopFor(/BadAuthorizationHeader/),
  BadJsonBody: refusal('content', 'BadJsonBody'),
  BadParams: refusal('content', 'BadParams'),
  BatchTooLarge: refusal('content', 'BatchTooLarge'),
  DatabaseError: refusal('trouble', 'DatabaseError'),
  EmailAlreadyExists: refusal('conflict', 'EmailAlreadyExists'),
  ExternalKeyConflict: refusal('conflict', 'ExternalKeyConflict'),
  Forbidden: stopFor(/Forbidden/),
  ForbiddenParamsError: refusal('content', 'ForbiddenParamsError'),
  ForgottenUserError: refusal('person', 'ForgottenUserError'),
  GenericError: refusal('trouble', 'GenericError'),
  InvalidEmailAddressError: refusal('person', 'InvalidEmailAddressError'),
  InvalidJwtPayload: stopFor(/InvalidJwtPayload/),
  InvalidUserIdError: refusal('person', 'InvalidUserIdError'),
  JwtUserIdentifiersMismatched: stopFor(/JwtUserIdentifiersMismatched/),
  NotFound: refusal('content', 'NotFound'),
  QueueEmailError: refusal('trouble', 'QueueEmailError'),
  RateLimitExceeded: { kind: 'slower', waitMs: null },
  RequestFieldsTypesMismatched: refusal('content', 'RequestFieldsTypesMismatched'),
  // Under a status that says otherwise, the word says nothing.
  Success: refusal('content', 'Success'),
  Unauthorized: stopFor(/Unauthorized/),
  UniqueFieldsLimitExceeded: refusal('content', 'UniqueFieldsLimitExceeded'),
  UnknownEmailError: refusal('unknown', 'UnknownEmailError'),
  UnknownUserIdError: refusal('unknown', 'UnknownUserIdError'),
  UserIdAlreadyExists: refusal('conflict', 'UserIdAlreadyExists'),
  SomethingNew: refusal('content', 'SomethingNew'),
};

describe('an answer', () => {
  const table: readonly [name: string, answer: Answer, verdict: object][] = [
    ['200 Success', answered(200, coded('Success')), ACKNOWLEDGED],
    ['200 with more than is known', answered(200, { ...(coded('Success') as object), extra: [1] }), ACKNOWLEDGED],
    ['200 with another object', answered(200, { successCount: 1 }), ACKNOWLEDGED],
    ['202 Success', answered(202, coded('Success')), ACKNOWLEDGED],
    ['200 with HTML', answered(200), AGAIN],
    ['200 cut off', answered(200, '{"msg": "", "code": "Succ'), AGAIN],
    ['200 without a body', answered(200, ''), AGAIN],
    ['200 with an array', answered(200, []), AGAIN],
    ['204', answered(204, ''), AGAIN],
    ['301', answered(301, ''), stopFor(/redirect.*region/)],
    ['302', answered(302), stopFor(/redirect/)],
    ['307', answered(307, coded('Success')), stopFor(/redirect/)],
    ['308', answered(308, ''), stopFor(/redirect/)],
    ['400 with HTML', answered(400), refusal('content', 'HTTP 400')],
    ['400 without a code', answered(400, { msg: 'no' }), refusal('content', 'HTTP 400')],
    ['400 with a code that is none', answered(400, coded('ada@x.de said no')), refusal('content', 'HTTP 400')],
    [
      '401 BadApiKey',
      answered(401, coded('BadApiKey')),
      stopFor(/^Iterable refused the API key \(HTTP 401, BadApiKey\)\.$/),
    ],
    ['401 with HTML', answered(401), stopFor(/^Iterable refused the API key \(HTTP 401\)\.$/)],
    ['403 Forbidden', answered(403, coded('Forbidden')), stopFor(/HTTP 403, Forbidden/)],
    ['403 with any other code', answered(403, coded('BadParams')), stopFor(/HTTP 403, BadParams/)],
    ['404 with HTML', answered(404), stopFor(/HTTP 404.*region/)],
    ['404 NotFound', answered(404, coded('NotFound')), stopFor(/HTTP 404/)],
    ['404 of a user', answered(404, coded('UnknownEmailError')), refusal('unknown', 'UnknownEmailError')],
    ['405', answered(405), refusal('content', 'HTTP 405')],
    ['408', answered(408), AGAIN],
    [
      '409 ExternalKeyConflict',
      answered(409, coded('ExternalKeyConflict')),
      refusal('conflict', 'ExternalKeyConflict'),
    ],
    ['409 ForgottenUserError', answered(409, coded('ForgottenUserError')), refusal('person', 'ForgottenUserError')],
    ['409 with HTML', answered(409), refusal('conflict', 'HTTP 409')],
    ['413 with HTML', answered(413), refusal('content', 'BatchTooLarge')],
    ['413 with a code', answered(413, coded('BadParams')), refusal('content', 'BatchTooLarge')],
    ['422', answered(422, coded('BadParams')), refusal('content', 'BadParams')],
    ['500 with HTML', answered(500), AGAIN],
    ['500 GenericError', answered(500, coded('GenericError')), AGAIN],
    ['500 that says Success', answered(500, coded('Success')), AGAIN],
    ['500 that blames the key', answered(500, coded('BadApiKey')), AGAIN],
    ['502 with HTML', answered(502), AGAIN],
    ['503 with HTML', answered(503), AGAIN],
    ['503 with Retry-After', answered(503, HTML, '7'), { ...AGAIN, waitMs: 7_000 }],
    ['504, where the request may still be applied', answered(504), { kind: 'again', waitMs: 60_000, late: true }],
    ['lost before it was sent', { kind: 'lost', because: 'ECONNREFUSED', reached: false }, AGAIN],
    [
      'lost after it was sent',
      { kind: 'lost', because: 'ECONNRESET', reached: true },
      { kind: 'again', waitMs: 60_000, late: true },
    ],
    ...Object.entries(CODES).map(([code, verdict]): [string, Answer, object] => [
      `400 ${code}`,
      answered(400, coded(code)),
      verdict,
    ]),
  ];
  it.each(table)('%s', (_, answer, verdict) => {
    expect(judge(answer)).toMatchObject(verdict);
  });

  it('that refuses is kept', () => {
    const body = JSON.stringify(coded('BadParams', { a: 1 }, 'too long'));
    expect(judge(answered(400, body))).toMatchObject({ answer: body });
  });
});

describe('a failure', () => {
  const none = (because: string, reached: boolean): Answer => ({ kind: 'lost', because, reached });
  const table: readonly [name: string, answer: Answer, reason: string, kept: string][] = [
    ['of the destination', answered(500, 'ada@x.de'), 'HTTP 500', '[email]'],
    ['of a gateway', answered(504), 'HTTP 504', HTML],
    ['to be quick enough', answered(408, ''), 'HTTP 408', ''],
    ['to answer', none('ETIMEDOUT', true), 'NoAnswer', 'No answer came (ETIMEDOUT).'],
    ['to be there', none('ECONNREFUSED', false), 'NoAnswer', 'No answer came (ECONNREFUSED).'],
  ];
  it.each(table)('%s has a reason, should it be given up', (_, answer, reason, kept) => {
    expect(judge(answer)).toMatchObject({ kind: 'again', reason, answer: kept });
    const segment = judgeSegment(answer, [], NOW);
    expect(segment.kind === 'each' ? null : segment.verdict).toEqual(judge(answer));
  });

  it('to say it in words of its own has one, too', () => {
    expect(judge(answered(200))).toMatchObject({ kind: 'again', reason: 'UnreadableAnswer', answer: HTML });
  });
});

describe('the wait after a 429', () => {
  const soon = new Date(NOW + 30_000).toUTCString();
  const table: readonly [name: string, body: unknown, retryAfter: string | null, waitMs: number | null][] = [
    ['is that of the bucket', coded('RateLimitExceeded', { rateLimitReset: 3 }), null, 3_000],
    ['is that of the bucket as text', coded('RateLimitExceeded', { rateLimitReset: '3' }), null, 3_000],
    ['with fractions', coded('RateLimitExceeded', { rateLimitReset: 0.5 }), null, 500],
    ['is the bucket’s rather than the header’s', coded('RateLimitExceeded', { rateLimitReset: 3 }), '9', 3_000],
    ['is the header’s seconds', coded('RateLimitExceeded'), '9', 9_000],
    ['is the header’s seconds, with plain text', 'Rate limit exceeded', '9', 9_000],
    ['is until the header’s date', coded('RateLimitExceeded'), soon, 30_000],
    ['of a date that has passed is not told', 'x', new Date(NOW - 1_000).toUTCString(), null],
    ['of nothing at all is not told', coded('RateLimitExceeded'), null, null],
    ['is not told by plain text', 'Rate limit exceeded', null, null],
    ['is not told by HTML', HTML, null, null],
    ['is not told by an empty header', HTML, '', null],
    ['is not told by words', HTML, 'soon', null],
    ['of zero would be no wait', coded('RateLimitExceeded', { rateLimitReset: 0 }), '0', null],
    ['of less than zero would be none', coded('RateLimitExceeded', { rateLimitReset: -5 }), '-5', null],
    ['is not told by null', coded('RateLimitExceeded', { rateLimitReset: null }), null, null],
    ['is not told by a list', coded('RateLimitExceeded', { rateLimitReset: [1] }), null, null],
    ['is ten minutes at most', coded('RateLimitExceeded', { rateLimitReset: 1e12 }), null, 600_000],
  ];
  it.each(table)('%s', (_, body, retryAfter, waitMs) => {
    expect(judge(answered(429, body, retryAfter))).toEqual({ kind: 'slower', waitMs });
  });
});

describe('the field that a refusal names', () => {
  const mismatch = (params: unknown, msg = 'The data types are not those of before.'): Answer =>
    answered(400, coded('RequestFieldsTypesMismatched', params, msg));
  const errors = (field: string): object => ({ validationErrors: { [field]: { expectedType: 'long' } } });
  const table: readonly [name: string, answer: Answer, fields: readonly string[], field: string | null][] = [
    ['is the key in its params', mismatch(errors('ltv')), ['ltv', 'orders'], 'ltv'],
    ['is a text in its params', mismatch({ fields: ['ltv'] }), ['ltv', 'orders'], 'ltv'],
    ['is in a sentence of its params', mismatch({ e: ["Field 'ltv' is a long"] }), ['ltv', 'orders'], 'ltv'],
    ['is in quotes in its message', mismatch(null, "Field 'ltv' of type 'user'"), ['ltv', 'orders'], 'ltv'],
    ['is in double quotes in its message', mismatch(null, 'Field "ltv" is wrong'), ['ltv', 'orders'], 'ltv'],
    ['is behind dataFields in its message', mismatch(null, 'dataFields.ltv is wrong'), ['ltv', 'orders'], 'ltv'],
    ['is the field of a nested path', mismatch(errors('address.city')), ['address', 'ltv'], 'address'],
    ['may hold characters of a pattern', mismatch(errors('a+b(c)')), ['a+b(c)', 'ltv'], 'a+b(c)'],
    ['is not another that begins alike', mismatch(errors('ltv_total')), ['ltv', 'ltv_total'], 'ltv_total'],
    ['is not another behind dataFields', mismatch(null, 'dataFields.ltv_total'), ['ltv', 'ltv_total'], 'ltv_total'],
    ['is none where two are named', mismatch({ ...errors('ltv'), more: 'orders' }), ['ltv', 'orders'], null],
    ['is none where nothing is named', mismatch(null), ['ltv', 'orders'], null],
    ['is none where it isn’t one of the call', mismatch(errors('other')), ['ltv', 'orders'], null],
    ['is none in HTML', answered(400, "<p>'ltv'</p>"), ['ltv'], null],
    ['is told by any refusal', answered(400, coded('BadParams', null, "'ltv' is too long")), ['ltv', 'orders'], 'ltv'],
  ];
  it.each(table)('%s', (_, answer, fields, field) => {
    expect(judge(answer, fields)).toMatchObject({ kind: 'refused', about: 'content', field });
  });
});

describe('the answer about a user', () => {
  const read = (there: boolean): object => ({ kind: 'read', there });
  const table: readonly [name: string, answer: Answer, judged: object][] = [
    ['with a user: there', answered(200, { user: { email: 'a@x.de' } }), read(true)],
    ['that is empty: not there', answered(200, '{}'), read(false)],
    ['with no user: not there', answered(200, { user: null }), read(false)],
    ['that doesn’t know them: not there', answered(400, coded('UnknownEmailError')), read(false)],
    ['that is another’s: again', answered(200), AGAIN],
    ['that speaks of something else: as any success', answered(200, coded('Success')), ACKNOWLEDGED],
    ['that refuses the address: refused', answered(400, coded('InvalidEmailAddressError')), { kind: 'refused' }],
    ['429: slower', answered(429, HTML, '2'), { kind: 'slower', waitMs: 2_000 }],
    ['401: stop', answered(401), { kind: 'stop' }],
    ['500: again', answered(500), AGAIN],
    ['lost: again', { kind: 'lost', because: 'ECONNRESET', reached: true }, { kind: 'again' }],
  ];
  it.each(table)('%s', (_, answer, judged) => {
    const batch = judgeUser(answer, NOW);
    const verdict = batch.kind === 'each' ? batch.verdicts[0] : batch.verdict;
    expect(verdict?.kind === 'read' ? { kind: 'read', there: isUserThere(verdict) } : verdict).toMatchObject(judged);
  });
});

describe('the answer to an event', () => {
  it('refuses one whose name the project bars, though it says success', () => {
    const barred = answered(200, coded('Success', null, 'Opened is disallowed from tracking'));
    expect(judgeTrack(barred, NOW)).toMatchObject(refusal('content', 'DisallowedEventName'));
  });

  it('accepts any other', () => {
    const tracked = answered(200, coded('Success', { id: 'x' }, 'Event with id: disallowed tracked.'));
    for (const answer of [tracked, answered(200, coded('Success'))])
      expect(judgeTrack(answer, NOW)).toEqual(ACKNOWLEDGED);
    expect(judgeTrack(answered(400, coded('BadParams')), NOW)).toMatchObject(refusal('content', 'BadParams'));
  });
});

describe('a request with a single call', () => {
  it('tells a destination that failed from one that was not heard', () => {
    const lost: Answer = { kind: 'lost', because: 'ECONNRESET', reached: true };
    const table: readonly [Answer, string][] = [
      [answered(200, coded('Success')), 'each'],
      [answered(400, coded('BadParams')), 'each'],
      [answered(200), 'whole'],
      [answered(429), 'whole'],
      [answered(401), 'whole'],
      [answered(503), 'failed'],
      [answered(400, coded('GenericError')), 'failed'],
      [lost, 'whole'],
    ];
    for (const [answer, kind] of table) expect(judgeOne(answer, judge(answer)).kind).toBe(kind);
  });
});

describe('an answer that is kept', () => {
  it('holds no address of a person, however it is written', () => {
    const text = `Invalid email: ada.lovelace+1@example.co.uk; <jürgen@exämple.de>, "x@y.de" {"e":"b\\u0040c.de"} /users/p%2B1%40x.de?a`;
    expect(scrubAnswer(text)).toBe('Invalid email: [email]; <[email]>, "[email]" {"e":"[email]"} /users/[email]?a');
  });

  it('is 2,000 bytes at most, and ends with a whole character', () => {
    expect(scrubAnswer('x'.repeat(1_999))).toHaveLength(1_999);
    const kept = scrubAnswer('é'.repeat(3_000));
    expect(Buffer.byteLength(kept)).toBe(2_000);
    expect(kept).not.toContain('\uFFFD');
    expect(Buffer.byteLength(scrubAnswer(`a${'é'.repeat(3_000)}`))).toBe(1_999);
  });

  it('shows no part of an address that its end cuts in two', () => {
    const addresses = Array.from({ length: 400 }, (_, n) => `somebody.with.a.long.name.${n}@example.com`).join(',');
    expect(scrubAnswer(addresses)).toMatch(/^(\[email\],)*(\[email\]?)?$/);
  });

  it('is text that PostgreSQL takes and a terminal may show', () => {
    expect(scrubAnswer('a\0b\u001b[31mc\nd')).toBe('a\uFFFDb\uFFFD[31mc\nd');
    expect(judge(answered(400, 'a\0b'))).toMatchObject({ answer: 'a\uFFFDb' });
  });

  it('is read in no time, however long it is', () => {
    const began = performance.now();
    scrubAnswer('a'.repeat(5_000_000));
    scrubAnswer('a@'.repeat(2_500_000));
    expect(performance.now() - began).toBeLessThan(500);
  });
});
