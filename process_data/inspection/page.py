"""The interactive page that :mod:`process_data.inspection.viewer` fills in: markup, style and WebGL."""

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>@TITLE@: cameras and points</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
html, body { margin: 0; height: 100%; overflow: hidden; background: #f3f5f8; color: #20242a;
  font: 14px/1.45 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
#view { width: 100%; height: 100%; display: block; cursor: grab; touch-action: none; }
.card { position: absolute; background: rgba(255, 255, 255, .92); border-radius: 8px; padding: 12px 16px;
  box-shadow: 0 1px 6px rgba(0, 0, 0, .15); }
#findings { top: 14px; left: 14px; width: 310px; max-height: calc(100% - 60px); overflow: auto; }
#findings h1 { font-size: 20px; margin: 0 0 6px; }
#findings p { margin: 3px 0; }
.warning { color: #c41e1e; font-weight: 600; }
.good { color: #14823c; font-weight: 600; }
#controls { top: 14px; right: 14px; }
#controls label { display: block; white-space: nowrap; }
#controls input[type=range] { width: 90px; vertical-align: middle; }
#tip { display: none; pointer-events: none; padding: 8px 10px; }
#tip canvas { display: block; margin-top: 5px; border-radius: 4px; }
#help { bottom: 10px; left: 0; right: 0; text-align: center; position: absolute; color: #78808a;
  pointer-events: none; }
.letter { position: absolute; pointer-events: none; font-weight: 700; text-shadow: 0 0 3px #fff; }
</style></head><body>
<canvas id="view"></canvas>
<div class="card" id="findings"></div>
<div class="card" id="controls">
<label><input type="checkbox" id="showCameras" checked> cameras</label>
<label><input type="checkbox" id="showPhotos" checked> photos</label>
<label><input type="checkbox" id="showPoints" checked> points</label>
<label><input type="checkbox" id="showSphere" checked> unit sphere</label>
<label><input type="checkbox" id="showAxes" checked> axes</label>
<label><input type="range" id="cameraSize" min="0.2" max="4" step="0.05" value="1"> camera size</label>
<label><input type="range" id="pointSize" min="1" max="8" step="0.5" value="3"> point size</label>
</div>
<div class="card" id="tip"><span></span><canvas></canvas></div>
<div id="help">drag: turn &nbsp; right button or shift: move &nbsp; wheel: zoom &nbsp; click a camera: look
through it &nbsp; R: back to the start</div>
<script>
"use strict";
const facts = @FACTS@;
const $ = id => document.getElementById(id);
const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0));
const corners = new Float32Array(bytes(facts.corners).buffer);
const points = new Float32Array(bytes(facts.points).buffer);
const number = facts.names.length;

// The findings, as text and never as markup.
function line(parent, text, name, tag) {
  const element = document.createElement(tag || "p");
  element.textContent = text;
  if (name) element.className = name;
  parent.appendChild(element);
}
line($("findings"), document.title.replace(/: cameras and points$/, ""), "", "h1");
facts.warnings.forEach(text => line($("findings"), "! " + text, "warning"));
facts.facts.forEach(text => line($("findings"), text, text.startsWith("poses fit") ? "good" : ""));

// Vectors.
const add = (a, b, s) => [a[0] + s * b[0], a[1] + s * b[1], a[2] + s * b[2]];
const dot = (a, b) => a[0] * b[0] + a[1] * b[1] + a[2] * b[2];
const cross = (a, b) => [a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]];
const unit = a => { const n = Math.hypot(...a) || 1; return a.map(x => x / n); };
const corner = (view, k) => Array.from(corners.subarray(15 * view + 3 * k, 15 * view + 3 * k + 3));

