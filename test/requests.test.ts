import { describe, expect, it } from 'vitest';
import type { IdentifyCall, TrackCall } from '../src/core/call.js';
import type { ProjectKey } from '../src/core/definition.js';
import type { FieldType } from '../src/core/field.js';
import { createIterablePort } from '../src/destinations/iterable/port.js';
import { eventText, subscriberText, updateText, userPath } from '../src/destinations/iterable/requests.js';
import { Secret } from '../src/lib/secret.js';

const COMPUTATION = { kind: 'audience', id: 'aud_1', key: 'vip' } as const;

function identify(
  recipient: string,
  beside: string | null = null,
  traits: readonly [string, string, FieldType][] = [['vip', 'true', 'boolean']],
): IdentifyCall {
  return {
    type: 'identify',
    messageId: null,
    recipient,
    beside,
    computation: COMPUTATION,
    traits: traits.map(([field, json, type]) => ({ field, json, type })),
  };
}

const EVENT: TrackCall = {
  type: 'track',
  recipient: 'u:7',
  beside: null,
  computation: COMPUTATION,
  event: 'Audience Entered',
  messageId: 'personas_0a1b',
  occurredAt: 1_767_225_600.75,
  properties: '{"audience_key": "vip", "vip": true}',
  dates: [],
};
const track = (recipient: string, beside: string | null = null): TrackCall => ({ ...EVENT, recipient, beside });

describe('users/update', () => {
  const ada = 'ada@x.de';
  const table: readonly [name: string, key: ProjectKey, call: IdentifyCall, body: object][] = [
    ['an email project, the key alone', 'email', identify(`e:${ada}`), { email: ada }],
    ['an email project, with the userId beside', 'email', identify(`e:${ada}`, '7'), { email: ada, userId: '7' }],
    ['an email project, a userId alone', 'email', identify('u:7'), { userId: '7', preferUserId: true }],
    ['a userID project, the key alone', 'user_id', identify('u:7'), { userId: '7' }],
    [
      'a userID project, with the email beside',
      'user_id',
      identify('u:7', ada),
      { userId: '7', dataFields: { email: ada, vip: true } },
    ],
    ['a hybrid project, a userId alone', 'hybrid', identify('u:7'), { userId: '7' }],
    ['a hybrid project, an email alone', 'hybrid', identify(`e:${ada}`), { email: ada }],
    ['a hybrid project, with both', 'hybrid', identify('u:7', ada), { email: ada, userId: '7' }],
  ];
  it.each(table)('%s', (_, key, call, body) => {
    expect(JSON.parse(updateText([call], key))).toEqual({ dataFields: { vip: true }, ...body });
  });

  it('carries every digit that PostgreSQL gave', () => {
    const traits: [string, string, FieldType][] = [
      ['big', '9223372036854775807', 'long'],
      ['sum', '10.0', 'double'],
      ['exact', '0.1000000000000000000001', 'double'],
    ];
    expect(updateText([identify('u:7', null, traits)], 'hybrid')).toBe(
      '{"userId":"7","dataFields":{"big":9223372036854775807,"sum":10.0,"exact":0.1000000000000000000001}}',
    );
  });

  it('writes a date with a time as Iterable does, to the second, and leaves one without a time', () => {
    const traits: [string, string, FieldType][] = [
      ['at', '"2026-01-31T23:59:59Z"', 'date'],
      ['exactly', '"2026-01-31T23:59:59.999999Z"', 'date'],
      ['day', '"2026-01-31"', 'date'],
      ['text', '"2026-01-31T23:59:59Z"', 'string'],
      ['gone', 'null', 'date'],
    ];
    expect(JSON.parse(updateText([identify('u:7', null, traits)], 'hybrid'))).toMatchObject({
      dataFields: {
        at: '2026-01-31 23:59:59 +00:00',
        exactly: '2026-01-31 23:59:59 +00:00',
        day: '2026-01-31',
        text: '2026-01-31T23:59:59Z',
        gone: null,
      },
    });
  });

  it('has no null member but the field of a trait that is removed', () => {
    const removed = identify('u:7', null, [['ltv', 'null', 'double']]);
    for (const key of ['user_id', 'hybrid'] as const) {
      expect(updateText([removed], key)).toBe('{"userId":"7","dataFields":{"ltv":null}}');
    }
  });

  it('is one for all calls of a recipient, with the identifier beside the key that arose last', () => {
    const calls: [IdentifyCall, ...IdentifyCall[]] = [
      identify('u:7', 'old@x.de'),
      identify('u:7', 'new@x.de', [['ltv', '1.0', 'double']]),
      identify('u:7', null, [['orders', '2', 'long']]),
    ];
    expect(JSON.parse(updateText(calls, 'hybrid'))).toEqual({
      userId: '7',
      email: 'new@x.de',
      dataFields: { vip: true, ltv: 1, orders: 2 },
    });
  });

  it('takes any name and identifier as text', () => {
    const call = identify('u:a"\\b', null, [['say "hi"', '"</script>\\u2028"', 'string']]);
    expect(JSON.parse(updateText([call], 'hybrid'))).toEqual({
      userId: 'a"\\b',
      dataFields: { 'say "hi"': '</script>\u2028' },
    });
  });
});

