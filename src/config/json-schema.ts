import { z } from 'zod';
import { lists, sections } from './schema.js';

/**
 * The JSON Schema of a configuration file, the main one or one that it includes, as the text of
 * `config/personas.schema.json`.
 */
export function renderConfigurationSchema(): string {
  const main = z.strictObject(sections).meta({ id: 'main', description: 'The main file.' });
  const included = z.strictObject(lists).meta({ id: 'included', description: 'A file that the main one includes.' });
  const { $schema, ...rest } = z.toJSONSchema(z.union([main, included]), {
    io: 'input',
    target: 'draft-7',
    override: ({ jsonSchema }) => allowVariables(jsonSchema),
  });
  return `${render({ $schema, title: 'Configuration of personas-sync', ...rest }, '')}\n`;
}

/** Lets `${NAME}` stand where a certain text, a number, or true and false belong. */
function allowVariables(schema: z.core.JSONSchema.BaseSchema): void {
  const limited = 'enum' in schema || 'const' in schema;
  const narrow = schema.pattern !== undefined && !new RegExp(schema.pattern).test('${NAME}');
  if (!limited && !narrow && !['integer', 'number', 'boolean'].some((type) => schema.type === type)) return;
  const { description, ...own } = schema;
  for (const keyword of Object.keys(schema)) Reflect.deleteProperty(schema, keyword);
  if (description !== undefined) schema.description = description;
  schema.anyOf = [own, { type: 'string', pattern: '\\$\\{' }];
}

/** JSON as the project's formatter writes it: lists of plain values on one line. */
function render(value: unknown, indent: string): string {
  const deeper = `${indent}  `;
  if (Array.isArray(value)) {
    const plain = value.every((entry) => typeof entry !== 'object');
    if (plain) return `[${value.map((entry) => JSON.stringify(entry)).join(', ')}]`;
    return `[\n${value.map((entry) => `${deeper}${render(entry, deeper)}`).join(',\n')}\n${indent}]`;
  }
  if (typeof value !== 'object' || value === null) return JSON.stringify(value);
  const members = Object.entries(value);
  if (members.length === 0) return '{}';
  return `{\n${members.map(([key, member]) => `${deeper}${JSON.stringify(key)}: ${render(member, deeper)}`).join(',\n')}\n${indent}}`;
}
