-- The state of personas-sync. Names are unqualified: the migration runs with search_path set to the configured schema.
-- Everything is new, so nothing waits for a lock.

-- One sequence numbers rows of the outbox and versions of marks: a later number arose later, and none is used twice.
create sequence version as bigint;

create table setting (
  name text primary key,
  value jsonb not null
);
-- Who is erased is remembered by a hash with this key: 244 random bits.
insert into setting values ('forget_key', to_jsonb(replace(gen_random_uuid()::text || gen_random_uuid()::text, '-', '')));

-- The one row that says who acts. `quiet_until` is the latest moment at which a request of the holder can still be open.
create table leader (
  only_row boolean primary key default true check (only_row),
  holder uuid,
  expires_at timestamptz not null default '-infinity',
  quiet_until timestamptz not null default '-infinity',
  since timestamptz,
  host text,
  pid integer,
  -- Until when the holder may begin requests in bulk; the next one leaves whoever was sent one in that pipeline.
  bulk_until timestamptz not null default '-infinity'
);
insert into leader default values;

create table definition (
  id integer primary key generated always as identity,
  key text not null unique,
  kind text not null check (kind in ('audience', 'trait')),
  name text not null,
  computation_id text not null unique,
  -- archived: gone from the configuration; disabled: `enabled: false`; paused: by a person, or by `reject`.
  state text not null default 'active' check (state in ('active', 'paused', 'disabled', 'archived')),
  paused_because text,
  on_delete text not null default 'leave' check (on_delete in ('leave', 'exit_all')),
  -- What the text was when it last ran to success, so that a change is seen.
  text_hash text,
  -- The fields as last sent: {"name": "string" | "long" | "double" | "boolean" | "date" | "object"}.
  fields jsonb not null default '{}' check (jsonb_typeof(fields) = 'object'),
  -- The columns that ride along on track calls, with their types.
  riders jsonb not null default '{}' check (jsonb_typeof(riders) = 'object'),
  members bigint not null default 0 check (members >= 0),
  -- Null until the first run has succeeded.
  first_run_at timestamptz,
  cadence text not null default '',
  -- The scheduled moment that has no outcome yet; null: none.
  due_at timestamptz,
  check ((state = 'paused') or (paused_because is null))
);

-- A destination is known by its name and host; another host is another destination.
create table destination (
  id integer primary key generated always as identity,
  name text not null,
  host text not null,
  type text not null,
  state text not null default 'active' check (state in ('active', 'paused', 'stopped')),
  -- Why it stopped, in a sentence.
  reason text,
  -- What the leader has last said of its deliveries: rates by lane, fields that the destination leaves out.
  delivery jsonb,
  unique (name, host),
  check ((state = 'stopped') = (reason is not null))
);

-- What a destination gets for a definition, and the cursor of its first sync or backfill over the snapshot.
create table definition_destination (
  definition_id integer not null references definition,
  destination_id integer not null references destination,
  active boolean not null default true,
  identify boolean not null,
  track boolean not null,
  entered text not null,
  exited text not null,
  computed text not null,
  -- The static list that is kept equal to the audience, by name; its id once it is known.
  list text,
  list_existing_only boolean not null default false,
  list_id bigint,
  -- Why no more of its calls are sent to this destination, in a sentence, until a person resumes the definition.
  stopped text,
  -- Since when changes are no longer told there as identify calls, and by the list; null while they are, or never were.
  identified_until timestamptz,
  listed_until timestamptz,
  backfill text check (backfill in ('initial', 'backfill')),
  backfill_identify boolean not null default true,
  backfill_events boolean not null default false,
  -- Every recipient up to and including this one has been taken; null: none yet.
  backfill_position text collate "C",
  -- Members who entered after this moment were told of as they entered.
  backfill_until timestamptz,
  backfill_total bigint,
  backfill_done bigint not null default 0,
  backfill_priority smallint not null default 2,
  -- Another begins when this one has ended: what was reached before has to be sent something that it lacked.
  backfill_again boolean not null default false,
  primary key (definition_id, destination_id),
  check ((backfill is null) = (backfill_until is null))
);

create table run (
  id bigint primary key generated always as identity,
  definition_id integer not null references definition,
  trigger text not null check (trigger in ('schedule', 'sync', 'approve', 'delete')),
  -- The scheduled moment that this run answers.
  scheduled_for timestamptz,
  -- The held run whose counts a person saw, for a run that `approve` began.
  approves bigint references run,
  leader uuid not null,
  started_at timestamptz not null default clock_timestamp(),
  finished_at timestamptz,
  outcome text check (outcome in ('succeeded', 'failed', 'held', 'skipped', 'cancelled', 'abandoned')),
  phases jsonb not null default '{}',
  text_hash text,
  members bigint,
  entered bigint,
  exited bigint,
  changed bigint,
  nulled bigint,
  without_identifier bigint,
  conflicting bigint,
  skipped_values bigint,
  error text,
  -- What a person said of a held run.
  decision text check (decision in ('approved', 'rejected')),
  check ((outcome is null) = (finished_at is null)),
  check ((outcome = 'failed') = (error is not null) or outcome in ('held', 'skipped', 'abandoned', 'cancelled')),
  check (decision is null or outcome = 'held')
);
create index on run (definition_id, id);
-- One definition never runs twice at a time, and has one held run at most.
create unique index run_open on run (definition_id) where outcome is null;
create unique index run_held on run (definition_id) where outcome = 'held' and decision is null;

