// Wires the page: what is shown, what is asked when, what the answers change.

import { drawArrows, drawInset, drawPoint, drawSamples, fit, percent, way } from "./drawing.js";
import { Latest, send } from "./requests.js";
import { Stage } from "./stage.js";

const LIVE_SECONDS = 0.25;
const SMALLEST_LIVE_SIDE = 8;
const PICTURE_KINDS = ["image/jpeg", "image/png", "image/webp", "image/bmp"];

const $ = (id) => document.getElementById(id);
const radio = (name) => document.querySelector(`input[name=${name}]:checked`).value;

let facts = null;
let image = null; // {id, source}: source loads it again
let field = null;
let samples = null;
let pinned = null;
let looked = null; // the newest answer about a point
let pointTurn = 0;
let costs = {}; // what the newest predictions took, by kind
let rate = 0; // queries per second of dense predictions
let seed = 0;
let busy = 0;
let example = 0;
let loading = 0;

const stage = new Stage($("stage"), $("handles"), {
  maxPokes: 128,
  onPokes: (live) => {
    listPokes();
    if (image) refresh(live);
  },
  onPoint: (point, kind) => lookAt(point, kind),
  onSelect: () => listPokes(),
  onFull: () => showError(new Error(`At most ${stage.maxPokes} pokes; remove one first.`)),
});

const asks = {
  field: new Latest("/api/field", {
    onAnswer: showField,
    onError: failed,
    onBusy: setBusy,
    isSlow: (question) => question.side > liveSide(),
  }),
  point: new Latest("/api/point", { onAnswer: showPoint, onError: failed, onBusy: setBusy }),
  samples: new Latest("/api/samples", { onAnswer: showSamples, onError: failed, onBusy: setBusy, isSlow: (q) => q.joint }),
};

function question() {
  const pokes = stage.pokes.map((p) => [p.x, p.y, p.dx, p.dy]);
  return { image: image.id, pokes, static: $("static").checked };
}

// How many points a side can be predicted while a poke is dragged.
function liveSide() {
  const affordable = Math.floor(Math.sqrt(rate * LIVE_SECONDS));
  return Math.min(facts.grid, Math.max(SMALLEST_LIVE_SIDE, affordable));
}

function refresh(live) {
  const view = radio("view");
  if (view === "flow" || view === "part") {
    asks.field.ask({ ...question(), side: liveSide(), information: view === "part", live });
  } else if (view === "samples") {
    const joint = radio("joint") === "yes";
    const amount = { side: Number($("points").value), samples: Number($("num").value) };
    if (live && joint) asks.samples.drop();
    else asks.samples.ask({ ...question(), ...amount, joint, seed });
  }
  const point = pinned ? [pinned.x, pinned.y] : looked?.point;
  if (point) asks.point.ask({ ...question(), point });
}

function lookAt(point, kind) {
  if (kind === "pin") pinned = point;
  const shown = point ?? pinned;
  if (shown) asks.point.ask({ ...question(), point: [shown.x, shown.y] });
  else {
    forgetPoint();
  }
}

function forgetPoint() {
  asks.point.drop();
  pointTurn += 1;
  looked = null;
  showDensity();
}

function showField(answer, asked) {
  field = answer;
  rate = rate ? 0.5 * rate + 0.5 * answer.queries_per_second : answer.queries_per_second;
  const view = radio("view");
  if (view === "flow") setOverlay(answer.flow_picture);
  if (view === "part" && answer.heat_picture) setOverlay(answer.heat_picture);
  $("full-colour").textContent = percent(answer.full_colour);
  if (answer.hottest_nats !== undefined) $("hottest").textContent = `${answer.hottest_nats.toFixed(2)} nats`;
  draw();
  report("field", answer);
  const wanted = view === "flow" || (view === "part" && asked.information);
  if (wanted && asked.side < facts.grid && !stage.dragging && !asks.field.next) {
    asks.field.ask({ ...asked, side: facts.grid });
  }
}

