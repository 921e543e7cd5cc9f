/** What the server says of runs. Only what someone sees is asked for, and once for all who see it. */

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const TICK = 500; // milliseconds between looks at what can be seen
const SOON = 1500; // between questions about a run at work
const LATER = 10000; // between questions about others
const PATIENCE = 30000; // for an answer: a connection that has gone, as a laptop sleeps, never says so
const ACTIVE = ["starting", "training", "stopping"];
const views = new Set();
const asked = new Map(); // by address without its query: {last: when, busy}

/** The list of runs, newest first; `known` once the server has told. `nodes`: the run of each node by its id. */
export const all = { known: false, runs: [], nodes: {}, error: "" };
const runs = new Map();
const offered = new Map(); // the result of each run that was seen, "" for none

export const active = (run) => ACTIVE.includes(run?.status);

/** A run as far as it is known: {name, data, curves, error, missing}. */
export function known(name) {
  if (!runs.has(name)) runs.set(name, { name, data: null, curves: empty(), error: "", missing: false });
  return runs.get(name);
}

const empty = () => ({ steps: [], series: {}, preview: { steps: [], series: {} } });

/** Add the new rows to a table {steps, series: {key: values}}; keys that one side lacks are null there. */
function append(table, steps, series) {
  const length = table.steps.length;
  const last = table.steps.at(-1) ?? -1;
  const rows = steps.flatMap((step, i) => (step > last ? [i] : []));
  for (const key of new Set([...Object.keys(table.series), ...Object.keys(series)])) {
    table.series[key] ??= Array(length).fill(null);
    table.series[key].push(...rows.map((i) => series[key]?.[i] ?? null));
  }
  table.steps.push(...rows.map((i) => steps[i]));
}

/** The series of an answer's curves, by "score/denoise" and the like. */
function flat(curves) {
  const found = {};
  for (const [name, values] of Object.entries(curves)) {
    if (Array.isArray(values)) found[name] = values;
    else for (const [part, inner] of Object.entries(values ?? {})) found[`${name}/${part}`] = inner;
  }
  return found;
}

function take(run, data) {
  const fresh = run.data?.course !== data.course;
  if (fresh) run.curves = empty();
  const { steps = [], preview: { steps: drawn = [], ...scores } = {}, ...series } = data.curves ?? {};
  append(run.curves, steps, flat(series));
  append(run.curves.preview, drawn, scores);
  Object.assign(run, { data, error: "", missing: false });
  offer(data);
}

/** Loaders offer a result that is newer than their lists. The newer page can do that without two messages to the user. */
function offer({ name, result, ended }) {
  const before = offered.get(name);
  offered.set(name, result ?? "");
  const isNew = before === undefined ? ended * 1000 > performance.timeOrigin : before !== result;
  if (!result || !isNew) return;
  const refresh = app.reloadNodeDefs ?? app.refreshComboInNodes;
  refresh.call(app).catch((error) => console.warn("SRPO: lists of files are not up to date:", error));
}

async function answer(path, options) {
  const response = await api.fetchApi(path, options);
  const data = await response.json().catch(() => ({}));
  if (!response.ok) throw Object.assign(new Error(data.error ?? `${response.status} ${response.statusText}`), { status: response.status });
  return data;
}

/** Ask once at a time; what goes wrong is for `failed`. */
async function ask(key, path, told, failed) {
  const state = asked.get(key) ?? {};
  if (state.busy) return;
  const now = { last: Date.now(), busy: true };
  asked.set(key, now);
  try {
    told(await answer(path, { signal: AbortSignal.timeout(PATIENCE) }));
  } catch (error) {
    failed(error);
  } finally {
    now.busy = false;
  }
}

const due = (key, interval) => Date.now() - (asked.get(key)?.last ?? 0) >= interval;
const LIST = "";

async function askForList() {
  await ask(LIST, "/srpo/runs", (data) => {
    for (const one of data.runs) {
      const run = known(one.name);
      if (run.data && run.data.version !== one.version) hurry(one.name);
      offer(one);
    }
    Object.assign(all, { known: true, error: "" }, data);
  }, (error) => (all.error = error.message));
  for (const view of views) view.listed();
}

async function askForRun(name, lines) {
  const run = known(name);
  const last = run.curves.steps.at(-1);
  const asking = run.data?.course;
  const query = new URLSearchParams({ log: lines, ...(asking !== undefined && last !== undefined && { after: last }) });
  await ask(name, `/srpo/runs/${encodeURIComponent(name)}?${query}`, (data) => {
    if (asking !== undefined && data.course !== asking) {
      run.data = { ...data, course: undefined }; // steps were written anew: everything again
      hurry(name);
    } else take(run, data);
  }, (error) => Object.assign(run, { error: error.message, missing: error.status === 404, ...(error.status === 404 && { data: null, curves: empty() }) }));
  for (const view of views) if (view.name() === name) view.told(run);
}

function tick() {
  if (document.hidden) return;
  const seen = [...views].filter((view) => view.shown());
  const listing = seen.filter((view) => view.lists());
  const quick = listing.some((view) => view.lists() === "always") && all.runs.some(active);
  if (listing.length && due(LIST, quick ? SOON : LATER)) askForList();
  for (const name of new Set(seen.map((view) => view.name()).filter(Boolean))) {
    if (due(name, active(known(name).data) ? SOON : LATER)) askForRun(name, linesOf(seen, name));
  }
}

/**
 * Have a view told of what it shows, from now on; returns what ends that. A view has
 * shown(): can it be seen; name(): of its run, or ""; lines(): of the log that it needs; lists(): "" for no need of the
 * list of runs, "sometimes" or "always"; told(run) and listed(), which draw.
 */
export function watch(view) {
  views.add(view);
  timer ??= setInterval(tick, TICK);
  return () => {
    views.delete(view);
    if (!views.size) timer = void clearInterval(timer);
  };
}
let timer;

/** Whether an element can be seen in the window. */
export function visible(element) {
  if (!element.isConnected || !element.checkVisibility()) return false;
  const box = element.getBoundingClientRect();
  return box.width > 0 && box.bottom > 0 && box.right > 0 && box.top < innerHeight && box.left < innerWidth;
}

/** Ask about a run now, though nobody may see it: something of it has just ended. */
export const askNow = (name) => askForRun(name, linesOf([...views], name));

const linesOf = (seen, name) => Math.max(0, ...seen.filter((view) => view.name() === name).map((view) => view.lines()));

/** Ask about a run (or, with none, for the list) at the next look. */
export function hurry(name = LIST) {
  const state = asked.get(name);
  if (state) state.last = 0;
}

/** Tell a run to stop, resume or save; Error with the server's words if it refuses. */
export async function act(name, verb, body = {}) {
  const path = `/srpo/runs/${encodeURIComponent(name)}/${verb}`;
  const options = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  const summary = await answer(path, options);
  const run = known(name);
  if (run.data) Object.assign(run.data, summary);
  offer(summary);
  hurry(name);
  hurry();
  for (const view of views) if (view.name() === name) view.told(run);
}

/** Address of something of a run, for pictures and links. */
export const address = (name, what) => api.apiURL(`/srpo/runs/${encodeURIComponent(name)}/${what}`);
