/** How the view of a run looks, in nodes and in the side panel, in dark and light themes. */

export const STYLE = `
:root { --srpo-blue: #4d96ff; --srpo-green: #35b37e; --srpo-amber: #e0a030; --srpo-red: #e5484d; }
.srpo-run { display: flex; flex-direction: column; gap: 8px; flex: 1 0 auto; min-width: 0;
  color: var(--input-text); font: 12px/18px system-ui, sans-serif; }
.srpo-run[hidden], .srpo-run [hidden], .srpo-runs [hidden] { display: none !important; }
.srpo-run p { margin: 0; overflow-wrap: anywhere; }
.srpo-run header { display: flex; align-items: baseline; gap: 8px; min-width: 0; }
.srpo-run header strong { font-size: 13px; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.srpo-run header .left { margin-left: auto; flex: none; font-variant-numeric: tabular-nums; }
.srpo-status { flex: none; color: var(--srpo-tone, var(--descrip-text)); font-weight: 600; white-space: nowrap; }
.srpo-status::before { content: ""; display: inline-block; width: 7px; height: 7px; border-radius: 50%; margin-right: 5px; background: currentColor; vertical-align: 1px; }
.srpo-tone[data-status=starting], .srpo-tone[data-status=stopping] { --srpo-tone: var(--srpo-amber); }
.srpo-tone[data-status=training] { --srpo-tone: var(--srpo-blue); }
.srpo-tone[data-status=finished] { --srpo-tone: var(--srpo-green); }
.srpo-tone[data-status=failed], .srpo-tone[data-status=killed] { --srpo-tone: var(--srpo-red); }
@media (prefers-reduced-motion: no-preference) {
  .srpo-tone[data-status=training] .srpo-status::before, .srpo-tone[data-status=starting] .srpo-status::before { animation: srpo-pulse 1.6s ease-in-out infinite; }
}
@keyframes srpo-pulse { 50% { opacity: .35; } }
.srpo-bar { height: 6px; border-radius: 3px; overflow: hidden; flex: none; background: color-mix(in srgb, var(--descrip-text) 25%, transparent); }
.srpo-bar i { display: block; height: 100%; border-radius: 3px; background: var(--srpo-tone, var(--descrip-text)); transition: width .4s; }
.srpo-run .now { color: var(--descrip-text); font-variant-numeric: tabular-nums; }
.srpo-run .error, .srpo-live > .error { border-left: 3px solid var(--srpo-red); padding: 4px 8px; white-space: pre-wrap; overflow-wrap: anywhere; max-height: 160px; overflow: auto; flex: none;
  background: color-mix(in srgb, var(--srpo-red) 12%, transparent); border-radius: 0 4px 4px 0; }
.srpo-run .charts { display: flex; flex-wrap: wrap; gap: 8px 16px; flex: 1 0 auto; }
.srpo-run > * { flex: none; }
.srpo-run figure { margin: 0; display: flex; flex-direction: column; gap: 4px; flex: 0 1 auto; }
.srpo-run figure a { display: block; overflow: auto; min-height: 0; max-height: 250px; border-radius: 4px; }
.srpo-run figure img { display: block; width: 100%; }
.dom-widget .srpo-run { flex: 1 1 0; min-height: 0; }
.dom-widget .srpo-run figure { min-height: 140px; }
.dom-widget .srpo-run figure a { max-height: none; }
.srpo-run figcaption { display: flex; align-items: center; gap: 10px; color: var(--descrip-text); font-variant-numeric: tabular-nums; }
.srpo-run figcaption span { flex: none; }
.srpo-run input[type=range] { flex: 1 1 auto; min-width: 0; max-width: 260px; margin: 0; accent-color: var(--srpo-blue); height: 14px; }
.srpo-run table { border-collapse: collapse; width: 100%; }
.srpo-run th, .srpo-run td { text-align: left; vertical-align: top; font-weight: 400; padding: 1px 10px 1px 0; border-top: 1px solid color-mix(in srgb, var(--border-color) 60%, transparent); overflow-wrap: anywhere; }
.srpo-run th { color: var(--descrip-text); white-space: nowrap; width: 1%; }
.srpo-run tr:first-child > * { border-top: 0; }
.srpo-run td button { font: inherit; color: var(--descrip-text); background: none; border: 0; padding: 0; margin-left: 8px; cursor: pointer; text-decoration: underline; }
.srpo-run code, .srpo-run .log { font: 11px/16px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.srpo-run .log { margin: 0; padding: 6px 8px; border-radius: 4px; height: 150px; flex: none; overflow: auto; white-space: pre-wrap; overflow-wrap: anywhere;
  background: color-mix(in srgb, var(--fg-color) 7%, transparent); }
.srpo-run footer { display: flex; flex-wrap: wrap; gap: 6px; align-items: center; }
.srpo-run footer .gap { flex: 1 1 0; }
.srpo-button { font: inherit; line-height: 18px; color: var(--input-text); text-decoration: none; padding: 2px 9px; border-radius: 5px; cursor: pointer; white-space: nowrap;
  border: 1px solid color-mix(in srgb, var(--descrip-text) 45%, transparent); background: color-mix(in srgb, var(--fg-color) 5%, transparent); }
.srpo-button:hover { background: color-mix(in srgb, var(--fg-color) 13%, transparent); color: var(--input-text); }
.srpo-button:focus-visible { outline: 2px solid var(--srpo-blue); outline-offset: 1px; }
.srpo-button:disabled { opacity: .5; cursor: default; }
.srpo-button[aria-pressed=true] { background: color-mix(in srgb, var(--fg-color) 18%, transparent); }
.srpo-button.main { background: var(--srpo-blue); border-color: var(--srpo-blue); color: #fff; }
.srpo-button.danger { color: var(--srpo-red); border-color: color-mix(in srgb, var(--srpo-red) 60%, transparent); }
.srpo-run .said { color: var(--descrip-text); white-space: pre-wrap; }
.srpo-run .said.bad { color: var(--srpo-red); }
.srpo-run form { display: flex; align-items: center; gap: 6px; }
.srpo-run form input { width: 54px; box-sizing: border-box; font: inherit; color: inherit; padding: 1px 5px; border-radius: 4px; border: 1px solid var(--border-color); background: var(--comfy-input-bg); }
`;
