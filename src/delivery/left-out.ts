/**
 * Fields that a destination says it has left out of what it was sent (`filteredOutFields`): nobody is told otherwise, since
 * such calls are accepted. Each is told once in the log, and remembered with the time when it last happened.
 */
export interface LeftOut {
  hear: (fields: readonly string[]) => void;
  /** Writes down what has been heard. */
  note: () => Promise<void>;
}

/** Whatever an answer says; and nobody's address is a field. */
const MOST = 100;
const isName = (text: string): boolean => text.length <= 128 && !text.includes('@');

export interface LeftOutOptions {
  write: (fields: readonly string[]) => Promise<void>;
  onNew: (fields: readonly string[]) => void;
}

export function createLeftOut({ write, onNew }: LeftOutOptions): LeftOut {
  const told = new Set<string>();
  let heard = new Set<string>();
  return {
    hear: (fields) => {
      const named = [...new Set(fields)].filter(isName);
      const others = named.filter((field) => !told.has(field)).slice(0, MOST - told.size);
      for (const field of others) told.add(field);
      for (const field of named) if (told.has(field)) heard.add(field);
      if (others.length > 0) onNew(others);
    },
    note: async () => {
      if (heard.size === 0) return;
      const fields = heard;
      heard = new Set();
      try {
        await write([...fields]);
      } catch (error) {
        for (const field of fields) heard.add(field);
        throw error;
      }
    },
  };
}
