import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { nextStep, type Step, type Waiting } from '../src/core/next.js';

/** `m` or `e`, its number, and how it is: `-` not due, `b` blocked, `?` its person has to be asked for. */
function row(text: string): Waiting {
  const [, kind = 'm', id = '0', how = ''] = /^([me])(\d+)(.*)$/.exec(text) ?? [];
  return {
    id: Number(id),
    kind: kind === 'm' ? 'm' : 'e',
    due: !how.includes('-'),
    blocked: how.includes('b'),
    confirm: how.includes('?'),
  };
}

function format(step: Step<Waiting>): string {
  const names = (rows: readonly Waiting[]): string => rows.map(({ kind, id }) => `${kind}${id}`).join(' ');
  switch (step.kind) {
    case 'update':
      return `update ${names(step.marks)}`;
    case 'track':
      return `track ${names([step.event])}`;
    case 'ask':
      return `ask ${names(step.rows)}`;
    case 'wait':
      return 'wait';
  }
}

const next = (rows: string): string => format(nextStep(rows.split(' ').filter(Boolean).map(row)));

describe('what is sent next for a recipient', () => {
  const table: readonly [because: string, rows: string, step: string][] = [
    ['nothing waits', '', 'wait'],
    ['all marks that are ready become one update', 'm1 m2 m3', 'update m1 m2 m3'],
    ['a mark that waits for its time is left out', 'm1 m2- m3', 'update m1 m3'],
    ['a mark that waits for an earlier key is left out', 'm1b m2', 'update m2'],
    ['a mark whose person has to be asked for is left out', 'm1? m2', 'update m2'],
    ['marks go before events, whichever arose first', 'e1 m2', 'update m2'],
    ['events go one at a time', 'e1 e2', 'track e1'],
    ['an event waits for one that arose before it', 'e1- e2', 'wait'],
    ['an event waits for a mark that arose before it and is tried again later', 'm1- e2', 'wait'],
    ['an event waits for a mark that arose before it and waits for another key', 'm1b e2', 'wait'],
    ['an event doesn’t wait for a mark that arose after it', 'e1 m2-', 'track e1'],
    ['an event doesn’t wait for a blocked mark that arose after it', 'e1 m2b', 'track e1'],
    ['whoever has vanished is asked for, with all that waits for that', 'm1? m2? e3?', 'ask m1 m2 e3'],
    ['those that wait for their time are not asked for', 'm1? m2?-', 'ask m1'],
    ['a blocked mark is not asked for', 'm1?b', 'wait'],
    ['an event alone is asked for', 'e1?', 'ask e1'],
    ['an event is asked for in its turn', 'e1 e2?', 'track e1'],
    ['an event is not asked for before its turn', 'e1- e2?', 'wait'],
    ['an event waits for a mark that was asked for and is tried again later', 'm1?- e2', 'wait'],
  ];
  it.each(table)('%s', (_, rows, step) => {
    expect(next(rows)).toBe(step);
  });
});

describe('whatever waits', () => {
  const rows = fc
    .array(
      fc.record({
        kind: fc.constantFrom('m' as const, 'e' as const),
        due: fc.boolean(),
        blocked: fc.boolean(),
        confirm: fc.boolean(),
      }),
      { maxLength: 8 },
    )
    .map((waiting) =>
      waiting.map((each, index): Waiting => ({ ...each, id: index + 1, blocked: each.blocked && each.kind === 'm' })),
    );
  const sentBy = (step: Step<Waiting>): readonly Waiting[] => {
    if (step.kind === 'update') return step.marks;
    return step.kind === 'track' ? [step.event] : [];
  };

  it('only what is due, not blocked and not unsure is sent, and asked for is only what is unsure', () => {
    fc.assert(
      fc.property(rows, (waiting) => {
        const step = nextStep(waiting);
        for (const each of sentBy(step)) expect(each).toMatchObject({ due: true, blocked: false, confirm: false });
        if (step.kind === 'ask') {
          expect(step.rows.length).toBeGreaterThan(0);
          for (const each of step.rows) expect(each).toMatchObject({ due: true, blocked: false, confirm: true });
        }
      }),
    );
  });

  it('an event goes only when nothing earlier waits: no event, and no mark', () => {
    fc.assert(
      fc.property(rows, (waiting) => {
        const step = nextStep(waiting);
        if (step.kind === 'track') expect(waiting.filter(({ id }) => id < step.event.id)).toEqual([]);
      }),
    );
  });

  it('a mark that is ready goes at once, with all others that are', () => {
    fc.assert(
      fc.property(rows, (waiting) => {
        const ready = waiting.filter(({ kind, due, blocked, confirm }) => kind === 'm' && due && !blocked && !confirm);
        const step = nextStep(waiting);
        expect(step.kind === 'update' ? step.marks : []).toEqual(ready);
      }),
    );
  });

  it('all of it is sent in the end, events in their order, once nothing has to wait', () => {
    fc.assert(
      fc.property(rows, (waiting) => {
        let left = waiting.map((each) => ({ ...each, due: true, blocked: false }));
        const events: number[] = [];
        for (let steps = 0; left.length > 0; steps += 1) {
          expect(steps).toBeLessThan(30);
          const step = nextStep(left);
          expect(step.kind).not.toBe('wait');
          const sent = new Set(sentBy(step));
          if (step.kind === 'track') events.push(step.event.id);
          const asked = new Set(step.kind === 'ask' ? step.rows : []);
          left = left
            .filter((each) => !sent.has(each))
            .map((each) => (asked.has(each) ? { ...each, confirm: false } : each));
        }
        expect(events).toEqual(waiting.filter(({ kind }) => kind === 'e').map(({ id }) => id));
      }),
    );
  });
});
