// Masks as programs: their cells, their tiles, their code, and why. No DOM, so that tests run it
// in any engine.
"use strict";

// int32 wraps around, and rounds a quotient toward 0. An index beyond an array is clamped.
const OPERATIONS = {
  add: (a, b) => (a + b) | 0, sub: (a, b) => (a - b) | 0, mul: Math.imul,
  div: (a, b) => (a / b) | 0, rem: (a, b) => (a % b) | 0,
  neg: (a) => -a | 0, abs: (a) => Math.abs(a) | 0, sign: Math.sign,
  max: Math.max, min: Math.min, clamp: (low, x, high) => Math.min(Math.max(x, low), high),
  lt: (a, b) => a < b, le: (a, b) => a <= b, gt: (a, b) => a > b, ge: (a, b) => a >= b,
  eq: (a, b) => a === b, ne: (a, b) => a !== b,
  and: (a, b) => a && b, or: (a, b) => a || b, xor: (a, b) => a !== b, not: (a) => !a,
  and_int: (a, b) => a & b, or_int: (a, b) => a | b, xor_int: (a, b) => a ^ b, not_int: (a) => ~a,
  select_n: (which, no, yes) => which ? yes : no,
  to_int: Number, to_bool: Boolean, same: (a) => a,
  read: (array, ...at) =>
    at.reduce((inner, i) => inner[Math.min(Math.max(i, 0), inner.length - 1)], array),
};
const COMPARED = {lt: "<", le: "<=", gt: ">", ge: ">=", eq: "==", ne: "!="};
const ARITHMETIC = {add: "+", sub: "-", mul: "*", div: "//", rem: "%"};
const JOINS = {"&": "all of", "|": "any of", "^": "an odd number of"};
// As in mask.why: a longer expression is harder to read than its value.
const LONGEST = 40;
const MOST = {cells: 128, number: 2 ** 31 - 1, depth: 8, masks: 32};

// --- states ---
//
// A node is a mask {not, name, choice, p} or a group {not, op, of}. The root is a group.

function mask(name) {
  const {choices, parameters} = PARTS[name];
  return {not: false, name, choice: choices[0],
    p: parameters.map(({start}) => structuredCopy(start))};
}
const structuredCopy = (value) => JSON.parse(JSON.stringify(value));
const group = (...of) => ({not: false, op: "&", of});
const start = () => ({T: 16, S: 16, tile: 4, q: 3, k: 7, root: group(mask("causal"))});

const toLink = (state) => encodeURIComponent(JSON.stringify(state));

/** The state that a link says. Throws an Error that says what is wrong with it. */
function fromLink(link) {
  const given = JSON.parse(decodeURIComponent(link));
  const state = {};
  for (const [name, low, high] of [["T", 1, MOST.cells], ["S", 1, MOST.cells],
    ["tile", 1, MOST.cells], ["q", 0, MOST.cells - 1], ["k", 0, MOST.cells - 1]])
    state[name] = integer(given?.[name], low, high, name);
  state.q = Math.min(state.q, state.T - 1);
  state.k = Math.min(state.k, state.S - 1);
  let masks = 0;
  const read = (node, depth) => {
    if (depth > MOST.depth || ++masks > MOST.masks) throw Error("too many masks");
    const not = Boolean(node?.not);
    if (Array.isArray(node?.of)) {
      if (!Object.hasOwn(JOINS, node.op)) throw Error(`got the operator ${node.op}`);
      if (!node.of.length) throw Error("got an empty group");
      return {not, op: node.op, of: node.of.map((each) => read(each, depth + 1))};
    }
    if (typeof node?.name !== "string" || !Object.hasOwn(PARTS, node.name))
      throw Error(`got the mask ${node?.name}`);
    const {choices, parameters} = PARTS[node.name];
    if (!choices.includes(node.choice)) throw Error(`got the choice ${node.choice}`);
    if (node.p?.length !== parameters.length) throw Error(`got the parameters of ${node.name}`);
    return {not, name: node.name, choice: node.choice, p: parameters.map((parameter, i) =>
      check(parameter, node.p[i]))};
  };
  if (!Array.isArray(given.root?.of)) throw Error("got no group of masks");
  state.root = read(given.root, 0);
  return state;
}

function integer(value, low, high, name) {
  if (!Number.isInteger(value) || value < low || value > high)
    throw Error(`${name}: got ${JSON.stringify(value)}, expected an integer from ${low} to ${high}`);
  return value;
}

