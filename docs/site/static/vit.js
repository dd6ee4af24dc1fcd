// The embedded vision transformer, quantized as evolq_lite quantizes it, in plain JavaScript: no
// kernel, no server. Read it beside evolq_lite/layers.py, whose names it keeps. `engine` is what
// runs in a worker; `startEngine` starts it for the page.
//
// Sums are made in float64 and stored in float32, where torch sums in float32. So logits differ in
// the sixth digit, and now and then a number halfway between two integers goes the other way.

"use strict";

function engine() {
  const single = Math.fround; // to float32
  const BIG = 1.5 * 2 ** 52; // added to a number, it leaves no room for digits behind the point
  const roundHalfEven = x => x + BIG - BIG;
  const clamp = (x, low, high) => (x < low ? low : x > high ? high : x);

  function erf(x) { // Abramowitz and Stegun 7.1.26: off by at most 1.5e-7
    const t = 1 / (1 + 0.3275911 * Math.abs(x));
    const sum = ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t +
      0.254829592) * t;
    return Math.sign(x) * (1 - sum * Math.exp(-x * x));
  }

  const gelu = x => x.map(v => v * 0.5 * (1 + erf(v * Math.SQRT1_2)));
  const add = (x, y) => x.map((v, i) => v + y[i]);

  // The integers that stand for x * unit, counted from the zero point; in place. `x` is
  // (tokens, channels), row by row, and a point has one scale or one per channel.
  function toIntegers(x, point, unit = 1) {
    const { zero, top } = point, factor = point.inverse.map(v => v * unit);
    for (let i = 0, c = 0; i < x.length; i++) {
      x[i] = clamp(roundHalfEven(single(x[i] * factor[c])) + zero, 0, top) - zero;
      if (++c === factor.length) c = 0;
    }
    return x;
  }

  // What the integers can tell apart; without a point, floats pass. In place.
  function fakeQuantize(x, point, unit = 1) {
    const scale = point ? point.scale : [unit];
    if (point) toIntegers(x, point, unit);
    for (let i = 0, c = 0; i < x.length; i++) {
      x[i] *= scale[c];
      if (++c === scale.length) c = 0;
    }
    return x;
  }

  function softmax(x) { // in place
    const largest = x.reduce((a, b) => Math.max(a, b));
    let sum = 0;
    for (let i = 0; i < x.length; i++) sum += x[i] = Math.exp(x[i] - largest);
    for (let i = 0; i < x.length; i++) x[i] /= sum;
  }

  // The network at one setting: {weights, acts} are bits, 0 for float; `rounding` is how integers
  // of weights are chosen: nearest with scales by "minmax" or by "mse", or "gptq".
  class Network {
    constructor(data, setting) {
      this.data = data;
      this.setting = setting;
      this.moved = 0; // weights whose integer is not the nearest
      this.layers = {};
      for (const name of data.layers) this.layers[name] = this.roundLayer(name);
      this.points = {};
      for (const name of setting.acts ? data.points : []) {
        const scale = data.floats(`act.${setting.acts}.${name}.scale`);
        const [zero] = data.floats(`act.${setting.acts}.${name}.zero_point`);
        const top = 2 ** setting.acts - 1;
        this.points[name] = { scale, inverse: scale.map(s => 1 / s), zero, top };
      }
    }

    // The weight (outputs, inputs) and the bias of a layer.
    roundLayer(name) {
      const { floats, integers } = this.data, { weights: bits, rounding } = this.setting;
      const float = floats(`${name}.weight`), bias = floats(`${name}.bias`);
      if (!bits) return { weight: float, bias };
      const first = rounding === "gptq" ? "mse" : rounding;
      const scale = floats(`${first}.${bits}.${name}.weight_quant`); // one per output
      const inputs = float.length / scale.length, top = 2 ** (bits - 1) - 1;
      const row = i => Math.floor(i / inputs);
      const inverse = scale.map(s => 1 / s);
      const nearest = float.map((w, i) =>
        clamp(roundHalfEven(single(w * inverse[row(i)])), -top - 1, top));
      if (rounding !== "gptq") return { weight: nearest.map((q, i) => q * scale[row(i)]), bias };
      const chosen = integers(`gptq.${bits}.${name}.integers`);
      const refit = floats(`gptq.${bits}.${name}.scale`);
      nearest.forEach((q, i) => { this.moved += q !== chosen[i]; });
      const weight = float.map((_, i) => chosen[i] * refit[row(i)]);
      return { weight, bias: floats(`gptq.${bits}.${name}.bias`) };
    }

    // (tokens, inputs) to (tokens, outputs).
    linear(name, x) {
      const { weight, bias } = this.layers[name];
      const outputs = bias.length, inputs = weight.length / outputs;
      x = fakeQuantize(x.slice(), this.points[`${name}.input_quant`]);
      const y = new Float32Array(x.length / inputs * outputs);
      let at = 0;
      for (let first = 0; first < x.length; first += inputs) {
        for (let o = 0, w = 0; o < outputs; o++) {
          let a = bias[o], b = 0, c = 0, d = 0; // four sums, so that none waits for another
          for (let i = first; i < first + inputs; i += 4, w += 4) {
            a += x[i] * weight[w];
            b += x[i + 1] * weight[w + 1];
            c += x[i + 2] * weight[w + 2];
            d += x[i + 3] * weight[w + 3];
          }
          y[at++] = a + b + c + d;
        }
      }
      return y;
    }

    layerNorm(name, x) {
      const weight = this.data.floats(`${name}.weight`), bias = this.data.floats(`${name}.bias`);
      const n = weight.length, y = new Float32Array(x.length);
      for (let first = 0; first < x.length; first += n) {
        let mean = 0, variance = 0;
        for (let i = first; i < first + n; i++) mean += x[i] / n;
        for (let i = first; i < first + n; i++) variance += (x[i] - mean) ** 2 / n;
        const root = 1 / Math.sqrt(variance + this.data.epsilon);
        for (let i = 0; i < n; i++) y[first + i] = (x[first + i] - mean) * root * weight[i] + bias[i];
      }
      return y;
    }

    // qkv (tokens, 3, heads, size) to (tokens, heads * size): all five operands are integers.
    products(name, qkv) {
      const { tokens, heads, channels } = this.data, size = channels / heads;
      const points = part => this.points[`${name}.${part}`];
      const operand = (part, which) => { // (tokens, heads * size)
        const x = new Float32Array(tokens * channels);
        for (let t = 0; t < tokens; t++) {
          const first = (3 * t + which) * channels;
          x.set(qkv.subarray(first, first + channels), t * channels);
        }
        return points(part) ? toIntegers(x, points(part)) : x;
      };
      const worth = part => (points(part) ? points(part).scale[0] : 1);
      const q = operand("q", 0), k = operand("k", 1), v = operand("v", 2);
      const scoreUnit = worth("q") * worth("k") / Math.sqrt(size);
      const valueUnit = worth("probabilities") * worth("v");
      const out = new Float32Array(tokens * channels), row = new Float32Array(tokens);
      for (let head = 0; head < channels; head += size) {
        for (let t = 0; t < tokens; t++) { // token t attends to all tokens
          const from = t * channels + head;
          for (let j = 0; j < tokens; j++) {
            let sum = 0;
            for (let c = 0; c < size; c++) sum += q[from + c] * k[j * channels + head + c];
            row[j] = sum;
          }
          softmax(fakeQuantize(row, points("scores"), scoreUnit));
          if (points("probabilities")) toIntegers(row, points("probabilities"));
          for (let c = 0; c < size; c++) {
            let sum = 0;
            for (let j = 0; j < tokens; j++) sum += row[j] * v[j * channels + head + c];
            out[from + c] = sum * valueUnit;
          }
        }
      }
      return out;
    }

    block(name, x) {
      const qkv = this.linear(`${name}.attn.qkv`, this.layerNorm(`${name}.norm1`, x));
      const attended = this.linear(`${name}.attn.proj`, this.products(`${name}.attn.products`, qkv));
      x = fakeQuantize(add(x, attended), this.points[`${name}.sum1`]);
      const hidden = this.linear(`${name}.mlp.fc1`, this.layerNorm(`${name}.norm2`, x));
      const mlp = this.linear(`${name}.mlp.fc2`, gelu(hidden));
      return fakeQuantize(add(x, mlp), this.points[`${name}.sum2`]);
    }

    // Image i as (patches, pixels of a patch), mapped from 0..255 to -1..1.
    patches(i) {
      const { side, patch, pixels } = this.data, image = i * side * side;
      const x = new Float32Array(side * side);
      let at = 0;
      for (let top = 0; top < side; top += patch) {
        for (let left = 0; left < side; left += patch) {
          for (let row = top; row < top + patch; row++) {
            for (let column = left; column < left + patch; column++) {
              // In float32, as torch does it: with 8 bits, each pixel lies halfway between integers.
              x[at++] = (single(pixels[image + row * side + column] / 255) - 0.5) / 0.5;
            }
          }
        }
      }
      return x;
    }

    // What leaves the embedding, each block, and the head (the logits) for image i.
    trace(i) {
      const { floats, channels, depth } = this.data;
      const embedded = new Float32Array(this.data.tokens * channels); // the class token is first
      embedded.set(floats("cls_token"));
      embedded.set(this.linear("patch_embed.proj", this.patches(i)), channels);
      let x = fakeQuantize(add(embedded, floats("pos_embed")), this.points["norm_pre.1"]);
      const seen = [x];
      for (let b = 0; b < depth; b++) seen.push(x = this.block(`blocks.${b}`, x));
      seen.push(this.linear("head", this.layerNorm("norm", x.subarray(0, channels))));
      return seen;
    }
  }

  // ---- what the page asks for ----

  const TRACED = 60; // images whose error is followed from block to block
  const exact = []; // the float network's trace of these, and its logits of the others
  let data, float; // float: the network without any rounding
  let wanted = 0; // the latest run; an older one stops

  function load(file) {
    const bytes = part => Uint8Array.from(atob(part.base64), letter => letter.charCodeAt(0)).buffer;
    const reader = (part, numbers) => name => {
      const [first, count] = part.places[name];
      return numbers.subarray(first, first + count);
    };
    data = {
      ...file,
      floats: reader(file.floats, new Float32Array(bytes(file.floats))),
      integers: reader(file.integers, new Int8Array(bytes(file.integers))),
      pixels: new Uint8Array(bytes(file.pixels)),
    };
    float = new Network(data, { weights: 0, acts: 0, rounding: "minmax" });
  }

  // All images at a setting. Answers come a few images at a time, until another one is wanted.
  async function run(id, setting) {
    const network = new Network(data, setting), { moved } = network;
    const lost = new Float64Array(data.depth + 2), power = new Float64Array(data.depth + 2);
    const images = data.labels.length;
    let logits = [], exactLogits = [], since = performance.now();
    for (let i = 0; i < images; i++) {
      exact[i] = exact[i] || float.trace(i).slice(i < TRACED ? 0 : -1);
      const trace = network.trace(i);
      exactLogits.push(exact[i].at(-1));
      logits.push(trace.at(-1));
      for (let at = 0; at < trace.length && i < TRACED; at++) {
        const wish = exact[i][at];
        trace[at].forEach((x, c) => { lost[at] += (x - wish[c]) ** 2; power[at] += wish[c] ** 2; });
      }
      const last = i === images - 1;
      if (performance.now() - since < 100 && !last) continue;
      const errors = Array.from(lost, (l, at) => Math.sqrt(l / power[at]));
      postMessage({ id, first: i + 1 - logits.length, logits, exactLogits, errors, moved, last });
      [logits, exactLogits] = [[], []];
      await new Promise(done => setTimeout(done)); // lets a newer wish in
      if (id !== wanted) return;
      since = performance.now();
    }
  }

  self.onmessage = ({ data: message }) => {
    if (message.file) load(message.file);
    if (message.setting) run(wanted = message.id, message.setting);
  };
}

// A worker made from the text of `engine`: browsers load no worker file for a page that was opened
// from a folder. Returns `ask(setting)`; answers go to `hear`, those to older questions are dropped.
function startEngine(file, hear) {
  const text = new Blob([`(${engine})()`], { type: "text/javascript" });
  const worker = new Worker(URL.createObjectURL(text));
  let id = 0;
  worker.onmessage = ({ data }) => { if (data.id === id) hear(data); };
  worker.postMessage({ file });
  return setting => worker.postMessage({ id: ++id, setting });
}
