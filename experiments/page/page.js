"use strict";
const $ = (id) => document.getElementById(id);
let state = start(), found = new Uint8Array(), refusal = null, saving = 0;

function say(element, text) {
  // A live region is read out when it changes.
  if (element.textContent !== text) element.textContent = text;
}

function restore() {
  const link = location.hash.slice(1);
  $("message").hidden = true;
  state = start();
  if (link) try { state = fromLink(link); } catch (error) {
    $("message").hidden = false;
    say($("message"), `The link cannot be read (${error.message}): this is the page's first mask.`);
  }
  build();
}

/** Writes the link; not for every cell on the way, which browsers forbid. */
function save() {
  clearTimeout(saving);
  saving = setTimeout(() => history.replaceState(null, "", "#" + toLink(state)), 150);
}

// --- the picture ---

function compute() {
  const {T, S, tile, root} = state;
  refusal = refused(root, T, S);
  $("fit").hidden = !refusal || refusal.tokens > MOST.cells;
  $("sum").className = refusal ? "wrong" : "";
  $("shown").hidden = Boolean(refusal);
  found = refusal ? new Uint8Array(T * S) : cells(root, T, S);
  if (refusal) {
    say($("sum"), refusal.said);
    $("fit").textContent = `Set queries and keys to ${refusal.tokens}`;
  } else {
    const seen = found.reduce((sum, cell) => sum + cell, 0);
    const {EMPTY, PARTIAL, FULL} = count(tiles(found, T, S, tile));
    say($("sum"), `${(100 * seen / (T * S)).toFixed(1)}% of the pairs are visible. Tiles: ` +
      `${PARTIAL} partial and ${FULL} full are computed, ${EMPTY} empty are skipped.`);
  }
  say($("code"), code(root));
  look();
}

function draw() {
  const {T, S, tile, q, k} = state, canvas = $("cells"), pen = canvas.getContext("2d");
  const style = getComputedStyle(document.documentElement);
  const color = (name) => style.getPropertyValue(`--${name}`);
  canvas.style.width = `${100 * $("zoom").value}%`;
  // As many pixels as are shown, and as many for each cell. Browsers limit how large a canvas is.
  const shown = canvas.clientWidth * devicePixelRatio;
  const side = Math.max(1, Math.floor(Math.min(shown, 4096) / Math.max(T, S)));
  const gap = side < 5 ? 0 : Math.max(1, side >> 4);
  canvas.width = S * side; canvas.height = T * side;
  pen.fillStyle = color("paper"); pen.fillRect(0, 0, canvas.width, canvas.height);
  if (!refusal) {
    const kinds = tiles(found, T, S, tile), across = Math.ceil(S / tile);
    kinds.forEach((kind, i) => {
      if (kind !== "EMPTY") return;
      pen.fillStyle = color("empty");
      pen.fillRect((i % across) * tile * side, Math.floor(i / across) * tile * side,
        tile * side, tile * side);
    });
    for (let i = 0; i < T; i++) for (let j = 0; j < S; j++) if (found[i * S + j]) {
      const kind = kinds[Math.floor(i / tile) * across + Math.floor(j / tile)];
      pen.fillStyle = color(kind === "FULL" ? "full" : "partial");
      pen.fillRect(j * side, i * side, side - gap, side - gap);
    }
    pen.strokeStyle = color("line"); pen.lineWidth = Math.max(1, gap);
    pen.beginPath();
    for (let i = 0; i <= T; i += tile) { pen.moveTo(0, i * side); pen.lineTo(S * side, i * side); }
    for (let j = 0; j <= S; j += tile) { pen.moveTo(j * side, 0); pen.lineTo(j * side, T * side); }
    pen.stroke();
    // Two frames, so that one of them stands out from whatever is below.
    for (const [name, width] of [["paper", 6], ["mark", 3]]) {
      pen.strokeStyle = color(name); pen.lineWidth = Math.min(width, 1 + side / 2);
      pen.strokeRect(k * side, q * side, side - gap, side - gap);
    }
  }
}

function look() {
  draw();
  say($("why"), refusal ? "" : why(state.root, state.q, state.k));
  save();
}

function follow() {
  const canvas = $("cells"), view = $("view");
  const side = canvas.clientWidth / state.S, left = state.k * side, top = state.q * side;
  const into = (now, at, size) => Math.min(Math.max(now, at + side - size), at);
  view.scrollLeft = into(view.scrollLeft, left, view.clientWidth);
  view.scrollTop = into(view.scrollTop, top, view.clientHeight);
}

// --- the form ---

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

const labelled = (text, control) => element("label", {}, `${text} `, control);
const choose = (id, options, value, change) => {
  const made = element("select", {id});
  for (const [key, text] of options) made.add(new Option(text, key, false, key === value));
  made.onchange = () => { change(made.value); build(); };
  return made;
};
const button = (id, text, action) =>
  element("button", {type: "button", id, textContent: text, onclick: () => { action(); build(); }});

function opposite(node, id) {
  const box = element("input", {type: "checkbox", id: `${id}-not`, checked: node.not});
  box.onchange = () => { node.not = box.checked; compute(); };
  return labelled("not", box);
}