function check({name, start, least}, value) {
  if (!Array.isArray(start)) return integer(value, least, MOST.number, name);
  if (!Array.isArray(value) || !value.length || value.length > MOST.cells)
    throw Error(`${name}: expected 1 to ${MOST.cells} entries`);
  if (typeof start[0] === "boolean") return value.map(Boolean);
  return value.map((each) => integer(each, -MOST.number, MOST.number, name));
}

/** What the user typed for a parameter, as a value. Throws as `check` does. */
function parse(parameter, text) {
  if (!Array.isArray(parameter.start)) return check(parameter, text.trim() ? Number(text) : NaN);
  const entries = text.split(/[\s,]+/).filter(Boolean).map(Number);
  if (typeof parameter.start[0] === "boolean") entries.forEach((x) => integer(x, 0, 1, parameter.name));
  return check(parameter, entries);
}
const unparse = (value) => Array.isArray(value) ? value.map(Number).join(", ") : String(value);

/** The state after a key of the keyboard. */
function moved({q, k, T, S, tile}, key) {
  const steps = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1],
    PageUp: [-tile, 0], PageDown: [tile, 0], Home: [0, -S], End: [0, S]};
  if (!Object.hasOwn(steps, key)) return null;
  const inside = (x, size) => Math.min(Math.max(x, 0), size - 1);
  return {q: inside(q + steps[key][0], T), k: inside(k + steps[key][1], S)};
}

// --- code ---

const python = (value) => !Array.isArray(value) ? String(value)
  : `jnp.array([${value.map((x) => x === true ? "True" : x === false ? "False" : x).join(", ")}])`;

/** The Python expression of a node. */
function code(node) {
  const no = node.not ? "~" : "";
  if (!node.of) {
    const {parameters, code} = PARTS[node.name];
    return no + parameters.reduce((text, {name}, i) => text.replace(`{${name}}`, python(node.p[i])),
      code.replace("{choice}", node.choice));
  }
  if (node.of.length === 1) return no + code(node.of[0]);
  const parts = node.of.map((each) => each.of?.length > 1 && !each.not ? `(${code(each)})` : code(each));
  const joined = parts.join(` ${node.op} `);
  return node.not ? `~(${joined})` : joined;
}

// --- cells ---

const programOf = (node) => PARTS[node.name].programs[node.choice];
const leavesOf = (node) =>
  programOf(node).leaves.map((leaf) => Array.isArray(leaf) ? leaf[0] : node.p[leaf]);
const leafNodes = (node) => node.of ? node.of.flatMap(leafNodes) : [node];

/** The values of all steps of a mask for one cell. */
function run(program, leaves, q, k) {
  const values = [0, 0, q, k, ...leaves, ...program.constants];
  for (const [name, ...args] of program.steps)
    values.push(OPERATIONS[name](...args.map((i) => values[i])));
  return values;
}

/** The cells of a node, row by row: 1 where the query may see the key. */
function cells(node, T, S) {
  const found = new Uint8Array(T * S);
  if (node.of) {
    const join = {"&": (a, b) => a & b, "|": (a, b) => a | b, "^": (a, b) => a ^ b}[node.op];
    node.of.map((each) => cells(each, T, S)).forEach((part, n) =>
      part.forEach((cell, i) => { found[i] = n ? join(found[i], cell) : cell; }));
  } else {
    const program = programOf(node), leaves = leavesOf(node);
    for (let q = 0; q < T; q++) for (let k = 0; k < S; k++)
      found[q * S + k] = run(program, leaves, q, k)[program.out];
  }
  return node.not ? found.map((cell) => 1 - cell) : found;
}

/** Why the library refuses a mask for so many queries and keys, and the number it is for; or null. */
function refused(node, T, S) {
  for (const each of leafNodes(node)) {
    const {reads, tokens, title} = programOf(each), leaves = leavesOf(each);
    if (tokens !== null && (T !== tokens || S !== tokens)) return {tokens,
      said: `${title}: got ${T} queries and ${S} keys, expected ${tokens} of each`};
    for (const [label, leaf, axis, position] of reads) {
      const extent = (axis ? leaves[leaf][0] : leaves[leaf]).length;
      const [size, what] = position === "q" ? [T, "queries"] : [S, "keys"];
      if (extent !== size) return {tokens: extent,
        said: `${label}: got ${extent} entries for ${size} ${what}, expected as many`};
    }
  }
  return null;
}

