import fc from 'fast-check';
import { expect, it } from 'vitest';
import { halve } from '../src/realtime/divide.js';

const rows = fc.uniqueArray(fc.record({ id: fc.integer(), profileId: fc.constantFrom('a', 'b', 'c', 'd', 'e') }), {
  selector: ({ id }) => id,
});

it('halves by profile: no row is lost, no profile is in both, and each has somebody', () => {
  fc.assert(
    fc.property(rows, (all) => {
      const people = new Set(all.map(({ profileId }) => profileId));
      const halves = halve(all);
      if (people.size < 2) {
        expect(halves).toBeNull();
        return;
      }
      const [first, second] = halves ?? [[], []];
      expect(new Set([...first, ...second])).toEqual(new Set(all));
      const sizes = [first, second].map((half) => new Set(half.map(({ profileId }) => profileId)).size);
      expect(sizes).toEqual([Math.ceil(people.size / 2), Math.floor(people.size / 2)]);
    }),
  );
});
