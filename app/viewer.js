// The viewer of the page. Gradio runs this file once, as the body of a function with three names:
// `element` is the component, `props.value` has the scans from `app.py`, and `watch` calls back when they change.
//
// All slices are in the browser, so wheel, keys and sliders need no answer of the server.

const find = (name) => element.querySelector(`.gi-${name}`);
const [viewer, stage, canvas, extent] = ["viewer", "stage", "canvas", "extent"].map(find);
const [slice, opacity, level, width, scanChoice] = ["slice", "opacity", "level", "width", "scan"].map(find);
// The slice is drawn here pixel by pixel, and then enlarged to the size of the canvas on the screen.
const pixels = document.createElement("canvas");
const fills = document.createElement("canvas");

// A wheel turned by one notch, and a swipe or a drag of some pixels, change the slice by one.
const WHEEL_STEP = 50;
const SWIPE_STEP = 12;
// With more organs, the rows of the table are lower.
const LONG_LIST = 8;

let scans = [];
let scan = null;
const hidden = new Set();

function fromBase64(text) {
  return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
}

async function unpack(text) {
  const stream = new Blob([fromBase64(text)]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// The words of the masks, by their bytes.
const WORDS = { 1: Uint8Array, 2: Uint16Array, 4: Uint32Array };

// One byte per voxel in `scan.intensities`; in `scan.masks`, one bit per organ, because organs may overlap.
async function showScans(received) {
  scans = await Promise.all(
    received.map(async (one) => ({
      ...one,
      intensities: await unpack(one.intensities),
      masks: new WORDS[one.mask_bytes]((await unpack(one.masks)).buffer),
    })),
  );
  scanChoice.replaceChildren(...scans.map((one, index) => new Option(one.name, index)));
  scanChoice.parentElement.hidden = scans.length < 2;
  viewer.classList.toggle("is-empty", !scans.length);
  if (!scans.length) return;
  chooseScan(0);
  // On a phone, the viewer is below the fields.
  if (viewer.getBoundingClientRect().top > window.innerHeight / 2) viewer.scrollIntoView();
}

function chooseScan(index) {
  scan = scans[index];
  const [depth] = scan.shape;
  slice.max = depth;
  slice.value = scan.first_slice;
  find("name").textContent = scan.name;
  listReasons();
  listOrgans();
  listDownloads();
  drawExtent();
  resetWindow();
}

const VERDICTS = { good: "Good", look: "Look at it", fail: "Fail" };

function listReasons() {
  find("triage").dataset.verdict = scan.verdict;
  find("triage").open = scan.verdict !== "good";
  find("verdict").textContent = VERDICTS[scan.verdict];
  const lines = [...scan.reasons, ...scan.unchecked];
  if (scan.verdict === "good") lines.unshift("Nothing unusual was found.");
  const items = lines.map((line) => Object.assign(document.createElement("li"), { textContent: line }));
  find("reasons").replaceChildren(...items);
}

function listOrgans() {
  const rows = scan.organs.map((organ, index) => {
    const row = document.createElement("tr");
    const name = row.insertCell();
    const label = document.createElement("label");
    const box = Object.assign(document.createElement("input"), { type: "checkbox", checked: !hidden.has(index) });
    box.addEventListener("change", () => {
      if (box.checked) hidden.delete(index);
      else hidden.add(index);
      drawExtent();
      draw();
    });
    box.style.setProperty("--organ", colour(organ));
    label.append(box, organ.name);
    name.append(label);
    row.insertCell().textContent = `${organ.volume_ml.toFixed(organ.volume_ml < 10 ? 1 : 0)} mL`;
    return row;
  });
  find("organs").tBodies[0].replaceChildren(...rows);
  find("organs").classList.toggle("is-long", rows.length > LONG_LIST);
}

function listDownloads() {
  const buttons = scan.files.map((file) => {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: file.label });
    button.title = file.name;
    button.addEventListener("click", () => {
      const address = URL.createObjectURL(new Blob([fromBase64(file.data)]));
      Object.assign(document.createElement("a"), { href: address, download: file.name }).click();
      // The browser needs the address until it has started to save the file.
      setTimeout(() => URL.revokeObjectURL(address), 10_000);
    });
    return button;
  });
  find("downloads").replaceChildren(...buttons);
  // What cannot be written, and what was left out of the files.
  find("notes").replaceChildren(
    ...scan.notes.map((note) => Object.assign(document.createElement("li"), { textContent: note })),
  );
}

