// A column's settings as the body of a request, and as lines to copy.

/** What both columns are asked with, and what each is: the body of /v1/chat/completions. */
export function bodyOf(shared, column) {
  const body = {
    model: shared.model,
    messages: [{ role: "user", content: shared.messages }],
    n: shared.n,
    max_tokens: shared.max_tokens,
    temperature: shared.temperature,
  };
  if (shared.seed !== null) body.seed = shared.seed;
  if (shared.hasField) body.diversity = diversityOf(column);
  if (column.style) body.style = { name: column.style, strength: column.strength };
  return body;
}

function diversityOf({ law, diversity }) {
  return law === "gated" || diversity === 0 ? diversity : { law, level: diversity };
}

/** The same, streamed, with what the page shows of each token. */
export function streamed(body) {
  const asked = {
    ...body, stream: true, stream_options: { include_usage: true }, logprobs: true,
  };
  if (body.diversity === undefined || isOff(body)) return asked;
  const object = typeof body.diversity === "number" ? { level: body.diversity } : body.diversity;
  return { ...asked, diversity: { ...object, trace: true } };
}

/** Whether the server samples as it would without our fields. */
function isOff(body) {
  return (body.diversity ?? 0) === 0 && !(body.style?.strength > 0);
}

export function curlOf(body, url) {
  const json = JSON.stringify(body, null, 2).replaceAll("'", "'\\''");
  return [
    `curl -s ${url}/chat/completions \\`,
    "  -H 'content-type: application/json' -H \"authorization: Bearer $OPENAI_API_KEY\" \\",
    `  -d '${json}'`,
  ].join("\n");
}

export function pythonOf(body, url) {
  const { diversity, style, ...stock } = body;
  const own = Object.fromEntries(
    Object.entries({ diversity, style }).filter(([, value]) => value !== undefined),
  );
  const lines = Object.entries(stock).map(([name, value]) => `    ${name}=${literal(value)},`);
  if (Object.keys(own).length) lines.push(`    extra_body=${literal(own)},`);
  return [
    "import os", "from openai import OpenAI", "",
    `client = OpenAI(base_url=${literal(url)}, api_key=os.environ.get("OPENAI_API_KEY", "EMPTY"))`,
    "answer = client.chat.completions.create(", ...lines, ")",
    "for choice in answer.choices:", "    print(choice.message.content)",
    'print((answer.model_extra or {}).get("diversity"))',
  ].join("\n");
}

/** Numbers, strings, lists and objects of these are written in JSON as in Python. */
function literal(value) {
  return JSON.stringify(value);
}
