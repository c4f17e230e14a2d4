// Makes the part of Plotly that reports draw with, and its style. In an empty folder:
//
//   npm install plotly.js@4.1.1 esbuild@0.28.2 acorn@8 acorn-walk@8
//   node .../reports/assets/plotly-bundle.mjs
//
// writes plotly-parts-4.1.1.min.js.gz and plotly.css beside this file: less than two thirds of
// Plotly's cartesian bundle, which starts in a fraction of its time. LICENSE.plotly.js holds the
// licences of all packages that are in it.
import { readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { gzipSync } from "node:zlib";

const ASSETS = dirname(fileURLToPath(import.meta.url));
const require = createRequire(join(process.cwd(), "/"));
const acorn = require("acorn"), walk = require("acorn-walk"), esbuild = require("esbuild");
const parse = (text) => acorn.parse(text, { ecmaVersion: "latest", sourceType: "script", allowReturnOutsideFunction: true });
const replace = (text, parts) => {
  for (const [start, end, made] of parts.sort((a, b) => b[0] - a[0])) text = text.slice(0, start) + made + text.slice(end);
  return text;
};

// Every attribute has a description, for Plotly's documentation alone.
const undescribed = (text) => {
  const found = [];
  walk.simple(parse(text), { ObjectExpression: ({ properties }) => {
    for (const { key, value } of properties) if (key?.name === "description") found.push([value.start, value.end, "void 0"]);
  } });
  return replace(text, found.filter(([start, end]) => !found.some(([from, to]) => from < start && end < to)));
};
// Colours are written as #rrggbb or rgb(): of culori's thirty spaces these and what converts
// between them are enough.
const COLOURS = `
  import { modeHsl, modeLrgb, modeRgb, useMode } from "culori/fn";
  [modeRgb, modeHsl, modeLrgb].forEach((mode) => useMode(mode));
  export { converter, formatHex, formatRgb, wcagContrast, wcagLuminance } from "culori/fn";
`;
const lighter = {
  name: "lighter",
  setup(build) {
    build.onLoad({ filter: /plotly\.js[\\/]src[\\/].*\.js$/ }, ({ path }) => ({ contents: undescribed(readFileSync(path, "utf8")), loader: "js" }));
    build.onResolve({ filter: /^culori$/ }, () => ({ path: "culori", namespace: "colours" }));
    build.onLoad({ filter: /.*/, namespace: "colours" }, () => ({ contents: COLOURS, loader: "js", resolveDir: process.cwd() }));
  },
};
// Each module is a function that is called once, at the start. In parentheses an engine compiles
// it at once, instead of reading it to its end first, and again when it is called.
const called = (text) => {
  const wrapped = new Map();
  walk.simple(parse(text), { VariableDeclarator: ({ init }) => {
    const [body, ...others] = init?.type === "CallExpression" ? init.arguments : [];
    if (body?.type !== "ArrowFunctionExpression" || others.length || body.body.type !== "BlockStatement") return;
    wrapped.set(init.callee.name, [...(wrapped.get(init.callee.name) ?? []), body]);
  } });
  const modules = [...wrapped.values()].sort((a, b) => b.length - a.length)[0];
  return replace(text, modules.flatMap((module) => [
    [module.start, module.body.start, `(function(${module.params.map(({ name }) => name).join(",")})`],
    [module.end, module.end, ")"],
  ]));
};

const { outputFiles } = await esbuild.build({
  entryPoints: [join(ASSETS, "plotly-parts.js")], outfile: "parts.js", write: false, bundle: true, minify: true, format: "iife",
  globalName: "Plotly", define: { global: "window" }, loader: { ".css": "empty" }, target: "es2020", legalComments: "none",
  nodePaths: [join(process.cwd(), "node_modules")], plugins: [lighter], logLevel: "warning",
});
const bundle = called(outputFiles.find(({ path }) => path.endsWith(".js")).text);
const { version } = require("plotly.js/package.json");
writeFileSync(join(ASSETS, `plotly-parts-${version}.min.js.gz`), gzipSync(bundle, { level: 9 }));

// Style, which Plotly would add rule by rule when it starts: each before those already there.
const { default: rules } = await import(`data:text/javascript,${encodeURIComponent(
  readFileSync(require.resolve("plotly.js/build/plotcss"), "utf8").replace(/^var Lib.*$/m, "").replace(/^for\([\s\S]*/m, "export default rules;"),
)}`);
const lines = Object.entries(rules).filter(([selector]) => !selector.includes("cloud")).reverse().map(([selector, rule]) =>
  `${selector.replace(/X/g, ".js-plotly-plot .plotly").replace(/Y/g, ".plotly-notifier")} { ${rule} }`);
writeFileSync(join(ASSETS, "plotly.css"), `/* Made by plotly-bundle.mjs from plotly.js ${version} (MIT licence, see LICENSE.plotly.js). */\n${lines.join("\n")}\n`);
console.log(`${bundle.length} characters, ${lines.length} rules`);
