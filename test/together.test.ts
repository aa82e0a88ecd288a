import fc from 'fast-check';
import { expect, it } from 'vitest';
import { togetherMs } from '../src/lib/together.js';

it('has everybody wake at one moment, whenever they ask, and nobody again at the moment at which they woke', () => {
  fc.assert(
    fc.property(fc.double({ min: 0, max: 1e7, noNaN: true }), fc.constantFrom(500, 1_000), (now, everyMs) => {
      const waitMs = togetherMs(everyMs, now);
      expect(waitMs).toBeGreaterThan(5);
      expect(waitMs).toBeLessThanOrEqual(everyMs + 5);
      const offMs = (now + waitMs) % everyMs;
      expect(Math.min(offMs, everyMs - offMs)).toBeLessThan(0.001);
    }),
  );
});
