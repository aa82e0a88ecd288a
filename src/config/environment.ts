import { readFileSync } from 'node:fs';

/**
 * `${NAME}` and `${NAME:-default}` in the configuration's scalars, and `$${` for a literal `${`. Where NAME is unset or
 * empty and NAME_FILE is set, the value is what the file of that path holds, without line breaks at its end. A message
 * names variables, and nothing that they hold.
 */

/** `text` stands only where there is no problem. */
interface Substitution {
  text: string;
  problems: readonly string[];
}

export type Substitute = (text: string) => Substitution;

const REFERENCE = /\$\$\{|\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}|\$\{/g;

export function createSubstitute(environment: NodeJS.ProcessEnv): Substitute {
  return (text) => {
    const problems: string[] = [];
    const replaced = text.replace(REFERENCE, (reference, name?: string, fallback?: string) => {
      if (reference === '$${') return '${';
      if (name === undefined) {
        problems.push('A variable is written as `${NAME}` or `${NAME:-default}`, and a literal `${` as `$${`.');
        return '';
      }
      const found = lookUp(name, fallback, environment);
      if (found.kind === 'problem') problems.push(found.message);
      return found.kind === 'value' ? found.value : '';
    });
    return { text: replaced, problems };
  };
}

type Found = { kind: 'value'; value: string } | { kind: 'problem'; message: string };

function lookUp(name: string, fallback: string | undefined, environment: NodeJS.ProcessEnv): Found {
  const value = environment[name] ?? '';
  const secretFile = environment[`${name}_FILE`] ?? '';
  if (value !== '' && secretFile !== '') {
    return { kind: 'problem', message: `The variables ${name} and ${name}_FILE are both set: unset one of them.` };
  }
  if (secretFile !== '') return readSecretFile(name, secretFile);
  if (value !== '') return { kind: 'value', value };
  if (fallback !== undefined) return { kind: 'value', value: fallback };
  if (environment[name] !== undefined) return { kind: 'value', value: '' };
  return {
    kind: 'problem',
    message: `The variable ${name} is not set: set ${name} or ${name}_FILE, or write \`\${${name}:-default}\`.`,
  };
}

function readSecretFile(name: string, file: string): Found {
  try {
    return { kind: 'value', value: readFileSync(file, 'utf8').replace(/[\r\n]+$/, '') };
  } catch (error) {
    // The path isn't shown: the secret itself is put here by mistake often enough.
    const code = error instanceof Error && 'code' in error ? String(error.code) : 'unknown error';
    return { kind: 'problem', message: `The file that ${name}_FILE names can't be read (${code}).` };
  }
}
