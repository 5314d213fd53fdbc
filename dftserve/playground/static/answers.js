// The answers of one column: their text and statistics so far, and how they are shown.

import { sharedIn } from "./phrases.js";

/** Each statistic's name, the values at which its colour is none and full, and its unit. */
export const STATISTICS = {
  entropy_before: { name: "entropy before", low: 0, high: 4, unit: " nats" },
  entropy_after: { name: "entropy after", low: 0, high: 4, unit: " nats" },
  temperature: { name: "temperature", low: 1, high: 4, unit: "" },
  changed: { name: "probability of another token", low: 0, high: 1, unit: "" },
};

/** One of a request's choices. */
class Answer {
  constructor(element, number) {
    this.element = element;
    this.text = "";
    this.reasoning = "";
    this.tokens = [];
    this.decoder = new TextDecoder();
    this.trace = null;
    this.notes = [];
    element.querySelector("h3").textContent = `Answer ${number}`;
    this.details = element.querySelector("details");
    this.details.addEventListener("toggle", () => this.fillTable());
    this.details.querySelector(".scroll").ariaLabel = `Statistics of answer ${number}`;
  }

  add({ delta = {}, logprobs, finish_reason: reason }) {
    this.text += delta.content ?? "";
    this.reasoning += delta.reasoning ?? delta.reasoning_content ?? "";
    for (const { token, bytes } of logprobs?.content ?? []) this.tokens.push(this.decoded(token, bytes));
    if (delta.tool_calls?.length) this.note("calls tools, which are not shown");
    if (reason === "length") this.note("cut at max tokens");
  }

  note(text) {
    if (!this.notes.includes(text)) this.notes.push(text);
  }

  /** A character made of several tokens is shown with the last of them. */
  decoded(token, bytes) {
    return bytes ? this.decoder.decode(new Uint8Array(bytes), { stream: true }) : token;
  }

  close(statistics, inForce) {
    this.trace = statistics?.trace ?? null;
    const parts = [inForce, ...statisticsOf(statistics), ...this.notes].filter(Boolean);
    this.element.querySelector(".statistics").textContent = parts.join(" · ");
    this.details.hidden = this.trace === null;
    const traced = this.trace?.changed.length;
    this.details.querySelector("summary").textContent =
      traced < statistics?.tokens
        ? `Statistics of the first ${traced} tokens`
        : "Statistics of each token";
  }

  fillTable() {
    const body = this.details.querySelector("tbody");
    if (!this.details.open || body.children.length || !this.trace) return;
    body.append(...this.trace.changed.map((_, index) => this.row(index)));
  }

  row(index) {
    const cells = Object.keys(STATISTICS).map((name) => shown(this.trace[name][index]));
    const row = document.createElement("tr");
    row.append(...[visible(this.tokens[index] ?? ""), ...cells].map((text) => cell(text)));
    return row;
  }

  show(view, shared) {
    const thinking = this.element.querySelector(".reasoning");
    thinking.hidden = this.reasoning === "";
    thinking.textContent = this.reasoning;
    const text = this.element.querySelector(".text");
    if (view === "shared") text.replaceChildren(...marked(this.text, shared));
    else if (view in STATISTICS && this.trace) text.replaceChildren(...this.coloured(view));
    else text.textContent = this.text;
  }

  /** The traced tokens, each with its colour, then the rest of the text. */
  coloured(name) {
    const { low, high, unit } = STATISTICS[name];
    const spans = this.trace[name].map((value, index) => {
      const token = this.tokens[index] ?? "";
      const span = document.createElement("span");
      span.className = value === null ? "token unknown" : "token";
      span.textContent = token;
      span.title = `${visible(token)}: ${shown(value)}${value === null ? "" : unit}`;
      const heat = value === null ? 0 : (value - low) / (high - low);
      span.style.setProperty("--heat", Math.min(Math.max(heat, 0), 1).toFixed(3));
      return span;
    });
    const rest = this.tokens.slice(spans.length).join("");
    if (rest === "") return spans;
    const end = document.createElement("span");
    end.className = "statistics";
    end.textContent = ` [no statistics from here on] `;
    return [...spans, end, rest];
  }
}

