import type { Config, Destination } from './config/types.js';
import { keepConfig, type KeptConfig } from './config/kept.js';
import { isUnreachable } from './db/failure.js';
import { SINGLE_REQUEST_MS } from './core/timeouts.js';
import { startRealTime, type RealTime } from './realtime/realtime.js';
import { LEASE_MS, LeaseLostError, tryLead, type Taken } from './db/lease.js';
import { hearWakes, type Wakes } from './db/wake.js';
import { createDeliveries, type Deliveries } from './delivery/deliveries.js';
import { QUOTA_WINDOW_MS } from './delivery/pace.js';
import type { Port } from './destinations/carrier.js';
import { OperatorError } from './lib/errors.js';
import type { Logger } from './lib/logger.js';
import { startLoop, type Loop } from './lib/loop.js';
import { until } from './lib/until.js';
import { Secret } from './lib/secret.js';
import type { Databases } from './sync/compute.js';
import { createFeeder } from './sync/cursor.js';
import { dropUnread } from './sync/findings.js';
import { prepareHistory, tidyUp } from './sync/housekeeping.js';
import { noteProblem, register } from './sync/registry.js';
import { ALL_REQUESTS, QUIET_REQUESTS } from './sync/asking.js';
import { startRequests } from './sync/requests.js';
import type { RunContext } from './sync/run.js';
import { abandonRuns, startScheduler, type Scheduler } from './sync/scheduler.js';

/**
 * The composition root of what acts. One instance leads: it registers the configuration, runs what is due, feeds the
 * cursors, sends, and carries out requests. The parts are started in that order and stopped in reverse; each looks at the
 * tables, none at another part.
 *
 *   standing by ──lease taken──▶ leading ──stop──▶ drained, lease given back
 *        ▲                          │
 *        └──────── lease lost ──────┘   what was under way settles nothing
 */
export interface Target {
  /** Tells a destination apart from others of its name. */
  host: string;
  /** Opens the way there; may start what answers there. */
  connect: () => Promise<Port>;
}

export interface Resources {
  config: Config;
  /** Reads the configuration's files again. */
  reread: () => Config;
  databases: Databases;
  targetOf: (destination: Destination) => Target;
  log: Logger;
}

/** Runs of a definition that have ended in the same way; `corrections` is what they found that real time had missed. */
interface Ended {
  definition: string;
  outcome: string;
  count: number;
  corrections: number;
}

export interface Leadership {
  leader: string;
  deliveries: Deliveries['all'];
  /** Runs that have ended since it leads, by definition and outcome. */
  runs: () => readonly Ended[];
  /** Resolves when another may lead. */
  lost: Promise<void>;
  /** Takes nothing new, finishes what is under way, gives the lease back. */
  stop: () => Promise<void>;
}

/** A clean stop is noticed within this. */
const STAND_BY_LOOK_MS = 500;
const FEED_EVERY_MS = 300;
/** Runs that are under way when everything stops may end in this time; then they are cancelled, and due again. */
const GRACE_MS = 4_000;
const REPORT_EVERY_MS = 2_000;
const TIDY_EVERY_MS = 60_000;
const WATCH_EVERY_MS = 1_000;
/** A request may be open for ten seconds; none begins unless the lease outlasts some of that, and the next leader waits. */
const LEASE_MARGIN_MS = 1_000;

/** Waits out the time in which a request of an earlier leader can still be open. */
function createQuiet(ms: number): () => boolean {
  const until = performance.now() + ms;
  return () => performance.now() >= until;
}

export interface LeadOptions {
  /** Definitions run when they are due; otherwise only where a command asks. */
  scheduled: boolean;
  /** False for commands that send nothing: the configuration isn't applied either, and only such requests are taken. */
  delivers: boolean;
  confirmRemovals: boolean;
  /** Where the files are looked at: what is kept of them; null: what was read is led by. */
  kept: KeptConfig | null;
}

