-- Locks `destination` and `definition_destination` for a moment.
alter table destination
  -- Fields that the destination has left out of what it was sent, each with the time when it last did.
  add column left_out jsonb not null default '{}',
  -- How many calls in a row were refused for their content, by definition and field.
  add column streaks jsonb not null default '{}';

alter table definition_destination
  -- Fields that are left out of what is sent there until a person resumes the definition, each with the reason.
  add column stopped_fields jsonb not null default '{}';
