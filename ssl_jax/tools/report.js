'use strict';
// The curves of a report: SVG line charts with smoothing, a logarithmic axis, intervals, and values under the pointer.
const {runs, charts} = JSON.parse(document.getElementById('data').textContent);
const state = {smooth: 0, log: false, hidden: new Set()};
const HEIGHT = 230, LEFT = 54, RIGHT = 12, TOP = 8, BOTTOM = 34;

function svg(parent, name, attributes = {}, text) {
  const element = document.createElementNS('http://www.w3.org/2000/svg', name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  parent.append(element);
  return element;
}

function html(parent, name, class_, text) {
  const element = document.createElement(name);
  if (class_) element.className = class_;
  if (text !== undefined) element.textContent = text;
  parent.append(element);
  return element;
}

// Mean with weights that fall off exponentially, corrected for its start; gaps stay gaps.
function smoothed(y, weight) {
  let sum = 0, total = 0;
  return y.map(v => {
    if (v === null) return null;
    sum = weight * sum + (1 - weight) * v;
    total = weight * total + (1 - weight);
    return sum / total;
  });
}

function nice(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find(m => m * power >= rough * 0.999);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) ticks.push(i * step);
  return ticks;
}

function decades(low, high) {
  const ticks = [], wide = Math.log10(high / low);
  for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++)
    for (const m of wide > 3 ? [1] : wide > 1 ? [1, 3] : [1, 1.5, 2, 3, 5, 7]) ticks.push(m * 10 ** e);
  const inside = ticks.filter(t => t >= low * 0.999 && t <= high * 1.001);
  return inside.length > 1 ? inside : nice(low, high, 4);
}

function format(v) {
  if (v === 0) return '0';
  const size = Math.abs(v);
  if (size >= 1e6 || size < 1e-4) return v.toExponential(2).replace(/\.?0+e/, 'e').replace('e+', 'e');
  return size >= 1e4 ? Math.round(v).toLocaleString('en') : String(+v.toPrecision(4));
}

const colour = s => (s.colour ?? s.run ?? 0) % 10;
const named = s => s.label || (runs.length > 1 ? runs[s.run] : '') || '';

