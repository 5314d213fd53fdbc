// The answers of one column: what has come of each, and how it is shown.

import { sharedIn } from "./phrases.js";

/** Of each figure: its name, the values from which and to which it is coloured, and its unit. */
export const FIGURES = {
  entropy_before: { name: "entropy before", low: 0, high: 4, unit: " nats" },
  entropy_after: { name: "entropy after", low: 0, high: 4, unit: " nats" },
  temperature: { name: "temperature", low: 1, high: 4, unit: "" },
  changed: { name: "share that comes out otherwise", low: 0, high: 1, unit: "" },
};

/** One of a request's choices. */
class Answer {
  constructor(element, number) {
    this.element = element;
    this.text = "";
    this.tokens = [];
    this.decoder = new TextDecoder();
    this.trace = null;
    element.querySelector("h3").textContent = `Answer ${number}`;
    this.details = element.querySelector("details");
    this.details.addEventListener("toggle", () => this.fillTable());
    this.details.querySelector(".scroll").ariaLabel = `Figures of answer ${number}`;
  }

  add(choice) {
    const delta = choice.delta ?? {};
    this.text += delta.content ?? "";
    for (const { token, bytes } of choice.logprobs?.content ?? []) this.tokens.push(this.decoded(token, bytes));
  }

  /** A character of several tokens stands where its last one does. */
  decoded(token, bytes) {
    return bytes ? this.decoder.decode(new Uint8Array(bytes), { stream: true }) : token;
  }

  close(figures) {
    this.trace = figures?.trace ?? null;
    this.element.querySelector(".figures").textContent = figuresOf(figures);
    this.details.hidden = this.trace === null;
    this.details.querySelector("summary").textContent = `Figures of each token (${this.trace?.changed.length})`;
  }

  fillTable() {
    const body = this.details.querySelector("tbody");
    if (!this.details.open || body.children.length || !this.trace) return;
    body.append(...this.trace.changed.map((_, place) => this.row(place)));
  }

  row(place) {
    const cells = Object.keys(FIGURES).map((name) => shown(this.trace[name][place]));
    const row = document.createElement("tr");
    row.append(...[visible(this.tokens[place] ?? ""), ...cells].map((text) => cell(text)));
    return row;
  }

  show(view, shared) {
    const place = this.element.querySelector(".text");
    if (view === "shared") place.replaceChildren(...marked(this.text, shared));
    else if (view in FIGURES && this.trace) place.replaceChildren(...this.coloured(view));
    else place.textContent = this.text;
  }

  coloured(name) {
    const { low, high, unit } = FIGURES[name];
    return this.tokens.map((token, place) => {
      const value = this.trace[name][place] ?? null;
      const span = document.createElement("span");
      span.className = "token";
      span.textContent = token;
      span.title = `${visible(token)}: ${shown(value)}${value === null ? "" : unit}`;
      const heat = value === null ? 0 : (value - low) / (high - low);
      span.style.setProperty("--heat", Math.min(Math.max(heat, 0), 1).toFixed(3));
      return span;
    });
  }
}

/** All choices of a column's request. */
export class Answers {
  constructor(place, template) {
    this.place = place;
    this.template = template;
    this.answers = [];
  }

  clear(count) {
    this.answers = Array.from({ length: count }, (_, index) => {
      const part = this.template.content.cloneNode(true);
      return new Answer(part.firstElementChild, index + 1);
    });
    this.place.replaceChildren(...this.answers.map(({ element }) => element));
  }

  add(event) {
    for (const choice of event.choices ?? []) this.answers[choice.index]?.add(choice);
    if (event.diversity) {
      this.answers.forEach((answer, index) => answer.close(event.diversity.choices[index]));
    }
  }

  show(view) {
    const shared = view === "shared" ? sharedIn(this.answers.map(({ text }) => text)) : [];
    this.answers.forEach((answer, index) => answer.show(view, shared[index]));
  }

  get tokens() {
    return this.answers.reduce((sum, { tokens }) => sum + tokens.length, 0);
  }
}

function figuresOf(figures) {
  if (!figures) return "Off: the model's own sampling, of which nothing is measured.";
  return [
    `${figures.tokens} tokens`,
    `mean entropy ${figures.mean_entropy_before.toFixed(2)} → ${figures.mean_entropy_after.toFixed(2)} nats`,
    `mean temperature ${figures.mean_temperature.toFixed(2)}`,
    `${(100 * figures.tokens_changed).toFixed(0)} % of the tokens come out otherwise`,
  ].join(" · ");
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

/** Blanks and ends of lines as signs. */
function visible(token) {
  return token.replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥");
}
