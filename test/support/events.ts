import { expect } from 'vitest';
import type { Simulator } from '../../src/demo/simulator/server.js';

/** Each event id had one content, and each person of an audience entered and exited in turn, up to where they are now. */
export function expectEvents(simulator: Simulator, people: readonly Record<string, unknown>[]): void {
  const contents = new Map<string, Set<string>>();
  for (const { endpoint, body } of simulator.requests()) {
    if (endpoint !== 'events/track') continue;
    const { id } = JSON.parse(body) as { id: string };
    contents.set(id, (contents.get(id) ?? new Set()).add(body));
  }
  expect([...contents.values()].filter(({ size }) => size !== 1)).toEqual([]);

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
