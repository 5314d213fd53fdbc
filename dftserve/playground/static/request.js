// A column's settings as the body of a request, and as code to copy.

/** The body of /v1/chat/completions, from the settings of both columns and of one. */
export function bodyOf(shared, column) {
  const messages = [{ role: "user", content: shared.prompt }];
  if (shared.system) messages.unshift({ role: "system", content: shared.system });
  const stock = {
    model: shared.model, messages, n: shared.n, max_tokens: shared.max_tokens,
    temperature: shared.temperature, seed: shared.seed,
  };
  const body = Object.fromEntries(Object.entries(stock).filter(([, value]) => value !== null));
  if (shared.hasField) body.diversity = diversityOf(column);
  if (column.style) body.style = { name: column.style, strength: column.strength };
  return body;
}

function diversityOf({ law, diversity }) {
  return law === "gated" || diversity === 0 ? diversity : { law, level: diversity };
}

/** The same body with streaming, and with the statistics of each token if the server has them. */
export function streamed(body, hasTrace) {
  const asked = { ...body, stream: true, stream_options: { include_usage: true }, logprobs: true };
  if (!hasTrace || isOff(body)) return asked;
  const object = typeof body.diversity === "number" ? { level: body.diversity } : body.diversity;
  return { ...asked, diversity: { ...object, trace: true } };
}

/** Whether the server samples as it would without our fields. */
export function isOff(body) {
  return (body.diversity ?? 0) === 0 && !(body.style?.strength > 0);
}

export function curlOf(body, { url, key_variable: key }) {
  return [
    `curl -s ${quoted(`${url}/chat/completions`)} \\`,
    `  -H 'content-type: application/json' -H "authorization: Bearer $${key}" \\`,
    `  -d ${quoted(JSON.stringify(body, null, 2))}`,
  ].join("\n");
}

/** The text quoted as one shell word. */
function quoted(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

export function pythonOf(body, { url, key_variable: key }) {
  const { diversity, style, ...stock } = body;
  const own = Object.fromEntries(
    Object.entries({ diversity, style }).filter(([, value]) => value !== undefined),
  );
  const lines = Object.entries(stock).map(([name, value]) => `    ${name}=${literal(value)},`);
  if (Object.keys(own).length) lines.push(`    extra_body=${literal(own)},`);
  return [
    "import os", "from openai import OpenAI", "",
    `client = OpenAI(base_url=${literal(url)}, api_key=os.environ.get(${literal(key)}, "EMPTY"))`,
    "answer = client.chat.completions.create(", ...lines, ")",
    "for choice in answer.choices:", "    print(choice.message.content)",
    'print((answer.model_extra or {}).get("diversity"))',
  ].join("\n");
}

/** A body has only numbers, strings, lists and objects, which JSON and Python write in the same way. */
function literal(value) {
  return JSON.stringify(value);
}
