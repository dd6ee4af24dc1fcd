// The page `try`: controls, characters, words. The network itself is in vit.js.

"use strict";

(() => {
  const FLOAT = 9; // the last position of a slider
  const SHOWN = 60;
  const $ = id => document.getElementById(`vit-${id}`);
  const make = (tag, words = "", attributes = {}) => {
    const element = document.createElement(tag);
    element.textContent = words;
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    return element;
  };
  const { characters, labels, side, gptqBits } = VIT_DATA;
  const images = labels.length;
  const pixels = Uint8Array.from(atob(VIT_DATA.pixels.base64), letter => letter.charCodeAt(0));
  const state = { setting: null, float: [], now: [], errors: null, done: false, chosen: null };
  window.vit = state; // for tests, and for the curious

  // ---- numbers in words ----

  const best = logits => logits.indexOf(Math.max(...logits));
  const percent = share => `${(100 * share).toFixed(1)} %`;

  function wilson(right, n) { // 95 %
    const z = 1.959964, p = right / n, middle = (p + z * z / (2 * n)) / (1 + z * z / n);
    const half = z / (1 + z * z / n) * Math.sqrt(p * (1 - p) / n + z * z / (4 * n * n));
    return `${percent(p)} [${(100 * (middle - half)).toFixed(1)}, ${(100 * (middle + half)).toFixed(1)}]`;
  }

  // McNemar's exact test: were the images on which two networks differ fair coins?
  function mcNemar(gained, lost) {
    const n = gained + lost;
    let sum = 0, term = 0.5 ** n; // n choose 0, over 2^n
    for (let i = 0; i <= Math.min(gained, lost); i++) {
      sum += term;
      term *= (n - i) / (i + 1);
    }
    return Math.min(1, 2 * sum);
  }

  function nameOf({ weights, acts, rounding }) {
    if (!weights && !acts) return "float";
    const name = `W${weights || "float"}A${acts || "float"}`;
    return !weights ? name : `${name}, ${{ minmax: "MinMax", mse: "MSE", gptq: "GPTQ" }[rounding]}`;
  }

  function softmax(logits) {
    const largest = Math.max(...logits), powers = Array.from(logits, v => Math.exp(v - largest));
    const sum = powers.reduce((a, b) => a + b);
    return powers.map(v => v / sum);
  }

  // ---- pictures ----

  function glyph(i, size) {
    const canvas = make("canvas", "", { width: side, height: side, "aria-hidden": "true" });
    canvas.style.width = `${size}px`;
    const context = canvas.getContext("2d"), picture = context.createImageData(side, side);
    for (let at = 0; at < side * side; at++) { // ink is dark on a white card in both themes
      picture.data.fill(255 - pixels[i * side * side + at], 4 * at, 4 * at + 3);
      picture.data[4 * at + 3] = 255;
    }
    context.putImageData(picture, 0, 0);
    return canvas;
  }

  const tiles = labels.map((label, i) => {
    const item = make("li"), button = make("button", "", { type: "button", "data-image": i });
    button.append(glyph(i, 44), make("span", "…"));
    button.addEventListener("click", () => { state.chosen = i; drawDetail(); });
    item.append(button);
    return { item, button, words: button.lastChild, said: "" };
  });
  $("grid").append(...tiles.map(tile => tile.item));

  function describeTile(i) {
    const was = best(state.float[i]), is = best(state.now[i]), right = is === labels[i];
    const flipped = was !== is, mark = right ? "✓" : "✗";
    return {
      flipped, right,
      words: flipped ? `${characters[was]} → ${characters[is]} ${mark}` : characters[is] + (right ? "" : " ?"),
      label: `${characters[labels[i]]}, read as ${characters[is]}, ${right ? "right" : "wrong"}` +
        (flipped ? `, flipped from ${characters[was]}` : ""),
    };
  }

  function drawTile(i) {
    const { flipped, right, words, label } = describeTile(i), tile = tiles[i];
    if (tile.said !== label) { // what has not changed is not touched: a reader may be on it
      tile.said = label;
      tile.words.textContent = words;
      tile.button.setAttribute("aria-label", label);
    }
    tile.button.className = flipped ? `vit-flip${right ? " vit-right" : ""}` : "";
    tile.button.classList.remove("vit-old");
    tile.item.hidden = $("shown").value === "first" ? i >= SHOWN : !flipped;
  }

  function drawDetail() {
    const i = state.chosen, detail = $("detail");
    tiles.forEach((tile, at) => tile.button.setAttribute("aria-pressed", at === i));
    detail.replaceChildren();
    if (i === null || !state.now[i]) return;
    const lists = [["float", state.float[i]], [nameOf(state.setting), state.now[i]]];
    detail.append(glyph(i, 84), ...lists.map(([name, logits]) => {
      const shares = softmax(logits), table = make("table");
      table.append(make("caption", name));
      const order = [...shares.keys()].sort((a, b) => shares[b] - shares[a]).slice(0, 5);
      for (const k of order) {
        const row = make("tr"), bar = make("td", percent(shares[k]));
        bar.style.setProperty("--share", percent(shares[k]).replace(" ", ""));
        row.append(make("th", characters[k] + (k === labels[i] ? " (right)" : ""), { scope: "row" }), bar);
        table.append(row);
      }
      return table;
    }));
  }

  function drawErrors() {
    const { errors } = state, figure = $("errors");
    const names = ["embedding", ...errors.slice(2).map((_, b) => `block ${b}`), "logits"];
    const words = names.map((name, at) => `${name} ${errors[at].toFixed(3)}`);
    figure.replaceChildren();
    const chart = make("div", "", {
      class: "vit-bars", role: "img",
      "aria-label": `Relative error of ${nameOf(state.setting)}: ${words.join(", ")}.`,
    });
    const most = Math.max(1e-9, ...errors);
    names.forEach((name, at) => {
      const bar = make("div", "", { class: "vit-bar" });
      bar.style.setProperty("--share", `${100 * errors[at] / Math.max(most, 0.1)}%`);
      chart.append(make("span", name), bar, make("span", errors[at].toFixed(3)));
    });
    figure.append(chart);
  }

  function say() {
    const n = state.now.length;
    let right = 0, floatRight = 0, gained = 0, lost = 0, flipped = 0;
    for (let i = 0; i < n; i++) {
      const was = best(state.float[i]), is = best(state.now[i]);
      right += is === labels[i];
      floatRight += was === labels[i];
      gained += is === labels[i] && was !== labels[i];
      lost += is !== labels[i] && was === labels[i];
      flipped += was !== is;
    }
    const name = nameOf(state.setting);
    if (!state.done) return `${name}: ${n} of ${images} characters read, ${flipped} labels flipped so far.`;
    if (name === "float") return `float: top-1 ${wilson(right, n)} on ${n} test images. Nothing is rounded.`;
    const p = mcNemar(gained, lost), chance = p < 0.05 ? "more than chance" : "not significant";
    const moved = state.moved ? ` GPTQ moved ${percent(state.moved / state.weights)} of the integers ` +
      "away from the nearest." : "";
    return `${name}: top-1 ${wilson(right, n)} on ${n} test images, float ${wilson(floatRight, n)}. ` +
      `${flipped} labels flipped: ${lost} lost, ${gained} won, ${flipped - lost - gained} wrong before ` +
      `and after (p ${p < 0.001 ? "< 0.001" : `= ${p.toFixed(3)}`}, ${chance}).${moved}`;
  }

  // ---- controls ----

  const rounding = () => document.querySelector("[name=vit-rounding]:checked").value;
  const bits = id => (+$(id).value === FLOAT ? 0 : +$(id).value);
  state.weights = VIT_DATA.layers
    .reduce((sum, name) => sum + VIT_DATA.floats.places[`${name}.weight`][1], 0);
  $("calibration").textContent = `${VIT_DATA.calibration} training`;

  const ask = startEngine(VIT_DATA, answer => {
    answer.logits.forEach((logits, k) => {
      state.float[answer.first + k] = answer.exactLogits[k];
      state.now[answer.first + k] = logits;
      drawTile(answer.first + k);
    });
    Object.assign(state, { errors: answer.errors, moved: answer.moved, done: answer.last });
    if (state.chosen !== null) drawDetail();
    drawErrors();
    $("progress").value = state.now.length / images;
    $("progress").classList.toggle("vit-idle", state.done);
    // Words while computing would be read aloud again and again, so they are said at the end.
    $("status").setAttribute("aria-busy", !state.done);
    $("status").textContent = say();
  });

  function update() {
    const weights = bits("weights"), acts = bits("acts");
    for (const id of ["weights", "acts"]) {
      const words = bits(id) ? `${bits(id)} bits` : "float";
      $(`${id}-said`).textContent = words;
      $(id).setAttribute("aria-valuetext", words);
    }
    const gptq = document.querySelector("[value=gptq]"), possible = gptqBits.includes(weights);
    gptq.disabled = !possible;
    $("gptq-said").textContent = possible ? "" : "(shipped for 2, 3 and 4 bits)";
    if (!possible && gptq.checked) document.querySelector("[value=mse]").checked = true;
    const setting = { weights, acts, rounding: rounding() };
    if (JSON.stringify(setting) === JSON.stringify(state.setting)) return;
    Object.assign(state, { setting, now: [], done: false });
    tiles.forEach((tile, i) => {
      tile.button.classList.add("vit-old"); // until its answer is there
      tile.item.hidden = tile.item.hidden && i >= SHOWN;
    });
    document.querySelectorAll("[data-set]").forEach(button => {
      const same = button.dataset.set === [weights || FLOAT, acts || FLOAT, setting.rounding].join(" ");
      button.setAttribute("aria-pressed", same);
    });
    ask(setting);
  }

  for (const input of document.querySelectorAll("#vit input")) input.addEventListener("input", update);
  for (const button of document.querySelectorAll("[data-set]")) {
    button.addEventListener("click", () => {
      const [weights, acts, kind] = button.dataset.set.split(" ");
      [$("weights").value, $("acts").value] = [weights, acts];
      document.querySelector(`[value=${kind}]`).checked = true;
      update();
    });
  }
  $("shown").addEventListener("change", () => state.now.forEach((_, i) => drawTile(i)));
  tiles.forEach((tile, i) => { tile.item.hidden = i >= SHOWN; });
  update();
})();
