import type { Opened } from '../../src/cli/open.js';
import { tryLead } from '../../src/db/lease.js';
import { register, type RegisteredDestination } from '../../src/sync/registry.js';

/** Applies the configuration as an instance does that leads for no longer than that. */
export async function applyConfig({
  databases,
  config,
  targetOf,
}: Pick<Opened, 'databases' | 'config' | 'targetOf'>): Promise<readonly RegisteredDestination[]> {
  const lease = await tryLead(databases.state.pool);
  if (lease === null) throw new Error('Another instance leads.');
  const hostOf = (name: string): string => {
    const destination = config.destinations.find((each) => each.name === name);
    if (destination === undefined) throw new Error(`There is no destination ${name}.`);
    return targetOf(destination).host;
  };
  try {
    return await register(databases.state, config, hostOf, { confirmRemovals: true, leader: lease.holder });
  } finally {
    await lease.release();
  }
}
