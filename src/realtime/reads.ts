import { parseSql } from '../db/parse.js';

/**
 * What a text of SQL reads, told from its syntax tree alone: tables and functions by name, the clock, and what makes one
 * row decide about all others. What the names stand for is the database's to say (`sources.ts`). All offsets are those of
 * a JavaScript string.
 */
export interface NamedTable {
  schema: string | null;
  name: string;
  /** Where the name stands; null where it is written in a way that can't be followed. */
  span: { from: number; to: number } | null;
  /** Without the tables that inherit from it. */
  only: boolean;
  /** It has an alias already, or (`TABLE x`) may have none. */
  isNamed: boolean;
}

export interface NamedFunction {
  schema: string | null;
  name: string;
  argumentCount: number;
  at: number;
}

/** Something in the text, as a message shows it. */
export interface Found {
  written: string;
  at: number;
}

/** A GROUP BY of plain columns: the tables of its FROM by their names there, and a place before which more may stand. */
export interface Grouping {
  at: number;
  columns: readonly { qualifier: string | null; name: string }[];
  tables: readonly { alias: string; table: NamedTable }[];
}

/** A SELECT that gives rows one by one, so that more columns may stand before its first. */
export interface PlainSelect {
  at: number;
  /** The tables of its FROM from which each of its rows has a row. */
  tables: Grouping['tables'];
}

export interface Reads {
  /** Without the names of CTEs; one entry for each time that a table is named. */
  tables: readonly NamedTable[];
  functions: readonly NamedFunction[];
  clock: readonly Found[];
  /** What gives another result each time. */
  chance: readonly Found[];
  /** A LIMIT, an OFFSET or a window over everything, but for those within a sub-query that may be about one row. */
  overall: readonly Found[];
  groupings: readonly Grouping[];
  /** Where columns are named with the schema of their table: the span of schema and table. */
  qualified: readonly { name: string; span: { from: number; to: number } }[];
  /** The text itself, where it is one. */
  plain: PlainSelect | null;
}

const CLOCK_FUNCTIONS = new Set('now transaction_timestamp statement_timestamp clock_timestamp timeofday'.split(' '));
const CHANCE_FUNCTIONS = new Set('random random_normal gen_random_uuid uuidv4 uuidv7 nextval'.split(' '));
const CLOCK_VALUES = /^SVFOP_(?:CURRENT_DATE|CURRENT_TIME|LOCALTIME)/;
/** Texts that PostgreSQL reads as the present, where they become a date or time. */
const CLOCK_TEXT = /^\s*(?:now|today|tomorrow|yesterday)\s*(?:[\d+-].*)?$/is;
const TEXT_TYPES = new Set(['text', 'varchar', 'bpchar', 'char', 'name', 'citext', 'json', 'jsonb']);

const TEXT_OPERATORS = new Set(['->', '->>', '#>', '#>>', '?', '~~', '~~*', '!~~', '!~~*', '~', '~*', '!~', '!~*']);

const IDENTIFIER = /(?:[uU]&)?"(?:[^"]|"")+"|[A-Za-z_\u0080-\uffff][\w$\u0080-\uffff]*/y;
const DOT = /\s*\.\s*/y;

type Fields = Readonly<Record<string, unknown>>;

interface Scope {
  /** Names of CTEs. */
  known: ReadonlySet<string>;
  /** Within a sub-query that may be about one row of the query around it. */
  isInner: boolean;
  /** Within `TABLE x`. */
  isBare: boolean;
}

/** Null where the text can't be parsed. `known` are names that stand for no table, such as `changed`. */
export async function readsOf(sql: string, known: readonly string[] = []): Promise<Reads | null> {
  const parsed = await parseSql(sql);
  if (parsed.kind === 'unreadable') return null;
  const reader = createReader(sql);
  for (const statement of parsed.statements) {
    reader.walk(statement, { known: new Set(known), isInner: false, isBare: false });
  }
  return { ...reader.reads, plain: reader.plainOf(parsed.statements) };
}

