// Phrases that several answers share.

const WORDS = 4;
const WORD = /[\p{L}\p{N}'’]+/gu;

/** For each text, the ranges of phrases of WORDS words or more that another text also has: pairs of
 *  offsets, in order, merged where they touch. */
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
