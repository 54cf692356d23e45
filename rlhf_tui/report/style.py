"""The style sheet of a report as HTML: light and dark, from 400 pixels of width on, and printed."""

STYLE = """
:root {
  color-scheme: light dark;
  --fg: #1c2024; --dim: #5b6570; --bg: #ffffff; --line: #d8dde3; --box: #f5f7f9;
  --curve: #1f5fbf; --raw: #a9c4ec; --mark: #7a3fa0; --warn: #b45309;
  --ghost: #b9bec5; --other: #c2410c;
}
@media (prefers-color-scheme: dark) {
  :root {
    --fg: #e4e8ec; --dim: #9aa5b1; --bg: #14171a; --line: #343b43; --box: #1d2227;
    --curve: #7fb1ff; --raw: #35517c; --mark: #cf9bef; --warn: #f0a850;
    --ghost: #4a525b; --other: #fb923c;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 16px; max-width: 1280px; background: var(--bg); color: var(--fg);
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere;
}
h1 { font-size: 1.6em; margin: .2em 0; }
h2 { font-size: 1.25em; margin: 1.8em 0 .5em; }
h3 { font-size: 1em; margin: 1.2em 0 .3em; }
a { color: var(--curve); }
nav a { display: inline-block; margin-right: 1em; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1em 1em; margin: .8em 0; }
dt { color: var(--dim); }
dd { margin: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .4em 0; font-variant-numeric: tabular-nums; }
th, td {
  text-align: left; vertical-align: top; padding: .2em .9em .2em 0;
  border-bottom: 1px solid var(--line);
}
th { color: var(--dim); font-weight: 600; white-space: nowrap; }
td { min-width: 3.5em; max-width: 44em; overflow-wrap: break-word; }
.charts {
  display: grid; gap: 14px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 360px), 1fr));
}
figure { margin: 0; }
figcaption { font-weight: 600; }
svg { display: block; width: 100%; height: auto; }
.dim, .left-out { color: var(--dim); }
.compared { color: var(--other); font-weight: 600; }
.sample {
  border: 1px solid var(--line); border-radius: 6px; margin: .6em 0; padding: .5em .8em;
  background: var(--box);
}
.sample p { margin: .4em 0 0; color: var(--dim); font-size: .9em; }
pre { margin: .2em 0 0; white-space: pre-wrap; font: 13px/1.45 ui-monospace, monospace; }
pre.prompt { color: var(--dim); }
pre.reply { color: var(--dim); border-left: 3px solid var(--dim); padding-left: .7em; }
summary { cursor: pointer; }
.grid { stroke: var(--line); stroke-width: 1; }
.tick { fill: var(--dim); font: 11px sans-serif; }
.raw, .mean, .ghost, .other { fill: none; stroke-linejoin: round; }
.raw { stroke: var(--raw); stroke-width: 1; }
.mean { stroke: var(--curve); stroke-width: 1.8; }
.ghost { stroke: var(--ghost); stroke-width: 1; }
.other { stroke: var(--other); stroke-width: 1.8; }
.dot { fill: var(--curve); }
.intervention { stroke: var(--mark); stroke-width: 1.2; stroke-dasharray: 4 3; }
.start { stroke: var(--dim); stroke-width: 1; stroke-dasharray: 1 3; }
.number { fill: var(--mark); font: bold 11px sans-serif; }
.alert { fill: var(--warn); }
@media print { .scroll { overflow: visible; } nav { display: none; } }
"""
