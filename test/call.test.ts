import { describe, expect, it } from 'vitest';
import { formatCall, identifiersOf, type IdentifyCall, type TrackCall } from '../src/core/call.js';

const COMPUTATION = { kind: 'trait', id: 'tra_1', key: 'order_stats' } as const;
const CONTEXT = {
  personas: {
    computation_class: 'trait',
    computation_id: 'tra_1',
    computation_key: 'order_stats',
    namespace: 'spa_1',
    space_id: 'spa_1',
  },
};
const IDENTIFY: IdentifyCall = {
  type: 'identify',
  messageId: null,
  recipient: 'u:7',
  beside: 'ada@x.de',
  computation: COMPUTATION,
  traits: [
    { field: 'orders', json: '3', type: 'long' },
    { field: 'last "order"', json: 'null', type: 'date' },
  ],
};
const TRACK: TrackCall = {
  type: 'track',
  recipient: 'u:7',
  beside: 'ada@x.de',
  computation: COMPUTATION,
  event: 'Trait Computed',
  messageId: 'personas_0a1b',
  occurredAt: 1_767_225_600.5,
  properties: '{"trait_key": "order_stats", "orders": 3}',
  dates: [],
};

describe('a call in Segment’s form', () => {
  it('identifies with the traits, the email among them', () => {
    expect(JSON.parse(formatCall(IDENTIFY, 'spa_1'))).toEqual({
      type: 'identify',
      userId: '7',
      traits: { email: 'ada@x.de', orders: 3, 'last "order"': null },
      context: CONTEXT,
    });
  });

  it('identifies by an email alone', () => {
    const call = { ...IDENTIFY, recipient: 'e:ada@x.de', beside: null };
    expect(JSON.parse(formatCall(call, 'spa_1'))).toMatchObject({ traits: { email: 'ada@x.de' } });
    expect(JSON.parse(formatCall(call, 'spa_1'))).not.toHaveProperty('userId');
    expect(JSON.parse(formatCall(call, 'spa_1', { anonymous: true }))).toMatchObject({ anonymousId: 'ada@x.de' });
    expect(JSON.parse(formatCall(IDENTIFY, 'spa_1', { anonymous: true }))).not.toHaveProperty('anonymousId');
  });

  it('tracks with the properties, the email in its context', () => {
    expect(JSON.parse(formatCall(TRACK, 'spa_1'))).toEqual({
      type: 'track',
      userId: '7',
      event: 'Trait Computed',
      messageId: 'personas_0a1b',
      timestamp: '2026-01-01T00:00:00.500Z',
      properties: { trait_key: 'order_stats', orders: 3 },
      context: { ...CONTEXT, traits: { email: 'ada@x.de' } },
    });
  });

  it('tracks by a userId alone', () => {
    expect(JSON.parse(formatCall({ ...TRACK, beside: null }, 'spa_1'))).toMatchObject({ context: CONTEXT });
  });
});

describe('the identifiers of a call', () => {
  const table: readonly [recipient: string, beside: string | null, identifiers: object][] = [
    ['u:7', null, { userId: '7', email: null }],
    ['u:7', 'ada@x.de', { userId: '7', email: 'ada@x.de' }],
    ['e:ada@x.de', null, { userId: null, email: 'ada@x.de' }],
    ['e:ada@x.de', '7', { userId: '7', email: 'ada@x.de' }],
  ];
  it.each(table)('%s beside %s', (recipient, beside, identifiers) => {
    expect(identifiersOf({ recipient, beside })).toEqual(identifiers);
  });
});
