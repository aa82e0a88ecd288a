import { expect, it } from 'vitest';
import { createLeftOut } from '../src/delivery/left-out.js';

const listen = () => {
  const [told, written]: [string[][], string[][]] = [[], []];
  const leftOut = createLeftOut({
    write: (fields) => {
      written.push([...fields]);
      return Promise.resolve();
    },
    onNew: (fields) => told.push([...fields]),
  });
  return { leftOut, told, written };
};

it('tells of each field once, and writes down which were left out since it last did', async () => {
  const { leftOut, told, written } = listen();
  leftOut.hear(['ltv', 'city', 'ltv']);
  await leftOut.note();
  leftOut.hear(['city', 'zip']);
  await leftOut.note();
  await leftOut.note();
  expect(told).toEqual([['ltv', 'city'], ['zip']]);
  expect(written).toEqual([
    ['ltv', 'city'],
    ['city', 'zip'],
  ]);
});

it('keeps no address that an answer calls a field, and no more than a hundred names', async () => {
  const { leftOut, told, written } = listen();
  leftOut.hear(['ada@example.com', 'x'.repeat(200)]);
  await leftOut.note();
  expect([told, written]).toEqual([[], []]);
  leftOut.hear(Array.from({ length: 300 }, (_, n) => `f${n}`));
  await leftOut.note();
  expect(written[0]).toHaveLength(100);
});
