// The endpoint's OpenAI protocol, as far as this page speaks it. Addresses are relative to the page.
import { EventSourceParserStream } from "eventsource-parser/stream";

export const API = new URL("openai/v1/", document.baseURI).href;

export interface Model {
  id: string;
  root: string;
  parent: string | null;
  digest: string;
  variant?: string;
  alias?: boolean;
  aliases?: string[];
  stage?: string;
  rank?: number;
  targets?: string[];
  added?: string;
  lineage?: Record<string, string>;
  examples?: string[]; // starts of test abstracts
  measured?: {
    abstracts: number;
    base_perplexity: { abstract_mean: number };
    perplexity: { abstract_mean: number };
    delta: { mean: number; low: number; high: number };
  };
}

export interface Settings {
  max_tokens: number;
  temperature: number;
  seed: number;
}

/** The body of a request: to continue a prompt, or with `echo` to score it. */
export interface Call extends Partial<Settings> {
  model: string;
  prompt: string;
  echo?: true;
  logprobs?: number;
}

/** One event of a stream. Offsets count code points of the text so far, the server's way. */
export interface Chunk {
  model: string;
  choices: {
    text: string;
    finish_reason: "stop" | "length" | null;
    logprobs: {
      tokens: string[];
      token_logprobs: (number | null)[];
      top_logprobs: (Record<string, number> | null)[];
      text_offset: number[];
    } | null;
  }[];
}

/** A refusal or a failure, in words for people. */
export class Refusal extends Error {
  constructor(
    message: string,
    readonly status = 0,
    readonly retryAfter = 0,
  ) {
    super(message);
  }
}

const ALTERNATIVES = 3;

export async function models(key: string): Promise<Model[]> {
  const response = await ask("models", key, {});
  return (await response.json()).data;
}

/** The model card of an adapter, Markdown. */
export async function card(model: string, key: string): Promise<string> {
  return (await ask(`../../cards/${encodeURIComponent(model)}`, key, {})).text();
}

/** The completion's events as they arrive; leaving the loop, or `signal`, ends it on the server too. */
export async function* complete(call: Call, key: string, signal: AbortSignal): AsyncGenerator<Chunk> {
  const body = JSON.stringify({ ...call, stream: true, logprobs: ALTERNATIVES });
  const headers = { "Content-Type": "application/json" };
  const response = await ask("completions", key, { method: "POST", body, headers, signal });
  const events = response.body!.pipeThrough(new TextDecoderStream()).pipeThrough(new EventSourceParserStream());
  const reader = events.getReader();
  try {
    for (;;) {
      const { value, done } = await read(reader);
      if (done) throw new Refusal("The answer broke off: the endpoint stopped, or the connection was lost.");
      if (value.data === "[DONE]") return;
      const event = JSON.parse(value.data);
      if (event.error) throw new Refusal(event.error.message);
      yield event;
    }
  } finally {
    await reader.cancel().catch(() => {});
  }
}

async function read<T>(reader: ReadableStreamDefaultReader<T>) {
  try {
    return await reader.read();
  } catch (e) {
    throw inWords(e);
  }
}

async function ask(path: string, key: string, init: RequestInit): Promise<Response> {
  const headers = { ...init.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  let response: Response;
  try {
    response = await fetch(new URL(path, API), { ...init, headers, cache: "no-store", credentials: "same-origin" });
  } catch (e) {
    throw inWords(e);
  }
  if (response.ok) return response;
  const said = await response.json().catch(() => null);
  const message = said?.error?.message ?? said?.error ?? `The endpoint answered ${response.status} ${response.statusText}.`;
  throw new Refusal(message, response.status, Number(response.headers.get("Retry-After") ?? 0));
}

function inWords(e: unknown): unknown {
  if (e instanceof TypeError) return new Refusal("The endpoint cannot be reached: is it still running?");
  return e;
}
