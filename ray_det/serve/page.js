// One picture at a time: sent as it is, shown as it is stored, with the boxes that the server answers.
const $ = (id) => document.getElementById(id);
const COLOURS = 7; // --s0 … --s6
const MOST = 100; // boxes that are drawn
const at = location.pathname.replace(/\/$/, "") + "/predict";
let asked = 0, image = null, address = null;

async function show(file) {
  const turn = ++asked; // of two pictures, the later one is shown
  document.body.classList.add("busy");
  const began = performance.now();
  let trouble = "", found = null;
  try {
    const reply = await fetch(at, {
      method: "POST", headers: { "Content-Type": file.type || "application/octet-stream" }, body: file,
    });
    const text = await reply.text();
    if (reply.ok) found = JSON.parse(text).images[0];
    else trouble = `${reply.status}: ${reason(text)}`;
  } catch (error) {
    trouble = `no answer: ${error.message}`;
  }
  if (turn !== asked) return;
  document.body.classList.remove("busy");
  $("trouble").textContent = trouble;
  $("trouble").hidden = !trouble;
  $("result").hidden = !found;
  image = found;
  if (!found) return;
  if (address) URL.revokeObjectURL(address);
  address = URL.createObjectURL(file);
  $("picture").src = address;
  $("picture").alt = file.name;
  $("frame").style.aspectRatio = `${found.width} / ${found.height}`;
  $("frame").style.maxWidth = `calc(80vh * ${found.width / found.height})`;
  const seconds = ((performance.now() - began) / 1000).toFixed(2);
  $("caption").textContent = `${file.name} · ${found.width} × ${found.height} pixels · answered in ${seconds} s`;
  draw();
}

function reason(text) {
  try {
    return JSON.parse(text).error;
  } catch {
    return text || "no reason given"; // Serve's own answers are plain text
  }
}

function draw() {
  const from = Number($("score").value);
  $("from").textContent = from.toFixed(2);
  if (!image) return;
  const kept = image.detections.filter((one) => one.score >= from);
  const drawn = kept.slice(0, MOST).map(drawOne);
  $("count").textContent = `${kept.length} of ${image.detections.length} detections` +
    (kept.length > MOST ? `, the best ${MOST} are drawn` : "");
  for (const old of $("frame").querySelectorAll(".box")) old.remove();
  $("frame").append(...drawn.map(([box]) => box).reverse()); // the best on top
  $("rows").replaceChildren(...drawn.map(([, row]) => row));
}

function drawOne({ category_id, class: name, score, bbox: [x, y, width, height] }) {
  const colour = `var(--s${category_id % COLOURS})`, label = `${name} ${score.toFixed(2)}`;
  const box = element("div", "box", element("span", "", label));
  const share = (value, of) => `${(100 * value) / of}%`;
  Object.assign(box.style, {
    left: share(x, image.width), top: share(y, image.height),
    width: share(width, image.width), height: share(height, image.height),
  });
  box.style.setProperty("--c", colour);
  box.classList.toggle("top", y < 0.06 * image.height); // the label stays inside
  box.classList.toggle("right", x > 0.75 * image.width);
  const mark = element("i", "");
  mark.style.setProperty("--c", colour);
  const row = element("tr", "", element("td", "", mark, name), element("td", "", score.toFixed(3)),
    element("td", "", `${Math.round(x)}, ${Math.round(y)}`),
    element("td", "", `${Math.round(width)} × ${Math.round(height)}`));
  row.addEventListener("pointerenter", () => box.classList.add("hot"));
  row.addEventListener("pointerleave", () => box.classList.remove("hot"));
  return [box, row];
}

function element(tag, kind, ...children) {
  const made = document.createElement(tag);
  made.className = kind;
  made.append(...children);
  return made;
}

const first = (list) => [...(list ?? [])].slice(0, 1).forEach(show);
$("file").addEventListener("change", (event) => {
  first(event.target.files);
  event.target.value = ""; // the same file may be chosen again
});
$("score").addEventListener("input", draw);
addEventListener("paste", (event) => first(event.clipboardData.files));
addEventListener("dragover", (event) => {
  event.preventDefault();
  $("drop").classList.add("over");
});
addEventListener("dragleave", () => $("drop").classList.remove("over"));
addEventListener("drop", (event) => {
  event.preventDefault();
  $("drop").classList.remove("over");
  first(event.dataTransfer.files);
});
draw();