function createReader(sql: string) {
  const tables: NamedTable[] = [];
  const functions: NamedFunction[] = [];
  const clock: Found[] = [];
  const chance: Found[] = [];
  const overall: Found[] = [];
  const groupings: Grouping[] = [];
  const qualified: Reads['qualified'][number][] = [];
  const offsetOf = offsetsIn(sql);
  const place = (fields: Fields): number => offsetOf(locationOf(fields));

  const tableOf = (fields: Fields, isBare: boolean): NamedTable => {
    const names = ['catalogname', 'schemaname', 'relname'].map((key) => textOf(fields[key]));
    const parts = names.filter((name) => name !== null);
    return {
      schema: names[1] ?? null,
      name: names[2] ?? '',
      span: locationOf(fields) < 0 ? null : spanOf(sql, place(fields), parts.length),
      only: fields.inh !== true,
      isNamed: isBare || fields.alias !== undefined,
    };
  };

  const walk = (value: unknown, scope: Scope): void => {
    if (Array.isArray(value)) for (const each of value) walk(each, scope);
    if (!isFields(value)) return;
    const node = nodeOf(value);
    if (node === null) for (const each of Object.values(value)) walk(each, scope);
    else visit(node.kind, node.fields, scope);
  };

  const visit = (kind: string, fields: Fields, around: Scope): void => {
    const scope = withNames(fields, around, walk);
    const inside = Object.entries(fields).filter(([key]) => key !== 'withClause');
    switch (kind) {
      case 'RangeVar': {
        const table = tableOf(fields, scope.isBare);
        if (table.schema !== null || !scope.known.has(table.name)) tables.push(table);
        return;
      }
      // Its names are those of the FROM.
      case 'LockingClause':
        return;
      case 'SelectStmt':
        visitSelect(inside, fields, scope);
        return;
      case 'SubLink':
        walk(Object.values(fields), { ...scope, isInner: true, isBare: false });
        return;
      case 'RangeSubselect':
        walk(fields.subquery, { ...scope, isInner: scope.isInner || fields.lateral === true, isBare: false });
        return;
      case 'RangeTableSample':
        chance.push({ written: 'TABLESAMPLE', at: place(fields) });
        break;
      case 'SQLValueFunction':
        if (CLOCK_VALUES.test(textOf(fields.op) ?? '')) {
          clock.push({ written: wordAt(sql, place(fields)), at: place(fields) });
        }
        break;
      case 'ColumnRef': {
        const [, name, column] = itemsOf(fields.fields).map(stringOf);
        const span = column === undefined ? null : spanOf(sql, place(fields), 2);
        if (name !== undefined && span !== null) qualified.push({ name, span });
        return;
      }
      case 'FuncCall':
        visitCall(fields, scope);
        break;
      case 'WindowDef':
        if (!scope.isInner && fields.partitionClause === undefined && fields.refname === undefined) {
          overall.push({ written: 'WINDOW', at: place(fields) });
        }
        break;
      case 'A_Expr':
        // A key or a pattern stays a text.
        if (
          TEXT_OPERATORS.has(itemsOf(fields.name).map(stringOf).at(-1) ?? '') &&
          nodeOf(fields.rexpr)?.kind === 'A_Const'
        ) {
          walk(fields.lexpr, scope);
          return;
        }
        break;
      case 'TypeCast':
        if (isTextType(fields.typeName) && nodeOf(fields.arg)?.kind === 'A_Const') return;
        break;
      case 'A_Const': {
        const text = textOf(isFields(fields.sval) ? fields.sval.sval : null) ?? '';
        if (CLOCK_TEXT.test(text)) clock.push({ written: `'${text.trim()}'`, at: place(fields) });
        return;
      }
    }
    for (const [, each] of inside) walk(each, scope);
  };

  const visitSelect = (inside: readonly (readonly [string, unknown])[], fields: Fields, scope: Scope): void => {
    if (!scope.isInner) {
      for (const [written, value] of [
        ['LIMIT', fields.limitCount],
        ['OFFSET', fields.limitOffset],
      ] as const) {
        const node = nodeOf(value);
        if (node !== null && !isNothing(node.fields)) overall.push({ written, at: place(node.fields) });
      }
    }
    const grouping = groupingOf(fields);
    if (grouping !== null) groupings.push(grouping);
    const target = nodeOf(itemsOf(fields.targetList)[0])?.fields.val;
    const column = nodeOf(target);
    // `TABLE x` is a SELECT * that stands nowhere.
    const isBare = column?.kind === 'ColumnRef' && column.fields.location === -1;
    for (const [key, value] of inside) {
      const isArm = (key === 'larg' || key === 'rarg') && isFields(value);
      if (isArm) visit('SelectStmt', value, { ...scope, isBare: false });
      else walk(value, { ...scope, isBare });
    }
  };

  const visitCall = (fields: Fields, scope: Scope): void => {
    const names = itemsOf(fields.funcname).map(stringOf);
    const name = names.at(-1) ?? '';
    const schema = names.length > 1 ? (names.at(-2) ?? null) : null;
    const argumentCount = itemsOf(fields.args).length;
    const call = { written: `${name}()`, at: place(fields) };
    const isOfSystem = schema === null || schema === 'pg_catalog';
    if (isOfSystem && (CLOCK_FUNCTIONS.has(name) || (name === 'age' && argumentCount === 1))) clock.push(call);
    if (isOfSystem && CHANCE_FUNCTIONS.has(name)) chance.push(call);
    functions.push({ schema, name, argumentCount, at: place(fields) });
    const { over } = fields;
    if (!isFields(over) || scope.isInner) return;
    if (['partitionClause', 'name', 'refname'].every((key) => over[key] === undefined)) {
      overall.push({ written: 'OVER', at: place(over) });
    }
  };

  const groupingOf = (fields: Fields): Grouping | null => {
    const targets = itemsOf(fields.targetList).map((target) => nodeOf(target)?.fields.val);
    const items = itemsOf(fields.groupClause).flatMap((item) => {
      const node = nodeOf(item);
      const isConstant = node?.kind === 'A_Const';
      const column = nodeOf(isConstant ? targets[ordinalOf(node.fields) - 1] : item);
      if (node === null || column?.kind !== 'ColumnRef') return node?.kind === 'GroupingSet' ? [null] : [];
      const [first, second, more] = itemsOf(column.fields.fields).map(stringOf);
      if (first === undefined || more !== undefined) return [];
      const named = second === undefined ? { qualifier: null, name: first } : { qualifier: first, name: second };
      return [{ at: place(node.fields), named }];
    });
    const columns = items.filter((item) => item !== null);
    const [start] = columns;
    if (start === undefined || columns.length < items.length) return null;
    return { at: start.at, columns: columns.map(({ named }) => named), tables: tablesOf(fields.fromClause) };
  };

  /** The tables of a FROM whose columns can be named by an alias and as they are in the table. */
  const tablesOf = (value: unknown, sidesOf: (join: Fields) => readonly unknown[] = bothSides): Grouping['tables'] => {
    if (Array.isArray(value)) return value.flatMap((each) => tablesOf(each, sidesOf));
    const node = nodeOf(value);
    if (node?.kind === 'JoinExpr')
      return node.fields.alias === undefined ? tablesOf(sidesOf(node.fields), sidesOf) : [];
    if (node?.kind !== 'RangeVar') return [];
    const alias = isFields(node.fields.alias) ? node.fields.alias : {};
    if (alias.colnames !== undefined) return [];
    const table = tableOf(node.fields, false);
    return [{ alias: textOf(alias.aliasname) ?? table.name, table }];
  };

  const plainOf = ([statement, ...others]: readonly unknown[]): PlainSelect | null => {
    const select = nodeOf(statement);
    const targets = itemsOf(select?.fields.targetList);
    const target = nodeOf(targets[0]);
    if (select?.kind !== 'SelectStmt' || target === null || others.length > 0) return null;
    const { fields } = select;
    const isDistinctOn = itemsOf(fields.distinctClause).some((each) => nodeOf(each) !== null);
    // A function among the columns may be an aggregate, or give several rows.
    if (isDistinctOn || NOT_PLAIN.some((key) => fields[key] !== undefined) || hasKind(targets, 'FuncCall')) return null;
    return { at: place(target.fields), tables: tablesOf(fields.fromClause, keptSides) };
  };

  return { walk, plainOf, reads: { tables, functions, clock, chance, overall, groupings, qualified } };
}

