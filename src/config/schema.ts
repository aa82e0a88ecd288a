import { z } from 'zod';
import {
  apiKey,
  baseUrl,
  choice,
  connection,
  describeChoice,
  duration,
  fieldPrefix,
  interval,
  mapping,
  memory,
  off,
  region,
  schedule,
  schemaName,
  share,
  table,
  text,
  wholeNumber,
  yesOrNo,
} from './values.js';

/**
 * The format of the configuration's files. The loader reads each part by its schema here, and `json-schema.ts` writes
 * the JSON Schema for editors from the same ones. What can't be told from one value alone is checked by the loader.
 */

const SECOND_MS = 1_000;
const HOUR_MS = 3_600_000;
const WEEK_MS = 604_800_000;

const sqlKeys = {
  sql: text('SELECT id AS profile_id FROM customers').optional().describe('A SELECT statement.'),
  sql_file: text('queries/customers.sql')
    .optional()
    .describe('A file that holds a SELECT statement, relative to this file.'),
  table: table().optional().describe('A table or view that holds the result, such as `public.customers`.'),
};

const changes = z
  .record(z.string(), text('customer_id'))
  .optional()
  .describe(
    'Tables whose changes matter: each with its profile column, or with a SELECT that finds profiles from the rows in `changed`.',
  );

const sourceSchema = mapping(
  {
    url: connection().describe('Connection string of the source. Left out: the embedded PostgreSQL.'),
    direct_url: connection().describe('A way past a connection pooler, where `url` is one.'),
  },
  'of `source`',
).describe('The database that holds the data.');

const stateSchema = mapping(
  {
    url: connection().describe('Connection string of the state database. Left out: the source.'),
    schema: schemaName().optional().describe('The schema that holds the state. Default: `personas`.'),
    migrate: choice(['auto', 'manual'])
      .optional()
      .describe('Whether the state tables are brought up to date at start, or only by `migrate`. Default: `auto`.'),
  },
  'of `state`',
).describe('Where personas-sync keeps what it has sent and has still to send.');

const profilesSchema = mapping(
  {
    ...sqlKeys,
    key: choice(['email', 'user_id', 'hybrid']).describe("What identifies a user: the Iterable project's type."),
    changes,
  },
  'of `profiles`',
  { query: 'is not supported here: write `sql`' },
).describe('Who people are: rows with `profile_id`, `email` and `user_id`. One of `sql`, `sql_file` and `table`.');

const eventsSchema = mapping(
  {
    ...sqlKeys,
    columns: mapping(
      {
        profile_id: text('customer_id').optional(),
        name: text('name').optional(),
        timestamp: text('occurred_at').optional(),
        properties: text('properties').optional(),
        message_id: text('message_id').optional(),
      },
      'of `columns`',
    )
      .optional()
      .describe('The columns that hold the parts of an event.'),
  },
  'of `events`',
).describe('Where events are. Without effect in this version.');

const perSecond = wholeNumber(1, 100_000).optional();

export const destinationTypes = choice(['iterable', 'segment', 'file']);

const iterableSchema = mapping(
  {
    type: z.literal('iterable').describe('An Iterable project.'),
    api_key: apiKey().describe('A server-side API key of the project.'),
    region: region().optional().describe('`us`, `eu`, `simulator`, or a base URL without `/api`. Default: `us`.'),
    quotas: mapping(
      {
        users_update: perSecond,
        users_bulk_update: perSecond,
        events_track: perSecond,
        events_track_bulk: perSecond,
        lists: perSecond,
        reads: perSecond,
      },
      'of `quotas`',
    )
      .optional()
      .describe(
        'Requests a second. Defaults: `users_update: 500`, `users_bulk_update: 5`, `events_track: 2000`, `events_track_bulk: 10`, `lists: 5`, `reads: 100`.',
      ),
    quota: share('50%', 1)
      .refine((value) => value > 0, 'must be more than `0%`')
      .optional()
      .describe('A part of all quotas, such as `50%`, instead of `quotas`.'),
  },
  'of an Iterable destination',
);

const batchQuotas = (byDefault: number) =>
  mapping({ batch: perSecond }, 'of `quotas`')
    .optional()
    .describe(`Requests a second. Default: \`batch: ${byDefault}\`.`);

