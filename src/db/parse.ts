/**
 * PostgreSQL's own parser, without a server: a text as its syntax tree. It is that of one version, so a server may know
 * more than it does: what can't be read here isn't a mistake in the text. It is loaded (50 ms) when it is first needed.
 */
export type Parsed = { kind: 'tree'; statements: readonly unknown[] } | { kind: 'unreadable' };

/**
 * The tree of each statement of `sql`, as JSON: a node is an object with its type as the only key, what is zero is left
 * out, and `location` counts bytes of UTF-8 (https://github.com/pganalyze/libpg_query).
 */
export async function parseSql(sql: string): Promise<Parsed> {
  const { parse, hasSqlDetails } = await import('libpg-query');
  try {
    const { stmts = [] } = await parse(sql);
    return { kind: 'tree', statements: stmts.map(({ stmt }) => stmt) };
  } catch (error) {
    // A RangeError: nested too deeply for a stack.
    if (hasSqlDetails(error) || error instanceof RangeError) return { kind: 'unreadable' };
    throw error;
  }
}