const NOT_PLAIN = ['groupClause', 'havingClause', 'limitCount', 'limitOffset', 'valuesLists', 'larg'];

const bothSides = ({ larg, rarg }: Fields): readonly unknown[] => [larg, rarg];
/** The sides of a join from which each of its rows has a row. */
const keptSides = ({ jointype, larg, rarg }: Fields): readonly unknown[] =>
  jointype === 'JOIN_INNER'
    ? [larg, rarg]
    : jointype === 'JOIN_LEFT'
      ? [larg]
      : jointype === 'JOIN_RIGHT'
        ? [rarg]
        : [];

function hasKind(value: unknown, kind: string): boolean {
  if (Array.isArray(value)) return value.some((each) => hasKind(each, kind));
  return isFields(value) && (kind in value || Object.values(value).some((each) => hasKind(each, kind)));
}

/** The scope within a node that has a WITH, whose queries are walked here: each sees those before it, or all. */
function withNames(fields: Fields, around: Scope, walk: (value: unknown, scope: Scope) => void): Scope {
  if (!isFields(fields.withClause)) return around;
  const { ctes, recursive } = fields.withClause;
  const queries = itemsOf(ctes).map((cte) => nodeOf(cte)?.fields ?? {});
  const nameOf = ({ ctename }: Fields): string => textOf(ctename) ?? '';
  const known = new Set([...around.known, ...(recursive === true ? queries.map(nameOf) : [])]);
  for (const query of queries) {
    walk(query.ctequery, { ...around, known: new Set(known), isBare: false });
    known.add(nameOf(query));
  }
  return { ...around, known };
}