-- Who has what, as of the last sync. A recipient is its kind and its id in one text, `u:` or `e:` before it.
create table snapshot (
  entered_at timestamptz not null,
  definition_id integer not null,
  -- on_missing keep: the row has gone from the result; it is kept for its value and not counted as a member.
  kept boolean not null default false,
  -- The identifier beside the key has changed since a call carried it.
  beside_changed boolean not null default false,
  recipient text collate "C" not null check (left(recipient, 2) in ('u:', 'e:')),
  profile_id text collate "C",
  beside text collate "C",
  -- {"column": value} of a trait's fields and of what rides along, without nulls; null where there is nothing.
  value jsonb,
  primary key (definition_id, recipient)
) partition by list (definition_id);
create index snapshot_profile on snapshot (profile_id);

-- Recipients for whom profiles that share them have different values, as of the last run; they keep what they had.
create table conflict (
  recipient text collate "C" not null,
  definition_id integer not null references definition,
  -- Some of those profiles.
  profiles text[] not null,
  primary key (recipient, definition_id)
);

-- What a destination has not acknowledged yet.
-- 'm', a mark: the columns of a recipient that are due; their values are read from the snapshot when they are sent.
-- 'e', an event: a track call with its payload, told apart by an id that was fixed when it arose.
-- No foreign keys: neither a destination nor a definition is ever deleted, and looking each up for each row would be a
-- third of what it costs to raise a mark.
create table outbox (
  id bigint primary key default nextval('version'),
  version bigint not null default nextval('version'),
  destination_id integer not null,
  definition_id integer not null,
  attempts smallint not null default 0,
  -- 0 live, 1 scheduled, 2 backfill.
  priority smallint not null check (priority between 0 and 2),
  kind "char" not null check (kind in ('m', 'e')),
  -- The call carries the identifier beside the key, too.
  with_beside boolean not null default false,
  -- Its person has vanished from the source: 1 the destination is to be asked first, 2 it has denied once.
  confirm smallint not null default 0 check (confirm between 0 and 2),
  -- How often it has been dead and was tried again by itself.
  revived smallint not null default 0,
  due_at timestamptz not null default now(),
  -- A request that went unanswered may be applied until then: what has changed meanwhile waits for it, too.
  not_before timestamptz,
  -- When the first change arose that hasn't been acknowledged.
  raised_at timestamptz not null default now(),
  recipient text collate "C" not null,
  columns text[],
  -- Marks of the keys that this one replaces: sent first.
  after bigint[],
  -- Recipients that replace this one: marked again when this one has been sent.
  successors text[],
  beside text collate "C",
  event text,
  message_id text,
  occurred_at timestamptz,
  properties jsonb,
  check (kind <> 'm' or (cardinality(columns) > 0 and event is null and message_id is null)),
  check (kind <> 'e' or (columns is null and event is not null and message_id is not null and occurred_at is not null))
);
create unique index outbox_mark on outbox (recipient, destination_id, definition_id) where kind = 'm';
create index outbox_event on outbox (recipient, destination_id, id) where kind = 'e';
create index outbox_queue on outbox (destination_id, priority, id);
create index outbox_due on outbox (due_at) where attempts > 0 or confirm > 0;

-- What a destination has refused, with the answer: a column of a mark, or an event. A newer change takes its place.
create table dead_call (
  id bigint primary key default nextval('version'),
  destination_id integer not null references destination,
  definition_id integer not null references definition,
  kind "char" not null check (kind in ('m', 'e')),
  recipient text collate "C" not null,
  died_at timestamptz not null default now(),
  retries smallint not null default 0,
  -- When it is tried again by itself; null: not before a person says so.
  retry_at timestamptz,
  reason text not null,
  answer text not null,
  field text,
  with_beside boolean not null default false,
  successors text[],
  beside text collate "C",
  event text,
  message_id text,
  occurred_at timestamptz,
  properties jsonb,
  check ((kind = 'm') = (field is not null)),
  check ((kind = 'e') = (message_id is not null))
);
create unique index dead_call_column on dead_call (recipient, destination_id, definition_id, field) where kind = 'm';
create index dead_call_recipient on dead_call (recipient);
create index dead_call_age on dead_call (died_at);

-- Who entered, who exited and whose value changed, and when; kept for 90 days, a partition a month.
create table transition (
  at timestamptz not null,
  definition_id integer not null,
  run_id bigint,
  kind "char" not null check (kind in ('e', 'x', 'c')),
  recipient text collate "C" not null
) partition by range (at);
create index transition_recipient on transition (recipient, at);

-- What a command asks of the leader, and how it ended.
create table request (
  id bigint primary key generated always as identity,
  kind text not null check (kind in ('sync', 'backfill', 'approve', 'reject', 'retry', 'discard', 'forget', 'verify')),
  arguments jsonb not null,
  requested_at timestamptz not null default now(),
  taken_by uuid,
  -- {"runs": [ids], ...}: how far it has come.
  progress jsonb not null default '{}',
  finished_at timestamptz,
  outcome text check (outcome in ('done', 'refused', 'failed')),
  answer text,
  check ((outcome is null) = (finished_at is null))
);
create index on request (id) where outcome is null;

-- People who were erased on request, as keyed hashes: nothing is queued for them again.
create table forgotten (
  hash bytea primary key
);

-- People whom a destination has forgotten, as keyed hashes: no call is sent to it for them again.
create table forgotten_there (
  destination_id integer not null references destination,
  hash bytea not null,
  primary key (destination_id, hash)
);
