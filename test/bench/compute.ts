import { countAudience, countTrait, createCopy, fillCopy, type Differences } from './baseline.js';
import { limit, ratio, timed, type Report } from './figures.js';
import type { BenchServer } from './server.js';
import { AUDIENCE, fillShop, moveMembers, moveValues, settle, TRAIT } from './shop.js';
import { openSite, type Site } from './site.js';

/**
 * What a run costs against SQL by hand: the comparison against a full join that only counts, the first sync against a
 * plain INSERT … SELECT, two databases against one. Each turn times both sides on the same rows, one after the other,
 * and both must have found the same.
 */
const TURNS = 5;
const FIRST_TURNS = 3;
const STORAGE_BYTES = 200;

const audience = { key: 'spenders', name: 'Spenders', sql: AUDIENCE };
const trait = { key: 'spend', name: 'Spend', sql: TRAIT };
const newcomers = Array.from({ length: FIRST_TURNS }, (_, n) => ({ ...audience, key: `newcomer_${n}` }));

export async function measureCompute(server: BenchServer, members: number, report: Report): Promise<void> {
  const shop = await server.createDatabase('shop');
  const state = await server.createDatabase('shop_state');
  report.say(`Making a shop with ${members} members`);
  await fillShop(shop.client, members);
  const one = await openSite(shop, shop, { audiences: [audience, ...newcomers], traits: [trait] });
  const two = await openSite(shop, state, { audiences: [audience], traits: [trait] });
  try {
    await shop.client.query(`set work_mem = '${one.workMemMb}MB'; set jit = off`);
    await measureFirstSync();
    for (const site of [one, two]) for (const { key } of [audience, trait]) await site.run(key);
    await measureStorage();
    await measureRuns(audience.key, 'audience', countAudience, moveMembers);
    await measureRuns(trait.key, 'trait', countTrait, moveValues);
  } finally {
    await one.close();
    await two.close();
    await state.drop();
    await shop.drop();
  }

  async function measureFirstSync(): Promise<void> {
    const ours: number[] = [];
    const theirs: number[] = [];
    for (const [turn, { key }] of newcomers.entries()) {
      report.say(`First sync, turn ${turn + 1} of ${FIRST_TURNS}`);
      const definitionId = await one.idOf(key);
      const copy = async (): Promise<void> => {
        await createCopy(shop.client, key, definitionId);
        await settle(shop.client);
        const { ms, result } = await timed(() => fillCopy(shop.client, key, definitionId));
        requireSame({ entered: result }, { entered: members });
        theirs.push(ms);
      };
      const run = async (): Promise<void> => {
        await settle(shop.client);
        const { ms, result } = await timed(() => one.run(key));
        requireSame({ entered: result.entered }, { entered: members });
        ours.push(ms);
      };
      for (const side of turn % 2 === 0 ? [copy, run] : [run, copy]) await side();
      await shop.client.query(`truncate personas.snapshot_${definitionId}, ${key}`);
    }
    report.add(ratio(`first sync of ${members} / INSERT … SELECT`, ours, theirs, 1.6));
  }

  async function measureStorage(): Promise<void> {
    await settle(shop.client);
    for (const { key } of [audience, trait]) {
      const { rows } = await shop.client.query<{ bytes: string }>(
        `select pg_total_relation_size('personas.snapshot_${await one.idOf(key)}') as bytes`,
      );
      const bytes = Number(rows[0]?.bytes) / members;
      report.add(
        limit(
          `storage of the ${key === audience.key ? 'audience' : 'trait'}, a member`,
          bytes,
          STORAGE_BYTES,
          (value) => `${Math.round(value)} bytes`,
        ),
      );
    }
  }

  async function measureRuns(
    key: string,
    kind: 'audience' | 'trait',
    count: (client: typeof shop.client, definitionId: number) => Promise<Differences>,
    move: (client: typeof shop.client, turn: number) => Promise<void>,
  ): Promise<void> {
    const times = { churn: { join: [], one: [], two: [] }, same: { join: [], one: [], two: [] } } satisfies Record<
      string,
      Record<string, number[]>
    >;
    const definitionId = await one.idOf(key);
    const turnOf = async (
      into: { join: number[]; one: number[]; two: number[] },
      order: 'join first' | 'run first',
    ): Promise<void> => {
      await settle(shop.client);
      await settle(state.client);
      const join = async (): Promise<Differences> => {
        const { ms, result } = await timed(() => count(shop.client, definitionId));
        into.join.push(ms);
        return result;
      };
      const run = async (site: Site, ran: number[]): Promise<Differences> => {
        const { ms, result } = await timed(() => site.run(key));
        ran.push(ms);
        await site.drain();
        const { entered, exited, changed } = result;
        return { entered, exited, changed };
      };
      if (order === 'join first') {
        const expected = await join();
        requireSame(await run(one, into.one), expected);
        requireSame(await run(two, into.two), expected);
      } else {
        const expected = await run(two, into.two);
        requireSame(await run(one, into.one), expected);
        requireSame(await join(), expected);
      }
    };
    // Connections that are new read more slowly at first, on both sides.
    await turnOf({ join: [], one: [], two: [] }, 'join first');
    for (let turn = 0; turn < TURNS; turn += 1) {
      report.say(`Runs of the ${kind}, turn ${turn + 1} of ${TURNS}`);
      await move(shop.client, turn);
      await turnOf(times.churn, 'join first');
      await turnOf(times.same, turn % 2 === 0 ? 'run first' : 'join first');
    }
    const { churn, same } = times;
    report.add(ratio(`${kind}, 1 % churn: run / full join`, churn.one, churn.join, 1.5));
    report.add(ratio(`${kind}, no change: run / full join`, same.one, same.join, 1.5));
    report.add(ratio(`${kind}, 1 % churn: two databases / one`, churn.two, churn.one, 3));
    report.add(ratio(`${kind}, no change: two databases / one`, same.two, same.one, 3));
  }
}

function requireSame<T extends object>(found: T, expected: T): void {
  const [a, b] = [JSON.stringify(found), JSON.stringify(expected)];
  if (a !== b) throw new Error(`The two sides found different things: ${a} and ${b}.`);
}
