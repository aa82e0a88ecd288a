import type { Destination } from '../config/types.js';

/** What a destination's quotas come to. */
export interface Quota {
  /** As in the configuration, and the name of the lane. */
  name: string;
  /** Requests a second. */
  quota: number;
}

export function quotasOf({ quotas }: Destination): readonly Quota[] {
  return Object.entries(quotas).map(([name, quota]) => ({
    name: name.replaceAll(/[A-Z]/g, (letter) => `_${letter.toLowerCase()}`),
    quota,
  }));
}

/** Above this Iterable is sent users and events in bulk, a thousand in a request. */
const BULK_FROM = 2_000;
const IN_BULK = 1_000;
/** About so many calls fit into a request to a destination that takes them in batches. */
const IN_BATCH = 500;

/** How long so many calls take at the full quota, in milliseconds. */
export function durationOf(destination: Destination, { updates, events }: { updates: number; events: number }): number {
  if (destination.type !== 'iterable') return ((updates + events) / IN_BATCH / destination.quotas.batch) * 1000;
  const { usersUpdate, usersBulkUpdate, eventsTrack, eventsTrackBulk } = destination.quotas;
  const isBulk = updates + events > BULK_FROM;
  const users = isBulk ? usersBulkUpdate * IN_BULK : usersUpdate;
  const tracks = isBulk ? eventsTrackBulk * IN_BULK : eventsTrack;
  return Math.max(updates / users, events / tracks) * 1000;
}
