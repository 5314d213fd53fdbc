// The page: its controls, its two columns, and sending requests.

import { Answers, STATISTICS } from "./answers.js";
import { bodyOf, curlOf, pythonOf, streamed } from "./request.js";
import { events } from "./stream.js";

const START = [0, 0.5];
const LEVELLED = "level";
const SHARED = ["messages", "model", "n", "max_tokens", "temperature", "seed"];

const byId = (id) => document.getElementById(id);
let server = { url: "", key_variable: "OPENAI_API_KEY", models: [], capabilities: null, problem: null };
let running = null;

class Column {
  constructor(name, level) {
    this.name = name;
    this.element = byId("column").content.cloneNode(true).firstElementChild;
    this.element.setAttribute("aria-label", `Setting ${name}`);
    this.element.querySelector("h2").textContent = `Setting ${name}`;
    this.answers = new Answers(this.element.querySelector(".answers"), byId("answer"));
    this.control("diversity").value = level;
    this.label();
    for (const button of this.element.querySelectorAll("[data-copy]")) {
      button.addEventListener("click", () => copy(button, this.code(button.dataset.copy).textContent));
    }
  }

  control(name) {
    return this.element.querySelector(`[data-name="${name}"]`);
  }

  code(name) {
    return this.element.querySelector(`[data-code="${name}"]`);
  }

  /** Link each control to its label and its error by id, so that a screen reader reads both. */
  label() {
    for (const control of this.element.querySelectorAll("[data-name]")) {
      const name = control.dataset.name;
      control.id = `${name}-${this.name}`;
      control.parentElement.querySelector("label").htmlFor = control.id;
      const error = this.element.querySelector(`[data-error="${name}"]`);
      if (error) control.setAttribute("aria-describedby", (error.id = `${control.id}-error`));
    }
  }

  /** Offer what the server can do; of the laws, only those that a single level controls. */
  offer({ laws = {}, styles = [], adapters = {} }, hasField) {
    const levelled = Object.keys(laws).filter((law) => LEVELLED in laws[law] && law !== "dynatemp");
    options(this.control("law"), levelled.map((law) => [law, law]));
    const named = [...styles, ...Object.keys(adapters)];
    options(this.control("style"), [["", "none"], ...named.map((name) => [name, name])]);
    for (const name of ["diversity", "law"]) this.control(name).disabled = !hasField;
    this.control("style").disabled = this.control("strength").disabled = named.length === 0;
    this.changed();
  }

  get settings() {
    return {
      diversity: Number(this.control("diversity").value),
      law: this.control("law").value,
      style: this.control("style").value,
      strength: Number(this.control("strength").value),
    };
  }

  get body() {
    return bodyOf(shared(), this.settings);
  }

  changed() {
    for (const slider of this.element.querySelectorAll("input[type=range]")) {
      slider.parentElement.querySelector(".value").textContent = Number(slider.value).toFixed(2);
    }
    this.code("curl").textContent = curlOf(this.body, server);
    this.code("python").textContent = pythonOf(this.body, server);
  }

  /** Send the request and show the answer as it arrives; returns whether it is complete. */
  async generate(signal) {
    const body = this.body;
    const hasTrace = Boolean(server.capabilities?.active && server.capabilities.trace);
    let otherwise = "the answer has no statistics";
    let shownAt = 0;
    this.answers.clear(body.n);
    try {
      for await (const event of events(streamed(body, hasTrace), signal)) {
        this.answers.add(event);
        if (performance.now() - shownAt > 50) {
          this.answers.show("plain");
          shownAt = performance.now();
        }
      }
      return true;
    } catch (error) {
      otherwise = error.name === "AbortError" ? "stopped" : "not finished";
      if (error.name !== "AbortError") this.refuse(error);
      return false;
    } finally {
      this.answers.end(otherwise);
      this.answers.show(view());
    }
  }

  /** Show an error next to the control that it concerns. */
  refuse({ message, parameter = "" }) {
    const field = CSS.escape(parameter.replace(/^vllm_xargs\./, "").split(".")[0]);
    const own = this.element.querySelector(`[data-error="${field}"]`);
    const target = own ?? document.querySelector(`form > div [data-error="${field}"]`);
    (target ?? this.element.querySelector('[data-error="other"]')).textContent = message;
    (own ? this.control(field) : byId(field))?.setAttribute("aria-invalid", "true");
  }
}

const columns = ["A", "B"].map((name, index) => new Column(name, START[index]));

