import { stripVTControlCharacters } from 'node:util';
import { afterEach, describe, expect, it } from 'vitest';
import type { CommandContext } from '../src/cli/command.js';
import { resume } from '../src/cli/pause.js';
import { runs } from '../src/cli/runs.js';
import { status } from '../src/cli/status.js';
import type { RealtimeStatus } from '../src/cli/status-realtime.js';
import { uninstall } from '../src/realtime/install.js';
import { openLive, SHOP, SPENDERS, type Live } from './support/live.js';
import { until } from './support/until.js';

/** What a person sees of real time: `status`, `runs`, `resume`. */
let live: Live;
afterEach(() => live.close());

/** Runs a command, and gives what it has printed. */
async function print(
  command: (context: CommandContext) => Promise<number>,
): Promise<{ text: string; object: Record<string, unknown> }> {
  const lines: string[] = [];
  let object: Record<string, unknown> = {};
  const output = {
    json: false,
    line: (text = '') => lines.push(text),
    object: (result: Record<string, unknown>) => (object = result),
    objectWith: () => Promise.resolve(),
    say: (text: string) => lines.push(text),
  };
  const confirm = (): Promise<boolean> => Promise.resolve(true);
  await command({ opened: live.harness.opened, output, signal: new AbortController().signal, confirm });
  // Whoever runs the tests may have colours.
  return { text: stripVTControlCharacters(lines.join('\n')), object };
}
const printStatus = () => print((context) => status(context, null));

async function realtimeOf(key: string): Promise<RealtimeStatus | null> {
  const { object } = await printStatus();
  const definitions = object['definitions'] as readonly { key: string; realtime: RealtimeStatus | null }[];
  return definitions.find((each) => each.key === key)?.realtime ?? null;
}

const QUIET = { waiting: 0, parked: 0, oldestSeconds: null, corrections: null };

describe('status', () => {
  it('says that a definition is followed, and nothing of one that does not ask for it', async () => {
    const everybody = { key: 'everybody', sql: 'SELECT id AS profile_id FROM people', poll: '1 hour' };
    live = await openLive({ audiences: [SPENDERS, everybody] });
    live.start();
    await until(async () => (await realtimeOf('spenders'))?.state === 'live');
    expect(await realtimeOf('spenders')).toEqual({ state: 'live', because: null, ...QUIET });
    expect(await realtimeOf('everybody')).toBeNull();
    expect((await printStatus()).text).toMatch(/spenders +audience +real time +active/);
  });

  it('says that it is polled, and why', async () => {
    live = await openLive();
    await live.harness.sql('drop schema personas_capture cascade');
    live.start();
    const because = 'Nothing captures changes in the source: run `personas-sync realtime install`.';
    await until(async () => (await realtimeOf('spenders'))?.state === 'polled');
    expect(await realtimeOf('spenders')).toEqual({ state: 'polled', because, ...QUIET });
    const { text } = await printStatus();
    expect(text).toMatch(/spenders +audience +polled +active/);
    expect(text).toContain(`spenders is polled: ${because}`);
  });

  it('says that it is polled once everything was uninstalled beside it, and the log no more than that', async () => {
    live = await openLive();
    live.start();
    await live.isLive();
    const before = live.said().length;
    const options = { signal: new AbortController().signal, onDone: () => undefined };
    expect(await uninstall(live.harness.opened.databases.source, options)).toBe(true);
    await until(async () => (await realtimeOf('spenders'))?.state === 'polled');
    const lines = live.said().slice(before);
    expect(lines.filter((line) => /"code"|node_modules|"level":"error"/.test(line))).toEqual([]);
    expect(lines.filter((line) => line.includes('Nothing captures changes')).length).toBeLessThanOrEqual(1);
  });

  it('counts who waits and who is parked, and says what is in the way', async () => {
    live = await openLive();
    live.start();
    await live.isLive();
    await live.stop();
    await live.harness.state(`update definition set stuck_because = 'The table is gone.'`);
    await live.harness.state(
      `insert into due (definition_id, profile_id, at, parked_at, reason)
       select d.id, w.id, clock_timestamp() - interval '100 seconds', w.parked_at, w.reason from definition as d,
         (values ('7', null::timestamptz, null), ('7', null, null), ('8', null, null), ('9', now(), 'It divides by zero.')) as w(id, parked_at, reason)`,
    );
    expect(await realtimeOf('spenders')).toEqual({
      state: 'live',
      because: 'The table is gone.',
      waiting: 2,
      parked: 1,
      oldestSeconds: expect.closeTo(100, -2) as number,
      corrections: null,
    });
    const { text } = await printStatus();
    expect(text).toMatch(/active.*, 2 changed for 1 min \d+ s/);
    expect(text).toContain('What has changed of spenders waits: The table is gone.');
    expect(text).toContain("1 profile of spenders can't be evaluated, tried again each hour: It divides by zero.");
  });
});

describe('a definition whose reconcile had to correct something', () => {
  it('is polled, said by `status` and `runs`, until `resume` has it judged and followed again', async () => {
    live = await openLive();
    live.start();
    await live.isLive();
    await live.harness.state(`delete from snapshot where recipient = 'u:u3'`);
    await live.harness.sync('spenders');
    const given = await realtimeOf('spenders');
    expect(given).toMatchObject({ state: 'polled', corrections: 1 });
    expect(given?.because).toMatch(/^Run \d+ compared everybody and had to correct one recipient: /);
    expect((await printStatus()).text).toContain(
      'following changes has missed something. When that is mended, `personas-sync resume spenders` has it followed again.',
    );
    const listed = (await print((context) => runs(context, { key: null, limit: 10 }))).object['runs'];
    expect(listed).toContainEqual(expect.objectContaining({ trigger: 'sync', corrections: 1 }));

    const resumed = await print((context) => resume(context, 'spenders'));
    expect(resumed.object).toEqual({ definition: 'spenders', state: 'active', changed: true });
    expect(resumed.text).toContain('Whether its changes can be followed is looked at anew by the daemon');
    await live.isLive();
    expect(await realtimeOf('spenders')).toMatchObject({ state: 'live', because: null });
    expect((await print((context) => resume(context, 'spenders'))).object).toMatchObject({ changed: false });
  });
});

it('a definition that takes too long for want of an index is followed once there is one and `resume` says so', async () => {
  live = await openLive({
    tables: `${SHOP}
      insert into people select n, 'u' || n, 'u' || n || '@x.de' from generate_series(21, 20000) as n;
      drop index people_lower_idx; analyze people`,
  });
  live.start();
  await until(async () => (await realtimeOf('spenders'))?.because?.includes('CREATE INDEX') === true);
  expect((await realtimeOf('spenders'))?.because).toBe(
    '"spenders" evaluating one person reads all of `people` (Seq Scan): run `CREATE INDEX ON people (lower(btrim(email)))`, or leave it polled.',
  );
  await live.harness.sql('create index on people (lower(btrim(email)))');
  await print((context) => resume(context, 'spenders'));
  await live.isLive();
});
