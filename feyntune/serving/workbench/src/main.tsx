import "@fontsource-variable/source-serif-4/wght.css";
import "katex/dist/katex.min.css";
import { render } from "preact";
import { useEffect, useRef, useState } from "preact/hooks";
import { complete, models as fetchModels, Refusal, type Model, type Settings } from "./api";
import { EXAMPLES } from "./examples";
import { Legend } from "./Output";
import { Panel, type Result } from "./Panel";
import { inOrder, Systems, titleOf } from "./Systems";
import { unitsOf } from "./text";

function Workbench() {
  const [models, setModels] = useState<Model[]>([]);
  const [trouble, setTrouble] = useState("");
  const [keyed, setKeyed] = useState(false);
  const [key, setKey] = useState(""); // in memory only: gone when the page is
  const [chosen, setChosen] = useState(new Set(["base", "champion"]));
  const [prompt, setPrompt] = useState("");
  const [settings, setSettings] = useState<Settings>({ max_tokens: 120, temperature: 0.8, seed: 1 });
  const [tex, setTex] = useState(true);
  const [shade, setShade] = useState(true);
  const [missing, setMissing] = useState("");
  const [results, setResults] = useState<Result[]>([]);
  const [said, setSaid] = useState("");
  const running = useRef<AbortController | null>(null);
  const answers = useRef<HTMLElement>(null);
  const scrolled = useRef(true);
  const keyField = useRef<HTMLInputElement>(null);
  const writing = results.some((r) => r.state === "waiting" || r.state === "writing");

  /** What is served now; asked again while the base loads. */
  async function refresh(withKey: string, signal?: AbortSignal) {
    for (;;) {
      try {
        const found = await fetchModels(withKey);
        if (signal?.aborted) return;
        setModels(inOrder(found));
        setPrompt((now) => now || examplesOf(found)[0].text);
        setTrouble("");
        return;
      } catch (e) {
        if (signal?.aborted) return;
        const refusal = e instanceof Refusal ? e : new Refusal(String(e));
        if (refusal.status === 401) setKeyed(true);
        const asks = withKey ? "This is no valid key of this endpoint." : "This endpoint asks for a key.";
        setTrouble(refusal.status === 401 ? asks : refusal.message);
        if (refusal.status !== 503) return;
        await new Promise((done) => setTimeout(done, 1000 * Math.max(1, refusal.retryAfter)));
      }
    }
  }

  useEffect(() => {
    const left = new AbortController();
    refresh(key, left.signal);
    const again = () => refresh(key, left.signal); // promotions happen while the page is in the background
    addEventListener("focus", again);
    return () => {
      left.abort();
      removeEventListener("focus", again);
    };
  }, [key]);

  useEffect(() => {
    if (keyed) keyField.current?.focus();
  }, [keyed]);

  // On a phone the answers lie below the form: go there with the first token, not before there is anything to see.
  useEffect(() => {
    if (scrolled.current || !results.some((r) => r.tokens.length || r.error)) return;
    scrolled.current = true;
    if (matchMedia("(max-width: 59.99rem)").matches) answers.current?.scrollIntoView();
  }, [results]);

  const examples = examplesOf(models);
  const asked = models.filter((m) => chosen.has(m.id));

  function toggle(id: string) {
    const next = new Set(chosen);
    if (!next.delete(id)) next.add(id);
    setChosen(next);
  }

  async function run(score: boolean) {
    running.current?.abort();
    const lacking = !prompt.trim() ? "Write or pick the start of an abstract first." : "";
    setMissing(lacking || (asked.length ? "" : "Tick at least one system to compare."));
    if (lacking || !asked.length) return;
    const control = new AbortController();
    running.current = control;
    setSaid(asked.length === 1 ? "One system is answering." : `${asked.length} systems are answering.`);
    const started: Result[] = asked.map((model) => ({
      call: score
        ? { model: model.id, prompt, max_tokens: 0, echo: true, logprobs: 0 }
        : { model: model.id, prompt, ...settings },
      title: titleOf(model),
      state: "waiting",
      version: model.parent === null ? model.root : "",
      text: "",
      tokens: [],
      finish: null,
      error: "",
      asked: performance.now(),
      ended: 0,
    }));
    setResults(started);
    scrolled.current = false;
    const ended = await Promise.all(started.map((result) => follow(result, control.signal)));
    if (running.current !== control) return;
    running.current = null;
    const failed = ended.filter((state) => state === "failed").length;
    setSaid(control.signal.aborted ? "Stopped." : failed ? `${failed} of ${ended.length} failed.` : "Finished.");
  }

  /** Bring one panel up to date until its stream ends; how it ended. */
  async function follow(result: Result, signal: AbortSignal): Promise<Result["state"]> {
    const show = (change: Partial<Result>) => {
      Object.assign(result, change);
      setResults((all) => (all.some((r) => r.call === result.call) ? all.map((r) => (r.call === result.call ? { ...result } : r)) : all));
    };
    try {
      for await (const chunk of complete(result.call, key, signal)) {
        const choice = chunk.choices[0];
        if (!choice) continue;
        const text = result.text + choice.text;
        const unit = unitsOf(text);
        const added = (choice.logprobs?.tokens ?? []).map((spelt, i) => ({
          start: unit(choice.logprobs!.text_offset[i]),
          spelt,
          logprob: choice.logprobs!.token_logprobs[i],
          top: Object.entries(choice.logprobs!.top_logprobs[i] ?? {}),
        }));
        show({
          state: "writing",
          text,
          tokens: added.length ? [...result.tokens, ...added] : result.tokens,
          version: chunk.model === "base" ? result.version : chunk.model,
          finish: choice.finish_reason ?? result.finish,
        });
      }
      show({ state: "done", ended: performance.now() });
    } catch (e) {
      const message = e instanceof Error ? e.message : String(e);
      if (e instanceof Refusal && e.status === 401) setKeyed(true);
      show({ state: signal.aborted ? "stopped" : "failed", error: signal.aborted ? "" : message, ended: performance.now() });
    }
    return result.state;
  }

  function onKeyDown(e: KeyboardEvent) {
    if ((e.target as Element).closest("dialog")) return;
    if (e.key === "Escape" && running.current) running.current.abort();
    if (e.key === "Enter" && (e.ctrlKey || e.metaKey)) {
      const form = (e.currentTarget as HTMLElement).querySelector("form")!;
      form.requestSubmit();
    }
  }

  return (
    <div class="page" onKeyDown={onKeyDown}>
      <header class="top">
        <h1>
          feyntune <span>workbench</span>
        </h1>
        <p class="quiet">{models[0] ? `one base model (${models[0].root}) and its adapters, side by side` : " "}</p>
      </header>
      <form
        aria-label="What to ask"
        onSubmit={(e) => {
          e.preventDefault();
          run((e.submitter as HTMLButtonElement | null)?.value === "score");
        }}
      >
        {trouble && (
          <p class="error" role="alert">
            {trouble}
          </p>
        )}
        {keyed && (
          <label class="field">
            Key
            <input
              ref={keyField}
              type="password"
              autocomplete="off"
              spellcheck={false}
              value={key}
              onChange={(e) => setKey(e.currentTarget.value.trim())}
            />
            <small>Kept in this page only, until it is closed.</small>
          </label>
        )}
        <label class="field">
          The start of an abstract
          <textarea
            rows={6}
            required
            spellcheck={false}
            value={prompt}
            onInput={(e) => setPrompt(e.currentTarget.value)}
          />
        </label>
        <div class="actions">
          <button class="main" type="submit" disabled={!models.length}>
            Complete
          </button>
          <button type="submit" value="score" disabled={!models.length} title="How well does each predict this very text?">
            Score
          </button>
          <button type="button" aria-disabled={!writing} onClick={() => running.current?.abort()}>
            Stop
          </button>
        </div>
        {missing && (
          <p role="alert" class="error missing">
            {missing}
          </p>
        )}
        <p class="quiet keys">
          <kbd>Ctrl</kbd> <kbd>Enter</kbd> completes, <kbd>Esc</kbd> stops
        </p>
        <div class="examples" role="group" aria-label="Examples">
          <span class="quiet">Examples:</span>
          {examples.map((example) => (
            <button key={example.name} type="button" onClick={() => setPrompt(example.text)}>
              {example.name}
            </button>
          ))}
        </div>
        {models.length > 0 && <Systems models={models} chosen={chosen} toggle={toggle} access={key} />}
        <div class="settings">
          <Amount label="Max tokens" name="max_tokens" min={1} max={8192} step={1} {...{ settings, setSettings }} />
          <Amount label="Temperature" name="temperature" min={0} max={2} step="any" {...{ settings, setSettings }} />
          <Amount label="Seed" name="seed" min={0} max={2 ** 31} step={1} {...{ settings, setSettings }} />
        </div>
      </form>
      <main aria-label="Answers" ref={answers}>
        <div class="view">
          {results.some((r) => r.call.echo) && (
            <>
              <Legend compared={results.some((r) => r.call.model === "base") && results.length > 1} />
              <label>
                <input type="checkbox" checked={shade} onChange={() => setShade(!shade)} /> shade
              </label>
            </>
          )}
          <label>
            <input type="checkbox" checked={tex} onChange={() => setTex(!tex)} /> TeX
          </label>
          <p role="status" class="said">
            {said}
          </p>
        </div>
        {results.length === 0 && (
          <div class="empty quiet">
            <p>
              <b>Complete</b> lets each system continue your text, with the same settings and the same seed.
            </p>
            <p>
              <b>Score</b> shows how well each system predicts the text itself: its perplexity, and token by token what an
              adapter predicts better or worse than the base.
            </p>
          </div>
        )}
        <div class="panels">
          {results.map((result) => (
            <Panel
              key={result.call.model}
              result={result}
              base={results.find((r) => r.call.model === "base" && r.call.echo)}
              tex={tex}
              shade={shade}
              keyed={keyed}
            />
          ))}
        </div>
      </main>
    </div>
  );
}

/** Starts of test abstracts of the run that measured the adapters; made-up ones where the registry holds none. */
function examplesOf(models: Model[]): { name: string; text: string }[] {
  const texts = [...new Set(models.flatMap((m) => m.examples ?? []))].slice(0, 4);
  if (!texts.length) return EXAMPLES;
  return texts.map((text) => ({ name: text.replace(/\$[^$]*\$/g, "…").split(/\s+/).slice(0, 6).join(" ") + " …", text }));
}

function Amount(props: {
  label: string;
  name: keyof Settings;
  min: number;
  max: number;
  step: number | "any";
  settings: Settings;
  setSettings: (settings: Settings) => void;
}) {
  const { label, name, settings, setSettings, ...limits } = props;
  const [typed, setTyped] = useState(String(settings[name])); // as it is typed, valid or not; the form checks it
  return (
    <label class="field">
      {label}
      <input
        type="number"
        name={name}
        required
        {...limits}
        value={typed}
        onInput={(e) => {
          setTyped(e.currentTarget.value);
          if (e.currentTarget.validity.valid) setSettings({ ...settings, [name]: e.currentTarget.valueAsNumber });
        }}
      />
    </label>
  );
}

render(<Workbench />, document.getElementById("app")!);