function showSamples(answer) {
  samples = answer;
  const count = answer.flow.length;
  const select = $("shown");
  if (select.options.length !== count + 1) {
    const options = ["all", ...Array(count).keys()].map((v) => new Option(v === "all" ? "all samples" : `sample ${v + 1}`, v));
    const before = select.value;
    select.replaceChildren(...options);
    select.value = before === "all" || Number(before) >= count ? "all" : before;
  }
  draw();
  report("samples", answer);
}

async function showPoint(answer) {
  const turn = ++pointTurn;
  const picture = new Image();
  picture.src = answer.picture;
  await picture.decode();
  if (turn !== pointTurn) return;
  looked = answer;
  showDensity();
  drawInset($("inset"), answer, picture);
  const rows = [
    ["Point", `${percent(answer.point[0])}, ${percent(answer.point[1])}`],
    ["Mean", way(...answer.mean)],
    ["Standard deviation", `${percent(answer.deviation[0])}, ${percent(answer.deviation[1])}`],
    modesRow(answer.modes),
    ["Entropy", `${answer.entropy_nats.toFixed(2)} nats`],
  ];
  const nodes = rows.flatMap(([name, value]) => {
    const [dt, dd] = [document.createElement("dt"), document.createElement("dd")];
    [dt.textContent, dd.textContent] = [name, value];
    return [dt, dd];
  });
  $("point-numbers").replaceChildren(...nodes);
  report("point", answer);
}

function modesRow(modes) {
  if (modes.length === 0) return ["Mode", "beyond the border of the picture"];
  return [modes.length === 1 ? "Mode" : `Highest of ${modes.length} modes`, way(...modes[0])];
}

// The density lies on the bare picture only; over other views the marks are enough.
function showDensity() {
  const place = $("density");
  drawPoint($("marks"), looked);
  place.hidden = !looked || radio("view") !== "image";
  if (place.hidden) return;
  const share = (value) => `${100 * value}%`;
  place.style.left = share(looked.point[0] - looked.reach);
  place.style.top = share(looked.point[1] - looked.reach);
  place.style.width = share(2 * looked.reach);
  place.src = looked.picture;
}

function report(kind, answer) {
  const count = answer.queries === 1 ? "1 query" : `${answer.queries.toLocaleString("en")} queries`;
  const speed = Math.round(answer.queries_per_second).toLocaleString("en");
  const what = { field: "Whole picture", samples: "Samples", point: "This point" }[kind];
  if (kind !== "point") costs = { point: costs.point };
  const rate = kind === "point" ? "" : ` (${speed} queries/s)`;
  const time = answer.milliseconds < 1000 ? `${answer.milliseconds.toFixed(1)} ms` : `${(answer.milliseconds / 1000).toFixed(2)} s`;
  costs[kind] = `${what}: ${count} in ${time}${rate}`;
  $("status").textContent = Object.values(costs).reverse().join(" · ");
  $("error").hidden = true;
  document.body.dataset.answers = Number(document.body.dataset.answers || 0) + 1;
}

function setBusy(change) {
  busy += change;
  document.body.classList.toggle("busy", busy > 0);
  $("stage").setAttribute("aria-busy", busy > 0);
}

function showError(error) {
  $("error").textContent = error.message;
  $("error").hidden = false;
}

// The server keeps the newest images only; an older one is loaded again, once.
async function failed(error, asked) {
  if (error.gone && image && asked.image === image.id) {
    try {
      const { source } = image;
      image = { id: (await source()).image, source };
      return refresh(false);
    } catch (again) {
      error = again;
    }
  }
  showError(error);
}

function setOverlay(source) {
  $("overlay").src = source;
  $("overlay").hidden = false;
}

function draw() {
  const view = radio("view");
  $("stage").classList.toggle("grey", view === "flow" || view === "part");
  if (view === "flow" && $("arrows").checked) drawArrows($("drawing"), field);
  else if (view === "samples") drawSamples($("drawing"), samples, $("shown").value);
  else fit($("drawing"));
}

