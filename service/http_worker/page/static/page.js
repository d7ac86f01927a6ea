// The page at /: sends images to the service, and shows predictions, attention, stage times and live metrics.

const base = new URL(".", location.href); // the page may be behind a proxy that adds a prefix
const element = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const METRICS_MS = 2000;
const BYTES = { "Content-Type": "application/octet-stream" }; // so that a wrong file is judged by its bytes
const DEMONSTRATION = "compact-hybrid-cifar10", SAMPLES = ["airplane", "bird", "cat", "dog", "frog", "ship"];
let attentionWorks = true;

function headers(more = {}) {
  const key = element("key").value;
  return key ? { Authorization: `Bearer ${key}`, ...more } : more;
}

function bar(from, to) {
  // Attributes instead of styles, which the Content-Security-Policy forbids.
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 100 1");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  const rectangle = document.createElementNS(SVG, "rect");
  rectangle.setAttribute("x", String(100 * from));
  rectangle.setAttribute("width", String(Math.max(0.3, 100 * (to - from))));
  rectangle.setAttribute("height", "1");
  svg.append(rectangle);
  return svg;
}

function row(list, from, to, ...texts) {
  const item = document.createElement("li");
  item.append(bar(from, to));
  for (const text of texts) {
    const span = document.createElement("span");
    span.textContent = text;
    item.append(span);
  }
  list.append(item);
}

async function problemOf(response) {
  try {
    const body = await response.json();
    return `${body.title}: ${body.detail}`;
  } catch {
    return `The service answered with status ${response.status}.`;
  }
}

function showStages(list, header) {
  const stages = [];
  for (const part of (header || "").split(",")) {
    const found = part.trim().match(/^(\w+);dur=([\d.]+)/);
    if (found) stages.push([found[1], Number(found[2])]);
  }
  const total = stages.reduce((sum, [, milliseconds]) => sum + milliseconds, 0) || 1;
  let before = 0;
  for (const [name, milliseconds] of stages) {
    row(list, before / total, (before + milliseconds) / total, name, `${milliseconds.toFixed(2)} ms`);
    before += milliseconds;
  }
}

async function classify(file) {
  const article = element("result").content.cloneNode(true).querySelector("article");
  const note = article.querySelector(".note");
  article.querySelector("h3").textContent = file.name || "Image";
  note.textContent = "Classifying …";
  element("results").prepend(article);
  const query = new URLSearchParams();
  if (element("head").value) query.set("head", element("head").value);
  let response;
  try {
    response = await fetch(new URL(`v1/classify?${query}`, base), { method: "POST", body: file, headers: headers(BYTES) });
  } catch {
    fail(article, note, `${file.name}: the service does not answer.`);
    return;
  }
  if (!response.ok) {
    fail(article, note, `${file.name}: ${await problemOf(response)}`);
    return;
  }
  const body = await response.json();
  const [result] = body.results;
  if (result.error) {
    fail(article, note, `${file.name}: ${result.error.title}: ${result.error.detail}`);
    return;
  }
  const image = article.querySelector(".image");
  image.src = URL.createObjectURL(file);
  image.alt = `${file.name}: most probably ${result.predictions[0]?.label ?? "without classes"}`;
  for (const { label, probability } of result.predictions) {
    row(article.querySelector(".bars"), 0, probability, label, `${(100 * probability).toFixed(1)}%`);
  }
  showStages(article.querySelector(".stages"), response.headers.get("Server-Timing"));
  note.textContent = "";
  element("message").textContent = "";
  if (!attentionWorks) return;
  try {
    await explain(article, file);
  } catch (error) {
    note.textContent = error.message;
  }
}

function fail(article, note, text) {
  element("message").textContent = text;
  note.textContent = text;
  note.classList.add("bad");
  article.querySelector("h4").hidden = true;
}

async function overlay(article, file, query) {
  const url = new URL(`v1/explain?${new URLSearchParams({ format: "overlay", ...query })}`, base);
  const response = await fetch(url, { method: "POST", body: file, headers: headers(BYTES) });
  if (!response.ok) throw new Error(await problemOf(response));
  const shown = article.querySelector(".overlay");
  URL.revokeObjectURL(shown.src);
  shown.src = URL.createObjectURL(await response.blob());
  shown.hidden = false;
  return shown;
}

async function explain(article, file) {
  const note = article.querySelector(".note");
  const response = await fetch(new URL("v1/explain", base), { method: "POST", body: file, headers: headers(BYTES) });
  if (response.status === 404) attentionWorks = false;
  if (!response.ok) {
    if (response.status !== 404) note.textContent = await problemOf(response);
    return;
  }
  const { method, layers } = await response.json();
  const shown = await overlay(article, file, {});
  if (method === "occlusion") {
    shown.alt = "Parts of the image whose covering lowers the probability";
    note.textContent = "Bright: covering this part lowers the probability (occlusion).";
    return;
  }
  shown.alt = "Attention over the image";
  const attention = article.querySelector(".attention"), slider = attention.querySelector("input");
  const caption = attention.querySelector(".caption");
  slider.max = slider.value = String(layers);
  const describe = () => {
    caption.textContent = `Attention up to layer ${slider.value} of ${layers}`;
    slider.setAttribute("aria-valuetext", `layer ${slider.value} of ${layers}`);
  };
  slider.min = "1";
  describe();
  attention.hidden = false;
  slider.addEventListener("input", describe);
  slider.addEventListener("change", () => {
    overlay(article, file, { method: "rollout", layer: slider.value }).catch((error) => { note.textContent = error.message; });
  });
}

