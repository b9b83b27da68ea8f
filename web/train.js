// The live view of a training: loss, attention, time left and previews.
// The server sends states and keeps the last ones, so that a reloaded page shows them too.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { NodeElement, addStyles, element } from "./node_element.js";
import { NO_ID, allNodes, isOpen, rootGraph } from "./workflow.js";

const NODE = "FMN_TrainForgetPatch";
const EVENT = "forget-me-not.train";
const ROUTE = "/forget-me-not/train";
const MIN_WIDTH = 320; // of a new node, in pixels
const ROOM = 690; // for curve, two lines of numbers, the answer, two previews and maps of attention
const CURVE = { width: 300, height: 96 };
const STATUSES = ["running", "done", "cancelled", "failed"];
const MAX_STATES = 64; // that are kept

const states = new Map(); // keyOf(workflow, node) -> state, the newest last
const views = new WeakMap(); // node -> LiveView

const STYLE = `
.fmn-train { box-sizing: border-box; width: 100%; overflow: hidden; font: 12px/1.35 sans-serif;
  contain: inline-size; /* or Nodes 2.0 makes it as wide as its longest line */
  color: var(--input-text, #ddd); border: 1px solid var(--border-color, #4e4e4e);
  border-radius: 6px; }
.fmn-train { --fmn-loss: color-mix(in srgb, #d64541 75%, currentColor);
  --fmn-share: color-mix(in srgb, #3d8fd1 75%, currentColor); }
.fmn-train[hidden] { display: none; }
.fmn-train svg { display: block; width: 100%; height: 96px; }
.fmn-train .fmn-content { padding: 6px 8px; overflow-wrap: anywhere; }
.fmn-train .fmn-line { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 8px; }
.fmn-train .fmn-line > span { min-width: 0; }
.fmn-train .fmn-head { flex-wrap: nowrap; align-items: center; }
.fmn-train .fmn-head .fmn-quiet { flex: none; }
.fmn-train .fmn-title { flex: 1; white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
.fmn-train button { flex: none; padding: 0 8px; font: inherit; color: inherit; cursor: pointer;
  background: none; border: 1px solid currentColor; border-radius: 4px; }
.fmn-train button[hidden] { display: none; }
.fmn-train .fmn-quiet { color: var(--descrip-text, #999); }
.fmn-train .fmn-loss { color: var(--fmn-loss); }
.fmn-train .fmn-error { padding-left: 6px; border-left: 2px solid var(--fmn-loss); }
.fmn-train .fmn-share { color: var(--fmn-share); }
.fmn-train svg .fmn-loss { stroke: var(--fmn-loss); fill: none; }
.fmn-train svg .fmn-share { stroke: var(--fmn-share); fill: none; }
.fmn-train .fmn-outcome { margin: 2px 0; font-weight: 600; overflow: hidden; white-space: pre-line;
  display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 6; }
.fmn-train .fmn-bar { height: 4px; margin: 4px 0; border-radius: 2px; overflow: hidden;
  background: var(--border-color, #4e4e4e); }
.fmn-train .fmn-bar div { height: 100%; background: var(--fmn-share); }
.fmn-train .fmn-pictures { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 4px; }
.fmn-train figure { margin: 0; }
.fmn-train figure div { display: flex; gap: 2px; }
.fmn-train img { flex: 1; min-width: 0; width: 50%; aspect-ratio: 1; object-fit: contain; }
.fmn-train figcaption { white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
`;

