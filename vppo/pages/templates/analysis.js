// The browser of responses. Its data is the JSON in the page; only the response that is looked at is unpacked.
const data = JSON.parse(document.getElementById("data").textContent);
const element = (id) => document.getElementById(id);
const list = element("responses"), tokens = document.querySelector("#response .tokens");
const special = new Set(data.special), newline = new Set(data.newline);
const state = { order: [], at: 0, estimator: data.divergence, ratio: data.keepRatio, columns: null, kept: null };

function make(tag, text = "", properties = {}) {
  const made = Object.assign(document.createElement(tag), properties);
  made.textContent = text;
  return made;
}

function percent(share) {
  return (100 * share).toFixed(1) + "\u00a0%";
}

function nats(value, digits = 3) {
  const size = Math.abs(value);
  if (size === 0 || (size >= 1e-3 && size < 1e3)) return String(Number(value.toPrecision(digits)));
  const [mantissa, exponent] = value.toExponential(1).split("e");
  const signs = { "-": "⁻", "+": "" };
  return `${mantissa} × 10${[...exponent].map((c) => signs[c] ?? "⁰¹²³⁴⁵⁶⁷⁸⁹"[c]).join("")}`;
}

// The columns of a response: float32, whose bytes were sorted by significance before they were compressed.
async function unpack(packed) {
  const bytes = Uint8Array.from(atob(packed), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const planes = new Uint8Array(await new Response(stream).arrayBuffer()), count = planes.length / 4;
  const values = new DataView(new ArrayBuffer(planes.length));
  for (let i = 0; i < planes.length; i++) values.setUint8(4 * (i % count) + Math.floor(i / count), planes[i]);
  const width = count / data.columns.length;
  return Object.fromEntries(data.columns.map((name, column) => [
    name, Float32Array.from({ length: width }, (_, i) => values.getFloat32(4 * (column * width + i), true)),
  ]));
}

// As the library selects: the ceil(ratio * n) highest, the earlier among equals; just below the rounding of the product.
function select(values, ratio) {
  const count = Math.ceil(values.length * ratio * (1 - 2 ** -40));
  const order = Array.from(values.keys()).sort((a, b) => values[b] - values[a] || a - b);
  const kept = new Uint8Array(values.length);
  for (const index of order.slice(0, count)) kept[index] = 1;
  return kept;
}

function sum(values, kept) {
  return values.reduce((total, value, i) => total + (kept[i] ? value : 0), 0);
}

// Colours and underlines of the response that is shown.
function paint() {
  const values = state.columns[state.estimator], { top, label } = data.estimators.find((e) => e.name === state.estimator);
  const kept = state.kept = select(values, state.ratio), count = sum(kept, kept);
  for (const [i, token] of [...tokens.children].entries()) {
    token.style.setProperty("--d", (100 * Math.sqrt(Math.min(1, Math.max(0, values[i] / top)))).toFixed(1) + "%");
    token.classList.toggle("kept", kept[i] === 1);
  }
  const all = values.reduce((a, b) => a + b, 0);
  const held = all > 0 ? `, which hold ${percent(sum(values, kept) / all)} of its ${label}` : "";
  let same = "";
  if (state.estimator !== data.divergence) {
    const other = select(state.columns[data.divergence], state.ratio);
    const name = data.estimators.find((e) => e.name === data.divergence).label;
    same = `; ${percent(sum(other, kept) / count)} of them are kept by ${name} too`;
  }
  element("share").textContent = `${count} of ${values.length} tokens kept${held}${same}`;
}

function paintScale() {
  const estimator = data.estimators.find((e) => e.name === state.estimator);
  const legend = document.querySelector("#response .legend");
  legend.firstElementChild.setAttribute("aria-label", `Colour scale of ${estimator.label}, 0 to ${estimator.top} nats`);
  legend.lastElementChild.replaceChildren(...estimator.ticks.map(([place, label]) => {
    const tick = make("span", label);
    tick.style.left = place + "%";
    return tick;
  }));
  element("kept").textContent = Number((100 * state.ratio).toFixed(1)) + "\u00a0%";
}

function picture(caption, image, alt) {
  const figure = make("figure");
  figure.append(make("figcaption", caption));
  if (image) {
    const { uri, width, height, small } = image;
    figure.append(make("img", "", { src: uri, width, height, alt, className: small ? "small" : "" }));
  } else {
    figure.append(make("p", "The image file was missing when the page was written.", { className: "none" }));
  }
  return figure;
}

// The two views of one of a sample's images, side by side.
function pair([clean, perturbed], place, { length }) {
  const which = length > 1 ? ` ${place + 1} of ${length}` : "", of = data.responses[state.order[state.at]].sample;
  const views = make("div", "", { className: "pair" });
  views.append(
    picture(`image${which}`, data.images[clean], `The image${which} of sample ${of}, as the model saw it`),
    picture(`perturbed view${which}`, data.images[perturbed], `The image${which} of sample ${of}, perturbed`),
  );
  return views;
}

// As the tables number them; the response is left out where every sample has a single one.
const several = data.responses.some(({ response }) => response > 0);

function name(response) {
  return `sample ${response.sample}` + (several ? `, response ${response.response}` : "");
}

function title(response) {
  return (data.models.length > 1 ? `${data.models[response.model]}, ` : "") + name(response);
}

async function showResponse(at) {
  state.at = at;
  const response = data.responses[state.order[at]];
  for (const [i, option] of [...list.children].entries()) {
    option.setAttribute("aria-selected", i === at);
    option.tabIndex = i === at ? 0 : -1;
  }
  element("which").textContent = `${title(response)} (${at + 1} of ${state.order.length})`;
  element("previous").disabled = at === 0;
  element("next").disabled = at === state.order.length - 1;
  document.querySelector("#response .pictures").replaceChildren(...response.pictures.map(pair));
  document.querySelector("#response .pictures").classList.toggle("several", response.pictures.length > 1);
  document.querySelector("#response .question").textContent = data.questions[response.question];
  const verdict = { true: ["✓ correct", "correct"], false: ["✗ wrong", "wrong"], null: ["not judged", ""] }[response.correct];
  element("verdict").replaceChildren(make("span", verdict[0], { className: verdict[1] }));
  if (response.answer !== null) element("verdict").append(", the reference is ", make("b", response.answer));
  if (response.truncated) element("verdict").append(", cut at the length limit");
  hide();
  const columns = await unpack(response.tokens);
  if (state.order[state.at] !== state.order[at] || state.at !== at) return; // another was chosen meanwhile
  state.columns = columns;
  tokens.replaceChildren(...Array.from(columns.word, (word, i) => {
    const token = make("li", data.vocabulary[word], { className: "token", tabIndex: i ? -1 : 0 });
    token.classList.toggle("special", special.has(word));
    token.classList.toggle("newline", newline.has(word));
    return token;
  }));
  paint();
}

function describe(tip, token) {
  const i = [...tokens.children].indexOf(token), of = (name) => state.columns[name][i];
  const rows = data.estimators.map(({ name, label }) => {
    const draws = name === data.divergence && !Number.isNaN(of("dependency_se"));
    return [label, nats(of(name)) + (draws ? ` ± ${nats(of("dependency_se"), 2)}` : "")];
  });
  rows.push(
    ["entropy, perturbed", nats(of("entropy_perturbed"), 2)],
    ["log-probability", nats(of("logprob"), 2)],
    ["log-probability, perturbed", nats(of("logprob_perturbed"), 2)],
  );
  const numbers = make("dl");
  for (const [label, value] of rows) numbers.append(make("dt", label), make("dd", value));
  const kept = state.kept[i] ? "kept" : "filtered out";
  tip.replaceChildren(make("b", token.textContent), `token ${i + 1} of ${tokens.children.length}, ${kept}; in nats:`, numbers);
}

const orders = {
  data: () => 0,
  most: (a, b) => b.mean - a.mean,
  least: (a, b) => a.mean - b.mean,
  wrong: (a, b) => (a.correct ?? 2) - (b.correct ?? 2),
  correct: (a, b) => (b.correct ?? -1) - (a.correct ?? -1),
  disagreement: (a, b) => a.overlap - b.overlap,
};

// The list in the order and with the model that are chosen; sorting is stable, so equals stay as in the data.
function arrange() {
  const by = orders[element("sort").value], model = element("model").value;
  state.order = [...data.responses.keys()]
    .filter((index) => model === "" || data.responses[index].model === Number(model))
    .sort((a, b) => by(data.responses[a], data.responses[b]));
  list.replaceChildren(...state.order.map((index) => {
    const response = data.responses[index], option = make("li");
    const [mark, className] = { true: ["✓", "correct"], false: ["✗", "wrong"], null: ["·", ""] }[response.correct];
    option.setAttribute("role", "option");
    const sign = make("span", mark, { className });
    sign.setAttribute("aria-label", { true: "correct", false: "wrong", null: "not judged" }[response.correct]);
    const number = element("sort").value === "disagreement" ? percent(response.overlap) : nats(response.mean);
    option.append(sign, make("span", name(response)), make("span", number));
    const model = data.models.length > 1 && element("model").value === "" ? `${data.models[response.model]}: ` : "";
    option.append(make("span", model + data.questions[response.question].slice(0, 80), { className: "what" }));
    return option;
  }));
  list.scrollTop = 0;
  return showResponse(0);
}

for (const { name, label } of data.estimators) {
  const choice = make("label", label);
  choice.prepend(make("input", "", { type: "radio", name: "estimator", value: name, checked: name === state.estimator }));
  document.querySelector("#estimators .choices").append(choice);
}
for (const [index, name] of data.models.entries()) element("model").append(make("option", name, { value: index }));
element("by-model").hidden = data.models.length < 2;
element("ratio").value = 100 * state.ratio;
element("estimators").addEventListener("change", (event) => { state.estimator = event.target.value; paintScale(); paint(); });
element("ratio").addEventListener("input", (event) => { state.ratio = event.target.value / 100; paintScale(); paint(); });
element("sort").addEventListener("change", arrange);
element("model").addEventListener("change", arrange);
for (const [id, step] of [["previous", -1], ["next", 1]]) {
  element(id).addEventListener("click", () => {
    showResponse(state.at + step);
    list.children[state.at].scrollIntoView({ block: "nearest" });
  });
}
list.addEventListener("click", (event) => {
  const option = event.target.closest("li");
  if (option) showResponse([...list.children].indexOf(option));
});
list.addEventListener("keydown", (event) => {
  const next = moved(event, list);
  if (next) showResponse([...list.children].indexOf(next));
});
tokenList(tokens, describe);
paintScale();
arrange();
