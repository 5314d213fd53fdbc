// The events of a streamed answer.

/** What the server refuses, or says instead of an answer, and which parameter it names. */
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
  const kind = answer.headers.get("content-type") ?? "";
  if (!answer.ok || !kind.startsWith("text/event-stream")) {
    throw refusalOf(answer.status, await answer.text());
  }
  yield* eventsOf(answer.body.pipeThrough(new TextDecoderStream()));
}

/** The events of a stream of strings, however these are cut, up to its [DONE]. */
export async function* eventsOf(stream) {
  const reader = stream.getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      const text = (rest + (value ?? "")).replace(/\r\n/g, "\n");
      // The first half of an end of line may be all that has come of it.
      const parts = text.split("\n\n");
      rest = done ? "" : parts.pop();
      for (const part of parts) {
        const data = dataOf(part);
        if (data === "[DONE]") return;
        const event = eventOf(data);
        if (event) yield event;
      }
      if (done) throw new Refused("The answer broke off before its end.");
    }
  } finally {
    await reader.cancel();
  }
}

function dataOf(part) {
  return part
    .split("\n")
    .filter((line) => line.startsWith("data:"))
    .map((line) => line.slice(5).trim())
    .join("\n");
}

/** An object; null of a comment, and of an event that broke off, behind which no [DONE] comes. */
function eventOf(data) {
  let event;
  try {
    event = JSON.parse(data);
  } catch {
    return null;
  }
  if (event.error) throw refusedBy(event.error);
  return event;
}

function refusedBy(error) {
  return typeof error === "string" ? new Refused(error) : new Refused(error.message, error.param);
}

function refusalOf(status, said) {
  try {
    const { error } = JSON.parse(said);
    if (error) return refusedBy(error);
  } catch {
    // No JSON: it is shown as it is.
  }
  return new Refused(`The server answered ${status}, and no stream of events: ${said.slice(0, 300)}`);
}
