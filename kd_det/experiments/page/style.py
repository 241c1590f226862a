"""How the page looks: light or dark as the reader's system is, from 390 pixels of width on."""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --ink: #1f2933; --soft: #5f6b77; --line: #e4e8ec; --box: #f6f8fa;
  --c0: #8793a0; --c1: #0072b2; --c2: #d55e00; --c3: #009e73; --c4: #c4679a; --c5: #3a9bd1;
  --c6: #c98a00; --gain: #0b6b4b; --loss: #a63c06; --plain: #5f6b77;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14181c; --ink: #e4e8ec; --soft: #9aa6b2; --line: #2c343c; --box: #1c2228;
    --c0: #8793a0; --c1: #4aa8e0; --c2: #f0843c; --c3: #2fc296; --c4: #dd8fbb; --c5: #7cc8ee;
    --c6: #e8b440; --gain: #2fa77c; --loss: #d9702e; --plain: #75828f;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1rem; max-width: 76rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
}
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0.5rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 0.5rem; padding-top: 0.6rem; }
h2 { border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.2rem 0 0.4rem; overflow-wrap: anywhere; }
p { max-width: 46rem; margin: 0.5rem 0; overflow-wrap: anywhere; }
.soft, figcaption, nav { color: var(--soft); font-size: 0.875rem; }
nav { display: flex; flex-wrap: wrap; gap: 0.3rem 0.9rem; margin: 0.6rem 0; }
nav a { color: inherit; }
code, pre { font: 0.8125rem/1.45 ui-monospace, "DejaVu Sans Mono", monospace; }
td code { white-space: nowrap; }
pre { background: var(--box); padding: 0.7rem; overflow: auto; max-height: 24rem; }
.scroll { overflow: auto; max-height: 32rem; max-width: 100%; margin: 0.6rem 0; }
table { border-collapse: collapse; font-size: 0.875rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.7rem; text-align: left; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 500; position: sticky; top: 0; background: var(--paper); }
th, td.n { white-space: nowrap; }
.n { text-align: right; }
td:first-child { min-width: 7rem; overflow-wrap: anywhere; }
.cards { display: grid; gap: 0.7rem; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); }
.card { background: var(--box); border-left: 4px solid var(--plain); padding: 0.6rem 0.9rem; }
.card.gain { border-color: var(--gain); } .card.loss { border-color: var(--loss); }
.card p { margin: 0.2rem 0; font-size: 0.9rem; }
.verdict { font-weight: 600; color: var(--plain); }
.gain .verdict, td .gain { color: var(--gain); } .loss .verdict, td .loss { color: var(--loss); }
.charts { display: grid; gap: 1rem 2rem; align-items: start; }
.charts { grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); }
.charts > * { min-width: 0; }
.charts figure { max-width: 33rem; }
figure { margin: 0; min-width: 0; }
figure svg { display: block; width: 100%; height: auto; }
.key { display: flex; flex-wrap: wrap; gap: 0.2rem 1.1rem; font-size: 0.875rem; margin: 0.5rem 0; }
.key span { overflow-wrap: anywhere; }
.key i { display: inline-block; width: 1.3rem; height: 0.25rem; margin: 0 0.4rem 0.2rem 0; }
.panels { display: grid; gap: 0.6rem; grid-template-columns: repeat(4, minmax(0, 1fr)); }
.panels img { display: block; width: 100%; height: auto; }
@media (max-width: 700px) {
  .panels { grid-template-columns: repeat(2, minmax(0, 1fr)); }
}
details { margin: 0.4rem 0; } summary { cursor: pointer; overflow-wrap: anywhere; }
"""
