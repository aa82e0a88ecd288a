/**
 * Lengths of time as people write them: `30 days`, `90s`, `1h`, `1 hour 30 minutes`. A month and a year have no length
 * of their own, so they exist only as intervals, which PostgreSQL counts on its calendar.
 */

type Unit = 'second' | 'minute' | 'hour' | 'day' | 'week' | 'month' | 'year';

const MS: Record<Unit, number | null> = {
  second: 1_000,
  minute: 60_000,
  hour: 3_600_000,
  day: 86_400_000,
  week: 604_800_000,
  month: null,
  year: null,
};

const SHORT: Readonly<Record<string, Unit>> = {
  s: 'second',
  sec: 'second',
  m: 'minute',
  min: 'minute',
  h: 'hour',
  hr: 'hour',
  d: 'day',
  w: 'week',
};

interface Amount {
  count: number;
  unit: Unit;
}

/** Milliseconds; null where the text is no duration, is zero, or has months or years. */
export function parseDuration(text: string): number | null {
  let total = 0;
  for (const { count, unit } of parseAmounts(text)) {
    const ms = MS[unit];
    if (ms === null) return null;
    total += count * ms;
  }
  return total === 0 ? null : total;
}

/**
 * The interval as PostgreSQL reads it, in whole words such as `30 days`; months and years are allowed. Null where the
 * text is no duration or is zero.
 */
export function parseInterval(text: string): string | null {
  const amounts = parseAmounts(text).filter(({ count }) => count > 0);
  return amounts.length === 0 ? null : amounts.map(describeAmount).join(' ');
}

function describeAmount({ count, unit }: Amount): string {
  return `${count} ${unit}${count === 1 ? '' : 's'}`;
}

/** None where any part of the text is something else. */
function parseAmounts(text: string): Amount[] {
  const amounts: Amount[] = [];
  const part = /\s*(\d{1,6})\s*([a-z]+)\s*/iy;
  while (part.lastIndex < text.length) {
    const [, digits = '', word = ''] = part.exec(text) ?? [];
    const unit = parseUnit(word.toLowerCase());
    if (unit === null) return [];
    amounts.push({ count: Number(digits), unit });
  }
  return amounts;
}

function parseUnit(word: string): Unit | null {
  if (Object.hasOwn(SHORT, word)) return SHORT[word] ?? null;
  const singular = word.replace(/s$/, '');
  if (isUnit(singular)) return singular;
  return singular.length > 1 && Object.hasOwn(SHORT, singular) ? (SHORT[singular] ?? null) : null;
}

function isUnit(word: string): word is Unit {
  return Object.hasOwn(MS, word);
}
