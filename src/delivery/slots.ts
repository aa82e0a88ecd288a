import Bottleneck from 'bottleneck';

/**
 * Tasks that run at the same time, so many at most, and some more that mustn't wait; `onFree` is called whenever some of
 * them have ended.
 */
export interface Slots {
  /** Begins a task for each of `all`, no more than `free`. A task may not throw. */
  run: <T>(all: readonly T[], task: (each: T) => Promise<void>) => void;
  /** The same at once for those that mustn't wait, no more than `spare`. */
  runNow: <T>(all: readonly T[], task: (each: T) => Promise<void>) => void;
  free: () => number;
  spare: () => number;
  taken: () => number;
  /** Of those taken, how many have yet to begin. */
  waiting: () => number;
  resize: (most: number) => void;
}

/**
 * Bottleneck takes the tasks in slabs, one job each: it passes some 430 jobs a second at most, far fewer than there are
 * calls. A slab's places are free when the slowest of it has ended, so that slabs are small. The quota is the pace's.
 *
 * It takes one job after the other, with two timers for each, so that a job that comes after fifty others has waited
 * for more than a second on a busy machine: what mustn't wait doesn't go through it.
 */
const SLABS = 60;
const SPARE = 50;

export function createSlots(most: number, onFree: () => void): Slots {
  const limiter = new Bottleneck({ maxConcurrent: most });
  let size = most;
  let taken = 0;
  let waiting = 0;
  const give = (count: number): void => {
    taken -= count;
    onFree();
  };
  return {
    run: (all, task) => {
      const slabSize = Math.max(1, Math.floor(size / SLABS));
      for (let first = 0; first < all.length; first += slabSize) {
        const slab = all.slice(first, first + slabSize);
        taken += slab.length;
        waiting += slab.length;
        void limiter
          .schedule({ weight: slab.length }, () => {
            waiting -= slab.length;
            return Promise.all(slab.map(task));
          })
          .finally(() => give(slab.length));
      }
    },
    runNow: (all, task) => {
      taken += all.length;
      for (const each of all) void task(each).finally(() => give(1));
    },
    free: () => Math.max(0, size - taken),
    spare: () => Math.max(0, size + SPARE - taken),
    taken: () => taken,
    waiting: () => waiting,
    resize: (next) => {
      if (next === size) return;
      size = next;
      // What is under way may be more than the new size: it ends, and nothing is begun meanwhile.
      limiter.updateSettings({ maxConcurrent: Math.max(next, taken) });
    },
  };
}
