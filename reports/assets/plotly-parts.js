"use strict";
// The parts of Plotly that reports draw with: two thirds of its cartesian bundle, which start in a
// quarter of the time. To make the bundle, in an empty folder:
//
//   npm install plotly.js@4.1.1 esbuild
//   npx esbuild .../reports/assets/plotly-parts.js --bundle --minify --format=iife \
//     --global-name=Plotly --define:global=window --alias:stream=stream-browserify \
//     --loader:.css=empty --target=es2020 --legal-comments=none --outfile=parts.js
//   gzip -9n < parts.js > .../reports/assets/plotly-parts-4.1.1.min.js.gz
//
// with NODE_PATH naming the folder's node_modules. LICENSE.plotly.js holds the licences of all
// packages that are in it.
require("plotly.js/build/plotcss");
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
