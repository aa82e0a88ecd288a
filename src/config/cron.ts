/**
 * Cron expressions of five fields, or six with seconds first: numbers, names, lists, ranges and steps. What is refused
 * here is a mistake; what is accepted, the scheduler accepts too. Day of month and day of week must both hold.
 */

interface Field {
  min: number;
  max: number;
  names?: readonly string[];
}

const MONTHS = ['jan', 'feb', 'mar', 'apr', 'may', 'jun', 'jul', 'aug', 'sep', 'oct', 'nov', 'dec'];
const WEEKDAYS = ['sun', 'mon', 'tue', 'wed', 'thu', 'fri', 'sat'];
const LONGEST_MONTH = [31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];

const SECOND: Field = { min: 0, max: 59 };
const DAY: Field = { min: 1, max: 31 };
const MONTH: Field = { min: 1, max: 12, names: MONTHS };
const FIELDS: readonly Field[] = [
  { min: 0, max: 59 },
  { min: 0, max: 23 },
  DAY,
  MONTH,
  { min: 0, max: 7, names: WEEKDAYS },
];

/** Whether the expression is well formed and names a moment that exists (the 30th of February doesn't). */
export function isCron(expression: string): boolean {
  const parts = expression.split(/\s+/);
  const fields = parts.length === FIELDS.length + 1 ? [SECOND, ...FIELDS] : FIELDS;
  if (parts.length !== fields.length) return false;
  const values = fields.map((field, index) => parseField(parts[index] ?? '', field));
  if (values.includes(null)) return false;
  const days = values[fields.indexOf(DAY)] ?? [];
  const months = values[fields.indexOf(MONTH)] ?? [];
  return months.some((month) => days.some((day) => day <= (LONGEST_MONTH[month - 1] ?? 0)));
}

/** Every value that a field stands for; null where it is malformed. A range may go round the end: `22-2`, `sat-mon`. */
function parseField(text: string, field: Field): number[] | null {
  const values: number[] = [];
  for (const entry of text.split(',')) {
    const [, range = '', step] = /^([^/]+)(?:\/(\d{1,4}))?$/.exec(entry) ?? [];
    const [first = '', last = first, more] = range.split('-');
    const from = range === '*' ? field.min : parseValue(first, field);
    const to = range === '*' ? field.max : parseValue(last, field);
    if (from === null || to === null || more !== undefined || Number(step) === 0) return null;
    if (step !== undefined && range !== '*' && !range.includes('-')) return null;
    const span = from <= to ? count(from, to) : [...count(from, field.max), ...count(field.min, to)];
    values.push(...span.filter((_, index) => index % Number(step ?? 1) === 0));
  }
  return values;
}

function count(from: number, to: number): number[] {
  return Array.from({ length: to - from + 1 }, (_, index) => from + index);
}

function parseValue(text: string, { min, max, names }: Field): number | null {
  const named = names?.indexOf(text.toLowerCase()) ?? -1;
  if (named >= 0) return named + min;
  const value = /^\d{1,2}$/.test(text) ? Number(text) : NaN;
  return value >= min && value <= max ? value : null;
}
