import { parseArgs } from 'node:util';
import { describeMachine, formatFigures, type Figure, type Report } from './figures.js';
import { startServer } from './server.js';

/**
 * `npm run bench -- [compute] [memory] [start] [delivery] [latency] [load] [windowed] [writer] [full] [--members N] [--seconds N]`:
 * measures what the project promises, prints a table and ends with 1 where a bound is broken. Without names: all but
 * `full`, which takes many minutes and ten million members. `realtime` stands for `latency`, `load`, `windowed` and `writer`.
 * `--seconds` is how long each lane is held at its quota, and single changes are made.
 */
const REAL_TIME = ['latency', 'load', 'windowed', 'writer'] as const;
const PARTS = ['compute', 'memory', 'start', 'delivery', ...REAL_TIME, 'full'] as const;
type Part = (typeof PARTS)[number];

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    members: { type: 'string', default: '1000000' },
    seconds: { type: 'string', default: '60' },
  },
});
const members = Number(values.members);
if (!Number.isSafeInteger(members) || members < 1_000) throw new Error('--members takes a number from 1000.');
const forSeconds = Number(values.seconds);
if (!Number.isSafeInteger(forSeconds) || forSeconds < 5) throw new Error('--seconds takes a number from 5.');
const named = positionals.flatMap((name) => (name === 'realtime' ? REAL_TIME : [name]));
const unknown = named.filter((name) => !(PARTS as readonly string[]).includes(name));
if (unknown.length > 0)
  throw new Error(`There is no part ${unknown.join(', ')}; there are ${[...PARTS, 'realtime'].join(', ')}.`);
const wanted = (part: Part): boolean => (named.length === 0 ? part !== 'full' : named.includes(part));

const figures: Figure[] = [];
const report: Report = {
  add: (figure) => {
    figures.push(figure);
    report.say(`${figure.name}: ${figure.measured}`);
  },
  say: (text) => process.stderr.write(`${text}\n`),
};

let postgres: string | null = null;
if (PARTS.some((part) => part !== 'start' && wanted(part))) {
  const server = await startServer();
  postgres = server.version;
  try {
    if (wanted('compute')) await (await import('./compute.js')).measureCompute(server, members, report);
    if (wanted('memory')) await (await import('./memory.js')).measureMemory(server, members, report);
    if (wanted('delivery')) {
      await (await import('./deliver.js')).measureDelivery(server, { members, pacingSeconds: forSeconds }, report);
    }
    if (wanted('latency')) {
      await (await import('./realtime.js')).measureLatencies(server, { members, forSeconds }, report);
    }
    if (wanted('load')) await (await import('./realtime.js')).measureLoads(server, forSeconds, report);
    if (wanted('windowed')) await (await import('./windowed.js')).measureWindowed(server, members, report);
    if (wanted('writer')) await (await import('./writer.js')).measureWriters(server, report);
    if (wanted('full')) await (await import('./full.js')).measureFull(server, report);
  } finally {
    await server.stop();
  }
}
if (wanted('start')) await (await import('./start.js')).measureStart(report);

console.log(`${describeMachine(postgres)}\n\n${formatFigures(figures)}`);
process.exitCode = figures.some(({ holds }) => holds === false) ? 1 : 0;
