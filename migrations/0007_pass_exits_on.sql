-- Whoever has left a definition under an address that they have no more is told so under the keys that other definitions have of
-- them. Locks `outbox` for a moment.
alter table outbox
  -- Such a call, which is passed on no further: else several keys of one person would tell each other for ever.
  add column passed_on boolean not null default false;
