-- A partition that has come has no triggers yet, and gets them; one that had them and lost them was meant to. Locks
-- `watched` for a moment.
alter table watched
  -- What of the table has been seen with its triggers, by its number in the source.
  add column covered text[] not null default '{}';