// The eye: it turns around a target, "up" stays up on the screen.
const up = unit(facts.up);
const level = unit(cross(up, Math.abs(up[0]) < 0.9 ? [1, 0, 0] : [0, 1, 0]));
const away = cross(level, up);
const distances = [...Array(number).keys()].map(v => Math.hypot(...corner(v, 0))).sort((a, b) => a - b);
const reach = Math.max(1.2, distances[Math.floor(0.95 * (number - 1))]);
let eye;
function reset() {
  eye = {target: [0, 0, 0], yaw: 0.6, pitch: 0.5, distance: 2.7 * reach, fov: 0.75, look: null};
}
reset();
function frame() {
  if (eye.look) return eye.look;
  const c = Math.cos(eye.pitch), s = Math.sin(eye.pitch);
  let back = [0, 1, 2].map(i => c * (Math.cos(eye.yaw) * level[i] + Math.sin(eye.yaw) * away[i]) + s * up[i]);
  const right = unit(cross(up, back));
  return {position: add(eye.target, back, eye.distance), right, over: cross(back, right), back};
}
function matrix(width, height) {
  const {position, right, over, back} = frame();
  const near = 0.01 * Math.min(1, eye.distance), far = 50 * reach + eye.distance;
  const f = 1 / Math.tan(eye.fov / 2), a = (far + near) / (near - far), b = 2 * far * near / (near - far);
  const rows = [right.map(x => x * f * height / width), over.map(x => x * f), back.map(x => x * a),
    back.map(x => -x)];
  const shifts = [-dot(rows[0], position), -dot(rows[1], position), -dot(rows[2], position) + b,
    dot(back, position)];
  const m = new Float32Array(16);
  for (let r = 0; r < 4; r++) {
    for (let k = 0; k < 3; k++) m[4 * k + r] = rows[r][k];
    m[12 + r] = shifts[r];
  }
  return m;
}

// WebGL: one program for lines, points and triangles, one for photographs. Cameras grow about their centres.
const canvas = $("view");
const gl = canvas.getContext("webgl", {antialias: true});
if (!gl) line($("findings"), "This browser has no WebGL: look at inspect.png instead.", "warning");
function program(vertex, fragment) {
  const made = gl.createProgram();
  for (const [kind, source] of [[gl.VERTEX_SHADER, vertex], [gl.FRAGMENT_SHADER, fragment]]) {
    const shader = gl.createShader(kind);
    gl.shaderSource(shader, source);
    gl.compileShader(shader);
    if (!gl.getShaderParameter(shader, gl.COMPILE_STATUS)) throw new Error(gl.getShaderInfoLog(shader));
    gl.attachShader(made, shader);
  }
  gl.linkProgram(made);
  return made;
}
const place = `attribute vec3 center, offset; uniform mat4 view; uniform float grow, size;
  vec4 placed() { gl_PointSize = size; return view * vec4(center + grow * offset, 1.0); }`;
const plain = gl && program(place + `attribute vec4 tint; varying vec4 color;
  void main() { gl_Position = placed(); color = tint; }`,
  `precision mediump float; varying vec4 color; void main() { gl_FragColor = color; }`);
const photo = gl && program(place + `attribute vec2 at; varying vec2 where;
  void main() { gl_Position = placed(); where = at; }`,
  `precision mediump float; varying vec2 where; uniform sampler2D picture; uniform float strength;
  void main() { gl_FragColor = vec4(texture2D(picture, where).rgb, strength); }`);

