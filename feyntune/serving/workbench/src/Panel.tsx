import { useState } from "preact/hooks";
import type { Call } from "./api";
import { curl, python } from "./calls";
import { Output } from "./Output";
import { better, meanSurprise, tail, type Token } from "./text";

/** One system's answer, from the moment it was asked for. */
export interface Result {
  call: Call;
  title: string;
  state: "waiting" | "writing" | "done" | "stopped" | "failed";
  version: string; // what the name meant when it was asked
  text: string;
  tokens: Token[];
  finish: string | null;
  error: string;
  asked: number; // ms
  ended: number;
}

export function Panel(props: { result: Result; base?: Result; tex: boolean; shade: boolean; keyed: boolean }) {
  const { result, tex, keyed } = props;
  // A text that all read alike is shaded; a model's own sample is not: dull text would look good.
  const shade = props.shade && Boolean(result.call.echo);
  const base = props.base && props.base !== result && props.base.call.prompt === result.call.prompt ? props.base : undefined;
  const { call, state } = result;
  const writing = state === "waiting" || state === "writing";
  return (
    <article class="panel" aria-busy={writing} data-model={call.model} data-state={state}>
      <header>
        <h2>{result.title}</h2>
        {result.version && result.version !== call.model && <p class="quiet version">{result.version}</p>}
      </header>
      <Output
        label={call.echo ? `The text as ${result.title} reads it` : `Completion by ${result.title}`}
        lead={call.echo ? "" : tail(call.prompt)}
        text={result.text}
        tokens={result.tokens}
        tex={tex}
        shade={shade}
        base={base?.tokens}
        writing={writing}
      />
      {result.error && (
        <p class="error" role="alert">
          {result.error}
        </p>
      )}
      <footer>
        <p class="figures">{figures(result, base)}</p>
        {!writing && <Copy result={result} keyed={keyed} />}
      </footer>
    </article>
  );
}

function figures(result: Result, base?: Result): string {
  const { state, tokens, call } = result;
  if (state === "waiting") return "waiting for the first token";
  if (state === "failed" && !tokens.length) return "";
  const mean = meanSurprise(tokens);
  const said = [`${tokens.length} tokens`];
  if (mean !== null && call.echo) {
    const before = base && meanSurprise(base.tokens);
    const [count, of] = base ? better(tokens, base.tokens) : [0, 0];
    if (before !== null && before !== undefined && of) said.push(`better than the base on ${count} of ${of}`);
    said.push(`perplexity ${Math.exp(mean).toFixed(2)}${before ? ` (base ${Math.exp(before).toFixed(2)})` : ""}`);
  }
  if (result.ended) said.push(`${((result.ended - result.asked) / 1000).toFixed(1)} s`);
  if (state === "done" && !call.echo) said.push(result.finish === "stop" ? "ended by itself" : "reached max tokens");
  if (state === "stopped") said.push("stopped");
  return said.join(" · ");
}

function Copy({ result, keyed }: { result: Result; keyed: boolean }) {
  const [said, setSaid] = useState("");
  const [shown, setShown] = useState("");
  const forms: [string, string][] = [
    ["text", result.call.echo ? result.text : result.call.prompt + result.text],
    ["curl", curl(result.call, keyed)],
    ["Python", python(result.call, keyed, result.version)],
  ];

  async function copy(name: string, text: string) {
    try {
      await navigator.clipboard.writeText(text);
      setShown("");
      setSaid(`${name} copied`);
    } catch {
      setShown(text); // browsers give the clipboard only to https and localhost
      setSaid("This browser keeps its clipboard closed here: select and copy.");
    }
  }

  return (
    <div class="copy">
      <span class="quiet">Copy</span>
      {forms.map(([name, text]) => (
        <button key={name} type="button" onClick={() => copy(name, text)} aria-label={`Copy ${name} of ${result.title}`}>
          {name}
        </button>
      ))}
      <span class="quiet" role="status">
        {said}
      </span>
      {shown && (
        <textarea
          readOnly
          rows={6}
          value={shown}
          aria-label="What to copy"
          ref={(e) => e?.select()}
          onFocus={(e) => e.currentTarget.select()}
        />
      )}
    </div>
  );
}
