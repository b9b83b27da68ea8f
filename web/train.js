// What a training looks like while it runs: the loss, the attention, the time left, previews.
// The server sends states and keeps the last ones, so a page that is loaded again shows them too.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { Below, adopt, made } from "./below.js";

const NODE = "FMN_TrainForgetPatch";
const EVENT = "forget-me-not.train";
const ROUTE = "/forget-me-not/train";
const NO_ID = "00000000-0000-0000-0000-000000000000";
const WIDTH = 320;
const CURVE = { width: 300, height: 96 };
const STATUS = { running: "running", done: "done", cancelled: "cancelled", failed: "failed" };

const MOST = 64; // states that are kept

const states = new Map(); // workflow and node -> state, the newest last
const views = new WeakMap(); // node on the page -> View

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
.fmn-train .fmn-head { flex-wrap: nowrap; }
.fmn-train .fmn-head .fmn-quiet { flex: none; }
.fmn-train .fmn-title { white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
.fmn-train .fmn-quiet { color: var(--descrip-text, #999); }
.fmn-train .fmn-loss { color: var(--fmn-loss); }
.fmn-train .fmn-error { padding-left: 6px; border-left: 2px solid var(--fmn-loss); }
.fmn-train .fmn-share { color: var(--fmn-share); }
.fmn-train svg .fmn-loss { stroke: var(--fmn-loss); fill: none; }
.fmn-train svg .fmn-share { stroke: var(--fmn-share); fill: none; }
.fmn-train .fmn-bar { height: 4px; margin: 4px 0; border-radius: 2px; overflow: hidden;
  background: var(--border-color, #4e4e4e); }
.fmn-train .fmn-bar div { height: 100%; background: var(--fmn-share); }
.fmn-train .fmn-pictures { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 4px; }
.fmn-train figure { margin: 0; }
.fmn-train figure div { display: flex; gap: 2px; }
.fmn-train img { flex: 1; min-width: 0; width: 50%; aspect-ratio: 1; object-fit: contain; }
.fmn-train figcaption { white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
`;

function drawn(tag, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

function duration(seconds) {
  const whole = Math.round(seconds);
  if (whole < 60) return `${whole} s`;
  const minutes = Math.floor(whole / 60);
  if (minutes < 60) return `${minutes} min ${whole % 60} s`;
  return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

/** An SVG line of [[index, value]], from 0 at the bottom to the highest value. */
function curve(points, steps, name) {
  const high = Math.max(...points.map(([, value]) => value), 1e-12);
  const places = points.map(([index, value]) => {
    const y = CURVE.height - 2 - (Math.max(value, 0) / high) * (CURVE.height - 6);
    return [across(index, steps), y].map((place) => place.toFixed(1));
  });
  if (places.length === 1) places.push(places[0]); // a dot, by its round caps
  return drawn("polyline", {
    points: places.join(" "), class: name, "stroke-width": 1.5, "stroke-linecap": "round",
    "vector-effect": "non-scaling-stroke",
  });
}

function across(index, steps) {
  return (index / Math.max(steps, 1)) * CURVE.width;
}

function percent(share) {
  return `${Number((100 * share).toPrecision(3))}%`;
}

class View extends Below {
  constructor(node) {
    super(node, { type: "FMN_TRAIN_LIVE", name: "fmn-train", narrow: WIDTH });
  }

  show(state) {
    if (state === this.state) return;
    this.state = state;
    this.fill(...this.parts(state));
  }

  *parts(state) {
    const head = made("div", "fmn-line fmn-head");
    head.append(made("span", "fmn-title", `${STATUS[state.status] ?? ""}: ${state.title}`));
    head.firstChild.title = state.title;
    const left = state.status === "running" && state.step ? `${duration(state.seconds_left)} left` : "";
    head.append(made("span", "fmn-quiet", left));
    yield head;
    if (state.total) yield* this.progress(state);
    if (state.error) yield made("div", "fmn-error", state.error);
    for (const told of [state.note, state.memory]) {
      if (told) yield made("div", "fmn-quiet", told);
    }
    if (state.previews?.length) yield this.pictures(state);
  }

  /** Bar, curves and numbers, once there has been a step. */
  *progress(state) {
    const bar = made("div", "fmn-bar");
    const done = made("div");
    done.style.width = `${(100 * state.step) / Math.max(state.total, 1)}%`;
    bar.append(done);
    yield bar;
    yield this.curves(state);
    yield this.numbers(state);
  }

  curves(state) {
    const box = `0 0 ${CURVE.width} ${CURVE.height}`;
    const svg = drawn("svg", { viewBox: box, preserveAspectRatio: "none", role: "img" });
    svg.append(drawn("title", {}));
    svg.firstChild.textContent = "loss and attention by step, each from 0 to its highest";
    const y = CURVE.height - 1;
    svg.append(drawn("line", {
      x1: 0, y1: y, x2: CURVE.width, y2: y, stroke: "currentColor", "stroke-opacity": 0.3,
    }));
    if (state.best) {
      const x = across(state.best, state.step);
      svg.append(drawn("line", {
        x1: x, y1: 0, x2: x, y2: y, stroke: "currentColor", "stroke-dasharray": "3 3",
        "stroke-opacity": 0.6, class: "fmn-best",
      }));
    }
    if (state.attention.length) svg.append(curve(state.attention, state.step, "fmn-share"));
    if (state.losses.length) svg.append(curve(state.losses, state.step, "fmn-loss"));
    return svg;
  }

  numbers(state) {
    const line = made("div", "fmn-line");
    const best = state.best ? `, best ${state.best}` : "";
    line.append(made("span", "fmn-quiet", `step ${state.step}/${state.total}${best}`));
    if (state.attention.length) {
      const first = percent(state.attention[0][1]);
      const last = percent(state.attention.at(-1)[1]);
      line.append(made("span", "fmn-share", `attention ${first} to ${last}`));
    }
    if (state.losses.length) {
      const loss = state.losses.at(-1)[1];
      line.append(made("span", "fmn-loss", `loss ${Number(loss.toPrecision(4))}`));
    }
    return line;
  }

  pictures(state) {
    const grid = made("div", "fmn-pictures");
    for (const { prompt, before, now } of state.previews) {
      const figure = made("figure");
      const pair = made("div");
      for (const [name, data] of [["before", before], [`step ${state.previews_at}`, now]]) {
        const picture = made("img");
        picture.src = `data:image/jpeg;base64,${data}`;
        picture.alt = `${prompt}, ${name}`;
        picture.title = `${prompt}, ${name}`;
        pair.append(picture);
      }
      figure.append(pair, made("figcaption", "fmn-quiet", prompt));
      grid.append(figure);
    }
    const caption = `before, and at step ${state.previews_at}`;
    const box = made("div");
    box.append(made("div", "fmn-quiet", caption), grid);
    return box;
  }
}

function keyOf(workflow, node) {
  return `${workflow ?? ""}/${node}`;
}

/** Every node of a graph and its subgraphs beside the id that the server knows it by. */
function* everyNode(graph, prefix = "") {
  for (const node of graph?.nodes ?? []) {
    const id = `${prefix}${node.id}`;
    yield [id, node];
    if (node.subgraph) yield* everyNode(node.subgraph, `${id}:`);
  }
}

/** Show what is known of the nodes on the page. */
function refresh() {
  const root = app.rootGraph ?? app.graph;
  if (!root) return;
  for (const [id, node] of everyNode(root)) {
    const view = views.get(node);
    const state = view && (states.get(keyOf(root.id, id)) ?? states.get(keyOf(null, id)));
    // Workflows made from API files share one id, and may not share what was trained before.
    const unsure = root.id === NO_ID && state?.status !== "running" && !view?.state;
    if (state && !unsure) view.show(state);
  }
}

function receive(state) {
  const key = keyOf(state.workflow, state.node);
  const previews = state.previews ?? states.get(key)?.previews ?? [];
  states.delete(key);
  states.set(key, { ...state, previews });
  if (states.size > MOST) states.delete(states.keys().next().value);
  refresh();
}

/** Did the server answer? If it is away, the page connects again, and this is asked again. */
async function askServer() {
  if (!api.clientId) return false;
  const query = `client=${encodeURIComponent(api.clientId)}`;
  const answer = await api.fetchApi(`${ROUTE}?${query}`).catch(() => null);
  if (!answer?.ok) return false;
  for (const state of (await answer.json()).states) receive(state);
  return true;
}

/** Nothing runs: what still seems to has ended unseen, or its server has. */
async function settle() {
  const open = [...states].filter(([, state]) => state.status === "running");
  if (!open.length || !(await askServer())) return;
  for (const [key, state] of open) {
    if (states.get(key) === state) states.set(key, { ...state, status: "failed", error: "The server was stopped." });
  }
  refresh();
}

app.registerExtension({
  name: "forgetmenot.train",
  setup() {
    adopt(STYLE);
    api.addEventListener(EVENT, (event) => receive(event.detail));
    // The server tells the page's id when it connects, and a new one after it was restarted.
    api.addEventListener("status", ({ detail }) => {
      askOnce();
      if (detail?.exec_info?.queue_remaining === 0) settle();
    });
    api.addEventListener("reconnected", askServer); // what came in between was lost
    askOnce();
  },
  nodeCreated(node) {
    if (node.comfyClass !== NODE) return;
    views.set(node, new View(node));
  },
  afterConfigureGraph: refresh,
});

let asked;
async function askOnce() {
  const client = api.clientId;
  if (asked === client) return;
  asked = client;
  if (!(await askServer())) asked = undefined;
}
