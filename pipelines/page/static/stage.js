// Pokes on the picture: mouse, touch and keyboard. Positions and flow are in 0..1 of the square.

import { percent, way } from "./drawing.js";

const SVG = "http://www.w3.org/2000/svg";
const DRAG_FROM_PX = 5;
const STEP = 0.01;
const BIG_STEP = 0.05;
const FIRST_FLOW = 0.1;
const MOVES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

function make(name, attributes, parent) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  parent?.append(element);
  return element;
}

// onPokes(live) when pokes change, live while something is dragged; onPoint(point, kind) when a point is looked at,
// kind "hover", "pin" (tap, click, cross) or "leave".
export class Stage {
  constructor(element, svg, { onPokes, onPoint, onSelect, onFull, maxPokes }) {
    Object.assign(this, { element, svg, onPokes, onPoint, onSelect, onFull, maxPokes });
    this.pokes = [];
    this.parts = new Map();
    this.selected = null;
    this.cross = { x: 0.5, y: 0.5 };
    this.drag = null;
    this.enabled = false;
    this.crossShape = make("g", { id: "cross", hidden: "" }, svg);
    make("path", {}, this.crossShape);
    svg.addEventListener("pointerdown", (event) => this.down(event));
    svg.addEventListener("pointermove", (event) => this.move(event));
    svg.addEventListener("pointerup", (event) => this.up(event));
    svg.addEventListener("pointercancel", () => this.cancel());
    svg.addEventListener("pointerleave", (event) => {
      if (this.enabled && !this.drag && event.pointerType === "mouse") this.onPoint(null, "leave");
    });
    element.addEventListener("keydown", (event) => this.key(event));
    element.addEventListener("focus", () => this.showCross(element.matches(":focus-visible")));
    element.addEventListener("blur", () => this.showCross(false));
    new ResizeObserver(() => this.render()).observe(element);
  }

  enable() {
    this.enabled = true;
    this.element.tabIndex = 0;
    this.element.setAttribute("aria-label", "Picture. Arrow keys move a cross, Enter pokes there, Tab goes to the pokes.");
  }

  get dragging() {
    return Boolean(this.drag?.poke);
  }

  clear() {
    this.drag = null;
    this.pokes = [];
    this.selected = null;
    this.changed(false);
  }

  remove(poke) {
    const index = this.pokes.indexOf(poke);
    if (index < 0) return;
    const focused = this.parts.get(poke)?.group.contains(document.activeElement);
    this.pokes.splice(index, 1);
    if (this.selected === poke) this.selected = null;
    this.changed(false);
    if (focused) {
      const next = this.pokes[Math.min(index, this.pokes.length - 1)];
      if (next) this.parts.get(next).tip.focus();
      else this.element.focus();
    }
  }

  select(poke) {
    if (poke === this.selected) return;
    this.selected = poke;
    this.render();
    this.onSelect();
  }

  position(event) {
    const box = this.svg.getBoundingClientRect();
    return { x: (event.clientX - box.left) / box.width, y: (event.clientY - box.top) / box.height };
  }

  add(x, y, dx, dy) {
    if (this.pokes.length >= this.maxPokes) {
      this.onFull();
      return null;
    }
    const poke = { x: clamp(x, 0, 1), y: clamp(y, 0, 1), dx, dy };
    this.pokes.push(poke);
    this.selected = poke;
    return poke;
  }

  down(event) {
    if (!this.enabled || this.drag || event.button !== 0 || !event.isPrimary) return;
    event.preventDefault();
    const at = this.position(event);
    const part = event.target.closest("[data-part]");
    const poke = part && this.pokes.find((p) => this.parts.get(p).group.contains(part));
    const kind = part ? part.dataset.part : "new";
    this.drag = { kind, poke, from: at, client: [event.clientX, event.clientY], before: poke && { ...poke }, id: event.pointerId };
    this.svg.setPointerCapture(event.pointerId);
    if (poke) {
      this.select(poke);
      this.parts.get(poke)[kind].focus({ preventScroll: true, focusVisible: false });
    } else {
      this.element.focus({ preventScroll: true, focusVisible: false });
      this.showCross(false);
    }
  }

  move(event) {
    if (!this.enabled) return;
    const at = this.position(event);
    const drag = this.drag;
    if (!drag) {
      if (event.pointerType === "mouse") this.onPoint({ x: clamp(at.x, 0, 1), y: clamp(at.y, 0, 1) }, "hover");
      return;
    }
    if (event.pointerId !== drag.id) return;
    const far = Math.hypot(event.clientX - drag.client[0], event.clientY - drag.client[1]) >= DRAG_FROM_PX;
    if (!drag.moved && !far) return;
    drag.moved = true;
    if (!drag.poke) {
      drag.poke = this.add(drag.from.x, drag.from.y, 0, 0);
      if (!drag.poke) {
        this.drag = null;
        return;
      }
      drag.kind = "fresh";
    }
    this.follow(drag, at);
    this.changed(true);
  }

  follow(drag, at) {
    const poke = drag.poke;
    if (drag.kind === "start") {
      poke.x = clamp(drag.before.x + at.x - drag.from.x, 0, 1);
      poke.y = clamp(drag.before.y + at.y - drag.from.y, 0, 1);
    } else if (drag.kind === "tip") {
      poke.dx = clamp(drag.before.dx + at.x - drag.from.x, -1, 1);
      poke.dy = clamp(drag.before.dy + at.y - drag.from.y, -1, 1);
    } else {
      poke.dx = clamp(at.x - poke.x, -1, 1);
      poke.dy = clamp(at.y - poke.y, -1, 1);
    }
  }