function changeView() {
  const view = radio("view");
  for (const part of document.querySelectorAll("[data-view]")) part.hidden = part.dataset.view !== view;
  $("opacity-field").hidden = view !== "flow" && view !== "part";
  $("overlay").hidden = true;
  field = samples = null;
  costs = {};
  draw();
  showDensity();
  if (image) refresh(false);
}

function listPokes() {
  const items = stage.pokes.map((poke, i) => {
    const [item, text, button] = ["li", "span", "button"].map((name) => document.createElement(name));
    item.classList.toggle("selected", poke === stage.selected);
    text.textContent = `${i + 1}: ${way(poke.dx, poke.dy)}`;
    button.type = "button";
    button.textContent = "Remove";
    button.setAttribute("aria-label", `Remove poke ${i + 1}`);
    button.addEventListener("click", () => {
      stage.remove(poke);
      const left = $("poke-list").querySelectorAll("button");
      (left[Math.min(i, left.length - 1)] ?? $("stage")).focus();
    });
    item.append(text, button);
    return item;
  });
  $("poke-list").replaceChildren(...items);
  $("poke-count").textContent = items.length ? `(${items.length})` : "";
  $("clear").disabled = items.length === 0;
}

async function load(source) {
  const turn = ++loading;
  for (const ask of Object.values(asks)) ask.drop();
  setBusy(1);
  $("error").hidden = true;
  $("status").textContent = "The model looks at the picture…";
  try {
    const answer = await source();
    if (turn !== loading) return;
    image = { id: answer.image, source };
    const picture = $("picture");
    picture.src = `/api/image/${answer.image}`;
    await picture.decode();
    if (turn !== loading) return;
    picture.hidden = false;
    picture.alt = "The picture, cut to its central square, which is what the model sees";
    $("stage").classList.remove("none");
    $("overlay").hidden = true;
    field = samples = pinned = null;
    costs = {};
    forgetPoint();
    drawInset($("inset"), null);
    $("point-numbers").replaceChildren();
    stage.enable();
    stage.clear();
    draw();
    $("status").textContent = `Seen in ${answer.milliseconds.toFixed(0)} ms (${answer.side_px} x ${answer.side_px} pixels).`;
    document.body.dataset.image = answer.image;
  } catch (error) {
    if (turn !== loading || error.stale) return;
    $("status").textContent = "";
    showError(error);
  } finally {
    setBusy(-1);
  }
}

async function loadFile(file) {
  if (!file) return;
  const limit = facts.max_upload_bytes;
  if (file.size > limit) {
    showError(new Error(`${file.name} has ${(file.size / 1e6).toFixed(1)} MB; at most ${limit / 1e6} MB are taken.`));
  } else if (file.type && !PICTURE_KINDS.includes(file.type)) {
    showError(new Error(`${file.name} is ${file.type}; choose a JPEG, PNG, WebP or BMP picture.`));
  } else {
    let body;
    try {
      body = await file.arrayBuffer();
    } catch {
      return showError(new Error(`${file.name} cannot be read; choose a picture file.`));
    }
    load(() => send("/api/image", { body }));
  }
}

function loadExample() {
  const number = example++;
  load(() => send("/api/example", { json: { number } }));
}

async function listClips(start) {
  const answer = await send(`/api/clips?start=${start}`);
  const select = $("clip");
  select.replaceChildren(...answer.clips.map((clip) => {
    const option = new Option(clip.label, clip.number);
    option.dataset.frames = clip.frames;
    return option;
  }));
  $("clip-pages").hidden = answer.total <= answer.clips.length;
  $("clips-before").disabled = answer.start === 0;
  $("clips-after").disabled = answer.start + answer.clips.length >= answer.total;
  Object.assign($("clip-pages").dataset, { start: answer.start, count: answer.clips.length });
  chooseClip(0);
}

function chooseClip(frame) {
  const option = $("clip").selectedOptions[0];
  $("frame").max = option.dataset.frames - 1;
  $("frame").value = frame;
  $("frame-number").textContent = `${frame + 1} of ${option.dataset.frames}`;
}