function draw(figure) {
  const chart = charts[figure.dataset.chart];
  figure.replaceChildren();
  html(figure, 'figcaption', '', chart.title);
  const series = chart.series.filter(s => !state.hidden.has(s.run));
  const lines = (chart.lines || []).filter(l => !state.hidden.has(l.run));
  const width = Math.max(figure.clientWidth - 24, 200);
  const root = svg(figure, 'svg', {viewBox: `0 0 ${width} ${HEIGHT}`, role: 'img', 'aria-label': chart.title});
  if (!series.length) return;

  // What is shown, and the axes that it needs. An alarm's limit far away from the curve does not squeeze it.
  const weight = chart.smooth ? state.smooth : 0;
  const shown = series.map(s => weight ? smoothed(s.y, weight) : s.y);
  const xs = series.flatMap(s => s.x);
  let ys = series.flatMap(s => [s.y, s.low || [], s.high || []].flat()).filter(v => v !== null);
  const near = lines.filter(l => l.colour !== 'alarm' || withinReach(l.y, ys));
  ys = ys.concat(near.map(l => l.y));
  let [x0, x1] = chart.unit ? [0, 1] : extent(xs), [y0, y1] = chart.unit ? [0, 1] : extent(ys);
  const log = state.log && chart.log && y0 > 0;
  if (x0 === x1) { x0 -= 1; x1 += 1; }
  if (y0 === y1) { const pad = Math.abs(y0) * 0.1 || 1; y0 -= pad; y1 += pad; }
  const pad = chart.unit ? 0 : 0.05;
  if (log) { const ratio = (y1 / y0) ** pad; y0 /= ratio; y1 *= ratio; } else { const d = (y1 - y0) * pad; y0 -= d; y1 += d; }
  const px = v => LEFT + (v - x0) / (x1 - x0) * (width - LEFT - RIGHT);
  const share = log ? v => Math.log(v / y0) / Math.log(y1 / y0) : v => (v - y0) / (y1 - y0);
  const py = v => HEIGHT - BOTTOM - share(v) * (HEIGHT - TOP - BOTTOM);

  for (const t of log ? decades(y0, y1) : nice(y0, y1, 5)) {
    svg(root, 'path', {class: 'grid', d: `M${LEFT},${py(t).toFixed(1)}H${width - RIGHT}`});
    svg(root, 'text', {x: LEFT - 7, y: py(t) + 4, 'text-anchor': 'end'}, format(+t.toPrecision(12)));
  }
  for (const t of nice(x0, x1, Math.max(3, Math.floor(width / 60))))
    svg(root, 'text', {x: px(t), y: HEIGHT - BOTTOM + 15, 'text-anchor': 'middle'}, format(+t.toPrecision(12)));
  svg(root, 'path', {class: 'axis', d: `M${LEFT},${HEIGHT - BOTTOM}H${width - RIGHT}`});
  if (chart.xlabel)
    svg(root, 'text', {x: (LEFT + width - RIGHT) / 2, y: HEIGHT - 3, 'text-anchor': 'middle'}, chart.xlabel);
  if (chart.ylabel)
    svg(root, 'text', {transform: `translate(11 ${(HEIGHT - BOTTOM) / 2}) rotate(-90)`, 'text-anchor': 'middle'},
      chart.ylabel);
  for (const [a, b, h] of chart.bars || [])
    svg(root, 'rect', {class: 'bars', x: px(a) + 0.5, width: Math.max(px(b) - px(a) - 1, 0.5), y: py(h),
      height: py(0) - py(h)});
  if (chart.diagonal) svg(root, 'path', {class: 'level chance', d: `M${px(0)},${py(0)}L${px(1)},${py(1)}`});
  for (const l of near) {
    const own = typeof l.colour === 'string' ? l.colour : `dash l${colour(l)}`;
    const element = svg(root, 'path', {class: `level ${own}`, d: `M${LEFT},${py(l.y).toFixed(1)}H${width - RIGHT}`});
    svg(element, 'title', {}, `${l.label} ${format(l.y)}`);
  }

  const curves = series.map((s, i) => {
    if (s.low && s.x.length === 1)
      svg(root, 'path', {class: `level l${colour(s)}`, d: `M${px(s.x[0])},${py(s.low[0])}V${py(s.high[0])}`});
    else if (s.low) {
      const up = s.x.map((x, j) => `${px(x).toFixed(1)},${py(s.high[j]).toFixed(1)}`);
      const down = s.x.map((x, j) => `${px(x).toFixed(1)},${py(s.low[j]).toFixed(1)}`).reverse();
      svg(root, 'path', {class: `band f${colour(s)}`, d: `M${up.concat(down).join('L')}Z`});
    }
    if (weight) svg(root, 'path', {class: `curve raw l${colour(s)}`, d: path(s.x, s.y, px, py)});
    const curve = svg(root, 'path', {class: `curve l${colour(s)}`, d: path(s.x, shown[i], px, py)});
    if (chart.points || s.x.length === 1) s.x.forEach((x, j) => {
      if (s.y[j] !== null) svg(root, 'circle', {class: `f${colour(s)}`, cx: px(x), cy: py(s.y[j]), r: 2.6});
    });
    return curve;
  });

  const legend = html(figure, 'div', 'legend');
  const labels = chart.series.length > 1 || named(chart.series[0]) ? series.filter(s => named(s)) : [];
  for (const s of labels) {
    const entry = html(legend, 'span');
    html(entry, 'i', `swatch b${colour(s)}`);
    entry.append(named(s));
  }
  if (chart.legend) html(legend, 'span', '', chart.legend);
  if (log) html(legend, 'span', '', 'logarithmic');
  else if (state.log && chart.log) html(legend, 'span', '', 'linear: not all values are positive');
  follow(figure, root, chart, {series, shown, weight, curves, px, py, width, near});
}

const extent = values => values.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [Infinity, -Infinity]);

function withinReach(y, values) {
  const [low, high] = extent(values), span = high - low || Math.abs(high) || 1;
  return y > low - span && y < high + span;
}

function path(x, y, px, py) {
  let d = '', pen = 'M';
  x.forEach((v, i) => {
    if (y[i] === null) { pen = 'M'; return; }
    d += `${pen}${px(v).toFixed(1)},${py(y[i]).toFixed(1)}`;
    pen = 'L';
  });
  return d;
}

