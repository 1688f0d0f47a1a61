import { useState } from "preact/hooks";
import { Formula } from "./Formula";
import { difference, GAINS, gain, LEVELS, level, meanSurprise, pieces, surprise, type Token } from "./text";

/** Text with its surprise: looked at by mouse, touch or arrow keys, token by token. */
export function Output(props: {
  label: string;
  lead: string;
  text: string;
  tokens: Token[];
  tex: boolean;
  shade: boolean;
  base?: Token[]; // what the base thinks of the same text
  writing: boolean;
}) {
  const { lead, text, tokens, base } = props;
  const [cursor, setCursor] = useState<number | null>(null);
  const at = cursor === null || cursor >= tokens.length ? null : cursor;

  function onKeyDown(e: KeyboardEvent) {
    const last = tokens.length - 1;
    const moves: Record<string, number> = {
      ArrowRight: at === null ? 0 : Math.min(at + 1, last),
      ArrowLeft: at === null ? last : Math.max(at - 1, 0),
      Home: 0,
      End: last,
    };
    if (!(e.key in moves) || last < 0 || e.altKey || e.ctrlKey || e.metaKey) return;
    e.preventDefault();
    setCursor(moves[e.key]);
  }

  function onPoint(e: Event) {
    const found = (e.target as Element).closest<HTMLElement>("[data-token]");
    if (found) setCursor(Number(found.dataset.token));
  }

  const last = tokens.at(-1);
  const end = last && last.start >= text.length ? last : null; // the token that says "end of text" has no text itself
  /** The shade of some tokens: their mean surprise, or by how much it is below the base's. */
  function shaded(indices: number[]): string {
    if (!props.shade) return "";
    if (!base) return ` s${level(meanSurprise(indices.map((i) => tokens[i])))}`;
    const known = indices.map((i) => difference(tokens[i], base[i])).filter((d): d is number => d !== null);
    return known.length ? ` ${gain(known.reduce((a, b) => a + b, 0) / known.length)}` : "";
  }
  return (
    <>
      <div
        class="output"
        role="group"
        tabIndex={0}
        aria-label={`${props.label}. Arrow keys go from token to token.`}
        onKeyDown={onKeyDown}
        onPointerOver={onPoint}
        onClick={onPoint}
      >
        {pieces(lead, text, tokens, props.tex).map((piece) => {
          if (piece.kind === "formula") {
            const own = piece.tokens.map((i) => tokens[i]);
            const here = at !== null && piece.tokens.includes(at);
            return (
              <span
                key={piece.start}
                class={(own.length ? "token" + shaded(piece.tokens) : "lead") + (here ? " here" : "")}
                data-token={piece.tokens[0]}
                title={own.length ? formulaInWords(piece.source, own) : undefined}
              >
                <Formula tex={piece.tex} source={piece.source} display={piece.display} />
              </span>
            );
          }
          if (piece.token === null) {
            return (
              <span key={piece.start} class="lead">
                {piece.text}
              </span>
            );
          }
          const token = tokens[piece.token];
          return (
            <span
              key={piece.start}
              class={`token${shaded([piece.token])}${piece.token === at ? " here" : ""}`}
              data-token={piece.token}
              title={inWords(token, base?.[piece.token])}
            >
              {piece.text}
            </span>
          );
        })}
        {props.writing && <span class="caret" aria-hidden="true" />}
        {end && !props.writing && (
          <span
            class={`token end${shaded([tokens.length - 1])}${at === tokens.length - 1 ? " here" : ""}`}
            data-token={tokens.length - 1}
            title={inWords(end)}
          >
            ∎
          </span>
        )}
      </div>
      <p class={tokens.length ? "readout" : "readout none"} aria-live="polite">
        {at !== null && <Readout token={tokens[at]} base={base?.[at]} number={at + 1} of={tokens.length} />}
        {at === null && tokens.length > 0 && <span class="quiet hint">Point at a token, or focus the text and use ← →</span>}
      </p>
    </>
  );
}

function Readout({ token, base, number, of }: { token: Token; base?: Token; number: number; of: number }) {
  const others = token.top.filter(([spelt]) => spelt !== token.spelt).slice(0, 3);
  return (
    <>
      <span class="quiet">
        {number}/{of}
      </span>{" "}
      <code>{visible(token.spelt)}</code> {figures(token)}{versus(token, base)}
      {others.length > 0 && (
        <span class="others">
          {" "}
          <span class="quiet">also</span>{" "}
          {others.map(([spelt, logprob]) => (
            <span key={spelt}>
              <code>{visible(spelt)}</code> {percent(Math.exp(logprob))}{" "}
            </span>
          ))}
        </span>
      )}
    </>
  );
}

/** What the shades mean: of the base, and where it was scored too, of the others beside it. */
export function Legend({ compared }: { compared: boolean }) {
  const bounds = [0, ...LEVELS];
  return (
    <>
      <div class="legend" role="group" aria-labelledby="legend-name">
        <span id="legend-name">
          {compared ? "Base: surprise" : "Surprise"}, <span class="formula">−log p</span> in nats
        </span>
        <ul>
          {bounds.map((bound, i) => (
            <li key={bound}>
              <span class={`token s${i}`}>{i < LEVELS.length ? `${bound}–${LEVELS[i]}` : `over ${bound}`}</span>
            </li>
          ))}
        </ul>
      </div>
      {compared && (
        <div class="legend difference" role="group" aria-labelledby="difference-name">
          <span id="difference-name">Others: nats better or worse than the base</span>
          <ul>
            {GAINS.map(([name, words]) => (
              <li key={name}>
                <span class={`token ${name}`}>{words}</span>
              </li>
            ))}
          </ul>
        </div>
      )}
    </>
  );
}

function inWords(token: Token, base?: Token): string {
  return `${visible(token.spelt)}: ${figures(token)}${versus(token, base)}`;
}

/** ", 0.52 nats better than the base", or nothing without a base. */
function versus(token: Token, base?: Token): string {
  const nats = difference(token, base);
  if (nats === null) return "";
  return `, ${Math.abs(nats).toFixed(2)} nats ${nats < 0 ? "worse" : "better"} than the base`;
}

function figures(token: Token): string {
  const nats = surprise(token);
  return nats === null ? "the first token: nothing to predict it from" : `${nats.toFixed(2)} nats, p = ${percent(Math.exp(-nats))}`;
}

function formulaInWords(source: string, tokens: Token[]): string {
  const mean = meanSurprise(tokens);
  return `${source}: ${tokens.length} tokens${mean === null ? "" : `, ${mean.toFixed(2)} nats on average`}`;
}

function percent(p: number): string {
  if (p < 0.0001) return "< 0.01 %";
  return p > 0.9995 ? "> 99.9 %" : `${(100 * p).toPrecision(p < 0.1 ? 2 : 3)} %`;
}

/** A token as it can be seen: spaces and line ends are drawn. */
function visible(spelt: string): string {
  return spelt.replaceAll(" ", "␣").replaceAll("\n", "⏎");
}
