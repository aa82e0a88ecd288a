import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { loadConfig } from '../src/config/load.js';
import type { Definition } from '../src/core/definition.js';
import { openSession } from '../src/db/session.js';
import { startEvaluator, type Evaluator, type EvaluatorOptions } from '../src/realtime/evaluator.js';
import type { Worker } from '../src/realtime/worker.js';
import type { BatchResult } from '../src/sync/batch.js';
import { createCaptured, type Captured } from './support/captured.js';

/**
 * Who is evaluated when, and what becomes of failures. A batch here is one statement over the ids of the profiles, in a
 * transaction that deletes what is due, so that it fails as PostgreSQL does.
 */
const SOON = { timeout: 30_000, interval: 10 };
const DONE = `select 'written' from unnest($1::text[]) as p`;
const DIVIDES = `select 'written', 1 / (p::int - 7) from unnest($1::text[]) as p`;

const sleeping = (seconds: string): string => `select 'written', $1::text[], pg_sleep(${seconds})`;

let captured: Captured;
let definitions: readonly Definition[];
let evaluators: Evaluator[];
/** The statement of each definition. */
let statements: Map<string, string>;
/** The profiles of each batch that was written, by definition. */
let written: { key: string; profiles: readonly string[] }[];
let tooSlow: string[];
/** Batches that were begun and those that are open, by definition; the most at once, and whether two were of one. */
let begun: string[];
let open: string[];
let mostOpen: number;
let isDoubled: boolean;

beforeEach(async () => {
  captured = await createCaptured();
  const folder = await mkdtemp(join(tmpdir(), 'personas-test-'));
  const file = join(folder, 'personas.yaml');
  await writeFile(
    file,
    `profiles: { sql: SELECT 1 AS profile_id, key: email }
audiences: [{ name: vip, sql: SELECT 1 AS profile_id }, { name: big, sql: SELECT 1 AS profile_id }]
destinations: { out: { type: file, path: out.jsonl } }
`,
  );
  definitions = loadConfig(file, {}).definitions;
  await rm(folder, { recursive: true });
  [evaluators, statements, written] = [[], new Map<string, string>(), []];
  [tooSlow, begun, open, mostOpen, isDoubled] = [[], [], [], 0, false];
});
afterEach(async () => {
  for (const evaluator of evaluators) await evaluator.stop();
  await captured.close();
});

async function openWorker(): Promise<Worker> {
  const session = await openSession(captured.state, (client) =>
    client.query(`set statement_timeout = 400; set application_name = 'worker'`),
  );
  const { client } = session;
  const batch: Worker['evaluate'] = async ({ key }, id, { limit, only }): Promise<BatchResult> => {
    await client.query('begin');
    const { rows } = await client.query<{ id: number; profile_id: string }>(
      `select id, profile_id from due where definition_id = $1 and parked_at is null and ($3::bigint[] is null or id = any($3)) order by id limit $2`,
      [id, limit, only ?? null],
    );
    const reached = await client.query<{ profile_id: string }>(
      `select profile_id from validity where definition_id = $1 and until <= now() and $2::bigint[] is null`,
      [id, only ?? null],
    );
    const profiles = [...new Set([...rows, ...reached.rows].map((row) => row.profile_id))];
    if (profiles.length === 0) return { kind: 'nothing' };
    const result = await client.query<[string]>({
      text: statements.get(key) ?? DONE,
      values: [profiles],
      rowMode: 'array',
    });
    const kind = result.rows[0]?.[0];
    if (kind === 'waits' || kind === 'holds') return { kind, because: 'a person has to look at it' };
    await client.query('delete from due where definition_id = $1 and id = any($2)', [id, rows.map((row) => row.id)]);
    await client.query('delete from validity where definition_id = $1 and profile_id = any($2)', [id, profiles]);
    await client.query('commit');
    written.push({ key, profiles });
    return {
      kind: 'written',
      profiles: profiles.length,
      changed: profiles.length,
      raisedFrom: Number(profiles[0]),
      counts: null,
      more: rows.length === limit,
    };
  };
  return {
    evaluate: async (definition, id, options) => {
      isDoubled ||= open.includes(definition.key);
      begun.push(definition.key);
      open.push(definition.key);
      mostOpen = Math.max(mostOpen, open.length);
      try {
        return await batch(definition, id, options);
      } finally {
        open.splice(open.indexOf(definition.key), 1);
        if (session.isOpen()) await client.query('rollback');
      }
    },
    isOpen: session.isOpen,
    close: session.close,
  };
}

function evaluate(more: Partial<EvaluatorOptions> = {}): Evaluator {
  const evaluator = startEvaluator({
    state: captured.state,
    definitions: () => definitions,
    openWorker,
    follows: true,
    onRaised: () => undefined,
    onTooSlow: async (id, sentence) => {
      tooSlow.push(sentence);
      await captured.state.query(`update definition set tracking = 'polled', polled_because = $2 where id = $1`, [
        id,
        sentence,
      ]);
    },
    log: captured.log,
    ...more,
  });
  evaluators.push(evaluator);
  return evaluator;
}