function shared() {
  const number = (id) => (byId(id).value.trim() === "" ? null : Number(byId(id).value));
  return {
    prompt: byId("messages").value,
    system: byId("system").value.trim() === "" ? null : byId("system").value,
    model: byId("model").value,
    n: number("n"),
    max_tokens: number("max_tokens"),
    temperature: number("temperature"),
    seed: number("seed"),
    hasField: Boolean(server.capabilities?.active),
  };
}

function view() {
  return document.querySelector("[name=view]:checked").value;
}

function options(select, pairs) {
  select.replaceChildren(...pairs.map(([value, text]) => new Option(text, value)));
}

async function copy(button, text) {
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Select it by hand";
  }
  setTimeout(() => (button.textContent = "Copy"), 2000);
}

function clearErrors() {
  for (const each of document.querySelectorAll("[data-error]")) each.textContent = "";
  for (const each of document.querySelectorAll("[aria-invalid]")) each.removeAttribute("aria-invalid");
}

/** Whether a field has an invalid value, which is then reported next to it. */
function hasInvalidField() {
  const invalid = [...document.querySelectorAll("form input[type=number]")].filter((input) => !input.checkValidity());
  for (const input of invalid) {
    document.querySelector(`[data-error="${input.id}"]`).textContent = input.validationMessage;
    input.setAttribute("aria-invalid", "true");
  }
  const empty = byId("messages").value.trim() === "";
  if (empty) document.querySelector('[data-error="messages"]').textContent = "Write a prompt.";
  (invalid[0] ?? (empty ? byId("messages") : null))?.focus();
  return invalid.length > 0 || empty;
}

async function generate(event) {
  event.preventDefault();
  if (running || byId("generate").disabled) return;
  clearErrors();
  if (hasInvalidField()) return;
  begin();
  const began = performance.now();
  let how = "Failed";
  try {
    const done = await Promise.all(columns.map((column) => column.generate(running.signal)));
    how = running.signal.aborted ? "Stopped" : done.every(Boolean) ? "Done" : "Some answers failed";
  } finally {
    const seconds = ((performance.now() - began) / 1000).toFixed(1);
    const tokens = columns.reduce((sum, { answers }) => sum + answers.tokens, 0);
    end(`${how}: ${tokens} tokens in ${seconds} s.`);
  }
}

/** A focused button that is about to be disabled passes the focus on, for keyboard users. */
function begin() {
  running = new AbortController();
  const hasFocus = document.activeElement === byId("generate");
  byId("stop").disabled = false;
  if (hasFocus) byId("stop").focus();
  byId("generate").disabled = true;
  byId("status").textContent = "Generating …";
}

function end(status) {
  running = null;
  const hasFocus = document.activeElement === byId("stop");
  byId("generate").disabled = false;
  if (hasFocus) byId("generate").focus();
  byId("stop").disabled = true;
  byId("status").textContent = status;
  showView();
}

function showView() {
  const counts = columns.map(({ answers }) => answers.show(view()));
  const statistic = STATISTICS[view()];
  let scale = "";
  if (statistic) {
    scale =
      `Coloured: ${statistic.name}, none at ${statistic.low}${statistic.unit}, full at ${statistic.high}${statistic.unit} and ` +
      "above. Answers that are off, stopped or failed have no statistics.";
  } else if (view() === "shared") {
    const found = columns.map(({ name }, index) => `${counts[index]} in setting ${name}`);
    scale = `Phrases of four words or more that another answer of the setting also has: ${found.join(", ")}.`;
  }
  byId("scale").textContent = scale;
}

async function start() {
  byId("columns").append(...columns.map(({ element }) => element));
  for (const name of SHARED) {
    const error = document.querySelector(`[data-error="${name}"]`);
    byId(name).setAttribute("aria-describedby", (error.id = `${name}-error`));
  }
  byId("ask").addEventListener("submit", generate);
  byId("ask").addEventListener("input", () => columns.forEach((column) => column.changed()));
  byId("stop").addEventListener("click", () => running?.abort());
  for (const radio of document.querySelectorAll("[name=view]")) radio.addEventListener("change", showView);
  try {
    server = await (await fetch("/api/server")).json();
  } catch (error) {
    server.problem = `The playground's own command does not answer (${error.message}): is it running?`;
  }
  options(byId("model"), server.models.map((name) => [name, name]));
  byId("server").textContent = server.problem ?? described(server);
  byId("server").classList.toggle("problem", server.problem !== null);
  for (const column of columns) column.offer(server.capabilities ?? {}, Boolean(server.capabilities?.active));
  byId("generate").disabled = false;
  byId("server").ariaBusy = "false";
}

function described({ url, capabilities }) {
  return `${url}: vLLM ${capabilities.vllm}, ${capabilities.runner} runner, diversity in force.`;
}

start();