async function send(files) {
  element("message").textContent = "";
  for (const file of files) await classify(file);
}

// -- the model and the metrics

async function showModel() {
  let response;
  try {
    response = await fetch(new URL("v1/model", base), { headers: headers() });
  } catch {
    element("model").textContent = "The service does not answer.";
    setTimeout(showModel, METRICS_MS);
    return;
  }
  if (response.status === 401) {
    element("key-label").hidden = false;
    element("model").textContent = "The service needs an API key.";
    return;
  }
  if (!response.ok) {
    element("model").textContent = await problemOf(response);
    setTimeout(showModel, METRICS_MS);
    return;
  }
  const model = await response.json();
  element("model").textContent = `${model.name}, version ${model.version}, on ${model.serving.engine} in ${model.serving.precision}`;
  if (model.name === DEMONSTRATION) showSamples();
  const heads = element("head");
  heads.replaceChildren(new Option("of the network", ""), ...model.heads.map(({ name }) => new Option(name, name)));
  element("head-label").hidden = model.heads.length === 0;
  const facts = {
    Network: model.variant,
    Input: `${model.input.width} × ${model.input.height} pixels`,
    Classes: model.labels.length > 12 ? `${model.labels.length}` : model.labels.join(", ") || "none",
    Probabilities: model.activation,
    Reference: model.reference || "–",
    "Largest difference of a probability": model.serving.parity.probability.toExponential(1),
  };
  element("card").replaceChildren(...Object.entries(facts).map(([term, fact]) => {
    const group = document.createElement("div"), title = document.createElement("dt"), value = document.createElement("dd");
    title.textContent = term;
    value.textContent = fact;
    group.append(title, value);
    return group;
  }));
}

function showSamples() {
  // Images of classes of the demonstration model.
  const tiles = SAMPLES.map((name) => {
    const button = document.createElement("button"), image = document.createElement("img");
    const url = new URL(`page/samples/${name}.jpg`, base);
    button.type = "button";
    image.src = url;
    image.alt = `Classify the ${name}`;
    button.append(image);
    button.addEventListener("click", async () => {
      send([new File([await (await fetch(url)).blob()], `${name}.jpg`)]);
    });
    return button;
  });
  element("samples").replaceChildren(...tiles);
  element("samples").hidden = false;
}

function samples(text, name) {
  const found = [];
  for (const line of text.split("\n")) {
    const match = line.match(/^(\w+)(?:\{(.*)\})? (\S+)$/);
    if (match && match[1] === name) found.push([match[2] || "", Number(match[3])]);
  }
  return found;
}

function quantile(buckets, share) {
  const total = buckets.at(-1)?.[1] ?? 0;
  if (!total) return "–";
  const [bound] = buckets.find(([, count]) => count >= share * total);
  return bound === Infinity ? "> 30 s" : `≤ ${1000 * bound} ms`;
}

let previous = null;

async function showMetrics() {
  let response = null;
  try {
    response = await fetch(new URL("metrics", base));
  } catch { /* the service restarts */ }
  if (!response?.ok) {
    element("metrics-link").hidden = response?.status === 404; // metrics are on another port
    return;
  }
  const text = await response.text(), now = performance.now();
  const images = samples(text, "vitserve_images_total").filter(([labels]) => labels.includes('outcome="ok"'));
  const done = images.reduce((sum, [, value]) => sum + value, 0);
  const buckets = new Map();
  for (const [labels, value] of samples(text, "vitserve_request_seconds_bucket")) {
    if (!/route="\/v1\/(classify|embed)"/.test(labels)) continue;
    const bound = Number(labels.match(/le="([^"]+)"/)[1].replace("+Inf", "Infinity"));
    buckets.set(bound, (buckets.get(bound) || 0) + value);
  }
  if (previous) {
    element("rate").textContent = (1000 * (done - previous.done) / (now - previous.now)).toFixed(1);
    const recent = [...buckets].sort(([a], [b]) => a - b).map(([bound, count]) => [bound, count - (previous.buckets.get(bound) || 0)]);
    element("p50").textContent = quantile(recent, 0.5);
    element("p99").textContent = quantile(recent, 0.99);
  }
  element("queue").textContent = samples(text, "vitserve_images_in_flight").map(([, value]) => value).join(", ") || "–";
  previous = { done, now, buckets };
}

// -- events

const drop = element("drop");
element("choose").addEventListener("click", () => element("files").click());
element("photo").addEventListener("click", () => element("camera").click());
for (const input of [element("files"), element("camera")]) {
  input.addEventListener("change", () => { send([...input.files]); input.value = ""; });
}
for (const name of ["dragenter", "dragover"]) {
  document.addEventListener(name, (event) => { event.preventDefault(); drop.classList.add("over"); });
}
document.addEventListener("dragleave", () => drop.classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  drop.classList.remove("over");
  send([...event.dataTransfer.files]);
});
document.addEventListener("paste", (event) => send([...event.clipboardData.files]));
element("key").addEventListener("change", showModel);
showModel();
showMetrics();
setInterval(() => { if (!document.hidden) showMetrics(); }, METRICS_MS);
