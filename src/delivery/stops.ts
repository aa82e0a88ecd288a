import type { Stop, Stopped, Streaks } from '../outbox/noted.js';

/**
 * What is sent no more until a person says so, since it is refused one time after the other: what is wrong with a
 * definition shows in all of its calls, and a hundred that were refused for their content, with none accepted between
 * them, say that it is. Each field is counted by itself, and so are events. A field that stops is left out of what is
 * sent; where it was the only one, where it is the events that are refused, or where the list is gone, the calls of the
 * definition wait.
 *
 * What was counted is remembered: a hundred are a hundred also where a command sends a few a day.
 */
export interface Stops {
  /** One field of a definition was accepted, or an event of it (null). */
  passed: (definitionId: number, field: string | null) => void;
  /** One was refused for its content; false where its call waits instead. */
  refused: (definitionId: number, field: string | null, reason: string) => boolean;
  listGone: (definitionId: number, reason: string) => void;
  /** Whether a field is left out of what is sent. */
  leavesOut: (definitionId: number, field: string) => boolean;
  /** Writes down the stops that have not been; first of all reads what was counted before. */
  flush: () => Promise<void>;
  /** Writes down what has been counted. */
  note: () => Promise<void>;
  /** What is stopped by what is written: others have been resumed. `fields` are named by `fieldName`. */
  heed: (written: { definitions: readonly number[]; fields: readonly string[] }) => void;
}

export interface StopsOptions {
  read: () => Promise<Streaks>;
  note: (streaks: Streaks) => Promise<void>;
  write: (stop: Stop) => Promise<Stopped>;
  /** There is something to flush. */
  onStop: (stop: Stop) => void;
}

const MOST = 100;
/** No field can have this name. */
const EVENTS = '.events';

/** Names a field of a definition, or its events (null). */
export const fieldName = (definitionId: number, field: string | null): string => `${definitionId} ${field ?? EVENTS}`;

export function createStops({ read, note, write, onStop }: StopsOptions): Stops {
  const streaks = new Map<string, number>();
  let isRead = false;
  let hasChanged = false;
  /** What has been decided and isn't written yet. */
  const decided = new Map<string, Stop>();
  const definitions = new Set<number>();
  const fields = new Set<string>();

  const decide = (stop: Stop): void => {
    const name = fieldName(stop.definitionId, stop.field);
    if (decided.has(name) || definitions.has(stop.definitionId)) return;
    decided.set(name, stop);
    onStop(stop);
  };
  const forget = (name: string): void => {
    if (streaks.delete(name)) hasChanged = true;
  };
  const forgetAll = (definitionId: number): void => {
    for (const name of streaks.keys()) if (name.startsWith(fieldName(definitionId, ''))) forget(name);
  };
  const recall = async (): Promise<void> => {
    if (isRead) return;
    for (const [name, count] of Object.entries(await read())) streaks.set(name, count);
    isRead = true;
  };

  return {
    passed: (definitionId, field) => {
      if (streaks.size > 0) forget(fieldName(definitionId, field));
    },
    refused: (definitionId, field, reason) => {
      const name = fieldName(definitionId, field);
      if (definitions.has(definitionId) || decided.has(name)) return false;
      if (fields.has(name)) return true;
      const streak = (streaks.get(name) ?? 0) + 1;
      streaks.set(name, streak);
      hasChanged = true;
      if (streak < MOST) return true;
      const why = `${MOST} calls in a row were refused for their content, the last with ${reason}.`;
      decide({ definitionId, field, reason: why, isListGone: false });
      return false;
    },
    listGone: (definitionId, reason) => decide({ definitionId, field: null, reason, isListGone: true }),
    leavesOut: (definitionId, field) => fields.size > 0 && fields.has(fieldName(definitionId, field)),
    flush: async () => {
      await recall();
      for (const [name, stop] of decided) {
        const stopped = await write(stop);
        decided.delete(name);
        // When a person has resumed it, counting begins anew.
        if (stopped === 'field') {
          fields.add(name);
          forget(name);
        } else {
          definitions.add(stop.definitionId);
          forgetAll(stop.definitionId);
        }
      }
    },
    note: async () => {
      if (!hasChanged || !isRead) return;
      hasChanged = false;
      try {
        await note(Object.fromEntries(streaks));
      } catch (error) {
        hasChanged = true;
        throw error;
      }
    },
    heed: (written) => {
      for (const id of definitions) if (!written.definitions.includes(id)) definitions.delete(id);
      fields.clear();
      for (const name of written.fields) fields.add(name);
    },
  };
}
