-- Whom `verify` has still to read and what it has found to differ, in tables rather than in memory and in one value of a
-- request: there may be very many. People are in them, and only for as long as it takes to read them. Locks `request` for
-- a moment.

alter table request
  -- When the command that asked has last read of what was found.
  add column read_at timestamptz;
update request set progress = progress - 'differences' where progress ? 'differences';

-- Who was drawn, until what is found of them is written down.
create table sample (
  request_id bigint not null references request on delete cascade,
  destination_id integer not null references destination,
  recipient text collate "C" not null,
  primary key (request_id, destination_id, recipient)
);

create table difference (
  request_id bigint not null references request on delete cascade,
  id bigint not null generated always as identity,
  destination_id integer not null references destination,
  definition_id integer not null references definition,
  recipient text collate "C" not null,
  field text not null,
  -- JSON texts, as they were compared; null where the user has nothing there.
  expected text not null,
  found text,
  primary key (request_id, id)
);
create index on difference (request_id, destination_id, recipient);
