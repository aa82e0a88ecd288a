import fc from 'fast-check';
import { expect, it } from 'vitest';
import { membersOf } from '../src/core/json.js';

const members = (text: string): [string, string][] => [...membersOf(text)].map(({ name, json }) => [name, json]);

it.each<[string, [string, string][]]>([
  ['{}', []],
  ['{ }', []],
  ['{"a": 1}', [['a', '1']]],
  [
    '{"a":10.00,"b":9007199254740993}',
    [
      ['a', '10.00'],
      ['b', '9007199254740993'],
    ],
  ],
  [
    '{"a": "x, } y", "b": [1, {"c": "]"}], "d": null}',
    [
      ['a', '"x, } y"'],
      ['b', '[1, {"c": "]"}]'],
      ['d', 'null'],
    ],
  ],
  [
    String.raw`{"a\"b": "\\", "c": "\"}"}`,
    [
      ['a"b', String.raw`"\\"`],
      ['c', String.raw`"\"}"`],
    ],
  ],
])('finds the members of %s', (text, expected) => {
  expect(members(text)).toEqual(expected);
});

it('finds in any object what a parser finds', () => {
  fc.assert(
    fc.property(fc.dictionary(fc.string(), fc.jsonValue()), fc.constantFrom(undefined, 1), (object, indent) => {
      const text = JSON.stringify(object, null, indent);
      expect(members(text).map(([name, json]) => [name, JSON.parse(json) as unknown])).toEqual(
        Object.entries(JSON.parse(text) as object),
      );
    }),
  );
});
