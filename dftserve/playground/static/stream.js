// The events of a streamed answer.

/** An error from the server instead of an answer, with the parameter that it names. */
export class Refused extends Error {
  constructor(message, parameter) {
    super(message);
    this.parameter = parameter ?? "";
  }
}

/** Send the request, and yield each event of the answer as an object. */
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

/** The events of a stream of strings, cut at any position, up to [DONE]. */
export async function* eventsOf(stream) {
  const reader = stream.getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      const text = (rest + (value ?? "")).replace(/\r\n/g, "\n");
      // A chunk may end between \r and \n.
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

/** The event as an object; null for a comment, and for a truncated event (no [DONE] follows it). */
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

function refusalOf(status, body) {
  try {
    const { error } = JSON.parse(body);
    if (error) return refusedBy(error);
  } catch {
    // Not JSON: shown as text.
  }
  return new Refused(`The server answered ${status}, not a stream of events: ${body.slice(0, 300)}`);
}
