/** What a test may do in place of waiting, by changing the rows that wait. */
type State = (text: string) => Promise<unknown>;

const letGo = (condition: string): string =>
  `with waiting as (select o.id from personas.outbox as o where o.due_at > now() ${condition}
     order by o.recipient, o.id for update skip locked)
   update personas.outbox as o set due_at = now(), not_before = null from waiting where o.id = waiting.id`;

/**
 * Ends the back-offs, not what waits for as long as a request may still be applied. Whoever settles or raises calls at
 * this moment is left alone.
 */
export const endBackoffs = (state: State): Promise<unknown> =>
  state(
    letGo(
      `and not exists (select from personas.outbox as late where late.recipient = o.recipient and late.not_before > now())`,
    ),
  );

/** Ends all waits: only where no request is left that could still be applied, and no sender that remembers one. */
export const endWaits = (state: State): Promise<unknown> => state(letGo(''));
