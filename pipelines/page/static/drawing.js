// What is drawn over the picture and beside it: arrows, samples, the looked-at point, the density inset.

export function fit(canvas) {
  const { width, height } = canvas.getBoundingClientRect();
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.max(1, Math.round(width * ratio));
  canvas.height = Math.max(1, Math.round(height * ratio));
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return { context, width, height };
}

function arrow(context, x, y, dx, dy, size) {
  const length = Math.hypot(dx, dy);
  context.beginPath();
  if (length < 1) {
    context.arc(x, y, size * 0.3, 0, 2 * Math.PI);
    context.fill();
    return;
  }
  const head = Math.min(size, length * 0.6);
  const [ux, uy] = [dx / length, dy / length];
  const [tipX, tipY] = [x + dx, y + dy];
  context.moveTo(x, y);
  context.lineTo(tipX - ux * head * 0.5, tipY - uy * head * 0.5);
  context.stroke();
  context.beginPath();
  context.moveTo(tipX, tipY);
  context.lineTo(tipX - head * (ux - 0.45 * uy), tipY - head * (uy + 0.45 * ux));
  context.lineTo(tipX - head * (ux + 0.45 * uy), tipY - head * (uy - 0.45 * ux));
  context.closePath();
  context.fill();
}

// Mean flow at about 16 points a side: dark rim first, so that arrows stand out on any picture.
export function drawArrows(canvas, field) {
  const { context, width, height } = fit(canvas);
  if (!field) return;
  const step = Math.max(1, Math.round(field.side / 16));
  const first = Math.floor((field.side % step || step) / 2);
  for (const [colour, line] of [["rgba(0,0,0,.75)", 3.6], ["#ffffff", 1.6]]) {
    Object.assign(context, { strokeStyle: colour, fillStyle: colour, lineWidth: line, lineCap: "round" });
    for (let row = first; row < field.side; row += step) {
      for (let column = first; column < field.side; column += step) {
        const [dx, dy] = field.flow[row][column];
        const x = ((column + 0.5) / field.side) * width;
        const y = ((row + 0.5) / field.side) * height;
        arrow(context, x, y, dx * width, dy * height, 6 + line);
      }
    }
  }
}

export function sampleColour(number, count) {
  return `hsl(${Math.round((360 * number) / count + 45) % 360} 95% 62%)`;
}

export function drawSamples(canvas, samples, shown) {
  const { context, width, height } = fit(canvas);
  if (!samples) return;
  const count = samples.flow.length;
  samples.flow.forEach((flow, number) => {
    if (shown !== "all" && Number(shown) !== number) return;
    for (const [colour, line] of [["rgba(0,0,0,.6)", 3.2], [sampleColour(number, count), 1.6]]) {
      Object.assign(context, { strokeStyle: colour, fillStyle: colour, lineWidth: line, lineCap: "round" });
      samples.points.forEach(([x, y], i) => {
        arrow(context, x * width, y * height, flow[i][0] * width, flow[i][1] * height, 5 + line);
      });
    }
  });
}

// The looked-at point on the picture: where it is, where it goes on average, where it goes most likely.
export function drawPoint(canvas, point) {
  const { context, width, height } = fit(canvas);
  if (!point) return;
  const [x, y] = point.point;
  for (const [colour, line] of [["rgba(0,0,0,.75)", 4], ["#35c3ff", 2]]) {
    Object.assign(context, { strokeStyle: colour, fillStyle: colour, lineWidth: line });
    context.beginPath();
    context.arc(x * width, y * height, 5, 0, 2 * Math.PI);
    context.stroke();
    context.beginPath();
    context.moveTo(x * width, y * height);
    context.lineTo((x + point.mean[0]) * width, (y + point.mean[1]) * height);
    context.stroke();
  }
  marks(context, point, (dx) => (x + dx) * width, (dy) => (y + dy) * height);
}

export function drawInset(canvas, point, picture) {
  const { context, width, height } = fit(canvas);
  if (!point) return;
  const toX = (dx) => ((dx / point.reach + 1) / 2) * width;
  const toY = (dy) => ((dy / point.reach + 1) / 2) * height;
  context.drawImage(picture, 0, 0, width, height);
  context.strokeStyle = "rgba(255,255,255,.45)";
  context.lineWidth = 1;
  context.beginPath();
  context.moveTo(width / 2, 0);
  context.lineTo(width / 2, height);
  context.moveTo(0, height / 2);
  context.lineTo(width, height / 2);
  context.stroke();
  marks(context, point, toX, toY);
  context.fillStyle = "#ffffff";
  context.font = "11px system-ui, sans-serif";
  context.textAlign = "right";
  context.fillText(`± ${percent(point.reach)}`, width - 5, height - 6);
}

// Mean as a dot, modes as crosses.
function marks(context, point, toX, toY) {
  for (const [colour, line] of [["#000000", 4.5], ["#5dffa6", 2.2]]) {
    context.strokeStyle = colour;
    context.lineWidth = line;
    for (const [dx, dy] of point.modes) {
      const [x, y] = [toX(dx), toY(dy)];
      context.beginPath();
      context.moveTo(x - 4.5, y - 4.5);
      context.lineTo(x + 4.5, y + 4.5);
      context.moveTo(x - 4.5, y + 4.5);
      context.lineTo(x + 4.5, y - 4.5);
      context.stroke();
    }
  }
  context.beginPath();
  context.arc(toX(point.mean[0]), toY(point.mean[1]), 4, 0, 2 * Math.PI);
  Object.assign(context, { fillStyle: "#35c3ff", strokeStyle: "#ffffff", lineWidth: 1.6 });
  context.fill();
  context.stroke();
}

// A displacement in words.
export function way(dx, dy) {
  return `${percent(Math.abs(dx))} ${dx < 0 ? "left" : "right"}, ${percent(Math.abs(dy))} ${dy < 0 ? "up" : "down"}`;
}

export function percent(value) {
  const size = Math.abs(value);
  return `${(100 * value).toFixed(size < 0.01 ? 2 : 1)} %`;
}
