/**
 * What Iterable answers. A single call's result is `{msg, code, params}`; a bulk call is answered with 200 even where
 * every user failed, and names those who did by their identifiers.
 */
import type { Draft } from './fields.js';
import type { IdentifierKind, Project } from './project.js';

export interface Answer {
  status: number;
  text: string;
  /** JSON unless said otherwise. */
  contentType?: string;
}

/** Iterable's codes that the simulator uses. */
export type Code =
  | 'BadApiKey'
  | 'BadJsonBody'
  | 'BadParams'
  | 'BatchTooLarge'
  | 'EmailAlreadyExists'
  | 'ExternalKeyConflict'
  | 'Forbidden'
  | 'ForbiddenParamsError'
  | 'ForgottenUserError'
  | 'GenericError'
  | 'InvalidEmailAddressError'
  | 'InvalidUserIdError'
  | 'NotFound'
  | 'RateLimitExceeded'
  | 'RequestFieldsTypesMismatched'
  | 'UniqueFieldsLimitExceeded'
  | 'UnknownEmailError'
  | 'UnknownUserIdError';

export type FailureKind = 'invalid' | 'notFound' | 'invalidData' | 'conflict' | 'forgotten';

/** Why one user or event was refused, and the identifier that a bulk answer names. */
export interface Failure {
  kind: FailureKind;
  by: IdentifierKind;
  value: string;
  msg: string;
  /** For `invalidData`, which has no code of its own. */
  code?: Code;
}

export function success(msg = '', params: unknown = null): Answer {
  return json({ msg, code: 'Success', params });
}

export function refusal(status: number, code: Code, msg: string, params: unknown = null): Answer {
  return json({ msg, code, params }, status);
}

export function badParams(msg: string): Answer {
  return refusal(400, 'BadParams', msg);
}

export function json(body: unknown, status = 200): Answer {
  return { status, text: JSON.stringify(body) };
}

/** The answer of a single call that was refused for its user. */
export function failureAnswer({ options }: Project, { kind, by, msg, code }: Failure): Answer {
  switch (kind) {
    case 'invalid':
      return refusal(400, by === 'email' ? 'InvalidEmailAddressError' : 'InvalidUserIdError', msg);
    case 'notFound':
      return refusal(400, by === 'email' ? 'UnknownEmailError' : 'UnknownUserIdError', msg);
    case 'invalidData':
      return refusal(400, code ?? 'BadParams', msg);
    case 'conflict':
      return refusal(409, 'ExternalKeyConflict', msg);
    case 'forgotten':
      return refusal(options.forgottenStatus, 'ForgottenUserError', msg);
  }
}

/** The refusal of a request whose values don't fit the types of the fields that it names. */
export function mismatchAnswer({ category, mismatches }: Draft): Answer {
  const sentences: string[] = [];
  const errors: string[] = [];
  for (const [field, { expected, incoming, raw }] of mismatches) {
    sentences.push(
      `Field '${field}' of type '${category}' is a '${expected}', the request has '${incoming.join(', ')}'.`,
    );
    const known = { incomingTypes: incoming, expectedType: expected, category, _type: 'UnexpectedType' };
    errors.push(`${JSON.stringify(field)}:${JSON.stringify(known).slice(0, -1)},"offendingValue":${raw}}`);
  }
  const msg = JSON.stringify(`The data types are not those of the data sent before. ${sentences.join(' ')}`);
  const params = `{"validationErrors":{${errors.join(',')}}}`;
  return { status: 400, text: `{"msg":${msg},"code":"RequestFieldsTypesMismatched","params":${params}}` };
}

/** A bulk answer with the given kinds of failure; `more` is what else belongs to it. */
export function bulkAnswer(
  kinds: readonly FailureKind[],
  failures: readonly Failure[],
  { successCount, draft, more }: { successCount: number; draft: Draft | undefined; more?: Record<string, unknown> },
): Answer {
  const failedUpdates: Record<string, string[]> = {};
  for (const kind of kinds) {
    for (const by of ['email', 'userId'] as const) {
      failedUpdates[`${kind}${by === 'email' ? 'Emails' : 'UserIds'}`] = failures
        .filter((failure) => failure.kind === kind && failure.by === by)
        .map(({ value }) => value);
    }
  }
  return json({
    successCount,
    failCount: failures.length,
    createdFields: [...(draft?.added.keys() ?? [])],
    filteredOutFields: [...(draft?.filtered ?? [])],
    invalidEmails: failedUpdates['invalidEmails'],
    invalidUserIds: failedUpdates['invalidUserIds'],
    failedUpdates,
    ...more,
  });
}