/** The kind of every tile, row by row, by its cells. */
function tiles(found, T, S, tile) {
  const kinds = [];
  for (let top = 0; top < T; top += tile) for (let left = 0; left < S; left += tile) {
    let seen = 0, size = 0;
    for (let q = top; q < Math.min(T, top + tile); q++)
      for (let k = left; k < Math.min(S, left + tile); k++, size++) seen += found[q * S + k];
    kinds.push(seen === 0 ? "EMPTY" : seen === size ? "FULL" : "PARTIAL");
  }
  return kinds;
}

/** How many entries equal each kind. */
const count = (kinds) => kinds.reduce((all, kind) => ({...all, [kind]: all[kind] + 1}),
  {EMPTY: 0, PARTIAL: 0, FULL: 0});

// --- why ---

/** What `mask.why(q, k)` prints. */
function why(root, q, k) {
  const lines = [];
  const verb = explain(root, q, k, 1, lines) ? "may" : "may not";
  return [`query ${q} ${verb} see key ${k} (row 0, head 0)`, ...lines].join("\n");
}

function explain(node, q, k, depth, lines) {
  const indent = "  ".repeat(depth);
  if (node.not) {
    lines.push(`${indent}the opposite of:`);
    return !explain({...node, not: false}, q, k, depth + 1, lines);
  }
  if (node.of?.length === 1) return explain(node.of[0], q, k, depth, lines);
  if (node.of) {
    // Python reads a | b | c as (a | b) | c.
    const parts = [{...node, of: node.of.slice(0, -1)}, node.of.at(-1)];
    if (node.op !== "&") lines.push(`${indent}${node.op === "|" ? "one is enough" : "exactly one of these"}:`);
    const [a, b] = parts.map((each) => explain(each, q, k, depth + (node.op !== "&"), lines));
    return node.op === "&" ? a && b : node.op === "|" ? a || b : a !== b;
  }
  const program = programOf(node), reader = read(program, run(program, leavesOf(node), q, k));
  const seen = reader.values[program.out], reasons = reader.reasons(program.out);
  lines.push(`${indent}${program.title} ${seen ? "allows" : "forbids"} it`
    + (reasons.length ? `: ${reasons.join("; ")}` : ""));
  return seen;
}

/** Reads what decided a cell from the values of its steps, as jaxattn/views/why.py does. */
function read(program, values) {
  const constants = program.inputs.length, first = constants + program.constants.length;
  const number = (ref) => Array.isArray(values[ref]) ? "..." : String(values[ref]);
  const same = (name) => ["to_int", "to_bool", "same"].includes(name);
  const unique = (lists) => [...new Set(lists.flat())];

  function reasons(ref) {
    const holds = Boolean(values[ref]);
    if (ref < first) return ref < constants ? [`${program.inputs[ref]} is ${holds}`] : [];
    const [name, ...args] = program.steps[ref - first];
    if (name === "and" || name === "or") {
      const decisive = args.filter((arg) => values[arg] === holds);
      return unique((holds === (name === "and") ? args : decisive).map(reasons));
    }
    if (name === "not" || same(name)) return reasons(args[0]);
    if (name === "select_n") return unique([reasons(args[0]), reasons(args[1 + values[args[0]]])]);
    if (COMPARED[name]) return [compared(COMPARED[name], args, holds)];
    const said = expression(ref);
    return said ? [`${said} is ${holds}`] : [];
  }

  function compared(sign, args, holds) {
    const said = args.map(expression), numbers = args.map(number);
    const known = said.every(Boolean) && said.some((each, i) => each !== numbers[i])
      ? `${said[0]} ${sign} ${said[1]}: ` : "";
    return `${known}${numbers[0]} ${sign} ${numbers[1]}${holds ? "" : " is false"}`;
  }

  function expression(ref) {
    if (ref < constants) return program.inputs[ref];
    if (ref < first) return number(ref);
    const [name, ...args] = program.steps[ref - first];
    if (same(name)) return expression(args[0]);
    if (name === "read") return `${expression(args[0])}[${args.slice(1).map(number).join(", ")}]`;
    if (!ARITHMETIC[name]) return "";
    const [left, right] = args.map(expression);
    const said = left && right ? `${left} ${ARITHMETIC[name]} ${right}` : "";
    return said.length <= LONGEST ? said : "";
  }
  return {values, reasons};
}