  up(event) {
    const drag = this.drag;
    if (!drag || event.pointerId !== drag.id) return;
    this.drag = null;
    if (drag.moved) this.changed(false);
    else if (drag.kind === "new") this.onPoint({ x: clamp(drag.from.x, 0, 1), y: clamp(drag.from.y, 0, 1) }, "pin");
    else this.onPoint({ x: drag.poke.x, y: drag.poke.y }, "pin");
  }

  cancel() {
    const drag = this.drag;
    this.drag = null;
    if (!drag?.moved) return;
    if (drag.before) Object.assign(drag.poke, drag.before);
    else this.pokes = this.pokes.filter((poke) => poke !== drag.poke);
    this.changed(false);
  }

  key(event) {
    if (!this.enabled || event.ctrlKey || event.metaKey || event.altKey) return;
    const part = event.target.closest?.("[data-part]");
    const poke = part && this.pokes.find((p) => this.parts.get(p).group.contains(part));
    const step = event.shiftKey ? BIG_STEP : STEP;
    const direction = MOVES[event.key];
    if (direction) {
      const [dx, dy] = direction.map((d) => d * step);
      if (!poke) {
        this.cross = { x: clamp(this.cross.x + dx, 0, 1), y: clamp(this.cross.y + dy, 0, 1) };
        this.showCross(true);
        this.onPoint({ ...this.cross }, "pin");
      } else {
        if (part.dataset.part === "tip") Object.assign(poke, { dx: clamp(poke.dx + dx, -1, 1), dy: clamp(poke.dy + dy, -1, 1) });
        else Object.assign(poke, { x: clamp(poke.x + dx, 0, 1), y: clamp(poke.y + dy, 0, 1) });
        this.changed(false);
      }
    } else if (poke && (event.key === "Delete" || event.key === "Backspace")) {
      this.remove(poke);
    } else if (poke && event.key === "Escape") {
      this.element.focus();
    } else if (!poke && event.key === "Enter") {
      const added = this.add(this.cross.x, this.cross.y, FIRST_FLOW, 0);
      this.changed(false);
      if (added) this.parts.get(added).tip.focus();
    } else {
      return;
    }
    event.preventDefault();
  }

  showCross(visible) {
    this.crossShape.toggleAttribute("hidden", !(visible && this.enabled));
    this.render();
  }

  changed(live) {
    this.render();
    this.onPokes(live);
  }

  build() {
    const group = make("g", { class: "poke" }, this.svg);
    const shaft = make("line", { "data-part": "start", class: "shaft" }, group);
    const part = (name) => {
      const g = make("g", { "data-part": name, tabindex: "0", role: "button" }, group);
      g.addEventListener("focus", () => this.select(this.pokes.find((p) => this.parts.get(p)?.group === group)));
      return g;
    };
    const start = part("start");
    const dot = make("circle", { r: 9, class: "dot" }, start);
    const text = make("text", {}, start);
    const tip = part("tip");
    const head = make("path", { class: "head", d: "M0,0 L-14,-7 L-14,7 Z" }, tip);
    const shapes = [start, tip].map((g) => [make("circle", { r: 14, class: "ring" }, g), make("circle", { r: 20, class: "hit" }, g)]);
    return { group, shaft, start, dot, text, tip, head, shapes };
  }

  render() {
    const { width, height } = this.svg.getBoundingClientRect();
    for (const [poke, parts] of this.parts) {
      if (this.pokes.includes(poke)) continue;
      parts.group.remove();
      this.parts.delete(poke);
    }
    this.pokes.forEach((poke, i) => {
      if (!this.parts.has(poke)) this.parts.set(poke, this.build());
      const p = this.parts.get(poke);
      const [x, y] = [poke.x * width, poke.y * height];
      const [tx, ty] = [x + poke.dx * width, y + poke.dy * height];
      const angle = (Math.atan2(ty - y, tx - x) * 180) / Math.PI;
      const place = { x1: x, y1: y, x2: tx, y2: ty };
      for (const [key, value] of Object.entries(place)) p.shaft.setAttribute(key, value);
      p.start.setAttribute("transform", `translate(${x} ${y})`);
      p.tip.setAttribute("transform", `translate(${tx} ${ty})`);
      p.head.setAttribute("transform", `rotate(${angle})`);
      p.text.textContent = i + 1;
      p.group.classList.toggle("selected", poke === this.selected);
      const where = `at ${percent(poke.x)}, ${percent(poke.y)}`;
      p.start.setAttribute("aria-label", `Poke ${i + 1}, start, ${where}. Arrow keys move the poke, Delete removes it.`);
      p.tip.setAttribute("aria-label", `Poke ${i + 1}, tip, ${way(poke.dx, poke.dy)}. Arrow keys move the tip, Delete removes the poke.`);
    });
    const [cx, cy] = [this.cross.x * width, this.cross.y * height];
    this.crossShape.firstChild.setAttribute("d", `M${cx - 11},${cy}h22 M${cx},${cy - 11}v22`);
  }
}