function svgElement(tag, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

function duration(seconds) {
  const whole = Math.round(seconds);
  if (whole < 60) return `${whole} s`;
  const minutes = Math.floor(whole / 60);
  if (minutes < 60) return `${minutes} min ${whole % 60} s`;
  return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

/** An SVG line of [[index, value]], from 0 at the bottom to the highest value. */
function curve(points, steps, className) {
  const highest = Math.max(...points.map(([, value]) => value), 1e-12);
  const corners = points.map(([index, value]) => {
    const y = CURVE.height - 2 - (Math.max(value, 0) / highest) * (CURVE.height - 6);
    return [xOf(index, steps), y].map((number) => number.toFixed(1));
  });
  if (corners.length === 1) corners.push(corners[0]); // its round caps make a dot
  return svgElement("polyline", {
    points: corners.join(" "), class: className, "stroke-width": 1.5, "stroke-linecap": "round",
    "vector-effect": "non-scaling-stroke",
  });
}

function xOf(index, steps) {
  return (index / Math.max(steps, 1)) * CURVE.width;
}

function percent(share) {
  return `${Number((100 * share).toPrecision(3))}%`;
}

class LiveView extends NodeElement {
  constructor(node) {
    super(node, { type: "FMN_TRAIN_LIVE", className: "fmn-train", minWidth: MIN_WIDTH, room: ROOM });
    this.title = element("span", "fmn-title");
    this.left = element("span", "fmn-quiet");
    this.cancel = element("button", "", "Cancel");
    this.cancel.type = "button";
    this.cancel.title = "Cancel this training";
    this.cancel.addEventListener("click", () => cancel(this.state.prompt_id));
    this.head = element("div", "fmn-line fmn-head");
    this.head.append(this.title, this.left, this.cancel);
    this.body = element("div");
  }

  show(state) {
    if (state === this.state) return;
    // The head stays: a press of a button that is replaced meanwhile would be lost.
    if (!this.state) this.fill(this.head, this.body);
    this.state = state;
    const running = state.status === "running";
    this.title.textContent = `${STATUSES.includes(state.status) ? state.status : ""}: ${state.title}`;
    this.title.title = state.title;
    this.left.textContent = running && state.step ? `${duration(state.seconds_left)} left` : "";
    this.cancel.hidden = !running;
    this.body.replaceChildren(...this.parts(state));
  }

  *parts(state) {
    if (state.total) yield* this.progress(state);
    if (state.outcome) {
      const outcome = element("div", "fmn-outcome", state.outcome);
      outcome.title = state.outcome;
      yield outcome;
    }
    if (state.error) yield element("div", "fmn-error", state.error);
    for (const note of [state.note, state.memory]) {
      if (note) yield element("div", "fmn-quiet", note);
    }
    if (state.previews?.length) yield this.pictures(state);
  }

  /** Bar, curves and numbers, from the first step on. */
  *progress(state) {
    const bar = element("div", "fmn-bar");
    const done = element("div");
    done.style.width = `${(100 * state.step) / Math.max(state.total, 1)}%`;
    bar.append(done);
    yield bar;
    yield this.curves(state);
    yield this.numbers(state);
  }

  curves(state) {
    const box = `0 0 ${CURVE.width} ${CURVE.height}`;
    const svg = svgElement("svg", { viewBox: box, preserveAspectRatio: "none", role: "img" });
    svg.append(svgElement("title", {}));
    svg.firstChild.textContent = "loss and attention by step, each from 0 to its highest";
    const y = CURVE.height - 1;
    svg.append(svgElement("line", {
      x1: 0, y1: y, x2: CURVE.width, y2: y, stroke: "currentColor", "stroke-opacity": 0.3,
    }));
    if (state.best) {
      const x = xOf(state.best, state.step);
      svg.append(svgElement("line", {
        x1: x, y1: 0, x2: x, y2: y, stroke: "currentColor", "stroke-dasharray": "3 3",
        "stroke-opacity": 0.6, class: "fmn-best",
      }));
    }
    if (state.attention.length) svg.append(curve(state.attention, state.step, "fmn-share"));
    if (state.losses.length) svg.append(curve(state.losses, state.step, "fmn-loss"));
    return svg;
  }

  numbers(state) {
    const line = element("div", "fmn-line");
    const best = state.best ? `, best ${state.best}` : "";
    line.append(element("span", "fmn-quiet", `step ${state.step}/${state.total}${best}`));
    if (state.attention.length) {
      const first = percent(state.attention[0][1]);
      const last = percent(state.attention.at(-1)[1]);
      line.append(element("span", "fmn-share", `attention ${first} to ${last}`));
    }
    if (state.losses.length) {
      const loss = state.losses.at(-1)[1];
      line.append(element("span", "fmn-loss", `loss ${Number(loss.toPrecision(4))}`));
    }
    return line;
  }

  pictures(state) {
    const grid = element("div", "fmn-pictures");
    for (const { prompt, before, now } of state.previews) {
      const figure = element("figure");
      const pair = element("div");
      for (const [name, data] of [["before", before], [`step ${state.previews_at}`, now]]) {
        const picture = element("img");
        picture.src = `data:image/jpeg;base64,${data}`;
        picture.alt = `${prompt}, ${name}`;
        picture.title = `${prompt}, ${name}`;
        pair.append(picture);
      }
      figure.append(pair, element("figcaption", "fmn-quiet", prompt));
      grid.append(figure);
    }
    const caption = `before, and at step ${state.previews_at}`;
    const box = element("div");
    box.append(element("div", "fmn-quiet", caption), grid);
    return box;
  }
}

function keyOf(workflow, node) {
  return `${workflow ?? ""}/${node}`;
}

/** The page's own Cancel does not know of a run that was queued before a reload. */
function cancel(promptId) {
  const body = JSON.stringify({ prompt_id: promptId });
  const headers = { "Content-Type": "application/json" };
  return api.fetchApi("/interrupt", { method: "POST", headers, body });
}

/** The last state of a node, or nothing. */
function stateOf(id, view) {
  const root = rootGraph();
  const own = states.get(keyOf(root.id, id)) ?? states.get(keyOf(null, id));
  if (own && root.id !== NO_ID) return own;
  // Workflows made from API files share one id, so an ended training may be another workflow's.
  const state = own ?? states.get(keyOf(NO_ID, id));
  const isSure = view.state || state?.status === "running";
  return state && isSure && isOpen(state) ? state : undefined;
}

/** Show the last states of the nodes on the page. */
function refresh() {
  for (const [id, node] of allNodes(rootGraph())) {
    const view = views.get(node);
    const state = view && stateOf(id, view);
    if (state) view.show(state);
  }
}

function receive(state) {
  const key = keyOf(state.workflow, state.node);
  const previews = state.previews ?? states.get(key)?.previews ?? [];
  states.delete(key);
  states.set(key, { ...state, previews });
  if (states.size > MAX_STATES) states.delete(states.keys().next().value);
  refresh();
}

/** Fetch the last states. False if the server does not answer; the page then reconnects. */
async function fetchStates() {
  if (!api.clientId) return false;
  const query = `client=${encodeURIComponent(api.clientId)}`;
  const answer = await api.fetchApi(`${ROUTE}?${query}`).catch(() => null);
  if (!answer?.ok) return false;
  for (const state of (await answer.json()).states) receive(state);
  return true;
}

/** Nothing is running: mark states that still say so and that the server does not know. */
async function endLostRuns() {
  const running = [...states].filter(([, state]) => state.status === "running");
  if (!running.length || !(await fetchStates())) return;
  for (const [key, state] of running) {
    if (states.get(key) === state) states.set(key, { ...state, status: "failed", error: "The server was stopped." });
  }
  refresh();
}

app.registerExtension({
  name: "forgetmenot.train",
  setup() {
    addStyles(STYLE);
    api.addEventListener(EVENT, (event) => receive(event.detail));
    // The page gets its id when it connects, and a new one from a restarted server.
    api.addEventListener("status", ({ detail }) => {
      fetchStatesOnce();
      if (detail?.exec_info?.queue_remaining === 0) endLostRuns();
    });
    api.addEventListener("reconnected", fetchStates); // events in between were lost
    fetchStatesOnce();
  },
  nodeCreated(node) {
    if (node.comfyClass !== NODE) return;
    views.set(node, new LiveView(node));
  },
  afterConfigureGraph: refresh,
});

let fetchedFor; // id of the page
async function fetchStatesOnce() {
  const client = api.clientId;
  if (fetchedFor === client) return;
  fetchedFor = client;
  if (!(await fetchStates())) fetchedFor = undefined;
}
