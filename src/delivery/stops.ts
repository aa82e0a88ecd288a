/**
 * Definitions whose calls to a destination wait until a person resumes them: what is wrong with a definition shows in all
 * of its calls, and a hundred that were refused for their content, if only for one of their fields, with none accepted as
 * it is between them, say that it is; so does a list that is gone. From the moment when one is stopped, what of it is under way waits, too.
 */
export interface Stop {
  definitionId: number;
  reason: string;
  isListGone: boolean;
}

export interface Stops {
  /** A call of the definition was accepted, all of it; marks and events are counted apart, since one may be well without the other. */
  passed: (call: { definitionId: number; kind: 'm' | 'e' }) => void;
  /** One was refused for its content; false where its calls wait instead. */
  refused: (call: { definitionId: number; kind: 'm' | 'e' }, reason: string) => boolean;
  stop: (stop: Stop) => void;
  /** Writes down the stops that have not been. */
  flush: () => Promise<void>;
  /** `waiting` are the definitions that are stopped by what is written: another has been resumed. */
  heed: (waiting: readonly number[]) => void;
}

const MOST = 100;

export interface StopsOptions {
  write: (stop: Stop) => Promise<void>;
  /** There is something to flush. */
  onStop: () => void;
}

export function createStops({ write, onStop }: StopsOptions): Stops {
  const streaks = new Map<string, number>();
  const nameOf = ({ definitionId, kind }: { definitionId: number; kind: 'm' | 'e' }): string =>
    `${definitionId} ${kind}`;
  const stops = new Map<number, { stop: Stop; isWritten: boolean }>();
  const stop = (each: Stop): void => {
    if (!stops.has(each.definitionId)) stops.set(each.definitionId, { stop: each, isWritten: false });
    onStop();
  };
  return {
    passed: (call) => {
      streaks.delete(nameOf(call));
    },
    refused: (call, reason) => {
      const { definitionId } = call;
      if (stops.has(definitionId)) return false;
      const streak = (streaks.get(nameOf(call)) ?? 0) + 1;
      streaks.set(nameOf(call), streak);
      if (streak < MOST) return true;
      const why = `${MOST} calls in a row were refused for their content, the last with ${reason}.`;
      stop({ definitionId, reason: why, isListGone: false });
      return false;
    },
    stop,
    flush: async () => {
      for (const [definitionId, each] of stops) {
        if (each.isWritten) continue;
        await write(each.stop);
        stops.set(definitionId, { ...each, isWritten: true });
      }
    },
    heed: (waiting) => {
      for (const [definitionId, { isWritten }] of stops) {
        if (!isWritten || waiting.includes(definitionId)) continue;
        stops.delete(definitionId);
        for (const kind of ['m', 'e'] as const) streaks.delete(nameOf({ definitionId, kind }));
      }
    },
  };
}
