// The page: its controls, two columns, and what happens when something is asked.

import { Answers, FIGURES } from "./answers.js";
import { bodyOf, curlOf, pythonOf, streamed } from "./request.js";
import { events } from "./stream.js";

const START = [0, 0.5];
const LEVELLED = "level";
const SHARED = ["messages", "model", "n", "max_tokens", "temperature", "seed"];

const byId = (id) => document.getElementById(id);
let server = { url: "", models: [], capabilities: null, problem: null };
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
    this.element.addEventListener("input", () => this.changed());
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

  /** Each control has its label and its error by id: a reader of the screen says both. */
  label() {
    for (const control of this.element.querySelectorAll("[data-name]")) {
      const name = control.dataset.name;
      control.id = `${name}-${this.name}`;
      control.parentElement.querySelector("label").htmlFor = control.id;
      const error = this.element.querySelector(`[data-error="${name}"]`);
      if (error) control.setAttribute("aria-describedby", (error.id = `${control.id}-error`));
    }
  }

  /** What the server can do decides what there is to choose. */
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
      slider.parentElement.querySelector("output").value = Number(slider.value).toFixed(2);
    }
    this.code("curl").textContent = curlOf(this.body, server.url);
    this.code("python").textContent = pythonOf(this.body, server.url);
  }

  /** Ask, and show what comes. Nothing of it is thrown but what stops it. */
  async write(signal) {
    const body = this.body;
    this.answers.clear(body.n);
    let shownAt = 0;
    try {
      for await (const event of events(streamed(body), signal)) {
        this.answers.add(event);
        if (performance.now() - shownAt > 50) {
          this.answers.show("plain");
          shownAt = performance.now();
        }
      }
      return true;
    } catch (error) {
      if (error.name !== "AbortError") this.refuse(error);
      return false;
    } finally {
      this.answers.show(view());
    }
  }

  /** An error stands beside the control of which it speaks. */
  refuse({ message, parameter = "" }) {
    const field = parameter.replace(/^vllm_xargs\./, "").split(".")[0];
    const own = this.element.querySelector(`[data-error="${field}"]`);
    const place = own ?? document.querySelector(`form > div [data-error="${field}"]`);
    (place ?? this.element.querySelector('[data-error="other"]')).textContent = message;
    (own ? this.control(field) : byId(field))?.setAttribute("aria-invalid", "true");
  }
}

const columns = ["A", "B"].map((name, index) => new Column(name, START[index]));

function shared() {
  const number = (id) => (byId(id).value.trim() === "" ? null : Number(byId(id).value));
  return {
    messages: byId("messages").value,
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
  for (const each of document.querySelectorAll(".error")) each.textContent = "";
  for (const each of document.querySelectorAll("[aria-invalid]")) each.removeAttribute("aria-invalid");
}

/** What no server has to be asked about. */
function slips() {
  const wrong = [...document.querySelectorAll("form input[type=number]")].filter((input) => !input.checkValidity());
  for (const input of wrong) {
    document.querySelector(`[data-error="${input.id}"]`).textContent = input.validationMessage;
    input.setAttribute("aria-invalid", "true");
  }
  const empty = byId("messages").value.trim() === "";
  if (empty) document.querySelector('[data-error="messages"]').textContent = "Write a prompt.";
  (wrong[0] ?? (empty ? byId("messages") : null))?.focus();
  return wrong.length > 0 || empty;
}

async function write(event) {
  event.preventDefault();
  clearErrors();
  if (running || slips()) return;
  running = new AbortController();
  byId("write").disabled = true;
  byId("stop").disabled = false;
  byId("status").textContent = "Writing …";
  const began = performance.now();
  const done = await Promise.all(columns.map((column) => column.write(running.signal)));
  const seconds = ((performance.now() - began) / 1000).toFixed(1);
  const tokens = columns.reduce((sum, { answers }) => sum + answers.tokens, 0);
  const how = running.signal.aborted ? "Stopped" : done.every(Boolean) ? "Done" : "Not all was answered";
  byId("status").textContent = `${how}: ${tokens} tokens in ${seconds} s.`;
  running = null;
  byId("write").disabled = false;
  byId("stop").disabled = true;
}

function showView() {
  const figure = FIGURES[view()];
  byId("scale").textContent = figure
    ? `Coloured: ${figure.name}, none at ${figure.low}${figure.unit}, full at ${figure.high}${figure.unit} and above. ` +
      "A setting that is off has no figures."
    : "";
  for (const { answers } of columns) answers.show(view());
}

async function start() {
  byId("columns").append(...columns.map(({ element }) => element));
  for (const name of SHARED) {
    const error = document.querySelector(`[data-error="${name}"]`);
    byId(name).setAttribute("aria-describedby", (error.id = `${name}-error`));
  }
  byId("ask").addEventListener("submit", write);
  byId("ask").addEventListener("input", () => columns.forEach((column) => column.changed()));
  byId("stop").addEventListener("click", () => running?.abort());
  for (const radio of document.querySelectorAll("[name=view]")) radio.addEventListener("change", showView);
  server = await (await fetch("/api/server")).json();
  options(byId("model"), server.models.map((name) => [name, name]));
  byId("server").textContent = server.problem ?? described(server);
  byId("server").classList.toggle("error", server.problem !== null);
  for (const column of columns) column.offer(server.capabilities ?? {}, Boolean(server.capabilities?.active));
}

function described({ url, capabilities }) {
  return `${url}: vLLM ${capabilities.vllm}, ${capabilities.runner} runner, diversity in force.`;
}

start();
