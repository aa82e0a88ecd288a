import { readFileSync } from 'node:fs';
import { format, resolveConfig } from 'prettier';
import { describe, expect, it } from 'vitest';
import { renderConfigurationSchema } from '../src/config/json-schema.js';

const FILE = 'config/personas.schema.json';

interface Schema {
  anyOf?: Schema[];
  definitions?: Record<string, Schema>;
  properties?: Record<string, Schema>;
  required?: string[];
  additionalProperties?: boolean | Schema;
  description?: string;
}

const schema = JSON.parse(renderConfigurationSchema()) as Schema;

describe(`the JSON Schema in ${FILE}`, () => {
  it('is the one that the program prints (`personas-sync schema`)', () => {
    expect(readFileSync(FILE, 'utf8')).toBe(renderConfigurationSchema());
  });

  it('is written as the formatter would', async () => {
    const text = renderConfigurationSchema();
    const options = await resolveConfig(FILE);
    expect(await format(text, { ...options, filepath: FILE })).toBe(text);
  });

  it('knows the main file and an included one, and no other keys', () => {
    expect(schema.anyOf).toEqual([{ $ref: '#/definitions/main' }, { $ref: '#/definitions/included' }]);
    const { main, included, audience, trait } = schema.definitions ?? {};
    expect(main?.required).toEqual(['profiles', 'destinations']);
    expect(Object.keys(included?.properties ?? {})).toEqual(['audiences', 'traits']);
    for (const each of [main, included, audience, trait]) expect(each?.additionalProperties).toBe(false);
  });

  it('describes every key of a definition', () => {
    for (const kind of ['audience', 'trait']) {
      for (const [key, property] of Object.entries(schema.definitions?.[kind]?.properties ?? {})) {
        expect([key, property.description]).toEqual([key, expect.stringMatching(/\w.*\.$/)]);
      }
    }
  });

  it('lets a variable stand for a choice and a number', () => {
    const variable = { type: 'string', pattern: '\\$\\{' };
    expect(schema.definitions?.audience?.properties?.initial?.anyOf).toContainEqual(variable);
    expect(JSON.stringify(schema.definitions?.main?.properties?.runs)).toContain(JSON.stringify(variable));
  });
});
