import { describe, expect, it } from 'vitest';
import type { Problem } from '../src/lib/errors.js';
import { describeProblem } from '../src/lib/errors.js';
import { readYaml } from '../src/config/yaml.js';

function read(lines: string | readonly string[], substitute = (text: string) => ({ text, problems: [] as string[] })) {
  const problems: Problem[] = [];
  const text = typeof lines === 'string' ? lines : lines.join('\n');
  const source = readYaml('/f.yaml', text, substitute, (problem) => problems.push(problem));
  return { source, text, problems: problems.map(describeProblem) };
}

/** What stands in the file at the place of each word of the text at the path. */
function wordsInFile(lines: string | readonly string[], path: (string | number)[]) {
  const { source, text } = read(lines);
  const found = source?.textAt(path);
  if (!found) throw new Error('no text');
  const rows = text.split('\n');
  return Array.from(found.sql.matchAll(/\S+/g), ({ 0: word, index }) => {
    const place = found.placeOf(Array.from(found.sql.slice(0, index)).length);
    return rows[place.line - 1]?.slice(place.column - 1, place.column - 1 + word.length);
  });
}

describe('the place of a character of SQL', () => {
  const words = ['SELECT', 'a,', 'b', 'FROM', 'orders', 'WHERE', "x='y'", 'GROUP'];

  const styles: [style: string, lines: readonly string[]][] = [
    ['a plain scalar', ["- sql: SELECT a, b FROM orders WHERE x='y' GROUP"]],
    ['a plain scalar of several lines', ['- sql: SELECT a, b', '    FROM orders', '', "    WHERE x='y' GROUP"]],
    ['a plain scalar on the next line', ['- sql:', "    SELECT a, b FROM orders WHERE x='y' GROUP"]],
    [
      'a literal block',
      ['- sql: |', '    SELECT a,', '      b', '    FROM orders', '', "    WHERE x='y' GROUP", '- x: 1'],
    ],
    ['a literal block with an indentation', ['- sql: |2-', "      SELECT a, b FROM orders WHERE x='y' GROUP"]],
    ['a literal block with a comment', ['- sql: |+ # SELECT', "    SELECT a, b FROM orders WHERE x='y' GROUP", '', '']],
    ['a literal block with an anchor', ['- sql: &q |', "    SELECT a, b FROM orders WHERE x='y' GROUP"]],
    ['a folded block', ['- sql: >-', '    SELECT a, b', '    FROM orders', '', "      WHERE x='y'", '    GROUP']],
    ['a double-quoted scalar', [`- sql: "SELECT a, b FROM orders WHERE x='y' GROUP"`]],
    [
      'a double-quoted scalar of several lines',
      ['- sql: "SELECT a, b', '    FROM orders \\', `    WHERE x='y'`, '', '    GROUP"'],
    ],
    ['a file with CRLF', ['- sql: |\r', '    SELECT a,\r', "      b FROM orders WHERE x='y'\r", '    GROUP\r', '']],
    ['an alias', ["- x: &q SELECT a, b FROM orders WHERE x='y' GROUP", '- sql: *q']],
  ];

  it.each(styles)('is found in %s', (style, lines) => {
    expect(wordsInFile(lines, [style === 'an alias' ? 1 : 0, 'sql'])).toEqual(words);
  });

  it('is found behind escapes and doubled quotes', () => {
    expect(wordsInFile(["sql: 'SELECT ''it''''s'' FROM orders'"], ['sql']).at(-1)).toBe('orders');
    expect(wordsInFile(['sql: "SELECT \\"A\\" \\t \\x41\\n\\u0020 \\U00000041 FROM orders"'], ['sql']).at(-1)).toBe(
      'orders',
    );
  });

  it('counts characters as PostgreSQL does, not units of UTF-16', () => {
    expect(wordsInFile(['sql: |', "  SELECT '😀😀' AS a", '  FROM orders'], ['sql']).at(-1)).toBe('orders');
  });

  it('is right behind the last character at the end of the text', () => {
    const { source } = read(['sql: |', '  SELECT 1 +', '']);
    expect(source?.textAt(['sql'])?.placeOf(11)).toEqual({ file: '/f.yaml', line: 2, column: 13 });
  });

  it('stays in the scalar where the text is empty or the offset too large', () => {
    const { source } = read(["sql: ''"]);
    expect(source?.textAt(['sql'])?.placeOf(99)).toEqual({ file: '/f.yaml', line: 1, column: 6 });
  });
});

