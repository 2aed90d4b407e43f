"use strict";
(() => {
  const root = document.documentElement;
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("data").textContent);
  const colour = (name) => getComputedStyle(root).getPropertyValue(name).trim();

  async function unpacked(id) {
    const raw = atob(byId(id).textContent);
    const bytes = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).text();
  }

  function trouble(text) {
    const note = byId("trouble");
    note.hidden = false;
    note.textContent = text;
  }

  // ---- plots ------------------------------------------------------------------------------
  const drawn = new Map();
  // Plotly's own toolbar would lie over legends; what it offers is in the menu above each plot.
  const config = { displayModeBar: false, responsive: true };

  /** The layout of a figure in the colours of the page. */
  function themed(figure) {
    const layout = structuredClone(figure.layout);
    layout.paper_bgcolor = "rgba(0,0,0,0)";
    layout.plot_bgcolor = "rgba(0,0,0,0)";
    layout.font = { ...layout.font, color: colour("--ink") };
    layout.title = { text: "" };
    layout.margin = { ...layout.margin, t: Math.max(20, layout.margin.t - 30) };
    layout.hoverlabel = { ...layout.hoverlabel, bgcolor: colour("--sheet"), bordercolor: colour("--soft"),
      font: { ...layout.hoverlabel.font, color: colour("--ink") } };
    for (const key of Object.keys(layout)) {
      if (/^[xy]axis\d*$/.test(key)) layout[key].gridcolor = colour("--grid");
    }
    return layout;
  }

  const isDark = () => getComputedStyle(root).colorScheme.includes("dark");

  /** The traces of a figure in the colours of the page. */
  function inked(traces) {
    const dark = isDark();
    return traces.map((trace) => {
      const scale = dark && data.scales[trace.meta?.scale];
      const changed = scale ? { ...trace, colorscale: scale, reversescale: false } : { ...trace };
      if (changed.error_y) changed.error_y = { ...changed.error_y, color: colour("--ink") };
      return changed;
    });
  }

  function draw(element) {
    const figure = data.figures[element.dataset.figure];
    Plotly.react(element, inked(figure.data), themed(figure), config);
    reach(element.parentElement);
    drawn.set(element, figure);
  }

  /** A box that scrolls can be reached by keyboard; one that does not is no stop on the way. */
  function reach(box) {
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
  }

  function redraw() {
    for (const element of drawn.keys()) draw(element);
  }

  const waiting = () => [...document.querySelectorAll(".canvas")].filter((each) => !drawn.has(each));

  /** What is in sight first, then the rest whenever the browser has time. */
  async function drawAll() {
    for (const element of waiting()) {
      const box = element.getBoundingClientRect();
      if (box.top < innerHeight && box.bottom > 0) draw(element);
    }
    root.dataset.ready = "yes";
    const seen = (entries) => entries.forEach(({ isIntersecting, target }) => {
      if (isIntersecting && !drawn.has(target)) draw(target);
    });
    const observer = new IntersectionObserver(seen, { rootMargin: "50%" });
    waiting().forEach((element) => observer.observe(element));
    for (let left = waiting(); left.length; left = waiting()) {
      await new Promise((done) => setTimeout(done, 10));
      if (!drawn.has(left[0])) draw(left[0]);
    }
    root.dataset.drawn = "all";
  }

  // ---- the slider through the layers ------------------------------------------------------
  function moveTo(layers, index) {
    const layer = layers[index];
    const figure = data.figures.pca_layer;
    const points = data.projections[layer];
    figure.data.forEach((trace) => {
      trace.x = points[trace.name].map((point) => point[0]);
      trace.y = points[trace.name].map((point) => point[1]);
    });
    byId("layer-name").textContent = layer;
    byId("layer").setAttribute("aria-valuetext", `layer ${layer}`);
    const held = data.geometry[layer];
    const share = (held.pc1_share * 100).toFixed(1);
    byId("layer-numbers").textContent =
      `PC1 holds ${share}% of the variance; |cos(PC1, difference of means)| ${held.cos_pc1.toFixed(3)}; ` +
      `AUC ${held.auc.toFixed(3)}; silhouette ${held.silhouette.toFixed(3)}`;
    if (drawn.has(byId("plot-pca_layer"))) draw(byId("plot-pca_layer"));
  }

  function setUpSlider() {
    const slider = byId("layer");
    if (!slider) return;
    const layers = Object.keys(data.projections).map(Number).sort((a, b) => a - b);
    slider.addEventListener("input", () => moveTo(layers, Number(slider.value)));
    moveTo(layers, Number(slider.value));
  }

  // ---- completions ------------------------------------------------------------------------
  const PAGE = 25;
  let texts = null;
  let shown = [];
  let at = 0;

  function made(tag, text, name) {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text;
    if (name) element.className = name;
    return element;
  }

  function badges(verdict) {
    const cell = made("td");
    if (!verdict) {
      cell.append(made("span", "–"));
      return cell;
    }
    const [refused, safe, broken, place, labelled] = verdict;
    const word = refused === null ? "unfinished" : refused ? "refused" : "answered";
    cell.append(made("span", word, `badge ${word}`));
    if (place) cell.append(made("span", `at token ${place}`, "badge later"));
    if (labelled && data.label) cell.append(made("span", data.label, "badge later"));
    if (broken) cell.append(made("span", broken, "badge broken"));
    if (safe !== null) cell.append(made("span", safe ? "safe" : "unsafe", `badge ${safe ? "safe" : "unsafe"}`));
    return cell;
  }

  // An answer, or a thought and the answer after it.
  function spoken(held) {
    if (!Array.isArray(held)) return [made("p", held || "(empty)")];
    const [thought, answer] = held;
    const said = answer === null ? "(the thought did not end)" : answer || "(empty)";
    return [made("p", thought || "(an empty thought)", "thought"), made("p", said)];
  }

  async function replies(index) {
    if (texts === null) texts = unpacked("texts").then(JSON.parse);
    const answers = (await texts)[index];
    const holder = made("div", undefined, "replies");
    data.interventions.forEach((name, column) => {
      if (answers[column] === null) return;
      const part = made("div");
      part.append(made("h3", name), ...spoken(answers[column]));
      holder.append(part);
    });
    return holder;
  }

  function toggle(row, button, index) {
    const open = button.getAttribute("aria-expanded") === "true";
    button.setAttribute("aria-expanded", String(!open));
    button.textContent = open ? "Show answers" : "Hide answers";
    if (open) {
      row.nextElementSibling.remove();
      return;
    }
    const below = made("tr", undefined, "opened");
    const cell = made("td");
    cell.colSpan = row.children.length;
    below.append(cell);
    row.after(below);
    replies(index).then((holder) => cell.append(holder)).catch((error) => trouble(String(error)));
  }

  function fill() {
    const body = document.querySelector("#answers tbody");
    body.replaceChildren();
    for (const index of shown.slice(at, at + PAGE)) {
      const held = data.rows[index];
      const row = made("tr");
      row.append(made("td", held.prompt), made("td", held.category ?? held.kind));
      held.verdicts.forEach((verdict) => row.append(badges(verdict)));
      const button = made("button", "Show answers");
      button.type = "button";
      button.setAttribute("aria-expanded", "false");
      button.addEventListener("click", () => toggle(row, button, index));
      const cell = made("td");
      cell.append(button);
      row.append(cell);
      body.append(row);
    }
    const pages = Math.max(1, Math.ceil(shown.length / PAGE));
    byId("page").textContent = `page ${at / PAGE + 1} of ${pages}`;
    byId("previous").disabled = at === 0;
    byId("next").disabled = at + PAGE >= shown.length;
    byId("count").textContent = `${shown.length} of ${data.rows.length} prompts`;
  }

  function outcome(verdicts, column, wanted) {
    const verdict = verdicts[column];
    if (!verdict) return false;
    if (wanted === "refused") return verdict[0];
    if (wanted === "answered") return verdict[0] === false;
    if (wanted === "unfinished") return verdict[0] === null;
    if (wanted === "later") return Boolean(verdict[3]);
    if (wanted === "labelled") return verdict[4] === true;
    if (wanted === "broken") return Boolean(verdict[2]);
    if (wanted === "unsafe") return verdict[1] === false;
    return Boolean(verdicts[0]) && verdicts[0][0] !== verdict[0];
  }

  function filter() {
    const text = byId("f-text").value.trim().toLowerCase();
    const kind = byId("f-kind").value;
    const category = byId("f-category").value;
    const column = Number(byId("f-column").value);
    const wanted = byId("f-outcome").value;
    shown = [];
    data.rows.forEach((row, index) => {
      const fits =
        (!text || row.prompt.toLowerCase().includes(text)) &&
        (!kind || row.kind === kind) &&
        (!category || String(row.category) === category) &&
        (!wanted || outcome(row.verdicts, column, wanted));
      if (fits) shown.push(index);
    });
    at = 0;
    fill();
  }

  function setUpCompletions() {
    const form = byId("filters");
    if (!form) return;
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("input", filter);
    byId("previous").addEventListener("click", () => { at -= PAGE; fill(); });
    byId("next").addEventListener("click", () => { at += PAGE; fill(); });
    filter();
  }

  // ---- downloads --------------------------------------------------------------------------
  /** Hands over a file that is made here; no request leaves the page. */
  function hand(name, type, parts) {
    const link = made("a");
    link.href = URL.createObjectURL(new Blob(parts, { type }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }

  /** A cell of a CSV; a spreadsheet must not take a prompt's text for a formula. */
  function cell(value) {
    let text = value === null || value === undefined ? "" : String(value);
    if (/^[=+\-@\t\r]/.test(text) && !/^[+-]?[\d.]+(e[+-]?\d+)?$/i.test(text)) text = `'${text}`;
    return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  }

  const csv = ({ columns, rows }) =>
    [columns, ...rows].map((row) => row.map(cell).join(",")).join("\r\n") + "\r\n";

  const records = ({ columns, rows }) =>
    rows.map((row) => Object.fromEntries(columns.map((name, at) => [name, row[at] ?? null])));

  const told = (element) => element.textContent.trim().replace(/\s+/g, " ");

  /** What a table on the page says; of the answers' table every prompt that the filter leaves. */
  function tabled(table) {
    if (table.id === "answers") {
      const words = (verdict) => verdict && [...badges(verdict).children].map(told).join(", ");
      return {
        columns: ["prompt", "kind", "category", ...data.interventions],
        rows: shown.map((index) => data.rows[index]).map((row) =>
          [row.prompt, row.kind, row.category, ...row.verdicts.map(words)]),
      };
    }
    const rows = [...table.tBodies[0].rows].map((row) => [...row.cells].map(told));
    const heads = table.tHead ? [...table.tHead.rows[0].cells].map(told) : ["name", "value"];
    return { columns: heads.map((name, at) => name || `column ${at + 1}`), rows };
  }

  /** The points of a figure, a row each: of a heatmap its cells, of curves their points. */
  function plotted(figure) {
    const plain = (text) => new DOMParser().parseFromString(String(text), "text/html").body.textContent;
    const named = (axis, value) => {
      const at = figure.layout[axis]?.tickvals?.indexOf(value) ?? -1;
      const text = at < 0 ? value : figure.layout[axis].ticktext[at];
      return typeof text === "string" ? plain(text) : text;
    };
    const rows = [];
    for (const trace of figure.data) {
      const add = (x, y, z) => rows.push([plain(trace.name ?? ""), named("xaxis", x), named("yaxis", y), z]);
      if (trace.z && trace.meta?.scale === "absent") {
        trace.z.forEach((line, row) => line.forEach((z, column) =>
          z !== null && add(trace.x[column], trace.y[row], null)));
      } else if (trace.z) trace.z.forEach((line, row) => line.forEach((z, column) => add(trace.x[column], trace.y[row], z)));
      else if (trace.fill !== "toself") (trace.x ?? []).forEach((x, at) => x !== null && add(x, trace.y[at], null));
    }
    return { columns: ["series", "x", "y", "value"], rows };
  }

  /** A figure as a picture for a page of white paper, with its title. */
  async function pictured(figure, element) {
    const size = { width: Math.max(640, element.clientWidth), height: figure.layout.height ?? 360 };
    const url = await Plotly.toImage(structuredClone(figure), { format: "png", scale: 2, ...size });
    const bytes = Uint8Array.from(atob(url.split(",")[1]), (letter) => letter.charCodeAt(0));
    return [bytes];
  }

  function menu(before, name, what, offers) {
    const holder = made("details", undefined, "save");
    const head = made("summary", "Download");
    head.setAttribute("aria-label", `Download ${what}`);
    holder.append(head);
    for (const [label, act] of offers) {
      const button = made("button", label);
      button.type = "button";
      button.addEventListener("click", () => Promise.resolve(act(name)).catch((error) => trouble(String(error))));
      holder.append(button);
    }
    before.before(holder);
  }

  /** The name of a file says where it is of something stale. */
  const fileName = (element, name) => name.replace(/[^\w-]+/g, "-") + (element.closest(".stale") ? "-stale" : "");

  function setUpDownloads() {
    const texts = (get, json) => [
      ["CSV", (name) => hand(`${name}.csv`, "text/csv", [csv(get())])],
      ["JSON", (name) => hand(`${name}.json`, "application/json", [JSON.stringify(json(), null, 1)])],
    ];
    for (const element of document.querySelectorAll(".canvas")) {
      const figure = data.figures[element.dataset.figure];
      menu(element.parentElement, fileName(element, element.dataset.figure), element.getAttribute("aria-label"), [
        ["PNG", async (name) => hand(`${name}.png`, "image/png", await pictured(figure, element))],
        ...texts(() => plotted(figure), () => figure),
        ["Reset view", () => draw(element)],
      ]);
    }
    document.querySelectorAll(".scroll > table").forEach((table, at) => {
      const box = table.parentElement;
      const what = `table ${at + 1}, ${box.getAttribute("aria-label")}`;
      const holder = made("div", undefined, "held");
      box.before(holder);
      holder.append(box);
      menu(box, fileName(box, `${box.closest("section").id}-table-${at + 1}`), what,
        texts(() => tabled(table), () => records(tabled(table))));
    });
  }

  // ---- theme and print --------------------------------------------------------------------
  const THEMES = ["system", "light", "dark"];

  function setUpTheme() {
    const button = byId("theme");
    let theme = "system";
    button.addEventListener("click", () => {
      theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
      if (theme === "system") delete root.dataset.theme;
      else root.dataset.theme = theme;
      button.textContent = `Theme: ${theme}`;
      redraw();
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
    addEventListener("resize", () => [...drawn.keys()].forEach((each) => reach(each.parentElement)));
    addEventListener("beforeprint", () => waiting().forEach(draw));
    matchMedia("print").addEventListener("change", redraw);
  }

  // ---- start ------------------------------------------------------------------------------
  setUpTheme();
  setUpSlider();
  setUpCompletions();
  setUpDownloads();
  unpacked("plotly")
    .then((code) => {
      const script = made("script", code);
      document.head.append(script);
      script.remove();
      return drawAll();
    })
    .catch((error) => trouble(`The plots cannot be drawn in this browser (${error}): use a current one.`))
    .finally(() => { root.dataset.ready = "yes"; });
})();