/** Leads under `lease` until stopped. Throws where the configuration may not be registered, or another leads meanwhile. */
export async function lead(
  resources: Resources,
  lease: Taken,
  { scheduled, delivers, confirmRemovals, kept }: LeadOptions,
): Promise<Leadership> {
  const { databases, log, targetOf, reread } = resources;
  const { state } = databases;
  let config = kept?.config() ?? resources.config;
  const draining = new AbortController();
  const stopping = new AbortController();
  let realTime: RealTime | null = null;
  let wakes: Wakes | null = null;
  let scheduler: Scheduler | null = null;
  let feeding: Loop | null = null;
  let requests: Loop | null = null;
  const context: RunContext = {
    databases,
    config,
    leader: lease.holder,
    signal: stopping.signal,
    moveCaptured: async () => (await realTime?.moveCaptured()) ?? false,
  };
  const stops: (() => Promise<void>)[] = [];
  const quiet = createQuiet(lease.quietForMs);
  const mayBegin = (timeoutMs: number): boolean =>
    quiet() && lease.remainingMs() > LEASE_MARGIN_MS && (timeoutMs <= SINGLE_REQUEST_MS || lease.allowsBulk());

  /** While a command would be heard, what it asks for isn't looked for so often. */
  const lookMs = (deafMs: number): number => wakes?.lookMs(deafMs) ?? deafMs;
  const deliveries = createDeliveries({
    state,
    leader: lease.holder,
    isHybrid: () => config.profiles.key === 'hybrid',
    mayBegin,
    prepareBulk: lease.allowsBulk,
    bulkAgoMs: lease.bulkAgoMs,
    lookMs,
    log,
  });
  /** Something may have come into the outbox, or into what is fed to it. */
  const nudge = (lowestId?: number): void => {
    deliveries.nudge(lowestId);
    feeding?.look();
  };
  /** A command has asked for something, or changed what is looked at. */
  const lookAtAll = (): void => {
    requests?.look();
    scheduler?.look();
    nudge(Infinity);
  };
  const runs = new Map<string, Ended>();
  const hostOf = (name: string): string => {
    const destination = config.destinations.find((each) => each.name === name);
    if (destination === undefined) throw new Error(`There is no destination ${name}.`);
    return targetOf(destination).host;
  };
  const applyConfig = async (next: Config, confirmRemovals: boolean): Promise<void> => {
    const before = config;
    config = next;
    try {
      const registered = await register(state, next, hostOf, { confirmRemovals, leader: lease.holder });
      const reachable = registered.flatMap(({ id, name }) => {
        const destination = next.destinations.find((each) => each.name === name);
        return destination === undefined ? [] : [{ id, name, connect: targetOf(destination).connect }];
      });
      const description = JSON.stringify([next.profiles.key, next.destinations], (name, value: unknown) => {
        if (name === 'place') return undefined;
        return value instanceof Secret ? value.reveal() : value;
      });
      await deliveries.replace(reachable, description);
      await realTime?.configure();
      feeding?.look();
    } catch (error) {
      config = before;
      throw error;
    }
  };
  const reloadOnce = async (confirmRemovals: boolean): Promise<void> => {
    try {
      await applyConfig(reread(), confirmRemovals);
      kept?.keep(config);
      await noteProblem(state, null);
    } catch (error) {
      if (error instanceof OperatorError) await noteProblem(state, error.message);
      throw error;
    }
  };

  let reloading: Promise<void> = Promise.resolve();
  /** One after the other: whoever asks while another goes on has the files read once more. */
  const reload = (confirmRemovals: boolean): Promise<void> => {
    const next = reloading.then(() => reloadOnce(confirmRemovals));
    reloading = next.catch(() => undefined);
    return next;
  };

  const stopAll = async (): Promise<void> => {
    draining.abort();
    // No request begins that could outlast what is under way elsewhere.
    const delivered = deliveries.stop();
    const grace = setTimeout(() => stopping.abort(), GRACE_MS);
    for (const stop of stops.reverse()) await stop();
    stops.length = 0;
    clearTimeout(grace);
    await delivered;
  };
  const release = async (): Promise<void> => {
    try {
      await lease.release(deliveries.quietMs());
    } catch (error) {
      log.failure('The lease cannot be given back; it runs out by itself', error);
    }
  };
  try {
    await abandonRuns(context);
    await prepareHistory(state);
    await dropUnread(state.pool);
    if (delivers) {
      await applyConfig(config, confirmRemovals);
      await noteProblem(state, kept?.problem() ?? null);
    }
    if (delivers) {
      realTime = await startRealTime({
        context: { databases, signal: stopping.signal },
        config: () => config,
        leader: lease.holder,
        follows: scheduled,
        onRaised: deliveries.nudge,
        log,
      });
      // Stopped after the scheduler: a run that ends may still ask for what was captured.
      stops.push(realTime.stop);
    }
    const running = startScheduler({
      context,
      scheduled,
      draining: draining.signal,
      config: () => config,
      log,
      onRun: (definition, result) => {
        nudge();
        const { outcome, error, counts, cause } = result;
        const ended = `${definition.key} ${outcome}`;
        const { count, corrections } = runs.get(ended) ?? { count: 0, corrections: 0 };
        const corrected = result.corrections ?? 0;
        runs.set(ended, {
          definition: definition.key,
          outcome,
          count: count + 1,
          corrections: corrections + corrected,
        });
        if (corrected > 0) log.warn(`Following the changes of "${definition.key}" has missed some`, { corrected });
        // A command that leads for itself shows its runs itself.
        if (!scheduled && cause === null) return;
        const facts = {
          definition: definition.key,
          run: result.id,
          ...(counts === null
            ? {}
            : {
                members: counts.members,
                entered: counts.entered,
                exited: counts.exited,
                changed: counts.changed,
                ...(counts.withoutIdentifier === 0 ? {} : { withoutIdentifier: counts.withoutIdentifier }),
                ...(counts.conflicting === 0 ? {} : { conflicting: counts.conflicting }),
                ...(counts.skippedValues === 0 ? {} : { skippedValues: counts.skippedValues }),
              }),
        };
        if (outcome === 'succeeded') {
          const moved = counts !== null && counts.entered + counts.exited + counts.changed > 0;
          log[moved ? 'info' : 'debug'](`Synced "${definition.key}"`, facts);
        } else if (cause !== null) log.failure(`The run of "${definition.key}" failed`, cause, facts);
        else log.warn(error ?? outcome, facts);
      },
    });
    scheduler = running;
    stops.push(() => running.stop());
    if (delivers) {
      const feed = createFeeder(state);
      let isLeft = true;
      const feedMs = (): number => (isLeft ? FEED_EVERY_MS : lookMs(FEED_EVERY_MS));
      feeding = startLoop('Feeding the outbox', feedMs, log, async () => {
        let fed = await feed();
        for (; fed.count > 0; fed = await feed()) deliveries.nudge(fed.lowestId);
        isLeft = fed.left > 0;
      });
      stops.push(feeding.stop);
      stops.push(startLoop('Telling how deliveries go', REPORT_EVERY_MS, log, deliveries.report).stop);
      stops.push(startLoop('Tidying up', TIDY_EVERY_MS, log, () => tidyUp(state)).stop);
    }
    const taking = startRequests({
      context,
      draining: draining.signal,
      kinds: delivers ? ALL_REQUESTS : QUIET_REQUESTS,
      scheduler: running,
      definitions: () => config.definitions,
      reload,
      nudge,
      lookMs,
      drain: async (key) => {
        await realTime?.moveCaptured();
        return (await realTime?.drain(key)) ?? true;
      },
      destinations: () =>
        deliveries.all().map(({ id, name, dispatcher }) => ({ id, name, compare: dispatcher.compare })),
      log,
    });
    requests = taking;
    stops.push(() => taking.stop());
    if (scheduled) {
      wakes = hearWakes(state.pool, log, lookAtAll);
      stops.push(wakes.stop);
    }
    if (kept !== null) {
      let isPending = false;
      stops.push(
        startLoop('Reading the configuration', WATCH_EVERY_MS, log, async () => {
          isPending ||= kept.hasChanged();
          if (!isPending) return;
          try {
            await reload(false);
            isPending = false;
            log.info('The configuration has been read again.');
          } catch (error) {
            // What time may mend is tried again.
            if (!(error instanceof OperatorError)) throw error;
            isPending = false;
            log.error(notUsed(error.message));
          }
        }).stop,
      );
    }
  } catch (error) {
    await stopAll();
    await release();
    throw error;
  }
  return {
    leader: lease.holder,
    deliveries: deliveries.all,
    runs: () => [...runs.values()],
    lost: lease.lost,
    stop: async () => {
      await stopAll();
      await release();
    },
  };
}

