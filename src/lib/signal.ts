/** Wakes one waiter; a call that nobody waits for isn't lost. */
export interface Signal {
  notify: () => void;
  /** Resolves at the next call of `notify`, at once if there was one since the last wait, or after `ms`. */
  wait: (ms: number) => Promise<void>;
}

export function createSignal(): Signal {
  let isNotified = false;
  let wake: () => void = () => undefined;
  return {
    notify: () => {
      isNotified = true;
      wake();
    },
    wait: async (ms) => {
      if (!isNotified) {
        await new Promise<void>((resolve) => {
          const timer = setTimeout(resolve, ms);
          wake = () => {
            clearTimeout(timer);
            resolve();
          };
        });
      }
      isNotified = false;
    },
  };
}