function previewFrame() {
  const [clip, frame] = [$("clip").value, $("frame").value];
  $("frame-number").textContent = `${Number(frame) + 1} of ${Number($("frame").max) + 1}`;
  const picture = $("picture");
  if (picture.dataset.pending) return;
  picture.dataset.pending = "yes";
  const next = new Image();
  next.onload = next.onerror = () => {
    delete picture.dataset.pending;
    if (next.naturalWidth) {
      picture.src = next.src;
      picture.hidden = false;
      $("stage").classList.remove("none");
      $("overlay").hidden = true;
      forgetPoint();
      fit($("drawing"));
    }
    if ($("frame").value !== frame && $("clip").value === clip && document.activeElement === $("frame")) previewFrame();
  };
  next.src = `/api/clips/${clip}/${frame}`;
}

function pickFrame() {
  const json = { clip: Number($("clip").value), frame: Number($("frame").value) };
  load(() => send("/api/frame", { json }));
}

function wireDrop() {
  const target = document.documentElement;
  const over = (on) => $("stage").classList.toggle("drop", on);
  target.addEventListener("dragover", (event) => {
    event.preventDefault();
    over(true);
  });
  target.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) over(false);
  });
  target.addEventListener("drop", (event) => {
    event.preventDefault();
    over(false);
    loadFile(event.dataTransfer.files[0]);
  });
}

function wireControls() {
  $("file").addEventListener("change", (event) => {
    loadFile(event.target.files[0]);
    event.target.value = "";
  });
  for (const id of ["example", "example-first"]) $(id).addEventListener("click", loadExample);
  for (const input of document.querySelectorAll("input[name=view]")) input.addEventListener("change", changeView);
  $("static").addEventListener("change", () => image && refresh(false));
  $("clear").addEventListener("click", () => stage.clear());
  $("arrows").addEventListener("change", draw);
  $("shown").addEventListener("change", draw);
  $("again").addEventListener("click", () => {
    seed += 1;
    if (image) refresh(false);
  });
  for (const id of ["num", "points"]) {
    $(id).addEventListener("input", () => {
      $(`${id}-out`).textContent = $(id).value;
      if (image) refresh(true);
    });
    $(id).addEventListener("change", () => image && refresh(false));
  }
  for (const input of document.querySelectorAll("input[name=joint]")) {
    input.addEventListener("change", () => image && refresh(false));
  }
  $("opacity").addEventListener("input", () => {
    $("overlay").style.opacity = $("opacity").value / 100;
    $("opacity-out").textContent = `${$("opacity").value} %`;
  });
  $("overlay").style.opacity = $("opacity").value / 100;
  $("clip").addEventListener("change", () => {
    chooseClip(0);
    pickFrame();
  });
  $("frame").addEventListener("input", previewFrame);
  $("frame").addEventListener("change", pickFrame);
  const turnPage = (sign) => {
    const { start, count } = $("clip-pages").dataset;
    const first = Math.max(0, Number(start) + sign * (sign > 0 ? Number(count) : facts.clips_per_list));
    listClips(first).catch(showError);
  };
  $("clips-before").addEventListener("click", () => turnPage(-1));
  $("clips-after").addEventListener("click", () => turnPage(1));
  new ResizeObserver(() => {
    draw();
    showDensity();
  }).observe($("stage"));
}

async function begin() {
  try {
    facts = await send("/api/state");
  } catch (error) {
    return showError(error);
  }
  stage.maxPokes = facts.max_pokes;
  $("model").textContent = `${facts.model} on ${facts.device}`;
  $("note").textContent = facts.note;
  $("note").hidden = !facts.note;
  $("limits").textContent = `, at most ${facts.max_upload_bytes / 1e6} MB`;
  wireControls();
  wireDrop();
  changeView();
  if (facts.clips) {
    try {
      await listClips(0);
      $("clips").hidden = false;
    } catch (error) {
      showError(error);
    }
  }
  document.body.dataset.ready = "yes";
}

begin();
