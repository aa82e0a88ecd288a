/**
 * The two kinds of expected failure. What a person must change is an `OperatorError`, what time may mend is an
 * `UnavailableError`; the command line turns them into exit codes 2 and 75. Anything else that is thrown is a bug.
 * Neither may carry a secret or a person's data in its message.
 */

/** A position in a file that a person wrote; line and column count from 1. */
export interface Place {
  file: string;
  line: number;
  column: number;
}

/** One thing that is wrong: where it is, what it is, and what to write or do instead. */
export interface Problem {
  place?: Place;
  message: string;
}

export class OperatorError extends Error {
  readonly problems: readonly Problem[];

  constructor(problems: string | readonly Problem[], options?: ErrorOptions) {
    const list = typeof problems === 'string' ? [{ message: problems }] : problems;
    super(list.map(describeProblem).join('\n'), options);
    this.name = 'OperatorError';
    this.problems = list;
  }
}

export class UnavailableError extends Error {
  constructor(message: string, options?: ErrorOptions) {
    super(message, options);
    this.name = 'UnavailableError';
  }
}

/** `file:line:column: message`, or the message alone where there is no place. */
export function describeProblem({ place, message }: Problem): string {
  return place === undefined ? message : `${place.file}:${place.line}:${place.column}: ${message}`;
}