const segmentSchema = mapping(
  {
    type: z.literal('segment').describe("Segment's HTTP tracking API, which RudderStack and Jitsu take, too."),
    write_key: apiKey().describe('The write key of an HTTP API source.'),
    url: baseUrl().optional().describe('The base URL without `/v1`. Default: `https://api.segment.io`.'),
    quotas: batchQuotas(10),
  },
  'of a Segment destination',
);

const fileSchema = mapping(
  {
    type: z.literal('file').describe('A file that gets a line of JSON for each call.'),
    path: text('calls.jsonl').describe('The file, relative to this one; it is made, and added to.'),
    quotas: batchQuotas(100),
  },
  'of a file destination',
);

/** By `type`. */
export const destinationSchemas = { iterable: iterableSchema, segment: segmentSchema, file: fileSchema };
const destinationSchema = z.union([iterableSchema, segmentSchema, fileSchema]);

const MODES = ['identify', 'track', 'both', 'list'] as const;

const mode = choice(MODES);

const modes = z
  .union([mode, z.array(mode).min(1)], {
    error: ({ input }) => describeChoice(MODES, input, {}, 'or several of these in brackets'),
  })
  .transform((value) => {
    const all: readonly string[] = typeof value === 'string' ? [value] : value;
    return {
      identify: all.includes('identify') || all.includes('both'),
      track: all.includes('track') || all.includes('both'),
      list: all.includes('list'),
    };
  });

const eventName = text('Became big spender').optional();

const sendSchema = z.union(
  [
    modes.transform((mode) => ({ kind: 'everywhere' as const, mode })),
    z
      .object({
        entered: eventName.describe('The event of an entry into an audience. Default: Audience Entered.'),
        exited: eventName.describe('The event of an exit from an audience. Default: Audience Exited.'),
        computed: eventName.describe('The event of a new value of a trait. Default: Trait Computed.'),
      })
      .catchall(modes)
      .transform((value) => ({ kind: 'named' as const, entries: Object.entries(value) })),
  ],
  {
    error: ({ input }) =>
      describeChoice(MODES, input, {}, 'several of these in brackets, or a mapping such as `{ iterable: track }`'),
  },
);

function guardShare(example: string, most: number) {
  const message = `must be \`off\` or a share such as \`${example}\`, at most \`${most * 100}%\``;
  return z.union([off(), share(example, most)], message).optional();
}

const guardSchema = z.union(
  [
    off(),
    mapping(
      {
        exits: guardShare('30%', 1).describe('The part of the members that may exit in one run. Default: 30%.'),
        growth: guardShare('100%', 10).describe('The growth that one run may bring. Default: 100%, twice as many.'),
        nulls: guardShare('30%', 1).describe('The part of the values that may turn to null. Default: 30%.'),
      },
      'of `guard`',
    ),
  ],
  'must be `off` or a mapping such as `{ exits: 30%, growth: 100%, nulls: 30% }`',
);

const definitionKeys = {
  name: text('Big spenders').optional().describe('What people call it; the key comes from it.'),
  key: text('big_spenders').optional().describe('The name of the field in Iterable; never changes.'),
  ...sqlKeys,
  lookback: interval()
    .optional()
    .describe('The window that the SQL looks back, its `:lookback`; such a definition is computed every hour.'),
  poll: duration('1 minute', SECOND_MS, WEEK_MS, 'from `1 second` to `7 days`')
    .optional()
    .describe('How often it is computed. Default: `1 minute`.'),
  schedule: schedule()
    .optional()
    .describe('When it is computed: `realtime`, `manual`, or a cron expression such as `0 3 * * *`.'),
  changes,
  reconcile: duration('1 day', HOUR_MS, WEEK_MS, 'from `1 hour` to `7 days`')
    .optional()
    .describe('How often everyone is computed where the changes are followed in real time. Default: `1 day`.'),
  send: sendSchema
    .optional()
    .describe(
      'What is sent: `identify` (default), `track`, `both`, `list`, several of these in brackets, or a mapping by destination.',
    ),
  destinations: z
    .array(text('iterable'), 'must be a list of destinations, such as `[iterable]`')
    .min(1, 'must name a destination: write `enabled: false` for a definition that is not wanted')
    .optional()
    .describe('The only destinations that it goes to. Default: all.'),
  enabled: yesOrNo().optional().describe('Default: true.'),
  initial: choice(['send', 'skip'])
    .optional()
    .describe('Whether the first sync sends everyone, or only remembers them. Default: `send`.'),
  on_delete: choice(['leave', 'exit_all'])
    .optional()
    .describe('What happens in Iterable when the definition is removed. Default: `leave`.'),
  guard: guardSchema.optional().describe('The changes above which a run waits for approval; `off` for none.'),
  properties: z
    .array(text('last_order_at'), 'must be a list of columns, such as `[last_order_at]`')
    .optional()
    .describe('Columns that ride along on track calls.'),
};

