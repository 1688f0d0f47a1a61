import type { ComponentChildren } from "preact";
import { useEffect, useRef, useState } from "preact/hooks";
import { card, type Model } from "./api";
import { Markdown } from "./Markdown";

const first = (m: Model) => m.parent === null || m.id === "champion";

/** The base, the champion, the adapters, and other names of the same adapters: the order of the list and of answers. */
export function inOrder(models: Model[]): Model[] {
  const rank = (m: Model) => (m.parent === null ? 0 : m.id === "champion" ? 1 : m.alias ? 3 : 2);
  return [...models].sort((a, b) => rank(a) - rank(b));
}

/** The base, what the registry chose, and the adapters: each to be ticked, each with where it comes from. */
export function Systems(props: {
  models: Model[];
  chosen: Set<string>;
  toggle: (id: string) => void;
  access: string;
}) {
  const groups: [string, Model[]][] = [
    ["Base and champion", props.models.filter(first)],
    ["Adapters: perplexity minus the base's [95 %]", props.models.filter((m) => !first(m) && !m.alias)],
    ["The registry's other names", props.models.filter((m) => !first(m) && m.alias)],
  ];
  const ticked = props.models.filter((m) => props.chosen.has(m.id)).length;
  return (
    <fieldset class="systems">
      <legend>
        Compare <span class="quiet">{ticked} of {props.models.length}</span>
      </legend>
      <div class="list">
        {groups.map(
        ([name, models], i) =>
          models.length > 0 && (
            <Group key={name} name={name} folded={i === 2}>
              {models.map((model) => (
                <System
                  key={model.id}
                  model={model}
                  chosen={props.chosen.has(model.id)}
                  toggle={props.toggle}
                  access={props.access}
                />
              ))}
            </Group>
          ),
      )}
      </div>
    </fieldset>
  );
}

/** A group of the list; the registry's other names are folded, since they stand for adapters above. */
function Group({ name, folded, children }: { name: string; folded: boolean; children: ComponentChildren }) {
  if (!folded) {
    return (
      <div role="group" aria-label={name}>
        <p class="group">{name}</p>
        {children}
      </div>
    );
  }
  return (
    <details class="names">
      <summary class="group">{name}</summary>
      {children}
    </details>
  );
}

function System(props: { model: Model; chosen: boolean; toggle: (id: string) => void; access: string }) {
  const { model, chosen, toggle } = props;
  const [shown, setShown] = useState("");
  return (
    <div class="system">
      <label>
        <input type="checkbox" checked={chosen} onChange={() => toggle(model.id)} />
        <span>
          {titleOf(model)}
          <span class="quiet summary"> {summary(model)}</span>
        </span>
      </label>
      <details>
        <summary aria-label={`Lineage of ${titleOf(model)}`}>lineage</summary>
        <dl>
          {facts(model).map(([name, value]) => (
            <div key={name}>
              <dt>{name}</dt>
              <dd>{value}</dd>
            </div>
          ))}
        </dl>
        {model.parent !== null && (
          <button
            type="button"
            class="link"
            onClick={() => card(model.id, props.access).then(setShown, (e: Error) => setShown(e.message))}
          >
            Model card of {titleOf(model)}
          </button>
        )}
        {shown && <Card title={titleOf(model)} text={shown} close={() => setShown("")} />}
      </details>
    </div>
  );
}

function Card({ title, text, close }: { title: string; text: string; close: () => void }) {
  const dialog = useRef<HTMLDialogElement>(null);
  useEffect(() => dialog.current!.showModal(), []);
  return (
    <dialog ref={dialog} onClose={close} aria-label={`Model card of ${title}`}>
      <div class="card" tabIndex={0}>
        <Markdown text={text} />
      </div>
      <button type="button" onClick={() => dialog.current!.close()}>
        Close
      </button>
    </dialog>
  );
}

export function titleOf(model: Model): string {
  return model.alias || model.parent === null ? model.id : (model.variant ?? model.id);
}

/** One line: which version an alias means, what the base is, by how much an adapter is better. */
export function summary(model: Model): string {
  if (model.parent === null) return model.root === model.id ? "" : model.root;
  if (model.alias) return `is ${model.variant}`;
  return [model.measured && interval(model.measured.delta), model.stage].filter(Boolean).join(" ");
}

function facts(model: Model): [string, string][] {
  const out: [string, string | undefined][] = [
    [model.parent === null ? "model" : "version", model.root],
    ["digest", short(model.digest)],
    ["stage", model.stage],
    ["also called", model.aliases?.join(", ")],
    ["LoRA", model.rank === undefined ? undefined : `rank ${model.rank} on ${model.targets?.join(", ")}`],
    ["registered", model.added?.slice(0, 16).replace("T", " ")],
  ];
  if (model.measured) {
    const { perplexity, base_perplexity, delta, abstracts } = model.measured;
    out.push([
      "perplexity",
      `${perplexity.abstract_mean.toFixed(2)}, base ${base_perplexity.abstract_mean.toFixed(2)}, ` +
        `paired difference ${interval(delta)}, over ${abstracts} abstracts`,
    ]);
  }
  for (const [name, digest] of Object.entries(model.lineage ?? {})) out.push([`from ${name}`, short(digest)]);
  return out.filter((fact): fact is [string, string] => Boolean(fact[1]));
}

function interval({ mean, low, high }: { mean: number; low: number; high: number }): string {
  return `${signed(mean)} [${signed(low)}, ${signed(high)}]`;
}

function signed(value: number): string {
  return (value < 0 ? "−" : "+") + Math.abs(value).toFixed(2);
}

function short(digest: string): string {
  return /^[0-9a-f]{32,}$/.test(digest) ? digest.slice(0, 16) : digest;
}
