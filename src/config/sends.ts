import type { z } from 'zod';
import type { Definition, Send } from '../core/definition.js';
import type { audienceSchema } from './schema.js';
import { listed, quoted, sentence, unknownWord } from './wording.js';
import type { Path, Report, YamlFile } from './yaml.js';

type Fields = Pick<z.output<typeof audienceSchema>, 'send' | 'destinations' | 'list'>;
type Modes = Pick<Send, 'identify' | 'track'> & { list: boolean };
type Events = Pick<Send, 'entered' | 'exited' | 'computed'>;

const EVENTS: Events = { entered: 'Audience Entered', exited: 'Audience Exited', computed: 'Trait Computed' };

const OWN_EVENTS: Record<Definition['kind'], readonly (keyof Events)[]> = {
  audience: ['entered', 'exited'],
  trait: ['computed'],
};

/**
 * What each destination is sent for a definition, by destination; mistakes are reported and left out. One `send` for
 * all goes to every destination, or to those that the definition's `destinations` names; a `send` that names
 * destinations leaves out the others. `known` are the names of all destinations, `listed` those of them that have lists.
 */
export function readSends(
  source: YamlFile,
  path: Path,
  kind: Definition['kind'],
  { send, destinations, list, key }: Fields & { key: string },
  { known, listed: withLists }: { known: readonly string[]; listed: readonly string[] },
  report: Report,
): ReadonlyMap<string, Send> {
  const allowed = destinations?.map((name) => name.trim()) ?? known;
  for (const [index, name] of allowed.entries()) {
    if (known.length === 0 || known.includes(name)) continue;
    const message = sentence(`${quoted(name)} ${unknownWord(name, known, 'destination')}`);
    report({ place: source.placeOf([...path, 'destinations', index]), message });
  }
  const refuse = (name: string, predicate: string) =>
    report({ place: source.keyPlaceOf([...path, 'send', name]), message: sentence(`${quoted(name)} ${predicate}`) });
  const own = OWN_EVENTS[kind];
  let sound = true;
  for (const name of namesIn(source.at([...path, 'send']))) {
    if (isEvent(name) ? own.includes(name) : allowed.includes(name)) continue;
    if (known.length === 0) continue;
    sound = false;
    if (isEvent(name)) refuse(name, `is for the other kind of definition: use ${listed(own, 'and')}`);
    else if (known.includes(name)) refuse(name, 'is not among the `destinations` of this definition: add it there');
    else refuse(name, unknownWord(name, [...known, ...own], 'destination'));
  }

  const filled = { name: list?.name?.trim() ?? key, existingOnly: list?.existing_only ?? false };
  const sendOf = ({ list: isListed, ...mode }: Modes): Omit<Send, keyof Events> => ({
    ...mode,
    list: isListed ? filled : null,
  });
  const sends = new Map<string, Omit<Send, keyof Events>>();
  const events: Partial<Events> = {};
  if (send === undefined) for (const name of allowed) sends.set(name, sendOf(BY_DEFAULT));
  else if (send.kind === 'everywhere') for (const name of allowed) sends.set(name, sendOf(send.mode));
  else {
    for (const [name, value] of send.entries) {
      if (typeof value === 'string' && isEvent(name)) events[name] = value.trim();
      if (typeof value === 'object') sends.set(name, sendOf(value));
    }
    const [event] = Object.keys(events);
    const example = `\`${known[0] ?? 'iterable'}: track\``;
    if (sound && event !== undefined && ![...sends.values()].some(({ track }) => track)) {
      refuse(event, `names the event of a track call, but nothing is sent as one: add ${example}`);
    } else if (sound && sends.size === 0) {
      const place = source.placeOf([...path, 'send']);
      report({ place, message: `\`send\` names no destination: add one, such as ${example}.` });
    }
  }
  const isListed = [...sends.values()].some((each) => each.list !== null);
  if (isListed && kind === 'trait') {
    const place = source.placeOf([...path, 'send']);
    report({ place, message: "`send` of a trait can't be `list`: a list holds the members of an audience." });
  } else if (sound && list !== undefined && !isListed) {
    const place = source.keyPlaceOf([...path, 'list']);
    report({
      place,
      message: '`list` names a list, but no `send` is `list`: add it, such as `send: [identify, list]`.',
    });
  }
  const without = [...sends].find(
    ([name, each]) => each.list !== null && known.includes(name) && !withLists.includes(name),
  );
  if (without !== undefined && kind === 'audience') {
    const place = source.placeOf([...path, 'send']);
    report({ place, message: `${quoted(without[0])} has no lists: \`send\` can't be \`list\` there.` });
  }
  return new Map([...sends].map(([name, mode]) => [name, { ...mode, ...EVENTS, ...events }]));
}

const BY_DEFAULT: Modes = { identify: true, track: false, list: false };

/** What a `send` in the form of a mapping names. */
function namesIn(send: unknown): string[] {
  return typeof send === 'object' && send !== null && !Array.isArray(send) ? Object.keys(send) : [];
}

function isEvent(name: string): name is keyof Events {
  return Object.hasOwn(EVENTS, name);
}
