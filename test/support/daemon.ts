import { runDaemon, type Leadership, type Resources } from '../../src/daemon.js';

export interface LeadingDaemon {
  leadership: Leadership;
  stop: () => Promise<void>;
}

/** Leads in this process all the while, so that several commands in a row find one leader, when this resolves. */
export async function startDaemon(resources: Resources): Promise<LeadingDaemon> {
  const stopping = new AbortController();
  return new Promise((resolve, reject) => {
    const running = runDaemon(resources, stopping.signal, (leadership) =>
      resolve({
        leadership,
        stop: async () => {
          stopping.abort();
          await running;
        },
      }),
    );
    running.catch(reject);
  });
}
