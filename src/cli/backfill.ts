import { OperatorError } from '../lib/errors.js';
import { act } from './act.js';
import { agrees, type CommandContext } from './command.js';
import { readKeys, refuseUnknown } from './known.js';
import type { Opened } from './open.js';
import { durationOf } from './quotas.js';
import { countOf, formatDuration, SIGN } from './output.js';
import { deliverAndReport, exitOf, summarise } from './sync.js';

/**
 * `backfill`: every member is sent again. One that was interrupted goes on, whether its cursor or only its calls were
 * left: a person agreed to it when it began.
 */
export interface BackfillOptions {
  key: string;
  events: boolean;
  yes: boolean;
}

interface Pair {
  destination: string;
  state: 'active' | 'paused' | 'disabled' | 'archived';
  identify: boolean;
  track: boolean;
  members: number;
  /** A first sync or a backfill is under way, and so much of it is left. */
  left: number | null;
}

interface Estimate {
  members: number;
  calls: number;
  /** At the full quota of each destination. */
  ms: number;
  resumes: boolean;
}

async function readPairs({ databases }: Opened, key: string): Promise<readonly Pair[]> {
  const { rows } = await databases.state.pool.query<Pair>(
    `select t.name as destination, d.state, (dd.identify or dd.list is not null) as identify, dd.track, d.members,
       case when dd.backfill is not null or o.waiting > 0 then
         o.waiting + case when dd.backfill is null then 0
           else greatest(0, dd.backfill_total - dd.backfill_done) * (dd.backfill_identify::int + dd.backfill_events::int) end
       end as left
     from definition as d
     join definition_destination as dd on dd.definition_id = d.id and dd.active
     join destination as t on t.id = dd.destination_id
     cross join lateral (select count(*) as waiting from outbox
       where destination_id = t.id and priority = 2 and definition_id = d.id) as o
     where d.key = $1 and d.first_run_at is not null`,
    [key],
  );
  return rows;
}

function estimate({ config }: Opened, pairs: readonly Pair[], events: boolean): Estimate {
  const resumes = pairs.some(({ left }) => left !== null);
  const each = pairs.map(({ destination, identify, track, members, left }) => {
    const configured = config.destinations.find(({ name }) => name === destination);
    const [updates, tracks] = resumes ? [left ?? 0, 0] : [identify ? members : 0, track && events ? members : 0];
    const ms = configured === undefined ? 0 : durationOf(configured, { updates, events: tracks });
    return { calls: updates + tracks, ms };
  });
  return {
    members: pairs[0]?.members ?? 0,
    calls: each.reduce((sum, { calls }) => sum + calls, 0),
    ms: Math.max(0, ...each.map(({ ms }) => ms)),
    resumes,
  };
}

function refuse(key: string, pairs: readonly Pair[], events: boolean): void {
  const [first] = pairs;
  if (first === undefined) {
    throw new OperatorError(`"${key}" has not been synced yet; \`personas-sync sync ${key}\` sends everyone.`);
  }
  if (first.state === 'paused') throw new OperatorError(`"${key}" is paused; \`personas-sync resume ${key}\` first.`);
  if (first.state !== 'active') throw new OperatorError(`"${key}" is ${first.state} in the configuration.`);
  if (!events && pairs.every(({ identify }) => !identify)) {
    throw new OperatorError(`"${key}" is sent as track calls alone; \`--events\` sends those again.`);
  }
}

export async function backfill(context: CommandContext, { key, events, yes }: BackfillOptions): Promise<number> {
  const { opened, output, signal } = context;
  refuseUnknown([key], await readKeys(opened), 'definition');
  const pairs = await readPairs(opened, key);
  refuse(key, pairs, events);
  const { members, calls, ms, resumes } = estimate(opened, pairs, events);
  const facts = { definition: key, members, calls, seconds: Math.ceil(ms / 1000), resumed: resumes };
  const cost = `${countOf(calls, 'call')}, about ${formatDuration(ms)} at the full quota`;
  output.say(
    resumes
      ? `The backfill of ${key} that was begun goes on: ${cost}.`
      : `A backfill of ${key} sends ${countOf(members, 'member')} again: ${cost}.`,
  );
  if (!resumes && !(await agrees(context, 'Send them?', yes))) {
    output.object({ ...facts, begun: false });
    return 2;
  }
  let exit = 0;
  const acted = await act(opened, {
    kind: 'backfill',
    args: { key, events, resumes },
    signal,
    afterwards: async (done) => {
      if (done.outcome !== 'done') return;
      const ended = await deliverAndReport(context, done);
      exit = ended.exit;
      output.object({ ...facts, begun: true, ...summarise(ended.delivery) });
      if (exit === 0)
        output.line(`${SIGN.good} ${key}: ${countOf(members, 'member')} ${members === 1 ? 'is' : 'are'} sent.`);
      else if (signal.aborted) output.line(`\`personas-sync backfill ${key}\` goes on where it stopped.`);
    },
  });
  return exitOf(context, acted, exit);
}
