-- Real time: what has changed in the source and waits to be evaluated. Columns are added without rewriting; the index on
-- `snapshot` reads each partition once, while nothing else may write it. Everything else is new and waits for nothing.

alter table definition
  -- none: changes aren't followed; polled: they would be, but can't be; live: they are.
  add column tracking text not null default 'none' check (tracking in ('none', 'polled', 'live')),
  -- Why changes can't be followed, in a sentence.
  add column polled_because text,
  -- Followed, but what has changed can't be evaluated at present, in a sentence.
  add column stuck_because text,
  -- When a reconcile had to correct what real time had missed; until a person resumes it, it is polled.
  add column distrusted_at timestamptz,
  -- A hash of all that decides whether and how changes are followed, as of the last look.
  add column evaluates text,
  -- A run in full is wanted where the first is greater: numbers of the sequence `version`.
  add column full_wanted bigint not null default 0,
  add column full_done bigint not null default 0,
  -- The open full run that has marked its start: what is evaluated meanwhile is noted for it.
  add column full_run bigint,
  -- When it is compared in full again, though nothing asks for it.
  add column reconcile_at timestamptz,
  add constraint definition_polled check ((tracking = 'polled') = (polled_because is not null));

alter table run
  -- How many profiles were evaluated; null: all.
  add column evaluated bigint,
  -- What a run in full found that real time had missed; null: it can't tell.
  add column corrections bigint;

-- Profiles that have a say about the recipient beside the one it is known by: they share it, or it is their userId that
-- an address stands for. When one of them changes, the recipient has to be looked at, too.
alter table snapshot add column others text[];
create index snapshot_others on snapshot using gin (others) where others is not null;
alter table conflict add column others text[];
create index conflict_others on conflict using gin (others) where others is not null;

-- Profiles whose rows have changed. Several rows may wait for one; a batch deletes exactly those that it had read.
create table due (
  definition_id integer not null,
  id bigint generated always as identity,
  profile_id text collate "C" not null,
  at timestamptz not null default clock_timestamp(),
  -- Evaluating this profile fails: it waits alone, and the sentence says why.
  parked_at timestamptz,
  reason text,
  -- The full run that settles it: one that a person has to approve.
  claimed_by bigint,
  primary key (definition_id, id),
  check ((parked_at is null) = (reason is null))
) with (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000, autovacuum_vacuum_cost_delay = 0);
create index due_parked on due (definition_id, profile_id) where parked_at is not null;

-- When a profile has to be looked at again though nothing of it changes: its window closes, or opens.
create table validity (
  definition_id integer not null,
  profile_id text collate "C" not null,
  until timestamptz not null,
  primary key (definition_id, profile_id)
);
create index validity_until on validity (definition_id, until);

-- What was evaluated while a full run goes on, 'p' profiles and 'r' recipients: newer than what that run computed.
create unlogged table noted (
  definition_id integer not null,
  kind "char" not null check (kind in ('p', 'r')),
  name text collate "C" not null,
  primary key (definition_id, kind, name)
);

-- What real time has done within the hour, by the minute, for the guard.
create table tally (
  definition_id integer not null,
  minute timestamptz not null,
  entered bigint not null,
  exited bigint not null,
  changed bigint not null,
  nulled bigint not null,
  primary key (definition_id, minute)
);

-- The tables of the source as they were last seen; another signature means that changes may have been missed.
create table watched (
  name text primary key,
  signature text not null,
  problem text,
  seen_at timestamptz not null default now()
);

-- The history of a definition's last hour is read where its guard would hold.
create index transition_at on transition using brin (at);

-- Which state consumes what is captured: a source serves one.
insert into setting values ('installation', to_jsonb(gen_random_uuid()::text));
