import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { createSubstitute } from '../src/config/environment.js';

let folder = '';
beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), 'personas-environment-'));
  writeFileSync(join(folder, 'key'), 'from a file\r\n\n');
});
afterAll(() => rmSync(folder, { recursive: true }));

describe('a variable in a scalar', () => {
  const substitute = createSubstitute({ NAME: 'value', EMPTY: '', _1: 'odd', MONEY: '$& ${NAME} $1' });

  it.each([
    ['no variable', 'no variable'],
    ['${NAME}', 'value'],
    ['a ${NAME} and ${_1}', 'a value and odd'],
    ['${NAME:-default}', 'value'],
    ['${GONE:-default}', 'default'],
    ['${EMPTY:-default}', 'default'],
    ['${GONE:-}', ''],
    ['${EMPTY}', ''],
    ['${GONE:-postgres://a:b@c/d}', 'postgres://a:b@c/d'],
    ['$${NAME}', '${NAME}'],
    ['$NAME and $ and {NAME}', '$NAME and $ and {NAME}'],
    ['${MONEY}', '$& ${NAME} $1'],
  ])('%j becomes %j', (text, expected) => {
    expect(substitute(text)).toEqual({ text: expected, problems: [] });
  });

  it.each(['${}', '${name', '${1ST}', '${NAME:?error}', '${NAME-default}', '${a b}'])('is not written %j', (text) => {
    const { problems } = substitute(text);
    expect(problems).toEqual([
      'A variable is written as `${NAME}` or `${NAME:-default}`, and a literal `${` as `$${`.',
    ]);
  });

  it('is a problem for each one that is missing', () => {
    expect(substitute('${GONE} ${NAME} ${AWAY}').problems).toEqual([
      'The variable GONE is not set: set GONE or GONE_FILE, or write `${GONE:-default}`.',
      'The variable AWAY is not set: set AWAY or AWAY_FILE, or write `${AWAY:-default}`.',
    ]);
  });
});

describe('a mounted secret', () => {
  it('is read from the file that NAME_FILE names, without line breaks at its end', () => {
    const file = join(folder, 'key');
    expect(createSubstitute({ NAME_FILE: file })('<${NAME}>').text).toBe('<from a file>');
    expect(createSubstitute({ NAME: '', NAME_FILE: file })('<${NAME:-default}>').text).toBe('<from a file>');
  });

  it('can not be set beside its variable', () => {
    const { problems } = createSubstitute({ NAME: 'value', NAME_FILE: join(folder, 'key') })('${NAME}');
    expect(problems).toEqual(['The variables NAME and NAME_FILE are both set: unset one of them.']);
  });

  it('is a problem without the path where its file is missing, since the path may be the secret itself', () => {
    const { problems } = createSubstitute({ NAME_FILE: '/hunter2' })('${NAME:-default}');
    expect(problems).toEqual(["The file that NAME_FILE names can't be read (ENOENT)."]);
  });
});
