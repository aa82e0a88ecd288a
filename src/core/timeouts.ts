/**
 * How long a request may be open altogether, in milliseconds: a call alone, or many together. The lease counts on it:
 * whoever leads next sends nothing while a request of the last leader may be open.
 */
export const SINGLE_REQUEST_MS = 10_000;
export const BULK_REQUEST_MS = 30_000;
