import { expect } from 'vitest';
import type { Simulator } from '../../src/demo/simulator/server.js';
import type { SeenRequest } from '../../src/demo/simulator/traffic.js';

/** Ids of events that were sent with several contents, singly or in bulk. */
export function ambiguousEvents(requests: readonly SeenRequest[]): string[] {
  const contents = new Map<string, string>();
  const ambiguous: string[] = [];
  for (const { endpoint, body } of requests) {
    if (endpoint !== 'events/track' && endpoint !== 'events/trackBulk') continue;
    const request = JSON.parse(body) as { id: string } | { events: { id: string }[] };
    for (const event of 'events' in request ? request.events : [request]) {
      const content = JSON.stringify(event);
      if ((contents.get(event.id) ?? content) !== content) ambiguous.push(event.id);
      contents.set(event.id, content);
    }
  }
  return ambiguous;
}

/** Each event id had one content, and each person of an audience entered and exited in turn, up to where they are now. */
export function expectEvents(simulator: Simulator, people: readonly Record<string, unknown>[]): void {
  expect(ambiguousEvents(simulator.requests())).toEqual([]);
  const told = new Map<string, string[]>();
  const seen = new Set<string>();
  for (const { id, name, identifier } of simulator.eventHistory) {
    if (!seen.has(id)) told.set(identifier, [...(told.get(identifier) ?? []), name]);
    seen.add(id);
  }
  for (const { user_id, vip } of people) {
    const names = told.get(user_id as string) ?? [];
    names.forEach((name, index) => expect(name).toBe(index % 2 === 0 ? 'Audience Entered' : 'Audience Exited'));
    expect({ user_id, member: names.length % 2 === 1 }).toEqual({ user_id, member: vip === 'true' });
  }
}
