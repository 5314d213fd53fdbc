// The events of a streamed answer.

/** An answer that is no stream: what the server refuses, and which parameter it names. */
export class Refused extends Error {
  constructor(message, parameter) {
    super(message);
    this.parameter = parameter ?? "";
  }
}

/** Ask, and give each event of the answer as an object. */
export async function* events(body, signal) {
  const answer = await fetch("/api/chat", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  if (!answer.ok) throw await refusalOf(answer);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value.replaceAll("\r\n", "\n")).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]" || !part.startsWith("data: ")) continue;
      const event = JSON.parse(data);
      if (event.error) throw new Refused(event.error.message, event.error.param);
      yield event;
    }
  }
}

async function refusalOf(answer) {
  const said = await answer.text();
  try {
    const { error } = JSON.parse(said);
    return new Refused(error.message, error.param);
  } catch {
    return new Refused(`The server answered ${answer.status}: ${said.slice(0, 300)}`);
  }
}
