import { migrate } from '../../src/db/migrate.js';
import { openPool, type Pool } from '../../src/db/connect.js';
import { tryLead, type Taken as Lease } from '../../src/db/lease.js';
import { createLogger, type Logger } from '../../src/lib/logger.js';
import { Secret } from '../../src/lib/secret.js';
import { createCapture, type Capture, type CaptureOptions, type Way } from '../../src/realtime/capture.js';
import { startMover, type Mover, type MoverOptions } from '../../src/realtime/mover.js';
import { createDatabase, type TestDatabase } from './database.js';

/** A source whose orders are captured, and a state with definitions that follow them. */
export interface Captured {
  database: TestDatabase;
  /** As the daemon sees them. */
  source: Pool;
  state: Pool;
  lease: Lease;
  installation: string;
  log: Logger;
  /** Lines of the log. */
  said: () => readonly string[];
  /** The ways from each watch; a test may change them. */
  ways: Map<string, readonly Way[]>;
  /** Definitions for which something was said to wait. */
  signalled: number[];
  /** Whose changes could not be found, and why. */
  unresolved: { keys: readonly string[]; sentence: string }[];
  /** A capture for `leader`, or for the lease that is held. */
  capture: (more?: Partial<CaptureOptions>) => Capture;
  /** A mover of that capture, which is stopped at the end. */
  move: (more?: Partial<MoverOptions>) => Mover;
  /** What waits, by definition, without what is due twice, in order. */
  due: (key?: string) => Promise<readonly string[]>;
  /** Which definitions want a run in full. */
  wantsFull: () => Promise<readonly string[]>;
  /** How many captured rows there are. */
  left: () => Promise<number>;
  close: () => Promise<void>;
}

export const WATCH = 'public.orders(customer_id)';
const INSTALLATION = '6f6b1c2e-0d4e-4f6b-9a39-0f2f4a1d9b10';

/** As `realtime install` makes them, for a table of orders. */
const SOURCE = `
  create table orders (id bigint generated always as identity, customer_id bigint, total numeric);
  create schema personas_capture;
  create table personas_capture.capture (
    id bigint primary key generated always as identity, watch text not null, keys text[]);
  create table personas_capture.listener (
    only_row boolean primary key default true check (only_row), installation uuid not null);
  create sequence personas_capture.asleep_until as bigint;
  insert into personas_capture.listener (installation) values ('${INSTALLATION}');
  create function personas_capture.orders() returns trigger language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
  begin
    insert into personas_capture.capture (watch, keys)
    select '${WATCH}', case when cardinality(k) <= 50000 then k::text[] end
    from (select array_agg(distinct customer_id) filter (where customer_id is not null) as k from new_rows) as c where k is not null;
    if found and pg_sequence_last_value('personas_capture.asleep_until') > extract(epoch from clock_timestamp()) then
      perform pg_notify('personas_capture', '');
    end if;
    return null;
  end $$;
  create trigger personas_insert after insert on orders referencing new table as new_rows
    for each statement execute function personas_capture.orders();`;

export async function createCaptured({ separate = false }: { separate?: boolean } = {}): Promise<Captured> {
  const database = await createDatabase();
  const stateDatabase = separate ? await createDatabase() : database;
  await database.pool.query(SOURCE);
  await migrate(stateDatabase.pool, 'personas');
  const source = openPool({ url: new Secret(database.url), purpose: 'source', max: 8 });
  const state = openPool({ url: new Secret(stateDatabase.url), purpose: 'state', max: 8, schema: 'personas' });
  await state.query(
    `insert into definition (key, kind, name, computation_id, tracking, polled_because)
     select key, 'audience', key, key, tracking, case when tracking = 'polled' then 'no triggers' end
     from (values ('vip', 'live'), ('big', 'live'), ('slow', 'polled')) as d (key, tracking)`,
  );
  const lease = await tryLead(state);
  if (lease === null) throw new Error('Somebody leads already.');
  const lines: string[] = [];
  const stream = new (await import('node:stream')).Writable({
    write: (chunk: Buffer, _, done) => {
      lines.push(chunk.toString());
      done();
    },
  });
  const movers: Mover[] = [];
  const captured: Captured = {
    database,
    source,
    state,
    lease,
    installation: INSTALLATION,
    log: createLogger({ level: 'debug', format: 'json', secrets: [], stream }),
    said: () => lines,
    ways: new Map([[WATCH, [{ keys: ['vip', 'slow'], resolve: null }]]]),
    signalled: [],
    unresolved: [],
    capture: (more) =>
      createCapture({
        state,
        same: !separate,
        leader: lease.holder,
        installation: INSTALLATION,
        mapping: () => captured.ways,
        perProfileMs: () => 0.2,
        onDue: (ids) => captured.signalled.push(...ids),
        onUnresolved: (keys, sentence) => {
          captured.unresolved.push({ keys, sentence });
          return Promise.resolve();
        },
        ...more,
      }),
    move: (more) => {
      const mover = startMover({
        source,
        capture: captured.capture(),
        installation: INSTALLATION,
        follows: true,
        notifies: true,
        log: captured.log,
        ...more,
      });
      movers.push(mover);
      return mover;
    },
    due: async (key = 'vip') => {
      const { rows } = await state.query<{ profile_id: string }>(
        `select distinct due.profile_id from due join definition as d on d.id = definition_id and d.key = $1 order by 1`,
        [key],
      );
      return rows.map(({ profile_id: id }) => id);
    },
    wantsFull: async () => {
      const { rows } = await state.query<{ key: string }>(
        'select key from definition where full_wanted > full_done order by key',
      );
      return rows.map(({ key }) => key);
    },
    left: async () => (await database.pool.query('select from personas_capture.capture')).rowCount ?? 0,
    close: async () => {
      for (const mover of movers) await mover.stop();
      await lease.release();
      await source.end();
      await state.end();
      await database.drop();
      if (separate) await stateDatabase.drop();
    },
  };
  return captured;
}