/** Has these profiles due; returns the definition's id. */
async function due(key: string, ...profiles: readonly (string | number)[]): Promise<number> {
  const { rows } = await captured.state.query<{ id: number }>('select id from definition where key = $1', [key]);
  const id = rows[0]?.id ?? 0;
  await captured.state.query('insert into due (definition_id, profile_id) select $1, unnest($2::text[])', [
    id,
    profiles,
  ]);
  return id;
}
const numbers = (count: number): readonly number[] => Array.from({ length: count }, (_, index) => index + 1);
const waits = (key = 'vip'): Promise<number> => captured.due(key).then(({ length }) => length);
const settles = (key = 'vip', count = 0): Promise<void> => expect.poll(() => waits(key), SOON).toBe(count);
async function parked(): Promise<readonly { profile: string; reason: string }[]> {
  const { rows } = await captured.state.query<{ profile: string; reason: string }>(
    'select profile_id as profile, reason from due where parked_at is not null order by 1',
  );
  return rows;
}
async function stuckBecause(key: string): Promise<string | null> {
  const { rows } = await captured.state.query<{ because: string | null }>(
    'select stuck_because as because from definition where key = $1',
    [key],
  );
  return rows[0]?.because ?? null;
}

describe('an evaluator', () => {
  it('evaluates at once what it is told of, and tells where it stands in the outbox', async () => {
    const raised: number[] = [];
    const evaluator = evaluate({ onRaised: (lowestId) => raised.push(lowestId) });
    await due('vip', 0);
    await settles();
    // The first is found by looking; from then on the definition is known.
    const began = performance.now();
    evaluator.notify([await due('vip', 1, 2)]);
    await settles();
    expect(performance.now() - began).toBeLessThan(500);
    expect(raised).toEqual([0, 1]);
  });

  it('finds by itself what nobody tells it of, and windows that are reached', async () => {
    evaluate();
    const id = await due('vip', 1);
    await captured.state.query(
      `insert into validity (definition_id, profile_id, until) values ($1, '2', now()), ($1, '3', now() + interval '1 hour')`,
      [id],
    );
    await settles();
    await expect.poll(() => written.flatMap(({ profiles }) => profiles).sort(), SOON).toEqual(['1', '2']);
  });

  it('works off a backlog in larger batches', async () => {
    await due('vip', ...numbers(3_000));
    evaluate();
    await settles();
    expect(written.map(({ profiles }) => profiles.length)).toEqual([500, 1_000, 1_500]);
  });

  it('evaluates definitions beside each other, and none of them twice at once', async () => {
    for (const key of ['vip', 'big']) statements.set(key, sleeping('0.01'));
    const evaluator = evaluate();
    for (let profile = 1; profile <= 50; profile += 1) {
      evaluator.notify([await due('vip', profile), await due('big', profile)]);
    }
    await settles('vip');
    await settles('big');
    expect(mostOpen).toBe(2);
    expect(isDoubled).toBe(false);
    const ofVip = written.filter(({ key }) => key === 'vip').flatMap(({ profiles }) => profiles);
    expect(ofVip.map(Number)).toEqual(numbers(50));
  });

  it('goes on in another session where one is ended', async () => {
    const evaluator = evaluate();
    await due('vip', 1);
    await settles();
    await captured.database.pool.query(
      `select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database() and application_name = 'worker'`,
    );
    evaluator.notify([await due('vip', 2)]);
    await settles();
    statements.set('vip', `select 'written', $1::text[], pg_terminate_backend(pg_backend_pid())`);
    evaluator.notify([await due('vip', 3)]);
    await expect.poll(() => open.length, SOON).toBe(0);
    statements.delete('vip');
    await settles();
    expect(await stuckBecause('vip')).toBeNull();
  });

  it('finishes the batch that is open when it is stopped, and begins no other', async () => {
    statements.set('vip', sleeping('0.2'));
    const evaluator = evaluate();
    await due('vip', 1);
    await expect.poll(() => open.length, SOON).toBe(1);
    await due('vip', 2);
    await evaluator.stop();
    expect(written).toEqual([{ key: 'vip', profiles: ['1'] }]);
    expect(await captured.due()).toEqual(['2']);
  });
});

