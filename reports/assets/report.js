"use strict";
(async () => {
  const $ = (id) => document.getElementById(id);
  const make = (tag, properties = {}, ...children) => {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children.filter((child) => child !== null));
    return element;
  };
  const unpack = async (id) => {
    const text = $(id).textContent;
    const bytes = Uint8Array.fromBase64?.(text) ?? Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).text();
  };

  // The rules of reports/units.py.
  const MISSING = "–";
  const digits = (value) => {
    if (value === 0) return "0";
    const rounded = Number(value.toPrecision(3));
    return rounded.toFixed(Math.max(0, 2 - Math.floor(Math.log10(Math.abs(rounded)))));
  };
  const PREFIXES = { "-12": "p", "-9": "n", "-6": "µ", "-3": "m", 0: "", 3: "k", 6: "M", 9: "G", 12: "T", 15: "P", 18: "E" };
  const si = (value, unit) => {
    if (value === null || value === undefined) return MISSING;
    if (value === 0) return `0 ${unit}`.trim();
    const rounded = Number(value.toPrecision(3));
    const exponent = Math.min(18, Math.max(-12, 3 * Math.floor(Math.log10(Math.abs(rounded)) / 3 + 1e-12)));
    return `${digits(rounded / 10 ** exponent)} ${PREFIXES[exponent]}${unit}`.trim();
  };
  const memory = (value) => {
    if (value === null || value === undefined) return MISSING;
    const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let power = 0;
    while (Math.abs(value) >= 1023.5 && power < 5) { value /= 1024; power += 1; }
    return `${power ? digits(value) : Math.round(value)} ${units[power]}`;
  };
  // Without toLocaleString, whose first call takes as long as a chart.
  const count = (value) => value === null || value === undefined ? MISSING : String(Math.round(value)).replace(/\B(?=(\d{3})+$)/g, ",");
  const seconds = (value) => si(value, "s");
  const SUFFIXES = { _hz: "Hz", _s: "s", _w: "W", _j: "J", _c: "°C" };
  // A number with the unit that its dotted key names.
  const entry = (key, found) => {
    if (typeof found !== "number") return String(found);
    for (const part of key.split(".").reverse()) {
      if (part.endsWith("_bytes")) return memory(found);
      for (const [suffix, unit] of Object.entries(SUFFIXES)) if (part.endsWith(suffix)) return si(found, unit);
    }
    return String(found);
  };
  window.mambenchUnits = { si, memory, seconds, entry };

  if (typeof DecompressionStream === "undefined") { delete document.documentElement.dataset.script; return; }
  const data = JSON.parse(await unpack("data"));
  performance.mark("data");
  const columns = data.columns, slices = data.slices;
  // Columns with few distinct values travel as those and each row's number among them.
  const unpacked = {};
  const spreadOut = (packed) => (Array.isArray(packed) ? packed : packed.at.map((place) => packed.distinct[place]));
  const column = (name) => (unpacked[name] ??= spreadOut(columns[name]));
  // What surrounded a measurement, as texts.
  let notes = null;
  const noted = (row) => {
    notes ??= Object.entries(data.notes).map(([key, packed]) => [key, spreadOut(packed)]);
    return Object.fromEntries(notes.filter(([, found]) => found[row] !== null).map(([key, found]) => [key, entry(key, found[row])]));
  };
  // Evenly spaced row numbers travel as [first, -count, step].
  const range = (rows) => (rows[1] < 0 ? Array.from({ length: -rows[1] }, (_, i) => rows[0] + i * (rows[2] ?? 1)) : rows);
  const expand = (slice) => {
    if (slice.expanded) return slice;
    const [shared] = slice.over_state;
    slice.over_state = (shared?.lengths || []).map(({ seqlen, data: traces, layout }) => ({ seqlen, figure: { layout, data: traces.map(([place, own]) => {
      const trace = { ...shared.looks[place], ...own };
      for (const axis of ["x", "y"]) if (typeof own[axis] === "string") trace[axis] = { column: own[axis] };
      return trace;
    }) } }));
    const figures = [...slice.over_length, ...slice.over_state.map((entry) => entry.figure), slice.roofline];
    for (const figure of figures) for (const trace of figure?.data || []) trace.rows = range(trace.rows);
    slice.expanded = true;
    return slice;
  };
  for (const slice of slices) slice.rows = slice.rows.flatMap(range);
  // What is made from other columns, row by row, when it is asked for.
  const over = (numerator, row) => (numerator === null || value("time_s", row) === null ? null : numerator / value("time_s", row));
  const tokens = (row) => value("batch", row) * (value("pass", row) === "decode" || value("seqlen", row) === null ? 1 : value("seqlen", row));
  const bound = (name, row) => {
    const share = columns[name] ? column(name)[row] : null;
    return share === null ? null : Number((value("time_s", row) * (1 + share / 1e6)).toPrecision(6));
  };
  const MADE = {
    tokens_per_s: (row) => over(tokens(row), row),
    model_flop_per_s: (row) => over(value("model_flop", row), row),
    modelled_bytes_per_s: (row) => over(value("compulsory_bytes", row), row),
    case_id: (row) => Array.from(atob(column("case_id")[row]), (c) => c.charCodeAt(0).toString(16).padStart(2, "0")).join(""),
    telemetry: noted,
    time_low_s: (row) => bound("time_low_s", row),
    time_high_s: (row) => bound("time_high_s", row),
    quantiles_s: (row) => {
      const q = column("quantiles_s")[row];
      if (!q) return null;
      const [median, ...shares] = q, middle = shares.length / 2;
      return [...shares.slice(0, middle), 0, ...shares.slice(middle)].map((share) => Number(((median || value("time_s", row)) * (1 + share / 1e4)).toPrecision(5)));
    },
  };
  // Columns without any value are not embedded.
  const value = (name, row) => (MADE[name] ? MADE[name](row) : columns[name] ? column(name)[row] ?? null : null);
  const total = columns.case_id ? column("case_id").length : 0;
  if (!slices.length) return;

  // State, kept in the address.
  const DIMENSIONS = [["device", "Device"], ["level", "Level"], ["pass", "Pass"], ["dtype", "Data type"], ["size", "Size"]];
  const state = { slice: slices[0], d_state: null, seqlen: null, hidden: new Set(), baseline: null, other: null, norm: "", kernelsAt: null };
  const readAddress = () => {
    const asked = new URLSearchParams(location.hash.slice(1));
    if (!location.hash.includes("=")) return;
    state.hidden = new Set(asked.getAll("hide"));
    state.slice = nearest(Object.fromEntries(DIMENSIONS.map(([name]) => [name, asked.get(name)])), null);
    state.d_state = asked.get("d_state") ? Number(asked.get("d_state")) : null;
    state.seqlen = asked.get("seqlen") ? Number(asked.get("seqlen")) : null;
    for (const name of ["baseline", "other", "norm"]) state[name] = asked.get(name);
    state.kernelsAt = asked.get("kernels") ? Number(asked.get("kernels")) : null;
  };
  const writeAddress = () => {
    const kept = new URLSearchParams(DIMENSIONS.map(([name]) => [name, state.slice[name]]));
    if (state.d_state !== null) kept.set("d_state", state.d_state);
    if (state.seqlen !== null) kept.set("seqlen", state.seqlen);
    if (state.baseline && state.baseline !== state.slice.legend[0].label) kept.set("baseline", state.baseline);
    if (state.other) kept.set("other", state.other);
    if (state.norm) kept.set("norm", state.norm);
    if (state.kernelsAt) kept.set("kernels", state.kernelsAt);
    state.hidden.forEach((name) => kept.append("hide", name));
    history.replaceState(null, "", `#${kept}`);
  };
  // The selection that has the changed filter's value and agrees in most of the others.
  const nearest = (wanted, changed) => {
    const agreement = (slice) => DIMENSIONS.reduce((sum, [name], i) => sum + (slice[name] === wanted[name] ? 2 ** (9 - i) : 0), 0);
    const possible = slices.filter((slice) => !changed || slice[changed] === wanted[changed]);
    return possible.reduce((best, slice) => (agreement(slice) > agreement(best) ? slice : best), possible[0]);
  };

  // Colours follow the scheme.
  const dark = () => {
    if (matchMedia("print").matches) return false;
    const theme = document.documentElement.dataset.theme;
    return theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  };
  // Each is asked for once per scheme: to compute styles between changes to the page is dear.
  let inks = {};
  const css = (name) => (inks[name] ??= getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim());
  const font = getComputedStyle(document.body).fontFamily;
  const colour = (implementation) => data.looks[implementation][dark() ? 1 : 0];

  // Figures: references to rows become numbers, as in figures.resolve.
  const escape = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const interval = (row) => {
    const low = value("time_low_s", row), high = value("time_high_s", row);
    return low === null ? "" : `${seconds(low)} to ${seconds(high)}`;
  };
  const hover = (row, fixed) => {
    const lines = [`<b>${escape(value("label", row))}</b>`];
    const states = value("d_state", row) === null ? "" : `, d_state ${value("d_state", row)}`;
    const length = value("seqlen", row) === null ? "at any L" : `L = ${count(value("seqlen", row))}`;
    lines.push(`${length}${fixed ? "" : states}`);
    if (value("outcome", row) !== "ok") {
      const reason = escape(value("reason", row) || "");
      lines.push(`<b>${value("outcome", row)}</b>`, ...(reason.match(/.{1,60}(\s|$)|.{1,60}/g) || []).slice(0, 6));
    } else {
      lines.push(`time ${seconds(value("time_s", row))}${interval(row) ? ` (${interval(row)})` : ""}`);
      lines.push(si(value("tokens_per_s", row), "tok/s"));
      if (value("peak_memory_bytes", row) !== null) lines.push(`peak memory ${memory(value("peak_memory_bytes", row))}`);
    }
    return lines.join("<br>");
  };
  const term = (name, row) => (name === "tokens" ? tokens(row) : value(name, row));
  const drawnValue = (name, row) => {
    if (!data.derived[name]) return value(name, row);
    const [above, below] = data.derived[name].map((part) => term(part, row));
    return above === null || !below ? null : above / below;
  };
  // One chart over length: the curves that all charts share, with its own metric and layout.
  const overLength = (entry, [name, , metric, , bounds]) => {
    if (!entry.layouts[name]) return null;
    const traces = entry.data.map((trace) => {
      if (trace.meta.failure) return trace;
      const kept = trace.rows.map((row, i) => [row, i]).filter(([row]) => drawnValue(metric, row) > 0);
      const made = { ...trace, y: { column: metric }, rows: kept.map(([row]) => row) };
      if (Array.isArray(trace.x)) made.x = kept.map(([, i]) => trace.x[i]);
      if (bounds) made.interval = bounds;
      return made;
    });
    return { data: traces.filter((trace) => trace.rows.length), layout: entry.layouts[name] };
  };
  // Where gaps between launches are in the time, what is made of it has hollow points.
  const gaps = (row) => value("flags", row).some((flag) => flag.startsWith(data.gaps));
  const hollow = (symbol) => (symbol.endsWith("-open") ? `${symbol}-dot` : `${symbol}-open`);
  const resolve = (trace, width) => {
    if (trace.meta.roof) {
      return { ...trace, hoverinfo: "name", line: { ...trace.line, color: css("soft") }, hoverlabel: { namelength: -1 } };
    }
    const look = data.looks[trace.meta.implementation], tint = colour(trace.meta.implementation);
    const made = { ...trace, customdata: trace.rows, hoverinfo: "text", marker: { ...trace.marker }, visible: !state.hidden.has(trace.meta.series) };
    for (const axis of ["x", "y"]) {
      if (trace[axis].column) made[axis] = trace.rows.map((row) => drawnValue(trace[axis].column, row));
    }
    made.hovertext = trace.hovertext || trace.rows.map((row) => hover(row, trace.meta.reference));
    made.hoverlabel = { align: "left", bgcolor: css("page"), bordercolor: tint, font: { color: css("ink") } };
    if (trace.meta.failure) {
      made.marker.line = { ...trace.marker.line, color: tint };
      made.textfont = { color: css("soft"), size: 11 };
      made.mode = width < 760 ? "markers" : trace.mode;
    } else {
      made.line = { ...trace.line, color: tint };
      made.marker.color = tint;
      const open = trace.marker.symbol.endsWith("-open");
      made.marker.line = { color: open ? tint : css("page"), width: open ? 2 : 1 };
      const marked = data.timed.includes(trace.y.column) && !trace.meta.reference ? trace.rows.map(gaps) : [];
      if (marked.some(Boolean)) {
        made.marker.symbol = marked.map((has) => (has ? hollow(trace.marker.symbol) : trace.marker.symbol));
        made.marker.line = { color: marked.map((has) => (has || open ? tint : css("page"))), width: marked.map((has) => (has || open ? 2 : 1)) };
      }
    }
    if (trace.interval) {
      const [low, high] = trace.interval;
      const gap = (row, end, sign) => value(end, row) === null ? 0 : Math.max(0, sign * (value(end, row) - value("time_s", row)));
      made.error_y = {
        type: "data", symmetric: false, thickness: 1.2, width: 3, color: tint,
        array: trace.rows.map((row) => gap(row, high, 1)), arrayminus: trace.rows.map((row) => gap(row, low, -1)),
      };
    }
    return look ? made : trace;
  };
  // To measure labels is dear, and how long the written ones are is known: they never turn, the
  // margin fits them, and the title has its usual place, which spaces before the labels keep free.
  const written = { automargin: false, tickangle: 0 };
  const axisLook = (axis, pad = "") => ({
    ...axis, ...(axis.ticktext ? { ...written, ticktext: axis.ticktext.map((text) => pad + text) } : { automargin: true }),
    title: axis.title ? { ...axis.title, font: { size: 12.5 } } : undefined, gridcolor: css("grid"), zeroline: false, linecolor: css("line"), ticklabeloverflow: "allow", tickfont: { color: css("soft") }, showline: true, ticks: "", minor: { showgrid: false },
  });
  const layoutOf = (figure) => {
    const layout = { ...figure.layout };
    layout.xaxis = axisLook(layout.xaxis);
    layout.yaxis = axisLook(layout.yaxis, "\u00a0\u00a0");
    if (innerWidth < 480 && layout.xaxis.tickvals) {
      layout.xaxis.title = { ...layout.xaxis.title, text: layout.xaxis.title.text.replace(/ \(.*/, "") };
      const every = Math.ceil(layout.xaxis.tickvals.length / 5);
      for (const key of ["tickvals", "ticktext"]) layout.xaxis[key] = layout.xaxis[key].filter((_, i) => i % every === 0);
    }
    const longest = Math.max(0, ...(figure.layout.yaxis.ticktext || []).map((text) => text.length));
    return {
      ...layout, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, hovermode: "closest", dragmode: "zoom",
      margin: { l: Math.max(64, 50 + 7 * longest), r: 28, t: 22, b: 56 }, font: { family: font, size: 12.5, color: css("ink") },
    };
  };

  // Plotly would offer to upload the chart to its makers' server.
  const CONFIG = { displaylogo: false, showSendToCloud: false, plotlyServerURL: "", responsive: true, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d", "zoomIn2d", "zoomOut2d", "pan2d", "zoom2d"] };
  const cards = new Map();
  let ready = false;
  const addCard = (name, title, wide) => {
    // The first chart is there already, as a picture, until Plotly has drawn it.
    const still = $("chart-grid").querySelector(`[data-card="${name}"]`);
    const plot = still?.querySelector(".plot") || make("div", { className: "plot" });
    const note = make("small");
    const caption = make("figcaption", {}, title, note);
    const figure = still || make("figure", { className: wide ? "card wide" : "card" });
    figure.replaceChildren(caption, plot);
    $("chart-grid").append(figure);
    cards.set(name, { plot, caption, note, figure, name, title, spec: null, seen: false });
    observer.observe(figure);
  };
  const draw = (card) => {
    if (!ready || !card.seen || !card.spec) return;
    const width = card.plot.clientWidth;
    card.plot.querySelector(".still")?.remove();
    const drawn = Plotly.react(card.plot, card.spec.data.map((trace) => resolve(trace, width)), layoutOf(card.spec), {
      ...CONFIG, toImageButtonOptions: { filename: `mambench-${card.name}`, scale: 2 },
    });
    drawn.then(() => {
      card.plot.dataset.drawn = card.spec.data.length;
      if (card.bound) return;
      card.bound = true;
      card.plot.on("plotly_click", (event) => { if (event.points[0].customdata !== undefined) showDetail(event.points[0].customdata); });
    });
  };
  // Work that is not above the fold, a piece at a time, when the page is at rest.
  const waiting = [];
  const atRest = window.requestIdleCallback ? (work) => requestIdleCallback(work, { timeout: 300 }) : (work) => setTimeout(work, 1);
  const proceed = () => { waiting.shift()(); if (waiting.length) atRest(proceed); };
  const later = (work) => { waiting.push(work); if (waiting.length === 1) atRest(proceed); };
  const observer = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      const card = [...cards.values()].find((other) => other.figure === entry.target);
      if (entry.isIntersecting && card && !card.seen) { card.seen = true; if (ready) later(() => draw(card)); }
    }
  }, { rootMargin: "300px" });

  const symbolPath = (symbol) => {
    const shapes = {
      circle: "M14 3.5a4.5 4.5 0 1 0 .01 0z", square: "M10 4h8v8h-8z", diamond: "M14 2.5l5.5 5.5-5.5 5.5-5.5-5.5z", "triangle-up": "M14 3l5 9h-10z",
      "triangle-down": "M14 13l5-9h-10z", cross: "M12.5 3h3v3.5h3.5v3h-3.5v3.5h-3v-3.5h-3.5v-3h3.5z", star: "M14 2l1.6 4h4.2l-3.4 2.6 1.3 4.2-3.7-2.5-3.7 2.5 1.3-4.2-3.4-2.6h4.2z",
      hexagon: "M10 5.5l4-2.5 4 2.5v5l-4 2.5-4-2.5z", pentagon: "M14 3l5 3.8-1.9 5.7h-6.2l-1.9-5.7z", bowtie: "M9 4l5 4 5-4v8l-5-4-5 4z",
    };
    return shapes[symbol.replace("-open", "")] || shapes.circle;
  };
  const DASHES = { solid: "", dash: "5 3", dot: "1.5 2.5", dashdot: "5 2 1.5 2", longdash: "8 3", longdashdot: "8 2 1.5 2" };
  const sample = ({ implementation, symbol, dash }) => {
    const tint = colour(implementation), open = symbol.endsWith("-open");
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    const part = (tag, attributes) => {
      const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
      Object.entries(attributes).forEach(([key, text]) => element.setAttribute(key, text));
      svg.append(element);
    };
    Object.entries({ width: 28, height: 16, "aria-hidden": "true" }).forEach(([key, text]) => svg.setAttribute(key, text));
    part("line", { x1: 0, x2: 28, y1: 8, y2: 8, stroke: tint, "stroke-width": 2, "stroke-dasharray": DASHES[dash] || "" });
    part("path", { d: symbolPath(symbol), fill: open ? css("page") : tint, stroke: tint, "stroke-width": open ? 2 : 1 });
    return svg;
  };
  const showLegend = () => {
    const buttons = state.slice.legend.map((entry) => {
      const button = make("button", { type: "button" }, sample(entry), entry.label,
        entry.state && state.d_state === null ? make("small", { textContent: `N = ${entry.state}` }) : null);
      button.setAttribute("aria-pressed", String(!state.hidden.has(entry.label)));
      button.addEventListener("click", () => {
        state.hidden.has(entry.label) ? state.hidden.delete(entry.label) : state.hidden.add(entry.label);
        button.setAttribute("aria-pressed", String(!state.hidden.has(entry.label)));
        writeAddress();
        cards.forEach(draw);
        showWins();
        showKernels();
      });
      return button;
    });
    $("legend").replaceChildren(...buttons);
  };

  const choice = (title, options, chosen, change) => {
    const select = make("select", {}, ...options.map(([text, label]) => make("option", { value: text, textContent: label, selected: text === chosen })));
    select.addEventListener("change", () => change(select.value));
    return make("label", { className: "field" }, make("span", { textContent: title }), select);
  };
  const pills = (name, title, options, chosen, change) => {
    const labels = options.map((option) => {
      const input = make("input", { type: "radio", name, value: option, checked: option === chosen });
      input.addEventListener("change", () => change(option));
      return make("label", {}, input, option);
    });
    return make("fieldset", {}, make("legend", { textContent: title }), make("div", { className: "pills" }, ...labels));
  };
  const showControls = () => {
    const focused = document.activeElement?.name;
    const parts = DIMENSIONS.map(([name, title]) => {
      const options = [...new Set(slices.map((slice) => slice[name]))];
      if (options.length < 2) return null;
      const change = (option) => {
        state.slice = nearest({ ...state.slice, [name]: option }, name);
        state.d_state = null;
        state.seqlen = null;
        update();
      };
      const short = options.length <= 4 && options.join("").length < 40;
      return short ? pills(name, title, options, state.slice[name], change)
        : choice(title, options.map((o) => [o, o]), state.slice[name], change);
    });
    const states = state.slice.over_length;
    if (states.length > 1) {
      const options = states.map((entry) => [String(entry.d_state ?? ""), entry.d_state === null ? "each one's usual" : `${entry.d_state}`]);
      parts.push(choice("State size N (charts over L)", options, String(state.d_state ?? ""), (text) => {
        state.d_state = text ? Number(text) : null;
        update();
      }));
    }
    $("controls").replaceChildren(...parts.filter(Boolean));
    $("controls").hidden = !$("controls").childElementCount;
    if (focused) $("controls").querySelector(`input[name="${CSS.escape(focused)}"]:checked`)?.focus();
  };

  let first = true;
  const update = () => {
    expand(state.slice);
    writeAddress();
    showControls();
    showLegend();
    document.querySelectorAll("[data-slice]").forEach((part) => {
      part.hidden = part.dataset.slice !== state.slice.key;
      part.classList.remove("later");
    });
    document.querySelectorAll("[data-group]").forEach((part) => { part.hidden = part.dataset.group !== group(state.slice); });
    $("hollow").hidden = !state.slice.rows.some(gaps);
    const lengths = state.slice.over_length.find((entry) => entry.d_state === state.d_state) || state.slice.over_length[0];
    for (const chart of data.charts) {
      const [name, title, , note, , ofDecode] = chart, card = cards.get(name);
      card.spec = overLength(lengths, chart);
      card.figure.hidden = !card.spec;
      if (!card.spec) continue;
      card.note.textContent = (state.slice.pass === "decode" && ofDecode) || note;
      describe(card, `${title} against sequence length`);
      draw(card);
    }
    $("points").hidden = !data.charts.some(([name]) => cards.get(name).spec);
    const roofline = cards.get("roofline");
    roofline.spec = state.slice.roofline;
    roofline.figure.hidden = !roofline.spec;
    if (roofline.spec) {
      const roofs = roofline.spec.data.filter((trace) => trace.meta.roof).map((trace) => trace.name);
      roofline.note.textContent = roofs.length ? roofs.join("; ") : "no ceiling is known of this device";
      describe(roofline, "Work rate against arithmetic intensity");
      draw(roofline);
    }
    for (const part of [showStates, showWins, showMachines, showKernels, showCases]) first ? later(part) : part();
    first = false;
  };
  const showStates = () => {
    const states = state.slice.over_state, card = cards.get("state");
    card.figure.hidden = !states.length;
    if (!states.length) return;
    const chosen = states.find((entry) => entry.seqlen === state.seqlen) || states[0];
    card.spec = chosen.figure;
    card.note.textContent = `against state size at L = ${count(chosen.seqlen)}`;
    describe(card, `Time against state size at length ${count(chosen.seqlen)}`);
    card.caption.querySelector(".field")?.remove();
    if (states.length > 1) {
      card.caption.append(choice("at L = ", states.map((entry) => [String(entry.seqlen), count(entry.seqlen)]), String(chosen.seqlen), (text) => {
        state.seqlen = Number(text);
        update();
      }));
    }
    draw(card);
  };
  // Who wins where: every implementation and state size against one of them, by length.
  const near = (end, row) => Math.log(value(end, row) / value("time_s", row));
  // As machines.ratio: distances to the near ends of both intervals, added in quadrature.
  const speedup = (ours, theirs) => {
    const ratio = value("time_s", theirs) / value("time_s", ours);
    if ([ours, theirs].some((row) => value("time_low_s", row) === null)) return { ratio, low: null, high: null };
    const down = Math.hypot(near("time_low_s", theirs), near("time_high_s", ours)), up = Math.hypot(near("time_high_s", theirs), near("time_low_s", ours));
    return { ratio, low: ratio * Math.exp(-down), high: ratio * Math.exp(up) };
  };
  window.mambenchSpeedup = (ours, theirs) => speedup(ours, theirs);
  const times = (ratio) => `${ratio >= 999.5 ? count(Number(ratio.toPrecision(3))) : digits(ratio)}×`;
  const factor = (ratio) => (ratio < 0.1 ? `1/${times(1 / ratio)}` : times(ratio));
  const tinted = (cell, found) => {
    const sure = found.low === null || found.low > 1 || found.high < 1;
    if (!sure) cell.classList.add("unsure");
    else {
      const share = Math.min(1, Math.abs(Math.log2(found.ratio)) / 4);
      cell.style.setProperty("--share", `${Math.round(14 + 56 * share)}%`);
      cell.classList.add(found.ratio >= 1 ? "faster" : "slower");
    }
    return sure;
  };
  const showWins = () => {
    const rows = state.slice.rows, labels = state.slice.legend.map((entry) => entry.label);
    const lengths = [...new Set(rows.map((row) => value("seqlen", row)).filter((n) => n !== null))].sort((a, b) => a - b);
    const at = new Map(rows.map((row) => [`${value("label", row)}|${value("d_state", row) ?? ""}|${value("seqlen", row) ?? ""}`, row]));
    const find = (label, n, length) => {
      const entry = state.slice.legend.find((other) => other.label === label);
      for (const d of [n ?? "", "", entry.state ?? ""]) for (const l of [length, ""]) {
        const found = at.get(`${label}|${d}|${l}`);
        if (found !== undefined) return found;
      }
      return undefined;
    };
    if (!labels.includes(state.baseline)) state.baseline = labels[0];
    $("wins").hidden = labels.length < 2 || lengths.length < 1 || rows.every((row) => value("time_s", row) === null);
    if ($("wins").hidden) return;
    $("wins-baseline").replaceChildren(choice("Speed-up over", labels.map((name) => [name, name]), state.baseline, (name) => { state.baseline = name; update(); }));
    const head = make("tr", {}, make("th", { scope: "col", className: "text", textContent: "Implementation" }), make("th", { scope: "col", textContent: "N" }),
      ...lengths.map((length, i) => make("th", { scope: "col", textContent: `${i ? "" : "L = "}${count(length)}` })));
    const body = [], sparse = [];
    for (const label of labels) {
      if (label === state.baseline || state.hidden.has(label)) continue;
      const states = [...new Set(rows.filter((row) => value("label", row) === label).map((row) => value("d_state", row)))].sort((a, b) => a - b);
      const lines = [];
      states.forEach((n, i) => {
        const line = make("tr", { className: i ? "" : "first" }, make("th", { scope: "row", className: "text", textContent: label }), make("td", { textContent: n === null ? MISSING : count(n) }));
        for (const length of lengths) {
          const row = at.get(`${label}|${n ?? ""}|${length}`) ?? at.get(`${label}|${n ?? ""}|`);
          const cell = make("td"), theirs = find(state.baseline, n, length);
          line.append(cell);
          if (row === undefined) { cell.textContent = MISSING; cell.className = "none"; continue; }
          const button = make("button", { type: "button" });
          button.addEventListener("click", () => showDetail(row));
          cell.append(button);
          if (value("outcome", row) !== "ok" || value("time_s", row) === null) {
            button.textContent = value("outcome", row) === "ok" ? "no time" : value("outcome", row);
            button.title = value("reason", row) || "";
            cell.className = "ended";
          } else if (theirs === undefined || value("time_s", theirs) === null) {
            button.textContent = "no baseline";
            button.title = `${state.baseline}: ${theirs === undefined ? "not asked here" : value("outcome", theirs)}`;
            cell.className = "none";
          } else {
            const found = speedup(row, theirs), sure = tinted(cell, found), unstable = value("converged", row) === false || value("converged", theirs) === false;
            button.textContent = `${factor(found.ratio)}${unstable ? " ~" : ""}`;
            button.title = `${found.low === null ? "no interval" : `${factor(found.low)} to ${factor(found.high)}`}${sure ? "" : ", not significant"}${unstable ? ", unstable: a time did not settle" : ""}`;
            button.setAttribute("aria-label", `${label}${n === null ? "" : `, d_state ${n}`}, L ${count(length)}: ${button.textContent}, ${button.title}`);
            cell.dataset.row = row;
            cell.dataset.baseline = theirs;
          }
        }
        lines.push([line, line.querySelectorAll("button").length]);
      });
      const most = Math.max(...lines.map(([, asked]) => asked));
      for (const [line, asked] of lines) (2 * asked <= most ? sparse : body).push(line);
    }
    $("wins-table").tHead.replaceChildren(head);
    if (sparse.length && body.length) body.push(make("tr", { className: "first" }, make("th", { scope: "rowgroup", colSpan: lengths.length + 2, className: "text few", textContent: "Measured at few lengths" })));
    $("wins-table").tBodies[0].replaceChildren(...body, ...sparse);
  };

  // The same questions on another machine, as machines.shared: implementations choose variants by it.
  const matched = (here, there) => {
    const question = (row) => ["implementation", "family", "seqlen", "d_state", "headdim", "ngroups", "gated"].map((name) => value(name, row)).join("|");
    const unique = [here, there].every((rows) => new Set(rows.map(question)).size === rows.length);
    const key = (row) => question(row) + (unique ? "" : `|${value("variant", row)}`);
    const found = new Map(there.map((row) => [key(row), row]));
    return (row) => found.get(key(row));
  };
  const group = (slice) => slice.key.split("~").slice(1).join("~");
  const showMachines = () => {
    const card = cards.get("machines"), others = slices.filter((slice) => group(slice) === group(state.slice) && slice.key !== state.slice.key);
    card.figure.hidden = !others.length;
    if (!others.length) return;
    const there = others.find((slice) => slice.device === state.other) || others[0];
    const described = (slice) => data.machines[slice.dtype].find((machine) => machine.label === slice.device);
    const [here, remote] = [described(state.slice), described(there)];
    const scales = { "": 1, bandwidth: remote.bytes_per_s / here.bytes_per_s, peak: remote.flop_per_s / here.flop_per_s };
    const known = Object.keys(scales).filter((name) => Number.isFinite(scales[name]) && scales[name] > 0);
    const norm = known.includes(state.norm) ? state.norm : "", scale = scales[norm];
    const same = matched(state.slice.rows, there.rows);
    const template = state.slice.over_length.find((entry) => entry.d_state === state.d_state) || state.slice.over_length[0];
    const time = overLength(template, data.charts[0]) || { data: [], layout: {} };
    const traces = time.data.filter((trace) => !trace.meta.failure).map((trace) => {
      const pairs = trace.rows.map((row, i) => [row, same(row), Array.isArray(trace.x) ? trace.x[i] : value("seqlen", row)])
        .filter(([row, other]) => other !== undefined && value("time_s", row) !== null && value("time_s", other) !== null);
      const found = pairs.map(([row, other]) => speedup(other, row));
      return {
        ...trace, interval: undefined, rows: pairs.map(([row]) => row), x: pairs.map(([, , x]) => x), y: found.map((one) => one.ratio / scale),
        hovertext: pairs.map(([row, other], i) => `<b>${escape(value("label", row))}</b><br>L = ${count(pairs[i][2])}<br>here ${seconds(value("time_s", row))} (${escape(value("variant", row))}), there ${seconds(value("time_s", other))} (${escape(value("variant", other))})<br>${factor(found[i].ratio)}${found[i].low === null ? "" : ` (${factor(found[i].low)} to ${factor(found[i].high)})`}`),
        error_y: { type: "data", symmetric: false, thickness: 1.2, width: 3, color: colour(trace.meta.implementation),
          array: found.map((one) => (one.high === null ? 0 : (one.high - one.ratio) / scale)), arrayminus: found.map((one) => (one.low === null ? 0 : (one.ratio - one.low) / scale)) },
      };
    }).filter((trace) => trace.rows.length);
    const drawn = traces.flatMap((trace) => trace.y), far = Math.min(...drawn) < 0.2 || Math.max(...drawn) > 5;
    const ends = [Math.min(1, ...drawn), Math.max(1, ...drawn)].map(Math.log10), pad = 0.06 * (ends[1] - ends[0]);
    const marks = [-6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5].flatMap((power) => (ends[1] - ends[0] > 3 ? [1] : [1, 2, 5]).map((m) => Number(`${m}e${power}`)))
      .filter((mark) => Math.log10(mark) >= ends[0] - pad && Math.log10(mark) <= ends[1] + pad);
    const scaled = far ? { type: "log", range: [ends[0] - pad, ends[1] + pad], tickmode: "array", tickvals: marks, ticktext: marks.map((mark) => `${mark < 1 ? mark : count(mark)}×`) } : { type: "linear", rangemode: "tozero" };
    card.spec = { data: traces, layout: { xaxis: time.layout.xaxis || {}, yaxis: { ...scaled, title: { text: norm ? `speed-up / ${norm} ratio` : "speed-up" } },
      shapes: [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: 1, y1: 1, line: { dash: "dot", width: 1, color: css("soft") } }] } };
    card.note.textContent = `speed-up of ${there.device} over ${state.slice.device}${norm ? `, divided by the ratio of their ${norm} (${factor(scale)}; ${remote.origin}${remote.origin === here.origin ? "" : ` over ${here.origin}`})` : ""}`;
    describe(card, `Speed-up of ${there.device} over ${state.slice.device}`);
    card.caption.querySelectorAll(".field").forEach((field) => field.remove());
    const fields = [];
    if (others.length > 1) fields.push(choice("against", others.map((slice) => [slice.device, slice.device]), there.device, (name) => { state.other = name; update(); }));
    if (known.length > 1) fields.push(choice("divided by", known.map((name) => [name, name || "nothing"]), norm, (name) => { state.norm = name; update(); }));
    card.caption.append(...fields);
    draw(card);
  };

  // Which kernels the GPU's time goes to.
  const short = (name) => (name.length > 44 ? `${name.slice(0, 43)}…` : name);
  const showKernels = () => {
    const rows = state.slice.rows.filter((row) => data.extras[row]?.kernels && !state.hidden.has(value("label", row)));
    $("kernels").hidden = !rows.length;
    if (!rows.length) return;
    const lengths = [...new Set(rows.map((row) => value("seqlen", row)).filter((n) => n !== null))].sort((a, b) => a - b);
    const length = lengths.includes(state.kernelsAt) ? state.kernelsAt : lengths[lengths.length - 1];
    $("kernels-length").replaceChildren(...(lengths.length > 1 ? [choice("at L =", lengths.map((n) => [String(n), count(n)]), String(length), (text) => { state.kernelsAt = Number(text); update(); })] : []));
    const chosen = rows.filter((row) => value("seqlen", row) === length || value("seqlen", row) === null);
    $("kernels-table").tBodies[0].replaceChildren(...chosen.map((row) => {
      const kernels = data.extras[row].kernels, first = kernels.slice(0, 5);
      const bar = make("div", { className: "shares" }, ...kernels.map((kernel) => {
        const part = make("span", { title: `${kernel.name}: ${(100 * kernel.share).toFixed(1)} %, ${kernel.count} times` });
        part.style.flexGrow = String(Math.max(kernel.share, 0.002));
        return part;
      }));
      bar.setAttribute("aria-hidden", "true");
      const list = make("ol", {}, ...first.map((kernel) => make("li", { textContent: `${(100 * kernel.share).toFixed(1)} % ${short(kernel.name)}${kernel.count > 1 ? ` (${count(kernel.count)} times)` : ""}`, title: kernel.name })));
      const more = kernels.length - first.length;
      return make("tr", {}, make("th", { scope: "row", className: "text" }, value("label", row), value("d_state", row) === null ? null : make("small", { textContent: `d_state ${value("d_state", row)}` })),
        make("td", { textContent: count(value("kernel_count", row)) }), make("td", { className: "text" }, bar, list, more > 0 ? make("small", { textContent: `and ${more} more` }) : null));
    }));
  };

  const describe = (card, text) => {
    card.plot.setAttribute("role", "group");
    card.plot.setAttribute("aria-label", `${text}, ${state.slice.device}, ${state.slice.title}. The numbers are in the tables below.`);
  };

  // The table of all cases.
  const withInterval = (row) => make("span", {}, seconds(value("time_s", row)), interval(row) ? make("small", { textContent: interval(row) }) : null);
  const FIELDS = [
    { key: "device", title: "Device", all: true, text: true }, { key: "label", title: "Implementation", text: true }, { key: "variant", title: "Variant", text: true },
    { key: "level", title: "Level", all: true, text: true }, { key: "pass", title: "Pass", all: true, text: true }, { key: "dtype", title: "Type", text: true },
    { key: "batch", title: "B", all: true, show: count }, { key: "d_inner", title: "Width", all: true, show: count },
    { key: "seqlen", title: "L", show: count }, { key: "d_state", title: "N", show: count }, { key: "outcome", title: "Outcome", text: true },
    { key: "time_s", title: "Time", cell: withInterval }, { key: "tokens_per_s", title: "Tokens/s", show: (v) => si(v, "") },
    { key: "peak_memory_bytes", title: "Peak memory", show: memory },
    { key: "model_flop", title: "FLOP (modelled)", show: (v) => si(v, "") }, { key: "model_flop_per_s", title: "FLOP/s (modelled)", show: (v) => si(v, "") },
    { key: "compulsory_bytes", title: "Bytes (modelled)", show: (v) => si(v, "B") }, { key: "modelled_bytes_per_s", title: "Bytes/s (modelled)", show: (v) => si(v, "B/s") },
    { key: "case_id", title: "Case", text: true },
  ];
  const PAGE = 100;
  const table = { sort: null, down: false, limit: PAGE };
  const chosenRows = () => {
    const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean), outcome = $("outcome").value;
    const source = $("scope").checked ? state.slice.rows : [...Array(total).keys()];
    const kept = source.filter((row) => {
      if (outcome && value("outcome", row) !== outcome) return false;
      const text = ["device", "label", "variant", "family", "level", "pass", "dtype", "seqlen", "d_state", "outcome", "case_id", "reason"].map((name) => value(name, row)).join(" ").toLowerCase();
      return words.every((word) => text.includes(word));
    });
    if (!table.sort) return kept;
    const sign = table.down ? -1 : 1, key = table.sort;
    return kept.sort((a, b) => {
      const x = value(key, a), y = value(key, b);
      if (x === null || y === null) return (x === null) - (y === null);
      return sign * (typeof x === "number" ? x - y : String(x).localeCompare(String(y)));
    });
  };
  const showCases = () => {
    const narrow = $("scope").checked, shown = FIELDS.filter((field) => !(narrow && field.all));
    const rows = chosenRows();
    const heads = shown.map((field) => {
      const button = make("button", { type: "button", textContent: field.title });
      button.addEventListener("click", () => {
        table.down = table.sort === field.key && !table.down;
        table.sort = field.key;
        showCases();
        [...$("case-table").querySelectorAll("thead button")].find((b) => b.textContent === field.title).focus();
      });
      const head = make("th", { scope: "col", className: field.text ? "text" : "" }, button);
      head.setAttribute("aria-sort", table.sort === field.key ? (table.down ? "descending" : "ascending") : "none");
      return head;
    });
    const body = rows.slice(0, table.limit).map((row) => make("tr", {}, ...shown.map((field) => {
      const cell = make("td", { className: field.text ? "text-cell text" : "" });
      const found = value(field.key, row);
      if (field.key === "case_id") {
        const button = make("button", { type: "button", textContent: found, title: "Where this comes from" });
        button.addEventListener("click", () => showDetail(row));
        cell.append(button);
      } else if (field.key === "outcome") {
        cell.append(make("span", { className: `outcome ${found === "ok" ? "ok" : ""}`, textContent: found, title: value("reason", row) || "" }));
      } else cell.append(field.cell ? field.cell(row) : field.show ? field.show(found) : found ?? MISSING);
      return cell;
    })));
    $("case-table").tHead.replaceChildren(make("tr", {}, ...heads));
    $("case-table").tBodies[0].replaceChildren(...body);
    $("case-count").textContent = `${count(rows.length)} of ${count(total)} cases`;
    $("more").hidden = rows.length <= table.limit;
  };
  for (const id of ["search", "outcome", "scope"]) $(id).addEventListener("input", () => { table.limit = PAGE; showCases(); });
  $("more").addEventListener("click", () => { table.limit += 5 * PAGE; showCases(); });
  $("outcome").append(...["", ...new Set(column("outcome"))].map((name) => make("option", { value: name, textContent: name || "all" })));

  // Where a number comes from.
  const spread = (row) => {
    const q = value("quantiles_s", row);
    if (!q) return null;
    const text = `min ${seconds(q[0])}, 5 % ${seconds(q[1])}, 25 % ${seconds(q[2])}, median ${seconds(q[3])}, 75 % ${seconds(q[4])}, 95 % ${seconds(q[5])}, max ${seconds(q[6])}`;
    return text;
  };
  const picture = (width, height, text) => {
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    const attributes = { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": text };
    Object.entries(attributes).forEach(([key, word]) => svg.setAttribute(key, word));
    const add = (tag, found) => {
      const part = document.createElementNS("http://www.w3.org/2000/svg", tag);
      Object.entries(found).forEach(([key, word]) => part.setAttribute(key, word));
      svg.append(part);
    };
    return [svg, add];
  };
  // Where the samples lie: extremes, 5 to 95 %, 25 to 75 %, median; the bar below is the interval.
  const boxplot = (row) => {
    const q = value("quantiles_s", row);
    if (!q || q[6] <= q[0]) return null;
    const x = (time) => (6 + (468 * (time - q[0])) / (q[6] - q[0])).toFixed(1);
    const [svg, add] = picture(480, 40, `Distribution of the samples: ${spread(row)}`);
    const ink = css("ink"), tint = colour(value("implementation", row));
    add("path", { d: `M${x(q[0])} 14H${x(q[6])}`, stroke: css("soft"), "stroke-width": 1 });
    add("path", { d: `M${x(q[1])} 14H${x(q[5])}`, stroke: tint, "stroke-width": 3 });
    add("rect", { x: x(q[2]), y: 5, width: Math.max(1, x(q[4]) - x(q[2])), height: 18, fill: tint, opacity: 0.45 });
    add("path", { d: `M${x(q[3])} 3V25`, stroke: ink, "stroke-width": 2 });
    const low = value("time_low_s", row), high = value("time_high_s", row);
    if (low !== null) add("path", { d: `M${x(Math.max(low, q[0]))} 34H${x(Math.min(high, q[6]))}`, stroke: ink, "stroke-width": 3 });
    return ["Distribution", svg];
  };
  const traceOf = (row) => {
    const found = (data.extras[row]?.trace || []).filter((point) => point.power_w !== null && point.power_w !== undefined);
    if (found.length < 2) return null;
    const powers = found.map((point) => point.power_w), clocks = found.map((point) => point.sm_clock_hz).filter(Boolean);
    const ends = (all, unit) => `${si(Math.min(...all), unit)} to ${si(Math.max(...all), unit)}`;
    const said = `power ${ends(powers, "W")}${clocks.length ? `, clock ${ends(clocks, "Hz")}` : ""}, over ${seconds(found[found.length - 1].at_s)}`;
    const [svg, add] = picture(480, 70, `Trace while energy was counted: ${said}`);
    const line = (key, tint, dash) => {
      const kept = found.filter((point) => point[key]), top = Math.max(...kept.map((point) => point[key]));
      if (kept.length > 1) add("path", { fill: "none", stroke: tint, "stroke-width": 2, "stroke-dasharray": dash, d: `M${kept.map((point) => `${((480 * point.at_s) / found[found.length - 1].at_s).toFixed(1)} ${(66 - (60 * point[key]) / top).toFixed(1)}`).join("L")}` });
    };
    line("power_w", colour(value("implementation", row)), "");
    line("sm_clock_hz", css("soft"), "4 3");
    return ["Power, clock (dashed)", make("div", {}, svg, make("small", { textContent: said }))];
  };
  const word = (text) => (/^[\w@%+=:,./-]+$/.test(text) ? text : `'${String(text).replace(/'/g, "'\"'\"'")}'`);
  // As reproduce.command; what all cases of a run share is made there.
  const command = (row) => {
    const has = (name) => value(name, row) !== null;
    const names = ["batch", "seqlen", value("level", row) === "block" ? "d_model" : "d_inner", "d_state", "headdim", "ngroups"].filter(has);
    if (value("level", row) === "op" && value("family", row) !== "attention") names.push("gated");
    return ["python run_bench.py run --suite custom", "-i", word(`${value("implementation", row)}:${value("variant", row)}`),
      ...names.flatMap((name) => ["-a", `${name}=${value(name, row)}`]), "--pass", value("pass", row), "--dtype", value("dtype", row),
      "--filter", `family=${value("family", row)}`, "--filter", `level=${value("level", row)}`, data.runs[value("run_id", row)].repeat].join(" ");
  };
  window.mambenchCommand = command;
  const showDetail = (row) => {
    const run = data.runs[value("run_id", row)] || {};
    const entries = [
      ["Outcome", value("reason", row) ? `${value("outcome", row)}: ${value("reason", row)}` : value("outcome", row)],
      ["Case", `${value("family", row)}, ${value("level", row)}, ${value("pass", row)}, ${value("dtype", row)}, batch ${value("batch", row)}, L ${count(value("seqlen", row))}, d_inner ${count(value("d_inner", row))}`
        + ["d_model", "d_state", "headdim", "ngroups"].filter((name) => value(name, row) !== null).map((name) => `, ${name} ${value(name, row)}`).join("")],
      ["Variant", value("variant", row)],
      ["Time", value("time_s", row) === null ? value("missing", row)?.time_s : `${seconds(value("time_s", row))}${interval(row) ? `, ${(100 * value("coverage", row)).toFixed(1)} % interval ${interval(row)} (over ${value("interval_over", row)})` : ""}`],
      ["Samples", value("samples", row) ? `${count(value("samples", row))} in ${value("rounds", row)} round${value("rounds", row) > 1 ? "s" : ""}, by ${value("method", row) || "an unnamed method"}` : null],
      ["Spread", spread(row)],
      ["Call time", value("call_time_s", row) === null ? null : seconds(value("call_time_s", row))],
      ["First call", value("first_call_s", row) === null ? null : seconds(value("first_call_s", row))],
      ["Throughput", value("tokens_per_s", row) === null ? null : si(value("tokens_per_s", row), "tok/s")],
      ["Peak memory", value("peak_memory_bytes", row) === null ? value("missing", row)?.peak_memory_bytes : `${memory(value("peak_memory_bytes", row))}, of it beyond what was there before ${memory(value("extra_memory_bytes", row))}`],
      ["Modelled", value("model_flop", row) === null ? null : `${si(value("model_flop", row), "FLOP")}, ${si(value("compulsory_bytes", row), "B")} compulsory; ${si(value("model_flop_per_s", row), "FLOP/s")}, ${si(value("modelled_bytes_per_s", row), "B/s")}`],
      ["HBM traffic", value("dram_bytes", row) === null ? value("missing", row)?.dram_bytes : `${si(value("dram_bytes", row), "B")} measured, ${digits(value("traffic_ratio", row) ?? value("dram_bytes", row) / value("compulsory_bytes", row))} times the compulsory bytes`],
      ["Energy", value("energy_j", row) === null ? value("missing", row)?.energy_j : `${si(value("energy_j", row), "J")} at ${si(value("power_w", row), "W")}; ${si(value("tokens_per_j", row), "tok/J")}`],
      ["Cold time", value("cold_time_s", row) === null ? null : seconds(value("cold_time_s", row))],
      ["Host time", value("host_time_s", row) === null ? null : seconds(value("host_time_s", row))],
      ["Share of ceiling", value("sol_frac", row) === null ? value("missing", row)?.sol_frac : `${digits(100 * value("sol_frac", row))} % of ${data.extras[row]?.ceiling || "the one that binds"}`],
      ["Kernels", value("kernel_count", row) === null ? value("missing", row)?.kernel_count : `${count(value("kernel_count", row))}${value("max_registers", row) === null ? "" : `, at most ${count(value("max_registers", row))} registers, ${count(value("max_spills", row))} spills, ${memory(value("max_shared_bytes", row))} shared memory`}`],
      ...(data.extras[row]?.triton || []).map((kernel) => [kernel.name, `${Object.entries(kernel.constants || {}).map(([key, text]) => `${key}=${text}`).join(", ")}; ${kernel.warps} warps, ${kernel.stages} stages, ${kernel.registers} registers, ${kernel.spills} spills`]),
      ["Weights", value("weight_count", row) === null ? null : count(value("weight_count", row))],
      ["Beware", value("flags", row).join("; ") || null],
      ["Device", value("device", row)],
      ["Run", `${value("run_id", row)}, ${run.suite || ""}, code ${run.commit || "unknown"}, measured ${value("measured_at", row) || "never"}`],
      ["Repeat", make("code", { textContent: command(row) })],
      ...Object.entries(value("telemetry", row)),
    ].filter(([, text]) => text !== null && text !== undefined && text !== "");
    $("detail-title").textContent = `${value("label", row)}, L = ${count(value("seqlen", row))}`;
    const list = make("dl", {}, ...[boxplot(row), traceOf(row)].filter(Boolean).flatMap(([name, picture]) => [make("dt", { textContent: name }), make("dd", {}, picture)]), ...entries.flatMap(([name, text]) => [make("dt", { textContent: name }), make("dd", {}, text)]));
    $("detail-body").replaceChildren(list);
    $("detail").showModal();
  };
  $("detail").addEventListener("click", (event) => { if (event.target === $("detail")) $("detail").close(); });

  // Downloads of everything that is embedded.
  const save = (name, type, text) => {
    const link = make("a", { href: URL.createObjectURL(new Blob([text], { type })), download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  };
  const quoted = (cell) => {
    if (cell === null || cell === undefined) return "";
    // A text that a spreadsheet would take for a formula is kept a text.
    const text = typeof cell === "object" ? JSON.stringify(cell) : typeof cell === "string" && /^[=+@\t\r-]/.test(cell) ? `'${cell}` : String(cell);
    return /[",\n\r]/.test(text) ? `"${text.replace(/"/g, '""')}"` : text;
  };
  const columnNames = () => [...new Set([...Object.keys(columns), ...Object.keys(MADE)])];
  $("csv").addEventListener("click", () => {
    const names = columnNames();
    const lines = [...Array(total).keys()].map((row) => names.map((name) => quoted(value(name, row))).join(","));
    save("mambench.csv", "text/csv", [names.join(","), ...lines].join("\n") + "\n");
  });
  $("json").addEventListener("click", () => {
    const rows = [...Array(total).keys()].map((row) => Object.fromEntries(columnNames().map((name) => [name, value(name, row)])));
    save("mambench.json", "application/json", JSON.stringify(rows, null, 1));
  });

  // Scheme, links, printing.
  const THEMES = { "": "Auto", light: "Light", dark: "Dark" };
  const repaint = () => { inks = {}; showLegend(); cards.forEach(draw); };
  $("theme").addEventListener("click", () => {
    const names = Object.keys(THEMES), next = names[(names.indexOf(document.documentElement.dataset.theme || "") + 1) % 3];
    if (next) document.documentElement.dataset.theme = next; else delete document.documentElement.dataset.theme;
    $("theme").textContent = THEMES[next];
    $("theme").setAttribute("aria-label", `${THEMES[next]}: colour scheme`);
    repaint();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);
  matchMedia("print").addEventListener("change", () => { cards.forEach((card) => { card.seen = true; }); repaint(); });
  document.querySelectorAll("nav a, .skip").forEach((link) => link.addEventListener("click", (event) => {
    event.preventDefault();
    const target = $(link.hash.slice(1));
    target.scrollIntoView();
    target.tabIndex = -1;
    target.focus({ preventScroll: true });
  }));
  document.querySelectorAll("[data-pick]").forEach((link) => link.addEventListener("click", (event) => {
    event.preventDefault();
    state.slice = slices.find((slice) => slice.key === link.dataset.pick);
    state.d_state = state.seqlen = null;
    update();
    $("answer").scrollIntoView();
  }));
  addEventListener("hashchange", () => { if (location.hash.includes("=")) { readAddress(); update(); } });

  document.querySelectorAll(".needs-script").forEach((part) => { part.hidden = false; });
  data.charts.forEach(([name, title], i) => addCard(name, title, i === 0));
  addCard("state", "Time", true);
  addCard("roofline", "Roofline", true);
  addCard("machines", "Machine against machine", true);
  for (const name of ["state", "machines"]) cards.get(name).figure.hidden = true; // until known
  $("differing")?.addEventListener("change", (event) => $("environment").classList.toggle("only-differing", event.target.checked));
  readAddress();
  if (state.slice !== slices[0] || state.d_state !== null || state.hidden.size) document.querySelector(".still")?.remove();
  update();
  performance.mark("controls");
  await new Promise((painted) => requestAnimationFrame(() => setTimeout(painted)));
  performance.mark("painted");
  const library = document.createElement("script");
  library.textContent = await unpack("plotly");
  performance.mark("unpacked");
  document.head.append(library);
  performance.mark("plotly");
  ready = true;
  const [top] = cards.values();
  top.seen = true;
  draw(top);
  performance.mark("chart");
  cards.forEach((card) => { if (card !== top) later(() => draw(card)); });
  later(() => { document.documentElement.dataset.ready = "true"; });
})();
