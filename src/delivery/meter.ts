/** How much happened a second, over the last ten seconds. */
export interface Meter {
  count: (amount: number, now: number) => void;
  perSecond: (now: number) => number;
}

const SECONDS = 10;

export function createMeter(): Meter {
  const counts = new Float64Array(SECONDS);
  const began = new Float64Array(SECONDS).fill(-Infinity);
  const slotOf = (second: number): number => ((second % SECONDS) + SECONDS) % SECONDS;
  return {
    count: (amount, now) => {
      const second = Math.floor(now / 1000);
      const slot = slotOf(second);
      if (began[slot] !== second) {
        began[slot] = second;
        counts[slot] = 0;
      }
      counts[slot] = (counts[slot] ?? 0) + amount;
    },
    // The second that goes on is left out: it would count for less than it is.
    perSecond: (now) => {
      const current = Math.floor(now / 1000);
      let sum = 0;
      for (let back = 1; back < SECONDS; back += 1) {
        const slot = slotOf(current - back);
        if (began[slot] === current - back) sum += counts[slot] ?? 0;
      }
      return sum / (SECONDS - 1);
    },
  };
}