// A layer holds rows of center (3), offset (3) and a colour (4) or a place in the atlas (2).
function layer(rows, width, mode) {
  const buffer = gl.createBuffer();
  gl.bindBuffer(gl.ARRAY_BUFFER, buffer);
  gl.bufferData(gl.ARRAY_BUFFER, new Float32Array(rows), gl.STATIC_DRAW);
  return {buffer, width, mode, count: rows.length / width};
}
function draw(used, made, grow, size) {
  gl.useProgram(used);
  gl.bindBuffer(gl.ARRAY_BUFFER, made.buffer);
  const last = used === photo ? ["at", 2] : ["tint", 4];
  let start = 0;
  for (const [name, count] of [["center", 3], ["offset", 3], last]) {
    const slot = gl.getAttribLocation(used, name);
    gl.enableVertexAttribArray(slot);
    gl.vertexAttribPointer(slot, count, gl.FLOAT, false, 4 * made.width, 4 * start);
    start += count;
  }
  gl.uniformMatrix4fv(gl.getUniformLocation(used, "view"), false, matrix(canvas.width, canvas.height));
  gl.uniform1f(gl.getUniformLocation(used, "grow"), grow);
  gl.uniform1f(gl.getUniformLocation(used, "size"), size);
  gl.drawArrays(made.mode, 0, made.count);
}
const tint = (rgb, alpha) => [...rgb.map(x => x / 255), alpha];
function cameraLines(view, color) {
  const c = corner(view, 0), out = [];
  const put = p => out.push(...c, ...add(p, c, -1), ...color);
  const edge = (p, q) => { put(p); put(q); };
  const [a, b, d, e] = [1, 2, 3, 4].map(k => corner(view, k));
  for (const p of [a, b, d, e]) edge(c, p);
  edge(a, b); edge(b, d); edge(d, e); edge(e, a);
  // A roof over the upper edge shows which way the camera is held.
  const roof = add(add(a, b, 1).map(x => x / 2), add(a, e, -1), 0.25);
  edge(a, roof); edge(roof, b);
  return out;
}
const axisLength = 0.6;
let layers = {}, chosen = null, texture = null;
function build() {
  const cameras = [], photos = [];
  for (let v = 0; v < number; v++) {
    const color = facts.heldOut[v] ? facts.colors.heldOut : facts.colors.training;
    cameras.push(...cameraLines(v, tint(color, 1)));
    const c = corner(v, 0), [l, t, r, b] = facts.boxes[v];
    const quad = [[1, l, t], [2, r, t], [3, r, b], [1, l, t], [3, r, b], [4, l, b]];
    for (const [k, x, y] of quad) photos.push(...c, ...add(corner(v, k), c, -1), x, y);
  }
  const colors = bytes(facts.pointColors), dots = new Float32Array(10 * points.length / 3);
  for (let p = 0; p < points.length / 3; p++) {
    dots.set(points.subarray(3 * p, 3 * p + 3), 10 * p);
    for (let k = 0; k < 3; k++) dots[10 * p + 6 + k] = colors[3 * p + k] / 255;
    dots[10 * p + 9] = 1;
  }
  const ball = [], circles = [], still = (p, color) => [...p, 0, 0, 0, ...color];
  const on = (i, j) => { const a = i / 48 * 2 * Math.PI, b = j / 24 * Math.PI;
    return [Math.cos(a) * Math.sin(b), Math.sin(a) * Math.sin(b), Math.cos(b)]; };
  for (let i = 0; i < 48; i++) for (let j = 0; j < 24; j++)
    for (const p of [on(i, j), on(i + 1, j), on(i + 1, j + 1), on(i, j), on(i + 1, j + 1), on(i, j + 1)])
      ball.push(...still(p, tint(facts.colors.sphere, 0.09)));
  for (let k = 0; k < 3; k++) for (let i = 0; i < 96; i++) for (const s of [i, i + 1]) {
    const a = s / 96 * 2 * Math.PI, p = [0, 0, 0];
    p[k] = Math.cos(a); p[(k + 1) % 3] = Math.sin(a);
    circles.push(...still(p, tint(facts.colors.sphere, 0.7)));
  }
  const axes = [];
  // Two crossed ribbons per axis: a line of WebGL would be one pixel wide.
  for (let k = 0; k < 3; k++) for (const side of [(k + 1) % 3, (k + 2) % 3])
    for (const [along, across] of [[0, -1], [1, -1], [1, 1], [0, -1], [1, 1], [0, 1]]) {
      const p = [0, 0, 0]; p[k] = axisLength * along; p[side] = 0.008 * across;
      axes.push(...still(p, tint(facts.colors.axes[k], 1)));
    }
  layers = {cameras: layer(cameras, 10, gl.LINES), photos: layer(photos, 8, gl.TRIANGLES),
    dots: layer(dots, 10, gl.POINTS), ball: layer(ball, 10, gl.TRIANGLES),
    circles: layer(circles, 10, gl.LINES), axes: layer(axes, 10, gl.TRIANGLES)};
}
const atlas = new Image();
atlas.onload = () => {
  if (!gl) return;
  texture = gl.createTexture();
  gl.bindTexture(gl.TEXTURE_2D, texture);
  gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGB, gl.RGB, gl.UNSIGNED_BYTE, atlas);
  for (const key of [gl.TEXTURE_WRAP_S, gl.TEXTURE_WRAP_T])
    gl.texParameteri(gl.TEXTURE_2D, key, gl.CLAMP_TO_EDGE);
  for (const key of [gl.TEXTURE_MIN_FILTER, gl.TEXTURE_MAG_FILTER])
    gl.texParameteri(gl.TEXTURE_2D, key, gl.LINEAR);
  render();
};
let waiting = false;
function render() { if (gl && !waiting) { waiting = true; requestAnimationFrame(paint); } }
function paint() {
  waiting = false;
  const ratio = window.devicePixelRatio || 1;
  canvas.width = canvas.clientWidth * ratio; canvas.height = canvas.clientHeight * ratio;
  gl.viewport(0, 0, canvas.width, canvas.height);
  gl.clearColor(0.953, 0.961, 0.973, 1);
  gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
  gl.enable(gl.DEPTH_TEST);
  gl.enable(gl.BLEND);
  gl.blendFuncSeparate(gl.SRC_ALPHA, gl.ONE_MINUS_SRC_ALPHA, gl.ONE, gl.ONE);
  const grow = +$("cameraSize").value;
  if ($("showPoints").checked) draw(plain, layers.dots, 0, $("pointSize").value * ratio);
  if ($("showAxes").checked) draw(plain, layers.axes, 0, 1);
  if ($("showCameras").checked) draw(plain, layers.cameras, grow, 1);
  if (chosen !== null) {
    // WebGL lines are one pixel wide: a few drawn over each other at slightly different sizes stand out.
    const marked = layer(cameraLines(chosen, [0.85, 0.1, 0.5, 1]), 10, gl.LINES);
    for (const factor of [1.15, 1.17, 1.19, 1.21]) draw(plain, marked, grow * factor, 1);
    gl.deleteBuffer(marked.buffer);
  }
  if ($("showPhotos").checked && texture) {
    gl.useProgram(photo);
    gl.uniform1f(gl.getUniformLocation(photo, "strength"), eye.look ? 0.35 : 1);
    draw(photo, layers.photos, grow, 1);
  }
  labelAxes();
  if ($("showSphere").checked) {
    draw(plain, layers.circles, 0, 1);
    gl.depthMask(false);
    draw(plain, layers.ball, 0, 1);
    gl.depthMask(true);
  }
}

