/** How the configuration's messages put things: quoted names, choices, the nearest known word. */

/** A word of a file as it is shown in a message: never with a line break. */
export function quoted(word: string): string {
  return `\`${JSON.stringify(word).slice(1, -1).replaceAll('\\"', '"')}\``;
}

/** `a`, `b` or `c`. */
export function listed(words: readonly string[], conjunction: 'or' | 'and' = 'or'): string {
  const all = words.map(quoted);
  const last = all.pop() ?? '';
  return all.length === 0 ? last : `${all.join(', ')} ${conjunction} ${last}`;
}

/** The known word that was probably meant, where one is near enough. */
export function nearest(word: string, known: readonly string[]): string | undefined {
  const given = plain(word);
  const allowed = Math.max(1, Math.floor(given.length / 3));
  const ranked = known
    .map((candidate) => ({ candidate, distance: distance(given, plain(candidate)) }))
    .filter((entry) => entry.distance <= allowed)
    .sort((a, b) => a.distance - b.distance);
  return ranked[0]?.candidate;
}

/** What follows the name of something unknown: the nearest known word, or all of them. */
export function unknownWord(word: string, known: readonly string[], what: string): string {
  const near = nearest(word, known);
  if (near !== undefined) return `isn't a known ${what}: did you mean ${quoted(near)}?`;
  return `isn't a known ${what}: use ${listed([...known].sort())}`;
}

/** With the stop that it needs at its end. */
export function sentence(text: string): string {
  return /[.?]$/.test(text) ? text : `${text}.`;
}

function plain(word: string): string {
  return word.toLowerCase().replace(/[\s_-]/g, '');
}

/** Letters to insert, remove, replace or swap with their neighbour. */
function distance(a: string, b: string): number {
  let before: number[] = [];
  let previous = Array.from({ length: b.length + 1 }, (_, index) => index);
  for (let i = 1; i <= a.length; i++) {
    const row = [i];
    for (let j = 1; j <= b.length; j++) {
      const same = a[i - 1] === b[j - 1];
      const swapped = i > 1 && j > 1 && a[i - 1] === b[j - 2] && a[i - 2] === b[j - 1];
      row.push(
        Math.min(
          (previous[j] ?? 0) + 1,
          (row[j - 1] ?? 0) + 1,
          (previous[j - 1] ?? 0) + (same ? 0 : 1),
          swapped ? (before[j - 2] ?? 0) + 1 : Infinity,
        ),
      );
    }
    before = previous;
    previous = row;
  }
  return previous[b.length] ?? 0;
}