/** All choices of a column's request. */
export class Answers {
  constructor(place, template) {
    this.place = place;
    this.template = template;
    this.answers = [];
    this.usage = null;
    this.hasStatistics = false;
  }

  clear(count) {
    this.usage = null;
    this.hasStatistics = false;
    this.answers = Array.from({ length: count }, (_, index) => {
      const part = this.template.content.cloneNode(true);
      return new Answer(part.firstElementChild, index + 1);
    });
    this.place.replaceChildren(...this.answers.map(({ element }) => element));
  }

  add(event) {
    for (const choice of event.choices ?? []) this.answers[choice.index]?.add(choice);
    if (event.usage) this.usage = event.usage;
    if (!event.diversity && !event.style) return;
    this.hasStatistics = true;
    const inForce = inForceOf(event);
    const statistics = event.diversity?.choices ?? [];
    this.answers.forEach((answer, index) => answer.close(statistics[index], inForce));
  }

  /** Called at the end of the stream. */
  end(otherwise) {
    if (!this.hasStatistics) for (const answer of this.answers) answer.close(null, otherwise);
  }

  /** Show the answers; returns how many shared phrases are marked, or null in another view. */
  show(view) {
    const shared = view === "shared" ? sharedIn(this.answers.map(({ text }) => text)) : null;
    this.answers.forEach((answer, index) => answer.show(view, shared?.[index]));
    return shared?.reduce((sum, ranges) => sum + ranges.length, 0) ?? null;
  }

  get tokens() {
    const counted = this.answers.reduce((sum, { tokens }) => sum + tokens.length, 0);
    return this.usage?.completion_tokens ?? counted;
  }
}

/** The settings that were in force, by the server's report, and what it lowered or left out. */
function inForceOf({ diversity, style }) {
  const parts = [];
  if (diversity?.reason) parts.push(`diversity off: ${diversity.reason}`);
  else if (diversity && diversity.level !== 0) parts.push(`${diversity.law} ${diversity.level ?? ""}`.trim());
  else if (diversity && !style) parts.push("off: the model's own sampling, without statistics");
  if (style) parts.push(`style ${style.name} ${style.strength ?? ""}`.trim());
  for (const [name, object] of Object.entries({ diversity, style })) {
    if (object?.clamped) parts.push(`${name} lowered by the server's policy from ${pairs(object.clamped)}`);
  }
  if (diversity?.dropped) parts.push(`the model's defaults that were not applied: ${pairs(diversity.dropped)}`);
  return parts.join(" · ");
}

function pairs(object) {
  return Object.entries(object).map(([name, value]) => `${name} ${value}`).join(", ");
}

function statisticsOf(statistics) {
  if (!statistics) return [];
  return [
    `${statistics.tokens} tokens`,
    `mean entropy ${statistics.mean_entropy_before.toFixed(2)} → ${statistics.mean_entropy_after.toFixed(2)} nats`,
    `mean temperature ${statistics.mean_temperature.toFixed(2)}`,
    `${(100 * statistics.tokens_changed).toFixed(0)} % of the tokens changed by it`,
  ];
}

function marked(text, ranges) {
  const parts = [];
  let at = 0;
  for (const [start, end] of ranges) {
    const mark = document.createElement("mark");
    mark.textContent = text.slice(start, end);
    parts.push(text.slice(at, start), mark);
    at = end;
  }
  return [...parts, text.slice(at)];
}

function cell(text) {
  const found = document.createElement("td");
  found.textContent = text;
  return found;
}

function shown(value) {
  return value === null || value === undefined ? "–" : value.toFixed(3);
}

/** Makes white space visible. */
function visible(token) {
  return token.replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥");
}