function colour(organ, alpha = 1) {
  return `rgb(${organ.colour.join(" ")} / ${alpha})`;
}

function visibleOrgans() {
  return scan.organs.map((organ, index) => [organ, 1 << index, index]).filter(([, , index]) => !hidden.has(index));
}

function draw() {
  if (!scan) return;
  const [depth, height, columns] = scan.shape;
  const start = (slice.value - 1) * height * columns;
  const masks = scan.masks.subarray(start, start + height * columns);
  for (const one of [pixels, fills]) Object.assign(one, { width: columns, height });
  drawIntensities(scan.intensities.subarray(start, start + height * columns));
  drawFills(masks);

  const scale = window.devicePixelRatio || 1;
  canvas.width = Math.round(canvas.clientWidth * scale);
  canvas.height = Math.round(canvas.clientHeight * scale);
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(pixels, 0, 0, canvas.width, canvas.height);
  context.drawImage(fills, 0, 0, canvas.width, canvas.height);
  drawOutlines(context, masks, scale);
  find("number").textContent = `${slice.value} / ${depth}`;
  find("level-value").textContent = `${Math.round(level.value)} %`;
  find("width-value").textContent = `${Math.round(width.value)} %`;
}

function drawIntensities(intensities) {
  const context = pixels.getContext("2d");
  const image = context.createImageData(pixels.width, pixels.height);
  const darkest = (255 / 100) * (level.value - width.value / 2);
  const factor = 100 / width.value;
  const words = new Uint32Array(image.data.buffer);
  // A grey for each of the 256 intensities, as the four bytes red, green, blue and opaque.
  const greys = Uint32Array.from({ length: 256 }, (_, intensity) => {
    const grey = Math.max(0, Math.min(255, Math.round((intensity - darkest) * factor)));
    return 0xff000000 | (grey * 0x010101);
  });
  for (let i = 0; i < words.length; i++) words[i] = greys[intensities[i]];
  context.putImageData(image, 0, 0);
}

function drawFills(masks) {
  const context = fills.getContext("2d");
  const image = context.createImageData(fills.width, fills.height);
  const alpha = Math.round(255 * 0.5 * (opacity.value / 100));
  // As in the label map, the last organ wins where organs overlap.
  for (const [organ, bit] of visibleOrgans()) {
    for (let i = 0; i < masks.length; i++) if (masks[i] & bit) image.data.set([...organ.colour, alpha], 4 * i);
  }
  context.putImageData(image, 0, 0);
}

// An outline runs along the edges between a pixel inside an organ and its neighbour outside.
function drawOutlines(context, masks, scale) {
  const { width: columns, height: rows } = fills;
  const [x, y] = [canvas.width / columns, canvas.height / rows];
  const inside = (row, column, bit) =>
    row >= 0 && column >= 0 && row < rows && column < columns && masks[row * columns + column] & bit;
  context.lineWidth = 1.5 * scale;
  context.lineCap = "round";
  for (const [organ, bit] of visibleOrgans()) {
    context.strokeStyle = colour(organ, opacity.value / 100);
    context.beginPath();
    for (let row = 0; row <= rows; row++) {
      for (let column = 0; column <= columns; column++) {
        const here = !inside(row, column, bit);
        if (here !== !inside(row - 1, column, bit)) {
          context.moveTo(column * x, row * y);
          context.lineTo((column + 1) * x, row * y);
        }
        if (here !== !inside(row, column - 1, bit)) {
          context.moveTo(column * x, row * y);
          context.lineTo(column * x, (row + 1) * y);
        }
      }
    }
    context.stroke();
  }
}

