import Bottleneck from 'bottleneck';

/**
 * Tasks that run at the same time, so many at most, and some more that mustn't wait; `onFree` is called whenever some of
 * them have ended.
 */
export interface Slots {
  /** Begins a task for each of `all` at once: no more than `free`, or than `spare` where they mustn't wait. A task may not throw. */
  run: <T>(all: readonly T[], task: (each: T) => Promise<void>) => void;
  free: () => number;
  spare: () => number;
  taken: () => number;
  resize: (most: number) => void;
}

/**
 * Bottleneck takes the tasks in slabs, one job each: it passes some 430 jobs a second at most, far fewer than there are
 * calls. A slab's places are free when the slowest of it has ended, so that slabs are small. The quota is the pace's.
 */
const SLABS = 60;
const SPARE = 50;

export function createSlots(most: number, onFree: () => void): Slots {
  const limiter = new Bottleneck({ maxConcurrent: most + SPARE });
  let size = most;
  let taken = 0;
  return {
    run: (all, task) => {
      const slabSize = Math.max(1, Math.floor(size / SLABS));
      for (let first = 0; first < all.length; first += slabSize) {
        const slab = all.slice(first, first + slabSize);
        taken += slab.length;
        void limiter
          .schedule({ weight: slab.length }, () => Promise.all(slab.map(task)))
          .finally(() => {
            taken -= slab.length;
            onFree();
          });
      }
    },
    free: () => Math.max(0, size - taken),
    spare: () => Math.max(0, size + SPARE - taken),
    taken: () => taken,
    resize: (next) => {
      if (next === size) return;
      size = next;
      // What is under way may be more than the new size: it ends, and nothing is begun meanwhile.
      limiter.updateSettings({ maxConcurrent: Math.max(next, taken) + SPARE });
    },
  };
}
