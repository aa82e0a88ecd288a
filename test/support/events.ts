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