describe('the place of a value', () => {
  const { source } = read(['a:', '  b: [x, { c: 1 }]', '  empty:', 'list:', '  - name: n']);

  it.each([
    ['a value', ['a', 'b', 1, 'c'], 2, 15],
    ['an entry', ['a', 'b', 0], 2, 7],
    ['a missing value: its mapping’s key', ['a', 'gone'], 1, 1],
    ['a missing value of an entry: the entry', ['list', 0, 'gone'], 5, 5],
    ['an empty value: its key', ['a', 'empty'], 3, 3],
    ['something far below what is there', ['a', 'b', 7, 'x', 'y'], 2, 3],
    ['the whole file', [], 1, 1],
  ] as [string, (string | number)[], number, number][])('of %s', (_, path, line, column) => {
    expect(source?.placeOf(path)).toEqual({ file: '/f.yaml', line, column });
  });

  it('of a key', () => {
    expect(source?.keyPlaceOf(['a', 'b', 1, 'c'])).toEqual({ file: '/f.yaml', line: 2, column: 12 });
  });
});

describe('broken YAML', () => {
  it.each([
    ['an unclosed quote', 'a: "hunter2\nb: 1', 'Something is missing here'],
    ['an unclosed bracket', 'a: [hunter2', 'a bracket before it is open'],
    ['a tab', 'a:\n\t- hunter2', 'indented by spaces'],
    ['a colon in a value', 'a: hunter2: x', "A second `key: value` can't stand on this line"],
    ['a wrong indentation', 'a:\n    b: 1\n  c: hunter2', 'indent what belongs together'],
    ['a reserved character', 'a: @hunter2', 'put it in quotes'],
    ['an unknown escape', 'a: "hunter2\\q"', 'use single quotes'],
    ['an unknown tag', 'a: !hunter2 x', 'Tags such as `!name` are not known'],
    ['two documents', 'a: 1\n---\nb: hunter2', 'A file holds one document'],
    ['a key twice', 'hunter2: 1\nhunter2: 2', 'This key was given before'],
    ['a mapping as a key', '? {hunter2: 1}\n: 2', 'A key must be text'],
    ['an alias without an anchor', 'a: *hunter2', 'no anchor before it'],
    ['an alias within its own anchor', 'a: &hunter2 [1, *hunter2]', 'no anchor before it'],
    ['text behind a block header', 'a: | hunter2\n  x', 'does not belong here'],
    ['a stray bracket', 'a: 1 ]hunter2\nb: {c: ]}', 'does not belong here'],
    ['a variable between braces', 'a: { b: ${NAME}, c: hunter2 }', 'needs quotes, "${NAME}"'],
  ])('with %s is a sentence with a place, and never a piece of the file', (_, text, expected) => {
    const { problems } = read(text);
    expect(problems.join('\n')).toContain(expected);
    expect(problems.join('\n')).not.toContain('hunter2');
    for (const problem of problems) expect(problem).toMatch(/^\/f\.yaml:\d+:\d+: [A-Z].*\.$/);
  });

  it('is still read where only a key is double', () => {
    expect(read('a: 1\na: 2').source).not.toBeNull();
  });
});

describe('anchors', () => {
  it('may be used a hundred times and more', () => {
    const { source, problems } = read(['- &g { exits: 30% }', ...Array.from({ length: 500 }, () => '- *g')]);
    expect(problems).toEqual([]);
    expect(source?.at([500, 'exits'])).toBe('30%');
  });

  it('are refused where they multiply', () => {
    const lines = ['a0: &a0 [x, x]'];
    for (let i = 1; i < 40; i++)
      lines.push(
        `a${i}: &a${i} [${Array(10)
          .fill(`*a${i - 1}`)
          .join(', ')}]`,
      );
    const { source, problems } = read(lines);
    expect(source).toBeNull();
    expect(problems).toEqual(['/f.yaml:2:10: Aliases in this file repeat too much: write the values out.']);
  });
});

describe('variables', () => {
  const shout = (text: string) => ({ text: text.replace('${X}', 'VALUE'), problems: [] as string[] });
  const fail = (text: string) => ({ text, problems: text.includes('$') ? ['No such variable.'] : [] });

  it('are replaced in every scalar but those below the key `sql`, and in no key', () => {
    const { source } = read(['a: ${X}', 'b: ["${X}", { sql: "${X}" }]', '"${X}": 1', 'sql: |-', '  ${X}'], shout);
    expect(source?.at([])).toEqual({ a: 'VALUE', b: ['VALUE', { sql: '${X}' }], '${X}': 1, sql: '${X}' });
  });

  it('that fail are reported in their places, and known as such', () => {
    const { source, problems } = read(['a: x', 'b:', '  - $'], fail);
    expect(problems).toEqual(['/f.yaml:3:5: No such variable.']);
    expect(source?.isUnresolved(['b', 0])).toBe(true);
    expect(source?.isUnresolved(['a'])).toBe(false);
  });
});