const notUsed = (problem: string): string => `The changed configuration is not used: ${problem}`;

/** Leads or stands by until `signal` fires, then drains. */
export async function runDaemon(
  resources: Resources,
  signal: AbortSignal,
  onLeading: (leadership: Leadership) => void,
): Promise<void> {
  const { databases, log } = resources;
  const kept = keepConfig(resources.config, resources.reread, (problem) => log.error(notUsed(problem)));
  let said = '';
  const say = (text: string): void => {
    if (text !== said) log.info(text);
    said = text;
  };
  const tryAgain = async (what: string, error: unknown): Promise<void> => {
    if (what !== said) log.failure(what, error);
    said = what;
    await until(STAND_BY_LOOK_MS, signal);
  };
  while (!signal.aborted) {
    let leadership: Leadership;
    try {
      const lease = await tryLead(databases.state.pool);
      if (lease === null) {
        say('Another instance leads; standing by.');
        kept.refresh();
        await until(STAND_BY_LOOK_MS, signal);
        continue;
      }
      const seconds = Math.ceil(lease.quietForMs / 1000);
      if (lease.quietForMs > QUOTA_WINDOW_MS) {
        log.info('Leading; sending begins when no request of the last leader can be open any more.', { seconds });
      } else log.info('Leading.');
      leadership = await lead(resources, lease, { scheduled: true, delivers: true, confirmRemovals: false, kept });
    } catch (error) {
      if (error instanceof LeaseLostError) await tryAgain('The lease was lost too soon; standing by', error);
      else if (isUnreachable(error)) await tryAgain('The state database is out of reach; trying again', error);
      else throw error;
      continue;
    }
    said = '';
    onLeading(leadership);
    const stopped = new Promise<'stopped'>((resolve) => {
      if (signal.aborted) resolve('stopped');
      signal.addEventListener('abort', () => resolve('stopped'), { once: true });
    });
    const ended = await Promise.race([leadership.lost.then(() => 'lost' as const), stopped]);
    if (ended === 'lost') log.warn(`The lease of ${LEASE_MS / 1000} s was lost; standing by.`);
    await leadership.stop();
  }
}