// The values nearest to the pointer: of all curves at one step, or the one point of all curves.
function follow(figure, root, chart, {series, shown, weight, curves, px, py, width, near}) {
  let tip = null, cursor = null;
  const leave = () => {
    tip?.remove();
    cursor?.remove();
    curves.forEach(c => c.classList.remove('thick'));
    tip = cursor = null;
  };
  root.addEventListener('pointerleave', leave);
  root.addEventListener('pointermove', event => {
    leave();
    const box = root.getBoundingClientRect(), scale = width / box.width;
    const mx = (event.clientX - box.left) * scale, my = (event.clientY - box.top) * scale;
    let best = null;
    series.forEach((s, i) => s.x.forEach((x, j) => {
      if (s.y[j] === null) return;
      const d = chart.unit ? Math.hypot(px(x) - mx, py(s.y[j]) - my) : Math.abs(px(x) - mx);
      if (best === null || d < best.d) best = {d, i, j, x};
    }));
    if (best === null) return;
    cursor = svg(root, 'path', {class: 'cursor', d: `M${px(best.x)},${TOP}V${HEIGHT - BOTTOM}`});
    tip = html(figure, 'div', 'tip');
    if (chart.unit) {
      const s = series[best.i];
      curves[best.i].classList.add('thick');
      html(tip, 'b', '', named(s));
      html(tip, 'div', '', `${chart.xlabel} ${format(s.x[best.j])}`);
      html(tip, 'div', '', `${chart.ylabel} ${format(s.y[best.j])}`);
    } else {
      html(tip, 'b', '', `${chart.xlabel} ${best.x.toLocaleString('en')}`);
      series.forEach((s, i) => {
        const j = closest(s.x, best.x);
        const row = html(tip, 'div');
        if (runs.length > 1) html(row, 'i', `swatch b${colour(s)}`);
        const value = s.y[j] === null ? 'not finite' : s.y[j].toLocaleString('en', {maximumSignificantDigits: 7});
        const away = s.x[j] === best.x ? '' : ` (at ${s.x[j].toLocaleString('en')})`;
        const ends = s.low ? ` [${format(s.low[j])}, ${format(s.high[j])}]` : '';
        row.append(`${named(s)} ${value}${ends}${away}`);
        if (weight && shown[i][j] !== null) html(row, 'span', 'faint', ` smoothed ${format(shown[i][j])}`);
      });
      for (const l of near) html(tip, 'div', 'faint', `${l.label} ${format(l.y)}`);
    }
    const left = px(best.x) / scale + 22;
    tip.style.top = `${Math.max(0, my / scale - tip.offsetHeight / 2 + 20)}px`;
    tip.style.left = `${left + tip.offsetWidth > figure.clientWidth ? Math.max(0, left - tip.offsetWidth - 20) : left}px`;
  });
}

function closest(xs, x) {
  let best = 0;
  xs.forEach((v, j) => { if (Math.abs(v - x) < Math.abs(xs[best] - x)) best = j; });
  return best;
}

const figures = [...document.querySelectorAll('.chart')];
const redraw = () => figures.forEach(draw);
const smooth = document.getElementById('smooth'), log = document.getElementById('log');
smooth?.addEventListener('input', () => {
  state.smooth = +smooth.value;
  document.getElementById('smoothing').textContent = smooth.value;
  redraw();
});
log?.addEventListener('change', () => { state.log = log.checked; redraw(); });
document.getElementById('tools')?.addEventListener('submit', event => event.preventDefault());
if (runs.length > 1) runs.forEach((name, k) => {
  const label = html(document.getElementById('runs'), 'label'), box = html(label, 'input');
  box.type = 'checkbox';
  box.checked = true;
  box.addEventListener('change', () => { state.hidden[box.checked ? 'delete' : 'add'](k); redraw(); });
  html(label, 'i', `swatch b${k % 10}`);
  label.append(name);
});
for (const gallery of document.querySelectorAll('.gallery')) {
  const buttons = [...gallery.querySelectorAll('button')];
  buttons.forEach(button => button.addEventListener('click', () => {
    buttons.forEach(b => b.setAttribute('aria-pressed', b === button));
    for (const shown of gallery.querySelectorAll('.pictures')) shown.hidden = shown.dataset.step !== button.dataset.step;
  }));
}
for (const picture of document.querySelectorAll('.pictures img'))
  picture.addEventListener('click', () => picture.closest('figure').classList.toggle('large'));
// A chart in a closed fold has no width to draw in.
for (const fold of document.querySelectorAll('details'))
  fold.addEventListener('toggle', () => { if (fold.open) fold.querySelectorAll('.chart').forEach(draw); });
let pending = 0;
window.addEventListener('resize', () => { clearTimeout(pending); pending = setTimeout(redraw, 100); });
window.addEventListener('beforeprint', redraw);   // paper has its own width
redraw();
