-- Marks of one person under several keys wait for each other by the person, whatever their definitions and whenever they
-- were raised, and no more by ids that one comparison has written down. Locks `outbox` and `dead_call` while it reads them.

alter table outbox
  -- An exit: the profile that leaves under this key.
  add column exit_of text collate "C",
  -- The profile whose exits under other keys go first. An exit waits for nothing, so that no two marks wait for each other.
  add column follows text collate "C",
  add constraint outbox_order check (exit_of is null or follows is null);
alter table dead_call add column exit_of text collate "C";

-- Whose exit it is, the snapshot says of the keys that came after.
update outbox as o set exit_of = s.profile_id
  from (select o.id, min(s.profile_id) as profile_id from outbox as o
        join snapshot as s on s.definition_id = o.definition_id and s.recipient = any(o.successors)
        where o.successors is not null group by o.id) as s
  where o.id = s.id;
update outbox as o set follows = x.exit_of
  from outbox as x where o.exit_of is null and x.id = any(o.after) and x.exit_of is not null;
update dead_call as c set exit_of = s.profile_id
  from (select c.id, min(s.profile_id) as profile_id from dead_call as c
        join snapshot as s on s.definition_id = c.definition_id and s.recipient = any(c.successors)
        where c.successors is not null group by c.id) as s
  where c.id = s.id;

alter table outbox drop column after, drop column successors;
alter table dead_call drop column successors;

create index outbox_exit on outbox (exit_of) where exit_of is not null;
create index outbox_follows on outbox (follows) where follows is not null;