function isFields(value: unknown): value is Fields {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}

/** A node is an object whose only key is its type; anything else is a part of one. */
function nodeOf(value: unknown): { kind: string; fields: Fields } | null {
  if (!isFields(value)) return null;
  const [entry, ...others] = Object.entries(value);
  if (entry === undefined || others.length > 0 || !/^[A-Z]/.test(entry[0])) return null;
  return isFields(entry[1]) ? { kind: entry[0], fields: entry[1] } : null;
}

const textOf = (value: unknown): string | null => (typeof value === 'string' ? value : null);
const itemsOf = (value: unknown): readonly unknown[] => (Array.isArray(value) ? value : []);
/** Of a `String` node; that of a `*` is nobody's name. */
const stringOf = (value: unknown): string => textOf(nodeOf(value)?.fields.sval) ?? '*';
const locationOf = ({ location }: Fields): number => (typeof location === 'number' ? location : 0);
/** Zero is left out. */
const integerOf = ({ ival }: Fields): number | null =>
  isFields(ival) ? (typeof ival.ival === 'number' ? ival.ival : 0) : null;
const ordinalOf = (constant: Fields): number => integerOf(constant) ?? 0;
/** `LIMIT ALL`, `LIMIT NULL`, `OFFSET 0`. */
const isNothing = (constant: Fields): boolean => constant.isnull === true || integerOf(constant) === 0;

function isTextType(value: unknown): boolean {
  const names = isFields(value) ? itemsOf(value.names).map(stringOf) : [];
  return TEXT_TYPES.has(names.at(-1) ?? '');
}

/** Offsets in the string for those in its UTF-8. */
function offsetsIn(sql: string): (byte: number) => number {
  const bytes = Buffer.from(sql);
  return bytes.length === sql.length ? (byte) => byte : (byte) => bytes.toString('utf8', 0, byte).length;
}

function spanOf(sql: string, from: number, parts: number): NamedTable['span'] {
  let to = from;
  for (let part = 0; part < parts; part += 1) {
    for (const pattern of part === 0 ? [IDENTIFIER] : [DOT, IDENTIFIER]) {
      pattern.lastIndex = to;
      if (!pattern.test(sql)) return null;
      to = pattern.lastIndex;
    }
  }
  return { from, to };
}

function wordAt(sql: string, at: number): string {
  return /^\w+/.exec(sql.slice(at))?.[0] ?? '';
}
