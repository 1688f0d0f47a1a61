// The call behind a completion, for a shell and for Python. A key never stands in it, only where it belongs.
import { API, type Call } from "./api";

export function curl(call: Call, keyed: boolean): string {
  const lines = [`curl -sS ${quoted(API + "completions")}`, `-H 'Content-Type: application/json'`];
  if (keyed) lines.push(`-H "Authorization: Bearer $FEYNTUNE_KEY"`);
  lines.push(`-d ${quoted(JSON.stringify(call))}`);
  return lines.join(" \\\n  ") + "\n";
}

export function python(call: Call, keyed: boolean, version: string): string {
  const { model, prompt, ...settings } = call;
  const wanted = call.echo ? "logprobs.token_logprobs" : "text";
  const served = version && version !== model ? `  # it was ${version}` : "";
  return [
    keyed ? "import os\n\nfrom openai import OpenAI\n" : "from openai import OpenAI\n",
    `client = OpenAI(base_url=${literal(API)}, api_key=${keyed ? 'os.environ["FEYNTUNE_KEY"]' : '"none"'})`,
    "completion = client.completions.create(",
    `    model=${literal(model)},${served}`,
    `    prompt=${literal(prompt)},`,
    ...Object.entries(settings).map(([name, value]) => `    ${name}=${value === true ? "True" : value},`),
    ")",
    `print(completion.choices[0].${wanted})`,
    "",
  ].join("\n");
}

/** One word of a POSIX shell. */
function quoted(text: string): string {
  return `'${text.replaceAll("'", `'\\''`)}'`;
}

/** A JSON string is a Python string. */
function literal(text: string): string {
  return JSON.stringify(text);
}
