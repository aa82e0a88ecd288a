import type { Logger } from './logger.js';
import { createSignal } from './signal.js';

/** Something that is done again and again. */
export interface Loop {
  /** Has it done at once, or once more where it is being done. */
  look: () => void;
  stop: () => Promise<void>;
}

/** Repeats `work` until stopped; what it throws is logged and time goes on. */
export function startLoop(
  name: string,
  everyMs: number | (() => number),
  log: Logger,
  work: () => Promise<unknown>,
): Loop {
  const signal = createSignal();
  let isStopping = false;
  const loop = async (): Promise<void> => {
    while (!isStopping) {
      try {
        await work();
      } catch (error) {
        log.failure(`${name} failed; trying again`, error);
      }
      await signal.wait(typeof everyMs === 'number' ? everyMs : everyMs());
    }
  };
  const looping = loop();
  return {
    look: signal.notify,
    stop: async () => {
      isStopping = true;
      signal.notify();
      await looping;
    },
  };
}
