"use strict";
// A slider over time for all pictures of a block; plays when asked.
for (const block of document.querySelectorAll(".times")) {
  const slider = block.querySelector("input"), button = block.querySelector("button"), shown = block.querySelector("output");
  const cells = [...block.querySelectorAll(".cell")].map((cell) => [...cell.children]);
  const frames = Number(block.dataset.frames);
  let timer = 0;
  const show = () => {
    for (const images of cells) images.forEach((image, i) => { image.hidden = i !== Math.min(Number(slider.value), images.length - 1); });
    shown.textContent = `${Number(slider.value) + 1} / ${frames}`;
  };
  slider.addEventListener("input", show);
  button.addEventListener("click", () => {
    if (timer) { clearInterval(timer); timer = 0; button.textContent = "Play"; return; }
    timer = setInterval(() => { slider.value = (Number(slider.value) + 1) % frames; show(); }, 400);
    button.textContent = "Pause";
  });
  show();
}
// Features of patches as unit vectors in bytes: a click shows how near every patch is to the clicked one.
for (const block of document.querySelectorAll(".patches")) {
  const [rows, columns] = block.dataset.grid.split(",").map(Number), width = Number(block.dataset.width);
  const bytes = Int8Array.from(atob(block.dataset.features), (c) => (c.charCodeAt(0) << 24) >> 24);
  const places = [...block.querySelectorAll(".over")], count = rows * columns;
  const feature = (frame, patch) => bytes.subarray((frame * count + patch) * width, (frame * count + patch + 1) * width);
  const dot = (a, b) => { let sum = 0; for (let i = 0; i < width; i++) sum += a[i] * b[i]; return sum; };
  const ask = (frame, patch) => {
    const wanted = feature(frame, patch), self = dot(wanted, wanted) || 1;
    places.forEach((place, other) => {
      const canvas = place.querySelector("canvas"), image = place.querySelector("img");
      canvas.width = image.clientWidth; canvas.height = image.clientHeight;
      const paint = canvas.getContext("2d"), w = canvas.width / columns, h = canvas.height / rows;
      let best = 0, nearest = -Infinity;
      for (let p = 0; p < count; p++) {
        const value = dot(wanted, feature(other, p)) / self;
        if (value > nearest) { nearest = value; best = p; }
        paint.fillStyle = `rgb(0 0 0 / ${0.75 * (1 - Math.max(0, Math.min(1, value)) ** 2)})`;
        paint.fillRect((p % columns) * w, Math.floor(p / columns) * h, w + 1, h + 1);
      }
      const at = other === frame ? patch : best;
      paint.strokeStyle = other === frame ? "#ffd60a" : "#fff"; paint.lineWidth = 2;
      paint.beginPath(); paint.arc((at % columns + 0.5) * w, (Math.floor(at / columns) + 0.5) * h, 1.2 * w, 0, 7); paint.stroke();
    });
  };
  places.forEach((place, frame) => place.addEventListener("click", (event) => {
    const box = place.getBoundingClientRect();
    const column = Math.min(columns - 1, Math.floor((event.clientX - box.left) / box.width * columns));
    const row = Math.min(rows - 1, Math.floor((event.clientY - box.top) / box.height * rows));
    ask(frame, row * columns + column);
  }));
}
// While the program runs the page is served, and is read again whenever it has changed; a file on disk stays as it is.
if (document.body.dataset.live && location.protocol.startsWith("http")) {
  let known = "";
  const loaded = performance.getEntriesByType("navigation")[0]?.decodedBodySize || 0;  // it may change before the first look
  setInterval(async () => {
    try {
      const answer = await fetch(location.href, { method: "HEAD", cache: "no-store" }), tag = answer.headers.get("ETag");
      const size = Number(answer.headers.get("Content-Length"));
      if (tag && (known ? tag !== known : loaded && size && size !== loaded)) location.reload();
      known = tag || known;
    } catch { /* the program has ended; what is shown is what there is */ }
  }, 2000);
}