describe('events/track', () => {
  const ada = 'ada@x.de';
  const table: readonly [name: string, key: ProjectKey, call: TrackCall, address: object][] = [
    ['an email project, the key alone', 'email', track(`e:${ada}`), { email: ada }],
    ['an email project, with the userId beside', 'email', track(`e:${ada}`, '7'), { email: ada, userId: '7' }],
    ['an email project, a userId alone', 'email', track('u:7'), { userId: '7' }],
    ['a userID project, the key alone', 'user_id', track('u:7'), { userId: '7' }],
    ['a userID project, whose events have no place for an email', 'user_id', track('u:7', ada), { userId: '7' }],
    ['a hybrid project, an email alone', 'hybrid', track(`e:${ada}`), { email: ada }],
    ['a hybrid project, with both', 'hybrid', track('u:7', ada), { email: ada, userId: '7' }],
  ];
  it.each(table)('%s', (_, key, call, address) => {
    expect(JSON.parse(eventText(call, key))).toEqual({
      ...address,
      eventName: 'Audience Entered',
      id: 'personas-0a1b',
      createdAt: 1_767_225_600,
      dataFields: { audience_key: 'vip', vip: true },
    });
  });

  it('has an id of letters, digits and hyphens alone, and whole seconds', () => {
    const body = JSON.parse(eventText(EVENT, 'hybrid')) as { id: string; createdAt: number };
    expect(body.id).toMatch(/^[A-Za-z0-9-]{1,512}$/);
    expect(Number.isInteger(body.createdAt)).toBe(true);
  });

  it('carries its properties as PostgreSQL wrote them', () => {
    const properties = '{"total": 10.0, "id": 9223372036854775807}';
    expect(eventText({ ...EVENT, properties }, 'hybrid')).toContain(`"dataFields":${properties}`);
  });
});

describe('a user who is asked for', () => {
  it('is named in the path, whatever the identifier holds', () => {
    expect(userPath('e:ada+1@x.de')).toBe('/api/users/ada%2B1%40x.de');
    expect(userPath('u:7/8?x')).toBe('/api/users/byUserId/7%2F8%3Fx');
  });
});

describe('a subscriber of a list', () => {
  it('is named by the key alone, and only made where they are put on it', () => {
    const change = { recipient: 'u:7', listId: 1, member: true, existingOnly: false };
    expect(subscriberText(change, 'hybrid')).toBe('{"userId":"7"}');
    expect(subscriberText(change, 'email')).toBe('{"userId":"7","preferUserId":true}');
    expect(subscriberText({ ...change, member: false }, 'email')).toBe('{"userId":"7"}');
  });
});

describe('a request', () => {
  const quotas = {
    usersUpdate: 500,
    usersBulkUpdate: 5,
    eventsTrack: 2_000,
    eventsTrackBulk: 10,
    lists: 5,
    reads: 100,
  };
  const port = createIterablePort({
    baseUrl: 'http://127.0.0.1:9',
    apiKey: new Secret('key'),
    projectKey: 'hybrid',
    quotas,
  });
  const change = (member: boolean, existingOnly = false, recipient = 'u:7') =>
    port.lists?.change({ recipient, listId: 3, member, existingOnly });
  const updates = [port.update.item([identify('u:7')]), port.update.item([identify('u:8', 'Eve@x.de')])];
  const events = [port.track.item(EVENT)];

  it('of single calls is the call itself, and of bulk calls an array of them', () => {
    const one = '{"userId":"7","dataFields":{"vip":true}}';
    const other = '{"email":"Eve@x.de","userId":"8","dataFields":{"vip":true}}';
    const single = { method: 'POST', timeoutMs: 10_000, isFrequent: true };
    const bulk = { method: 'POST', timeoutMs: 30_000 };
    expect(port.update.single.request(updates.slice(0, 1))).toEqual({
      ...single,
      path: '/api/users/update',
      body: one,
    });
    expect(port.update.bulk?.request(updates)).toEqual({
      ...bulk,
      path: '/api/users/bulkUpdate',
      body: `{"users":[${one},${other}]}`,
    });
    const event = eventText(EVENT, 'hybrid');
    expect(port.track.single.request(events)).toEqual({ ...single, path: '/api/events/track', body: event });
    expect(port.track.bulk?.request(events)).toEqual({
      ...bulk,
      path: '/api/events/trackBulk',
      body: `{"events":[${event}]}`,
    });
  });

  it('knows how long its body is before it is put together', () => {
    for (const carrier of [port.update.bulk, port.track.bulk]) {
      const texts = updates.reduce((sum, { text }) => sum + Buffer.byteLength(text) + 1, 0);
      const bytes = Buffer.byteLength(carrier?.request(updates).body ?? '');
      expect(bytes).toBe((carrier?.overhead ?? 0) + texts - 1);
    }
  });

  it('names its people as an answer names them', () => {
    expect(updates.map(({ names }) => names)).toEqual([['u:7'], ['u:8', 'e:eve@x.de']]);
  });

  it('of a list never unsubscribes from more than the list', () => {
    const items = [change(false), change(false, false, 'e:a@x.de')].flatMap((item) => item ?? []);
    expect(port.lists?.carrier.request(items)).toMatchObject({
      path: '/api/lists/unsubscribe',
      body: '{"listId":3,"subscribers":[{"userId":"7"},{"email":"a@x.de"}],"channelUnsubscribe":false}',
    });
  });

  it('of a list makes nobody where that isn’t wanted', () => {
    const body = (existingOnly: boolean): unknown =>
      port.lists?.carrier.request([change(true, existingOnly)].flatMap((item) => item ?? []));
    expect(body(false)).toMatchObject({
      path: '/api/lists/subscribe',
      body: '{"listId":3,"subscribers":[{"userId":"7"}]}',
    });
    expect(body(true)).toMatchObject({
      body: '{"listId":3,"subscribers":[{"userId":"7"}],"updateExistingUsersOnly":true}',
    });
    expect(change(true)?.group).not.toBe(change(true, true)?.group);
    expect(change(true)?.group).not.toBe(change(false)?.group);
  });
});
