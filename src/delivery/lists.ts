import type { Verdict } from '../core/verdict.js';
import type { WaitingMark } from '../outbox/queue.js';

/** The list of a definition, by its name: asked for once, and again only where that came to nothing. */
export interface Lists {
  /** Its id, or what keeps it from being known; null: later. */
  of: (mark: WaitingMark) => Promise<Found>;
  /** It isn't there any more. */
  forget: (definitionId: number) => void;
}

type Found = { kind: 'list'; id: number } | Verdict | null;

export interface ListsOptions {
  /** Finds the list of that name, or makes it. */
  find: (name: string) => Promise<Found>;
  note: (list: { definitionId: number; name: string; listId: number }) => Promise<void>;
}

export function createLists({ find, note }: ListsOptions): Lists {
  const asked = new Map<string, { definitionId: number; found: Promise<Found> }>();

  const ask = async (definitionId: number, name: string): Promise<Found> => {
    const found = await find(name);
    if (found?.kind === 'list') await note({ definitionId, name, listId: found.id });
    return found;
  };

  return {
    of: async ({ definitionId, list }) => {
      if (list === null) throw new Error('The definition fills no list.');
      if (list.id !== null) return { kind: 'list', id: list.id };
      const name = `${definitionId} ${list.name}`;
      const asking = asked.get(name)?.found ?? ask(definitionId, list.name);
      asked.set(name, { definitionId, found: asking });
      const found = await asking.catch((error: unknown) => {
        asked.delete(name);
        throw error;
      });
      if (found?.kind !== 'list') asked.delete(name);
      return found;
    },
    forget: (definitionId) => {
      for (const [name, each] of asked) if (each.definitionId === definitionId) asked.delete(name);
    },
  };
}
