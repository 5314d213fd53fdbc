// Phrases that several answers have.

const WORDS = 4;
const WORD = /[\p{L}\p{N}'’]+/gu;

/** Of each text, where in it phrases of WORDS words stand that another text has too: pairs of
 *  offsets, in order, none touching the next. */
export function sharedIn(texts) {
  const found = texts.map(phrasesOf);
  const owners = new Map();
  found.forEach((phrases, text) => {
    for (const { key } of phrases) owners.set(key, (owners.get(key) ?? new Set()).add(text));
  });
  return found.map((phrases) => merged(phrases.filter(({ key }) => owners.get(key).size > 1)));
}

function phrasesOf(text) {
  const words = [...text.matchAll(WORD)];
  const phrases = [];
  for (let first = 0; first + WORDS <= words.length; first += 1) {
    const part = words.slice(first, first + WORDS);
    const last = part[WORDS - 1];
    phrases.push({
      key: part.map(([word]) => word.toLowerCase()).join(" "),
      start: part[0].index,
      end: last.index + last[0].length,
    });
  }
  return phrases;
}

function merged(phrases) {
  const ranges = [];
  for (const { start, end } of phrases) {
    const last = ranges.at(-1);
    if (last && start <= last[1]) last[1] = Math.max(last[1], end);
    else ranges.push([start, end]);
  }
  return ranges;
}
