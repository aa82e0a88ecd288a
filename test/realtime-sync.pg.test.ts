import { afterEach, describe, expect, it } from 'vitest';
import { openLive, type Live } from './support/live.js';
import { until } from './support/until.js';

/** `sync` of a definition that is followed: whatever was committed before it is delivered when it ends. */
let live: Live;
afterEach(() => live.close());

const eventsOf = (email: string): readonly string[] => live.harness.simulator.events(email).map(({ name }) => name);

describe.each([
  ['beside a daemon', true, false],
  ['that leads itself', false, false],
  ['that leads itself, in two databases', false, true],
])('a `sync` %s', (_, isLed, separate) => {
  it('delivers what was captured before it, though nobody takes it', async () => {
    live = await openLive({ separate });
    live.start();
    await live.isLive();
    if (!isLed) await live.stop();
    await live.harness.sql('insert into orders (customer_id, total) values (9, 150)');
    const { progress, delivery } = await live.harness.sync('spenders');
    expect(progress).toMatchObject({ runs: [{ outcome: 'succeeded', members: 6 }], unevaluated: [] });
    expect(delivery).toMatchObject({ waiting: 0, refused: 0 });
    expect(eventsOf('u9@x.de')).toEqual(['Audience Entered']);
    expect(await live.harness.state('select from due')).toEqual([]);
    expect(await live.harness.sql('select from personas_capture.capture')).toEqual([]);
    const [run] = await live.harness.state('select corrections from run order by id desc limit 1');
    expect(run).toEqual({ corrections: 0 });
  });
});

/** Begins a `sync` whose run waits at its start until `release`; what was due before has been evaluated by then. */
async function beginSync(): Promise<{ release: () => Promise<void>; synced: ReturnType<Live['harness']['sync']> }> {
  live = await openLive();
  live.start();
  await live.isLive();
  await live.stop();
  const { harness } = live;
  await harness.state(`create function wait() returns trigger language plpgsql as
    $$ begin if new.full_run is not null then perform pg_advisory_xact_lock(7); end if; return new; end $$`);
  await harness.state(
    'create trigger wait before update of full_run on definition for each row execute function wait()',
  );
  const holder = await harness.database.pool.connect();
  await holder.query('select pg_advisory_lock(7)');
  const synced = harness.sync('spenders');
  await until(async () => (await harness.state('select from run where outcome is null')).length > 0);
  return {
    synced,
    release: async () => {
      await holder.query('select pg_advisory_unlock(7)');
      holder.release();
    },
  };
}

it('what changes while the run is under way is evaluated before the `sync` ends', async () => {
  const { release, synced } = await beginSync();
  await live.harness.sql('insert into orders (customer_id, total) values (10, 150)');
  await release();
  const { progress, delivery } = await synced;
  // It is left out of the run: what is evaluated singly is newer.
  expect(progress).toMatchObject({ runs: [{ outcome: 'succeeded', entered: 0 }], unevaluated: [] });
  expect(delivery).toMatchObject({ waiting: 0 });
  expect(eventsOf('u10@x.de')).toEqual(['Audience Entered']);
  expect(await live.harness.state('select from due')).toEqual([]);
});

it('what can not be evaluated after the run is named, and waits', async () => {
  const { release, synced } = await beginSync();
  await live.harness.sql('insert into orders (customer_id, total) values (10, 150)');
  await live.harness.state(`create function broken() returns trigger language plpgsql as
    $$ begin raise exception 'broken' using errcode = 'undefined_table'; end $$`);
  await live.harness.state('create trigger broken before delete on due for each row execute function broken()');
  await release();
  expect((await synced).progress).toMatchObject({ runs: [{ outcome: 'succeeded' }], unevaluated: ['spenders'] });
  expect(eventsOf('u10@x.de')).toEqual([]);
  expect((await live.harness.state('select from due')).length).toBe(1);
});