/** A change that says what is wrong with what was typed, and leaves the state as it was. */
const typed = (input, change) => () => {
  let said = "";
  try { change(); compute(); } catch (error) { said = error.message; }
  input.setCustomValidity(said);
  input.setAttribute("aria-invalid", Boolean(said));
  if (said) { $("sum").className = "wrong"; say($("sum"), said); }
};

/** Sets numbers of queries and of keys; the cell stays inside. */
function resize(sizes) {
  Object.assign(state, sizes);
  Object.assign(state, {q: Math.min(state.q, state.T - 1), k: Math.min(state.k, state.S - 1)});
}

function parameterOf(node, i, id) {
  const parameter = PARTS[node.name].parameters[i], list = Array.isArray(parameter.start);
  const input = element("input", {id: `${id}-${parameter.name}`, value: unparse(node.p[i]),
    type: list ? "text" : "number", className: list ? "list" : ""});
  if (!list) input.min = parameter.least;
  input.oninput = typed(input, () => { node.p[i] = parse(parameter, input.value); });
  return labelled(parameter.name, input);
}

function maskForm(node, title, id, remove) {
  const part = PARTS[node.name], box = element("fieldset", {}, element("legend", {}, title));
  box.append(opposite(node, id), labelled("mask", choose(`${id}-name`,
    Object.keys(PARTS).map((name) => [name, name]), node.name,
    (name) => Object.assign(node, mask(name), {not: node.not}))));
  if (part.choices.length > 1 || part.choices[0]) box.append(labelled("arguments",
    choose(`${id}-choice`, part.choices.map((choice) => [choice, choice]), node.choice,
      (choice) => { node.choice = choice; })));
  part.parameters.forEach((_, i) => box.append(parameterOf(node, i, id)));
  if (part.note) box.append(element("p", {className: "note", textContent: part.note}));
  if (remove) box.append(button(`${id}-remove`, `Remove ${title}`, remove));
  return box;
}

function groupForm(node, title, id, remove) {
  const box = element("fieldset", {}, element("legend", {}, title));
  box.append(opposite(node, id), labelled("combine", choose(`${id}-op`,
    Object.entries(JOINS).map(([op, text]) => [op, `${text} these (${op})`]), node.op,
    (op) => { node.op = op; })));
  node.of.forEach((each, i) => {
    const drop = node.of.length > 1 ? () => { node.of.splice(i, 1); } : null;
    const number = `${title === "masks" ? "" : title.replace(/^\S+ /, "") + "."}${i + 1}`;
    box.append(each.of ? groupForm(each, `group ${number}`, `${id}.${i}`, drop)
      : maskForm(each, `mask ${number}`, `${id}.${i}`, drop));
  });
  const where = title === "masks" ? "" : ` to ${title}`;
  box.append(button(`${id}-add`, `Add a mask${where}`, () => { node.of.push(mask("sliding_window")); }),
    button(`${id}-group`, `Add a group${where}`, () => { node.of.push(group(mask("segments"))); }));
  if (remove) box.append(button(`${id}-remove`, `Remove ${title}`, remove));
  return box;
}

/** Builds the form anew, and leaves the focus where it was. */
function build() {
  const focused = document.activeElement?.id;
  $("root").replaceChildren(groupForm(state.root, "masks", "m"));
  for (const id of ["T", "S", "tile"]) $(id).value = state[id];
  if (focused && document.activeElement?.id !== focused)
    ($(focused) ?? $(`${focused.split(/[.-]/)[0]}-add`))?.focus();
  compute();
}

// --- events ---

$("form").onsubmit = () => false;
for (const [id, name] of [["T", "queries"], ["S", "keys"], ["tile", "tile"]])
  $(id).oninput = typed($(id), () =>
    resize({[id]: integer(parse({name, start: 1, least: 1}, $(id).value), 1, MOST.cells, name)}));
$("fit").onclick = () => {
  resize({T: refusal.tokens, S: refusal.tokens}); build(); $("cells").focus();
};
$("zoom").oninput = () => { draw(); follow(); };
$("copy").onclick = async () => {
  try { await navigator.clipboard.writeText(code(state.root)); say($("copied"), "Copied."); }
  catch {
    getSelection().selectAllChildren($("code"));
    say($("copied"), "Selected: copy it by the keyboard.");
  }
};
$("cells").onkeydown = (event) => {
  const to = event.ctrlKey || event.altKey || event.metaKey ? null : moved(state, event.key);
  if (!to) return;
  event.preventDefault();
  Object.assign(state, to); look(); follow();
};
$("cells").onpointermove = $("cells").onpointerdown = (event) => {
  const box = $("cells").getBoundingClientRect(), {T, S} = state;
  const at = (x, size) => Math.min(Math.max(Math.floor(x * size), 0), size - 1);
  const q = at((event.clientY - box.top) / box.height, T), k = at((event.clientX - box.left) / box.width, S);
  if (q === state.q && k === state.k) return;
  Object.assign(state, {q, k}); look();
};
onhashchange = restore;
onresize = matchMedia("(prefers-color-scheme: dark)").onchange = draw;
restore();