const definitionHints = {
  query: 'is not supported by this version: write the definition as `sql`',
};

export const audienceSchema = mapping(
  {
    ...definitionKeys,
    list: z
      .union(
        [
          text('Big spenders').transform((name) => ({ name, existing_only: undefined })),
          mapping(
            {
              name: text('Big spenders').optional(),
              existing_only: yesOrNo()
                .optional()
                .describe('Nobody is made in Iterable only to be on the list. Default: false.'),
            },
            'of `list`',
          ),
        ],
        'must be the name of a list, or a mapping such as `{ name: Big spenders, existing_only: true }`',
      )
      .optional()
      .describe('The static list that `send: list` keeps equal to the audience. Default: one named by the key.'),
  },
  'of an audience',
  {
    ...definitionHints,
    on_missing: 'is for traits alone: leave it out',
    prefix: 'is for traits alone: leave it out',
  },
).meta({ id: 'audience', description: 'A set of profiles. One of `sql`, `sql_file` and `table`.' });

export const traitSchema = mapping(
  {
    ...definitionKeys,
    on_missing: z
      .union([z.null(), z.enum(['null', 'keep'])], 'must be `null` or `keep`')
      .optional()
      .describe('What happens to the fields of a profile whose row is gone. Default: `null`.'),
    prefix: fieldPrefix().optional().describe('Stands before the column names of a trait with several columns.'),
  },
  'of a trait',
  { ...definitionHints, list: 'is for audiences alone: leave it out' },
).meta({ id: 'trait', description: 'A value, or several, of each profile. One of `sql`, `sql_file` and `table`.' });

const runsSchema = mapping(
  {
    parallel: wholeNumber(1, 32).optional().describe('How many definitions are computed at once. Default: 2.'),
    memory: memory().optional().describe('What they may use together in the database. Default: `256 MB`.'),
    timeout: duration('1 hour', SECOND_MS, WEEK_MS, 'from `1 second` to `7 days`')
      .optional()
      .describe('After how long a run is given up. Default: `1 hour`.'),
  },
  'of `runs`',
).describe('How definitions are computed.');

const httpSchema = z
  .union(
    [
      off(),
      mapping(
        {
          host: text('127.0.0.1').optional().describe('Default: `127.0.0.1`.'),
          port: wholeNumber(0, 65_535).optional().describe('Default: 8080; 0 takes any that is free.'),
        },
        'of `http`',
      ),
    ],
    'must be `off` or a mapping such as `{ host: 127.0.0.1, port: 8080 }`',
  )
  .describe('Where `/healthz`, `/readyz` and `/metrics` are served while it runs; `off` for nowhere.');

const loggingSchema = mapping(
  {
    level: choice(['error', 'warn', 'info', 'debug']).optional().describe('Default: `info`.'),
    format: choice(['auto', 'pretty', 'json'])
      .optional()
      .describe('`auto` (default) is `pretty` on a terminal and `json` elsewhere.'),
  },
  'of `logging`',
);

/** What an included file may hold. */
export const lists = {
  audiences: z.array(audienceSchema).nullish().describe('Audiences: who belongs to them is sent.'),
  traits: z.array(traitSchema).nullish().describe('Computed traits: their values are sent.'),
};

/** The sections of the main file. */
export const sections = {
  source: sourceSchema.nullish(),
  state: stateSchema.nullish(),
  profiles: profilesSchema,
  events: eventsSchema.nullish(),
  destinations: z.record(z.string(), destinationSchema).describe('Where calls are sent, by a name of your own.'),
  include: z
    .array(text('audiences/*.yaml'), 'must be a list of files, such as `[audiences/*.yaml]`')
    .nullish()
    .describe('Files with more audiences and traits, relative to this one: `*`, `?` and `**` stand for any names.'),
  ...lists,
  runs: runsSchema.nullish(),
  http: httpSchema.nullish(),
  logging: loggingSchema.nullish(),
};
