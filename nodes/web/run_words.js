/** What is said of a run: its state, how far it is, how long it takes. */

import { active } from "./watch.js";

const WORDS = { starting: "Starting", training: "Training", stopping: "Stopping", stopped: "Stopped", finished: "Finished", failed: "Failed", killed: "Ended unexpectedly" };

/** Seconds in words: "40 s", "4 min 20 s", "38 min", "2 h 05 min". */
export function duration(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  const [hours, minutes] = [Math.floor(whole / 3600), Math.floor(whole / 60)];
  if (hours) return `${hours} h ${String(minutes % 60).padStart(2, "0")} min`;
  if (minutes >= 10) return `${minutes} min`;
  return minutes ? `${minutes} min ${whole % 60} s` : `${whole} s`;
}

export const statusOf = (data) => (data.stopping && active(data) ? "stopping" : data.status);
export const statusText = (data) => WORDS[statusOf(data)] ?? data.status;
/** A file with the folder it lies in. */
export const base = (path) => path.split(/[\\/]/).slice(-2).join("/");

/** How much of a run is done, 0 to 1: its steps, or while it starts its phase. */
export function share(data) {
  const [done, total] = data.status === "starting" ? [data.phase_done, data.phase_total] : [data.step, data.steps];
  return total ? Math.min(1, (done ?? 0) / total) : 0;
}

/** The line below the bar. */
export function progressText(data) {
  const counted = data.phase_total ? ` ${data.phase_done ?? 0}/${data.phase_total}` : "";
  const phase = data.phase && data.phase !== "training" && active(data) ? `${data.phase}${counted}` : "";
  if (data.status === "starting") return phase || "the process is starting";
  const took = data.began && data.ended && !active(data) ? ` ${data.status === "finished" ? "in" : "after"} ${duration((data.worked ?? 0) + data.ended - data.began)}` : "";
  const steps = data.status === "finished" ? `${data.steps} steps` : `step ${data.step} of ${data.steps}`;
  const result = data.result ? `saved as ${base(data.result)}` : "";
  return [`${steps}${took}`, phase, result].filter(Boolean).join(" · ");
}