// Where a position appears in the window; null behind the eye.
function onScreen(m, p) {
  const w = m[3] * p[0] + m[7] * p[1] + m[11] * p[2] + m[15];
  if (w <= 0) return null;
  const u = [0, 1].map(r => (m[r] * p[0] + m[4 + r] * p[1] + m[8 + r] * p[2] + m[12 + r]) / w);
  return [(u[0] + 1) / 2 * canvas.clientWidth, (1 - u[1]) / 2 * canvas.clientHeight];
}
const letters = ["x", "y", "z"].map((name, k) => {
  const element = document.createElement("div");
  element.className = "letter";
  element.textContent = name;
  element.style.color = "rgb(" + facts.colors.axes[k] + ")";
  document.body.appendChild(element);
  return element;
});
function labelAxes() {
  const m = matrix(canvas.clientWidth, canvas.clientHeight);
  letters.forEach((element, k) => {
    const p = [0, 0, 0]; p[k] = 1.08 * axisLength;
    const at = onScreen(m, p);
    element.style.display = at && $("showAxes").checked ? "block" : "none";
    if (at) { element.style.left = at[0] - 5 + "px"; element.style.top = at[1] - 11 + "px"; }
  });
}

// The mouse.
function nearest(x, y) {
  const m = matrix(canvas.clientWidth, canvas.clientHeight);
  let best = null, least = 18;
  for (let v = 0; v < number; v++) for (const share of [0, 0.5, 1]) {
    const c = corner(v, 0), grow = +$("cameraSize").value * share;
    const middle = [0, 1, 2].map(i => (corner(v, 1)[i] + corner(v, 3)[i]) / 2 - c[i]);
    const at = onScreen(m, add(c, middle, grow));
    const far = at ? Math.hypot(at[0] - x, at[1] - y) : Infinity;
    if (far < least) { least = far; best = v; }
  }
  return best;
}
function tell(x, y) {
  chosen = $("showCameras").checked ? nearest(x, y) : null;
  const tip = $("tip");
  tip.style.display = chosen === null ? "none" : "block";
  canvas.style.cursor = chosen === null ? "grab" : "pointer";
  if (chosen !== null) {
    const [l, t, r, b] = facts.boxes[chosen], picture = tip.lastElementChild;
    const from = [l * atlas.width, t * atlas.height, (r - l) * atlas.width, (b - t) * atlas.height];
    const role = facts.heldOut[chosen] ? "  (held out)" : "";
    tip.firstElementChild.textContent = chosen + "  " + facts.names[chosen] + role;
    picture.width = 2 * from[2]; picture.height = 2 * from[3];
    picture.getContext("2d").drawImage(atlas, ...from, 0, 0, picture.width, picture.height);
    tip.style.left = Math.min(x + 16, innerWidth - tip.offsetWidth - 8) + "px";
    tip.style.top = Math.min(y + 16, innerHeight - tip.offsetHeight - 8) + "px";
  }
  render();
}
function lookThrough(view) {
  const [c, a, b, d] = [0, 1, 2, 3].map(k => corner(view, k));
  const right = unit(add(b, a, -1)), down = unit(add(d, b, -1));
  const back = cross(right, down).map(x => -x), size = facts.sizes[view];
  const [w, h] = [canvas.clientWidth, canvas.clientHeight];
  // The whole photograph fits into the window.
  const tall = size[1] * Math.max(1, (size[0] / size[1]) / (w / h));
  eye.look = {position: c, right, over: down.map(x => -x), back};
  eye.fov = 2 * Math.atan(tall / 2 / facts.focals[view]);
  render();
}
// Leaving a camera's view keeps the eye near where it was.
function leave() {
  if (!eye.look) return;
  const {position} = eye.look, from = add(position, eye.target, -1), height = dot(unit(from), up);
  eye.pitch = Math.asin(Math.max(-1, Math.min(1, height)));
  eye.yaw = Math.atan2(dot(from, away), dot(from, level));
  eye.distance = Math.hypot(...from);
  eye.look = null;
  eye.fov = 0.75;
}
function zoom(factor) {
  leave();
  eye.distance = Math.max(0.02, Math.min(40 * reach, eye.distance * factor));
  render();
}
let held = new Map(), moved = 0;
canvas.onpointerdown = e => { canvas.setPointerCapture(e.pointerId); held.set(e.pointerId, e); moved = 0; };
canvas.onpointerup = canvas.onpointercancel = e => {
  held.delete(e.pointerId);
  if (moved < 4 && e.button === 0) { tell(e.offsetX, e.offsetY); if (chosen !== null) lookThrough(chosen); }
};
canvas.onpointermove = e => {
  const before = held.get(e.pointerId);
  if (!before) { tell(e.offsetX, e.offsetY); return; }
  const [dx, dy] = [e.clientX - before.clientX, e.clientY - before.clientY];
  moved += Math.abs(dx) + Math.abs(dy);
  if (moved < 4) return;
  $("tip").style.display = "none"; chosen = null;
  const other = [...held.values()].find(p => p.pointerId !== e.pointerId);
  if (other) {
    const gap = p => Math.hypot(p.clientX - other.clientX, p.clientY - other.clientY);
    zoom(gap(before) / Math.max(1, gap(e)));
  }
  leave();
  if (e.buttons & 6 || e.shiftKey || other) {
    const {right, over} = frame(), step = 2 * eye.distance * Math.tan(eye.fov / 2) / canvas.clientHeight;
    eye.target = add(add(eye.target, right, -dx * step), over, dy * step);
  } else {
    eye.yaw -= 0.006 * dx;
    eye.pitch = Math.max(-1.55, Math.min(1.55, eye.pitch + 0.006 * dy));
  }
  held.set(e.pointerId, e);
  render();
};
const onWheel = e => { e.preventDefault(); zoom(Math.exp(0.0012 * e.deltaY)); };
canvas.addEventListener("wheel", onWheel, {passive: false});
canvas.oncontextmenu = e => e.preventDefault();
onkeydown = e => { if (e.key === "r" || e.key === "R") { reset(); render(); } };
onresize = render;
$("controls").oninput = render;
if (gl) { build(); render(); }
atlas.src = facts.atlas;
</script></body></html>
"""
