/**
 * The members of a JSON object's text, as texts: JSON.parse would make JavaScript numbers of the digits that PostgreSQL
 * gave. The text must be a valid object.
 */
export function* membersOf(object: string): Generator<{ name: string; json: string }> {
  let at = object.indexOf('{') + 1;
  const passBlank = (): void => {
    while (/[\s,]/.test(object.charAt(at))) at += 1;
  };
  const passString = (): void => {
    for (at += 1; object.charAt(at) !== '"'; at += 1) if (object.charAt(at) === '\\') at += 1;
    at += 1;
  };
  passBlank();
  while (object.charAt(at) !== '}' && at < object.length) {
    const start = at;
    passString();
    const name = JSON.parse(object.slice(start, at)) as string;
    at = object.indexOf(':', at) + 1;
    const value = at;
    for (let depth = 0; depth > 0 || !/[,}]/.test(object.charAt(at));) {
      const sign = object.charAt(at);
      if (sign === '"') {
        passString();
        continue;
      }
      if (sign === '{' || sign === '[') depth += 1;
      if (sign === '}' || sign === ']') depth -= 1;
      at += 1;
    }
    yield { name, json: object.slice(value, at).trim() };
    passBlank();
  }
}
