import { runDaemon, type Leadership } from '../daemon.js';
import { keepHeapSmall } from '../lib/heap.js';
import { until, within } from '../lib/until.js';
import type { Server } from '../server/server.js';
import { describeCadence } from '../sync/registry.js';
import type { CommandContext } from './command.js';
import { countOf, formatDuration } from './output.js';

/** `start`: the daemon, until it is told to stop. On the sample shop, the shop goes on trading meanwhile. */
const DRAINED_WITHIN_MS = 10_000;
const FIRST_LOOK_MS = 1_000;

async function keepTrading({ opened, signal }: CommandContext): Promise<void> {
  if (!opened.embedded) return;
  const { isSampleShop, trade } = await import('../demo/shop.js');
  const { source } = opened.databases;
  if (!(await isSampleShop(source))) return;
  while (!signal.aborted) {
    try {
      await trade(source, { signal, pauseMs: 300 });
    } catch (error) {
      opened.log.failure('The sample shop paused', error);
      await new Promise((resolve) => setTimeout(resolve, 1_000));
    }
  }
}

/** Says every few seconds how the delivery goes, while there is something to deliver. */
function reportDelivery({ opened }: CommandContext, leadership: Leadership): () => void {
  const { pool } = opened.databases.state;
  let before = 0;
  let at = performance.now();
  let waitedBefore = 0;
  let wasWaiting = false;
  const look = async (): Promise<void> => {
    const dispatchers = leadership.deliveries().map(({ dispatcher }) => dispatcher);
    const sent = dispatchers.flatMap(({ lanes }) => lanes()).reduce((sum, { calls }) => sum + calls, 0);
    const seconds = (performance.now() - at) / 1000;
    const rate = Math.round((sent - before) / seconds);
    [before, at] = [sent, performance.now()];
    const trouble = dispatchers.map((dispatcher) => dispatcher.trouble()).find((each) => each !== null);
    // Nothing that is worth counting for.
    if (rate === 0 && trouble === undefined && !wasWaiting) {
      waitedBefore = 0;
      return;
    }
    const { rows } = await pool.query<{ waiting: number; ahead: number }>(
      `select (select count(*) from outbox) as waiting,
         (select coalesce(sum(greatest(0, backfill_total - backfill_done)), 0)::int8 from definition_destination where backfill is not null) as ahead`,
    );
    const waiting = (rows[0]?.waiting ?? 0) + (rows[0]?.ahead ?? 0);
    // Several marks may become one call: how fast they become fewer says how long it takes.
    const fewer = (waitedBefore - waiting) / seconds;
    waitedBefore = waiting;
    if (waiting > 0 && (rate > 0 || trouble !== undefined)) {
      const left = fewer > 0 ? `, about ${formatDuration((waiting / fewer) * 1000)} left` : '';
      opened.log.info(
        `Delivering: ${countOf(waiting, 'call')} ${waiting === 1 ? 'waits' : 'wait'}, ${countOf(rate, 'call')} a second${left}`,
        trouble ? { trouble } : {},
      );
      wasWaiting = true;
    } else if (wasWaiting && waiting === 0) {
      opened.log.info('All delivered.', { calls: sent });
      wasWaiting = false;
    }
  };
  const stopping = new AbortController();
  const { signal } = stopping;
  const saidEveryMs = process.stderr.isTTY ? 5_000 : 10_000;
  const report = async (): Promise<void> => {
    // Whoever has just started something sees soon that it goes on.
    let pauseMs = FIRST_LOOK_MS;
    for (;;) {
      await until(pauseMs, signal);
      if (signal.aborted) return;
      try {
        await look();
        pauseMs = wasWaiting ? saidEveryMs : FIRST_LOOK_MS;
      } catch (error) {
        const trouble = leadership.deliveries().map(({ dispatcher }) => dispatcher.trouble());
        opened.log.failure(trouble.find((each) => each !== null) ?? 'How deliveries go cannot be read', error);
        pauseMs = saidEveryMs;
      }
    }
  };
  void report();
  return () => stopping.abort();
}

/** How long the state database may take to answer when somebody asks whether all is well. */
const READY_WITHIN_MS = 2_000;

/** Serves how things are; null where the configuration says `http: off`. */
async function serve({ opened }: CommandContext, current: () => Leadership | null): Promise<Server | null> {
  const { config, databases, log } = opened;
  if (config.http === null) return null;
  const { startServer, text } = await import('../server/server.js');
  const { createMetrics } = await import('../server/metrics.js');
  const { pool } = databases.state;
  const isReached = async (): Promise<boolean> => {
    try {
      return (await within(READY_WITHIN_MS, pool.query('select'))) !== null;
    } catch {
      // Whatever it is, a load balancer needs to know no more.
      return false;
    }
  };
  const lanes = () =>
    (current()?.deliveries() ?? []).flatMap(({ name: destination, dispatcher }) =>
      dispatcher.lanes().map((lane) => ({ destination, lane })),
    );
  const server = await startServer({
    ...config.http,
    log,
    pages: {
      '/healthz': () => text(200, 'alive'),
      '/readyz': async () => {
        if (!(await isReached())) return text(503, 'The state database is out of reach.');
        return text(200, current() === null ? 'standing by' : 'leading');
      },
      '/metrics': createMetrics(
        { state: pool, source: databases.source },
        {
          leading: () => current() !== null,
          lanes,
          runs: () => current()?.runs() ?? [],
        },
        log,
      ),
    },
  });
  log.info(`Serving at ${server.url}: /healthz, /readyz, /metrics.`);
  return server;
}

export async function start(context: CommandContext): Promise<number> {
  keepHeapSmall();
  const { opened, signal } = context;
  const { config, log } = opened;
  for (const remark of config.remarks) log.warn(remark);
  log.info('personas-sync starts.', {
    definitions: config.definitions.length,
    destinations: config.destinations.map(({ name }) => name).join(', '),
  });
  for (const { key, cadence, enabled } of config.definitions)
    log.debug(`"${key}" runs ${enabled ? describeCadence(cadence) : 'not: it is disabled'}.`);
  if (opened.embedded) {
    const { captureOwn } = await import('./realtime.js');
    await captureOwn(opened, signal);
  }
  let stopReport: () => void = () => undefined;
  let leadership: Leadership | null = null;
  const server = await serve(context, () => leadership);
  const trading = keepTrading(context);
  signal.addEventListener(
    'abort',
    () => {
      log.info('Stopping: what is under way is finished first.');
      setTimeout(() => {
        log.warn(
          `Not everything under way has ended within ${DRAINED_WITHIN_MS / 1000} s; it is sent again at the next start.`,
        );
        process.exit(0);
      }, DRAINED_WITHIN_MS).unref();
    },
    { once: true },
  );
  await runDaemon(opened, signal, (next) => {
    stopReport();
    stopReport = reportDelivery(context, next);
    leadership = next;
    void next.lost.then(() => {
      if (leadership !== next) return;
      leadership = null;
      stopReport();
    });
  });
  stopReport();
  await trading;
  await server?.close();
  log.info('Stopped.');
  return 0;
}
