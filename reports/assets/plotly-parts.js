"use strict";
// The parts of Plotly that reports draw with; plotly-bundle.mjs makes the bundle.
const registry = require("plotly.js/src/registry");
const api = require("plotly.js/src/plot_api");

for (const name of Object.keys(api)) {
  if (!name.startsWith("_")) exports[name] = api[name];
  registry.register({ moduleType: "apiMethod", name, fn: api[name] });
}
registry.register([
  require("plotly.js/src/traces/scatter"),
  require("plotly.js/src/components/shapes"),
  require("plotly.js/src/components/errorbars"),
  require("plotly.js/src/components/colorscale"),
  require("plotly.js/src/components/fx"),
  require("plotly.js/src/components/modebar"),
  require("plotly.js/src/locale-en"),
  require("plotly.js/src/locale-en-us"),
]);
