import { countAudience } from './baseline.js';
import { ratio, seconds, timed, type Report } from './figures.js';
import { limitMemory, peakOfRuns } from './memory.js';
import type { BenchServer } from './server.js';
import { AUDIENCE, fillShop, moveMembers, settle } from './shop.js';
import { openSite } from './site.js';

/**
 * Ten million members: that a first run and a run with 1 % churn complete on this machine, how long they take, and that
 * the daemon needs no more memory for them than for a hundred thousand.
 */
const MEMBERS = 10_000_000;

export async function measureFull(server: BenchServer, report: Report): Promise<void> {
  const shop = await server.createDatabase('ten_million');
  report.say(`Making a shop with ${MEMBERS} members`);
  await fillShop(shop.client, MEMBERS);
  const site = await openSite(shop, shop, { audiences: [{ key: 'spenders', name: 'Spenders', sql: AUDIENCE }] });
  try {
    await shop.client.query(`set work_mem = '${site.workMemMb}MB'`);
    const first = await timed(() => site.run('spenders'));
    const completes = (name: string, ms: number): void =>
      report.add({ name: `${MEMBERS} members, ${name}`, measured: seconds(ms), bound: 'completes', holds: true });
    completes('first run', first.ms);
    await site.drain();
    await moveMembers(shop.client, 0);
    await settle(shop.client);
    const id = await site.idOf('spenders');
    const join = await timed(() => countAudience(shop.client, id));
    const run = await timed(() => site.run('spenders'));
    completes('1 % churn', run.ms);
    report.add(ratio(`${MEMBERS} members, 1 % churn: run / full join`, [run.ms], [join.ms], null));
  } finally {
    await site.close();
    await shop.drop();
  }
  limitMemory(await peakOfRuns(server, MEMBERS, report), MEMBERS, report);
}
