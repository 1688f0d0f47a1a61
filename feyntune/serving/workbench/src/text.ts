// From a stream of chunks to what is drawn: words with their surprise, and formulas.

/** A token of the text: where it begins (UTF-16 units, as JavaScript counts), and what the model thought of it. */
export interface Token {
  start: number;
  spelt: string;
  logprob: number | null; // natural logarithm, temperature 1; none for the first token of a text
  top: [string, number][];
}

/** A stretch of text that is drawn in one go. Those before the completion have no tokens. */
export type Piece =
  | { kind: "text"; start: number; text: string; token: number | null }
  | { kind: "formula"; start: number; tex: string; display: boolean; source: string; tokens: number[] };

// Opening $ before, closing $ after something that is no space, no digit behind it: "$5 and $6" is money.
const FORMULA = /\$\$([^$]+)\$\$|\$(?!\s)((?:\\.|[^$\\])+?)(?<!\s)\$(?!\d)|\\\(([^]+?)\\\)|\\\[([^]+?)\\\]/g;

/** Where code point number `offset` of `text` begins, in UTF-16 units. Asked in rising order it reads once. */
export function unitsOf(text: string): (offset: number) => number {
  let unit = 0;
  let point = 0;
  return (offset) => {
    while (point < offset && unit < text.length) {
      unit += text.codePointAt(unit)! > 0xffff ? 2 : 1;
      point += 1;
    }
    return unit;
  };
}

/** −log p of the worst-predicted token is large; no number for the first of a text. */
export function surprise(token: Token): number | null {
  return token.logprob === null ? null : Math.max(0, -token.logprob);
}

/** Mean surprise in nats of some tokens, of those that have one. */
export function meanSurprise(tokens: Token[]): number | null {
  const known = tokens.map(surprise).filter((s): s is number => s !== null);
  return known.length ? known.reduce((a, b) => a + b, 0) / known.length : null;
}

export const LEVELS = [1, 2, 4, 7]; // nats: the upper bounds of levels 0 to 3; level 4 lies above

export function level(nats: number | null): number {
  if (nats === null) return 0;
  const found = LEVELS.findIndex((bound) => nats < bound);
  return found < 0 ? LEVELS.length : found;
}

/** By how many nats `token` is less surprising than the base finds it; null where one of them says nothing. */
export function difference(token: Token, base?: Token): number | null {
  if (!base || base.start !== token.start || base.logprob === null || token.logprob === null) return null;
  return token.logprob - base.logprob;
}

/** How many tokens are predicted better than by the base, of how many. */
export function better(tokens: Token[], base: Token[]): [number, number] {
  const known = tokens.map((t, i) => difference(t, base[i])).filter((d): d is number => d !== null);
  return [known.filter((d) => d > 0).length, known.length];
}

// Classes of a difference, from much better to much worse.
export const GAINS: [string, string][] = [
  ["g2", "over 1 better"],
  ["g1", "0.2–1 better"],
  ["g0", "alike"],
  ["w1", "0.2–1 worse"],
  ["w2", "over 1 worse"],
];

export function gain(nats: number): string {
  const size = Math.abs(nats) > 1 ? 2 : Math.abs(nats) > 0.2 ? 1 : 0;
  return size === 0 ? "g0" : (nats > 0 ? "g" : "w") + size;
}

/** `lead` and the completion after it as pieces; formulas may begin in the one and end in the other. */
export function pieces(lead: string, text: string, tokens: Token[], tex: boolean): Piece[] {
  const whole = lead + text;
  const starts = tokens.map((t) => lead.length + t.start);
  const out: Piece[] = [];
  let next = 0; // the first token that is not drawn yet

  function words(from: number, to: number) {
    if (from < Math.min(to, lead.length)) {
      out.push({ kind: "text", start: from, text: whole.slice(from, Math.min(to, lead.length)), token: null });
    }
    let at = Math.max(from, lead.length);
    while (at < to) {
      while (next + 1 < tokens.length && starts[next + 1] <= at) next += 1;
      const end = next + 1 < tokens.length ? Math.min(starts[next + 1], to) : to;
      const token = next < tokens.length && starts[next] <= at ? next : null;
      const until = token === null && next < tokens.length ? Math.min(starts[next], to) : end;
      out.push({ kind: "text", start: at, text: whole.slice(at, until), token });
      at = until;
    }
  }

  let at = 0;
  for (const found of tex ? whole.matchAll(FORMULA) : []) {
    const end = found.index + found[0].length;
    words(at, found.index);
    const inside = tokens.flatMap((_, i) => {
      const stop = i + 1 < tokens.length ? starts[i + 1] : whole.length;
      return starts[i] < end && stop > found.index ? [i] : [];
    });
    const display = found[1] !== undefined || found[4] !== undefined;
    const source = found[1] ?? found[2] ?? found[3] ?? found[4];
    out.push({ kind: "formula", start: found.index, tex: source, display, source: found[0], tokens: inside });
    at = end;
  }
  words(at, whole.length);
  return out;
}

/** The end of a long prompt, from a sentence's beginning: enough to read on from. */
export function tail(prompt: string, least = 160): string {
  if (prompt.length <= 2 * least) return prompt;
  const until = prompt.length - least;
  const sentence = Math.max(prompt.lastIndexOf(". ", until) + 1, prompt.lastIndexOf("\n", until));
  const from = sentence > 0 && until - sentence < 2 * least ? sentence : prompt.lastIndexOf(" ", until);
  const formulas = [...prompt.matchAll(FORMULA)].map((m) => [m.index, m.index + m[0].length]);
  const cut = formulas.find(([begin, end]) => begin < from && from < end)?.[0] ?? from;
  return "…" + prompt.slice(Math.max(0, cut));
}
