// The page `play`: a surface that turns, and a search that is played from its record.

"use strict";

(() => {
  const $ = id => document.getElementById(`play-${id}`);
  const { landscapes, search } = PLAY_DATA;
  const state = { kind: 0, turn: 35, tilt: 35, at: 1, timer: null };
  window.play = state; // for tests, and for the curious

  // Colors of the page, in the theme that it has now.
  const ink = () => getComputedStyle(document.body).color;
  const paper = () => getComputedStyle(document.body).backgroundColor;

  // From dark blue to yellow, like the lessons' maps.
  function shade(share) {
    const stops = [[0, 34, 78], [55, 73, 111], [124, 123, 120], [187, 173, 108], [254, 232, 56]];
    const place = share * (stops.length - 1), low = Math.min(Math.floor(place), stops.length - 2);
    const mixed = stops[low].map((v, i) => v + (place - low) * (stops[low + 1][i] - v));
    return `rgb(${mixed.map(Math.round).join(" ")})`;
  }

  // ---- the surface ----

  const all = landscapes.flatMap(({ values }) => values.flat());
  const [lowest, highest] = [Math.min(...all), Math.max(...all)];
  const share = value => (value - lowest) / (highest - lowest);

  // Where a point of the plane is on the canvas, and how far away.
  function project(canvas, i, j, value) {
    const n = landscapes[0].values.length - 1, turn = state.turn * Math.PI / 180;
    const tilt = state.tilt * Math.PI / 180, x = 2 * j / n - 1, y = 2 * i / n - 1;
    const across = x * Math.cos(turn) - y * Math.sin(turn), depth = x * Math.sin(turn) + y * Math.cos(turn);
    const up = depth * Math.sin(tilt) + 1.1 * (share(value) - 0.5) * Math.cos(tilt);
    const unit = canvas.height / 3.1;
    return { x: canvas.width / 2 + 1.15 * unit * across, y: canvas.height / 2 - unit * up, depth };
  }

  function drawSurface() {
    const canvas = $("surface"), context = canvas.getContext("2d"), { name, values } = landscapes[state.kind];
    context.clearRect(0, 0, canvas.width, canvas.height);
    const points = values.map((row, i) => row.map((value, j) => project(canvas, i, j, value)));
    const cells = [];
    for (let i = 0; i + 1 < values.length; i++) {
      for (let j = 0; j + 1 < values.length; j++) {
        const corners = [points[i][j], points[i][j + 1], points[i + 1][j + 1], points[i + 1][j]];
        const mean = (values[i][j] + values[i][j + 1] + values[i + 1][j + 1] + values[i + 1][j]) / 4;
        cells.push({ corners, mean, depth: corners.reduce((sum, c) => sum + c.depth, 0) });
      }
    }
    cells.sort((a, b) => b.depth - a.depth); // what is behind comes first
    context.lineWidth = 1.2;
    context.lineJoin = "round";
    for (const { corners, mean } of cells) {
      context.beginPath();
      corners.forEach(({ x, y }) => context.lineTo(x, y));
      context.closePath();
      context.fillStyle = shade(share(mean));
      context.strokeStyle = "rgb(40 40 40 / 0.55)";
      context.fill();
      context.stroke();
    }
    const flat = values.flat(), middle = values[values.length >> 1][values.length >> 1];
    const center = project(canvas, values.length >> 1, values.length >> 1, middle);
    context.beginPath();
    context.arc(center.x, center.y, 9, 0, 7);
    context.fillStyle = "white";
    context.strokeStyle = "black";
    context.lineWidth = 3;
    context.fill();
    context.stroke();
    const said = `${PLAY_DATA.where}, ${name}: within ${PLAY_DATA.percent} % of every scale, on ` +
      `${PLAY_DATA.planeImages} images, the loss changes by ${Math.min(...flat).toFixed(4)} to ` +
      `+${Math.max(...flat).toFixed(4)}. The white dot is where a search starts.`;
    canvas.setAttribute("aria-label", `Surface seen from ${state.turn} degrees. ${said}`);
    if ($("surface-said").textContent !== said) $("surface-said").textContent = said; // not at every turn
    for (const key of ["turn", "tilt"]) {
      $(`${key}-said`).textContent = `${Math.round(state[key])}°`;
      $(key).value = state[key];
    }
  }

  landscapes.forEach(({ name }, kind) => {
    const label = document.createElement("label"), input = document.createElement("input");
    Object.assign(input, { type: "radio", name: "play-kind", value: kind, checked: kind === 0 });
    label.append(input, ` ${name}`);
    $("kinds").append(label);
    input.addEventListener("change", () => { state.kind = kind; drawSurface(); });
  });
  for (const key of ["turn", "tilt"]) {
    $(key).addEventListener("input", () => { state[key] = +$(key).value; drawSurface(); });
  }
  const surface = $("surface");
  surface.addEventListener("pointerdown", event => surface.setPointerCapture(event.pointerId));
  surface.addEventListener("pointermove", event => {
    if (!surface.hasPointerCapture(event.pointerId)) return;
    state.turn = (state.turn - 0.5 * event.movementX + 360) % 360;
    state.tilt = Math.min(90, Math.max(10, state.tilt + 0.3 * event.movementY));
    drawSurface();
  });

  // ---- the search ----

  const colors = ["#3f90da", "#e8843a", "#bd1f01", "#8b6fc0", "#4a9e58", "#a96b59", "#b9ac70", "#92dadd"];
  const best = [];
  search.forEach(([, loss], i) => best.push(i ? Math.min(best[i - 1], loss) : loss));

  function drawHistory() {
    const canvas = $("history"), context = canvas.getContext("2d"), { width, height } = canvas;
    const losses = search.map(([, loss]) => loss).sort((a, b) => a - b);
    const low = losses[0], high = Math.max(search[0][1], losses[Math.floor(0.97 * losses.length)]);
    const left = 130, bottom = 90, top = 60;
    const x = i => left + (width - left - 40) * i / Math.max(1, search.length - 1);
    const y = v => height - bottom - (height - bottom - top) * Math.min(1.06, (v - low) / (high - low));
    context.clearRect(0, 0, width, height);
    Object.assign(context, { fillStyle: ink(), strokeStyle: ink(), font: "26px sans-serif", lineWidth: 2 });
    context.strokeRect(left - 20, top - 30, width - left, height - bottom - top + 50);
    context.fillText("evaluation", width / 2 - 60, height - 16);
    for (const v of [low, (low + high) / 2, high]) context.fillText(v.toFixed(3), 4, y(v) + 9);
    for (const i of [0, search.length >> 1, search.length - 1]) context.fillText(i + 1, x(i) - 14, height - 48);
    context.beginPath();
    for (let i = 0; i < state.at; i++) {
      if (i) context.lineTo(x(i), y(best[i - 1]));
      context.lineTo(x(i), y(best[i]));
    }
    context.stroke();
    search.slice(0, state.at).forEach(([block, loss, accepted], i) => {
      context.beginPath();
      context.arc(x(i), y(loss), i === state.at - 1 ? 11 : 7, 0, 7);
      context.lineWidth = 3;
      context.strokeStyle = colors[block % colors.length];
      context.fillStyle = accepted ? colors[block % colors.length] : paper();
      context.fill();
      context.stroke();
    });
    [...new Set(search.map(([block]) => block))].sort((a, b) => a - b).forEach((block, i) => {
      context.fillStyle = colors[block % colors.length];
      context.fillRect(left + 150 * i, 4, 22, 22);
      context.fillStyle = ink();
      context.fillText(`block ${block}`, left + 30 + 150 * i, 24);
    });
    const [block, loss, accepted] = search[state.at - 1];
    const found = search.slice(1, state.at).filter(([, , yes]) => yes).length;
    const now = state.at === 1 ? `The first scales: loss ${loss.toFixed(4)}.`
      : `Evaluation ${state.at} of ${search.length}, block ${block}: loss ${loss.toFixed(4)}, ` +
        `${accepted ? "accepted" : "rejected"}; ${found} accepted so far, best ${best[state.at - 1].toFixed(4)}.`;
    canvas.setAttribute("aria-label", now);
    $("at-said").textContent = state.at;
    $("at").value = state.at;
    // Words that change with every candidate would be read aloud without end.
    if (state.timer === null || state.at % 10 === 0) $("history-said").textContent = now;
  }

  function stop() {
    clearInterval(state.timer);
    state.timer = null;
    $("button").textContent = "Play";
    drawHistory();
  }
  $("button").addEventListener("click", () => {
    if (state.timer !== null) return stop();
    if (state.at === search.length) state.at = 1;
    $("button").textContent = "Pause";
    state.timer = setInterval(() => {
      state.at += 1;
      if (state.at >= search.length) return stop();
      drawHistory();
    }, 80);
  });
  $("at").max = search.length;
  $("at").addEventListener("input", () => { state.at = +$("at").value; drawHistory(); });
  $("images").textContent = PLAY_DATA.searchImages;

  // A canvas does not follow the theme by itself.
  const redraw = () => { drawSurface(); drawHistory(); };
  new MutationObserver(redraw).observe(document.body, { attributes: true, attributeFilter: ["data-theme"] });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  redraw();
})();