// The strip above the slider shows on which slices each organ is.
function drawExtent() {
  const [depth, height, columns] = scan.shape;
  Object.assign(extent, { width: depth, height: scan.organs.length });
  // A row must be high enough to be seen.
  extent.style.height = `${Math.max(12, 3 * scan.organs.length)}px`;
  const context = extent.getContext("2d");
  for (const [organ, bit, row] of visibleOrgans()) {
    context.fillStyle = colour(organ);
    for (let number = 0; number < depth; number++) {
      const masks = scan.masks.subarray(number * height * columns, (number + 1) * height * columns);
      if (masks.some((mask) => mask & bit)) context.fillRect(number, row, 1, 1);
    }
  }
}

function moveBy(slices) {
  if (!scan) return;
  // The browser keeps the value of the slider between its ends.
  slice.value = Number(slice.value) + slices;
  draw();
}

function resetWindow() {
  level.value = scan.brightest_percent / 2;
  width.value = scan.brightest_percent;
  fitCanvas();
}

// The canvas has the shape of the slice in millimetres, as large as the stage allows.
function fitCanvas() {
  if (!scan) return;
  const [, height, columns] = scan.shape;
  const [, heightMm, widthMm] = scan.spacing_mm;
  const ratio = (columns * widthMm) / (height * heightMm);
  const fitted = Math.min(stage.clientWidth, stage.clientHeight * ratio);
  canvas.style.width = `${fitted}px`;
  canvas.style.height = `${fitted / ratio}px`;
  draw();
}

let turned = 0;
stage.addEventListener(
  "wheel",
  (event) => {
    event.preventDefault();
    // A touchpad sends many small steps, and a wheel a few large ones.
    turned += Math.max(-WHEEL_STEP, Math.min(WHEEL_STEP, event.deltaY));
    const steps = Math.trunc(turned / WHEEL_STEP);
    turned -= steps * WHEEL_STEP;
    if (steps) moveBy(steps);
  },
  { passive: false },
);

let dragged = null;
stage.addEventListener("pointerdown", (event) => {
  dragged = { x: event.clientX, y: event.clientY };
  stage.setPointerCapture(event.pointerId);
});
stage.addEventListener("pointermove", (event) => {
  if (!dragged || !scan) return;
  const [right, down] = [event.clientX - dragged.x, event.clientY - dragged.y];
  if (event.pointerType === "touch") {
    const steps = Math.trunc(right / SWIPE_STEP);
    if (steps) dragged.x = event.clientX;
    if (steps) moveBy(steps);
    return;
  }
  dragged = { x: event.clientX, y: event.clientY };
  width.value = Number(width.value) + right / 4;
  level.value = Number(level.value) + down / 4;
  draw();
});
for (const name of ["pointerup", "pointercancel"]) stage.addEventListener(name, () => (dragged = null));
stage.addEventListener("dblclick", () => scan && resetWindow());

const KEYS = { ArrowUp: -1, ArrowLeft: -1, ArrowDown: 1, ArrowRight: 1, PageUp: -10, PageDown: 10 };
document.addEventListener("keydown", (event) => {
  // In fields and on other sliders these keys have a meaning of their own. On a slider, the arrow down means less.
  const elsewhere = event.target !== slice && event.target.closest("input, textarea, select, [contenteditable]");
  if (!scan || elsewhere || event.altKey || event.ctrlKey || event.metaKey || !(event.key in KEYS)) return;
  event.preventDefault();
  moveBy(KEYS[event.key]);
});

for (const one of [slice, opacity, level, width]) one.addEventListener("input", draw);
scanChoice.addEventListener("change", () => chooseScan(scanChoice.value));
find("reset").addEventListener("click", resetWindow);
new ResizeObserver(fitCanvas).observe(stage);
watch("value", () => showScans(props.value ?? []));