describe('what fails', () => {
  it('for somebody’s rows is left to that profile alone, which is parked with the reason', async () => {
    statements.set('vip', DIVIDES);
    evaluate();
    await due('vip', ...numbers(40), 7);
    await due('big', 7);
    await settles('vip', 1);
    await settles('big');
    const reason = 'Evaluating what has changed divides by zero [SQLSTATE 22012].';
    expect(await parked()).toEqual([
      { profile: '7', reason },
      { profile: '7', reason },
    ]);
    const profiles = written.filter(({ key }) => key === 'vip').flatMap((batch) => batch.profiles);
    expect(profiles.map(Number).sort((a, b) => a - b)).toEqual(numbers(40).filter((profile) => profile !== 7));
    expect(await stuckBecause('vip')).toBeNull();
  });

  it('and was parked is tried again after an hour', async () => {
    const id = await due('vip', 7, 8);
    await captured.state.query(
      `update due set parked_at = now() - case profile_id when '7' then interval '61 minutes' else interval '59 minutes' end, reason = 'x'
       where definition_id = $1`,
      [id],
    );
    evaluate();
    await settles('vip', 1);
    expect(await captured.due()).toEqual(['8']);
  });

  it('for a profile whose window is reached is parked, too, and its window looked at again later', async () => {
    statements.set('vip', DIVIDES);
    const id = await due('vip', 1);
    await captured.state.query(`insert into validity (definition_id, profile_id, until) values ($1, '7', now())`, [id]);
    evaluate();
    await expect.poll(async () => (await parked()).map(({ profile }) => profile), SOON).toEqual(['7']);
    await settles('vip', 1);
    const { rowCount } = await captured.state.query(
      `select from validity where until > now() + interval '50 minutes' and profile_id = '7'`,
    );
    expect(rowCount).toBe(1);
  });

  it('for very many is the definition’s own fault: it waits, says why, and goes on once that is mended', async () => {
    statements.set('vip', `select 'written', 1 / 0 from unnest($1::text[]) as p`);
    const evaluator = evaluate();
    evaluator.notify([await due('vip', ...numbers(100))]);
    await expect
      .poll(() => stuckBecause('vip'), SOON)
      .toBe('Evaluating what has changed divides by zero [SQLSTATE 22012].');
    expect((await parked()).length).toBe(20);
    statements.set('vip', DONE);
    await settles('vip', 20);
    await expect.poll(() => stuckBecause('vip'), SOON).toBeNull();
  });

  it('five times asks for a run in full, which tells a person where, and holds up nobody else', async () => {
    statements.set('vip', 'select $1::text[], nonsense');
    const evaluator = evaluate();
    evaluator.notify([await due('vip', 1), await due('big', 1)]);
    await settles('big');
    await expect
      .poll(() => stuckBecause('vip'), SOON)
      .toBe('Evaluating what has changed names a column that does not exist [SQLSTATE 42703].');
    expect(await captured.wantsFull()).toEqual([]);
    await expect.poll(captured.wantsFull, SOON).toEqual(['vip']);
    expect(await captured.due()).toEqual(['1']);
    expect(captured.said().filter((line) => line.includes('waits'))).toHaveLength(1);
  });

  it('by taking too long, whatever the size of the batch, has the definition polled', async () => {
    statements.set('vip', sleeping('1'));
    const evaluator = evaluate();
    evaluator.notify([await due('vip', 1)]);
    await expect.poll(() => tooSlow, SOON).toEqual(['Evaluating what has changed takes longer than the time allowed.']);
    expect(await captured.due()).toEqual(['1']);
  });

  it('for its size is tried in smaller batches', async () => {
    statements.set('vip', sleeping('cardinality($1::text[]) * 0.002'));
    evaluate();
    await due('vip', ...numbers(400));
    await settles();
    expect(tooSlow).toEqual([]);
    expect(written[0]?.profiles).toHaveLength(125);
  });
});

describe('what may not be written', () => {
  it('stays due where a person has to decide, and is not tried without pause', async () => {
    statements.set('vip', `select 'waits', $1::text[]`);
    const evaluator = evaluate();
    const id = await due('vip', 1);
    const began = performance.now();
    while (performance.now() - began < 1_500) {
      evaluator.notify([id]);
      await captured.state.query('select');
    }
    expect(begun.length).toBeGreaterThan(0);
    expect(begun.length).toBeLessThan(4);
    expect(await captured.due()).toEqual(['1']);
    expect(await captured.wantsFull()).toEqual([]);
    statements.delete('vip');
    await settles();
  });

  it('because of the guard is shown to a person by a run in full', async () => {
    statements.set('vip', `select 'holds', $1::text[]`);
    const evaluator = evaluate();
    evaluator.notify([await due('vip', 1)]);
    await expect.poll(captured.wantsFull, SOON).toEqual(['vip']);
    expect(await captured.due()).toEqual(['1']);
  });
});

describe('drain()', () => {
  it('evaluates all that is due of a definition, parked or not, and nothing else where nobody follows', async () => {
    statements.set('vip', DIVIDES);
    const evaluator = evaluate({ follows: false });
    await due('vip', ...numbers(1_200));
    await due('big', 1);
    expect(await evaluator.drain('vip')).toBe(true);
    expect(await captured.due('vip')).toEqual(['7']);
    expect(await captured.due('big')).toEqual(['1']);
  });

  it('says that something stays where it cannot be evaluated, and where nothing follows changes that all is done', async () => {
    statements.set('vip', `select 'holds', $1::text[]`);
    statements.set('big', 'select $1::text[], nonsense');
    const evaluator = evaluate({ follows: false });
    await due('vip', 1);
    await due('big', 1);
    expect(await evaluator.drain('vip')).toBe(false);
    expect(await evaluator.drain('big')).toBe(false);
    expect(await evaluator.drain('slow')).toBe(true);
  });
});
