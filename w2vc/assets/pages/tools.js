// The tools that every explorer gets as `w`: `box` is the whole explorer, `live` the part that its script works on,
// `table` the 256 colours of cividis, three bytes each.
function tools(box, live, table) {
  const w = {}, redraws = new Set(), probe = document.createElement("i");
  probe.hidden = true;
  box.append(probe);
  const later = () => redraws.forEach((draw) => draw());
  new MutationObserver(later).observe(document.body, {attributes: true});
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", later);
  // An element: w.el("button", {class: "x", onclick: f}, "text", child)
  w.el = (tag, attributes = {}, ...children) => {
    const node = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) {
      if (key.startsWith("on")) node.addEventListener(key.slice(2), value); else node.setAttribute(key, value);
    }
    node.append(...children);
    return node;
  };
  w.find = (selector) => live.querySelector(selector);
  // A colour of base.css by its name, right for light and dark: w.color("ink")
  w.color = (name) => { probe.style.color = `var(--${name})`; return getComputedStyle(probe).color; };
  w.font = (size, weight = 400) => `${weight} ${size}px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif`;
  // A sharp canvas as wide as its holder: draw(context, width, height) in CSS pixels; height a number or f(width).
  w.canvas = (holder, height, draw, label = "") => {
    const canvas = w.el("canvas", label ? {role: "img", "aria-label": label} : {});
    holder.append(canvas);
    let asked = 0;
    const paint = () => {
      asked = 0;
      const width = Math.floor(holder.clientWidth), ratio = window.devicePixelRatio || 1;
      if (width < 2) return;
      const high = Math.round(typeof height === "function" ? height(width) : height);
      const [columns, rows] = [Math.round(width * ratio), Math.round(high * ratio)];
      if (canvas.width !== columns || canvas.height !== rows) { canvas.width = columns; canvas.height = rows; }
      canvas.style.height = high + "px";
      const context = canvas.getContext("2d");
      context.setTransform(columns / width, 0, 0, rows / high, 0, 0);
      context.clearRect(0, 0, width, high);
      draw(context, width, high);
    };
    const redraw = () => { if (!asked) asked = requestAnimationFrame(paint); };
    redraws.add(redraw);
    new ResizeObserver(redraw).observe(holder);
    redraw();
    return {canvas, redraw};
  };
  // Numbers out of an 8-bit PNG: {width, height, values}, row after row
  w.pixels = async (uri) => {
    const image = new Image();
    image.src = uri;
    await image.decode();
    const canvas = w.el("canvas");
    [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
    const context = canvas.getContext("2d", {willReadFrequently: true});
    context.drawImage(image, 0, 0);
    const rgba = context.getImageData(0, 0, canvas.width, canvas.height).data;
    const values = new Uint8Array(canvas.width * canvas.height);
    for (let i = 0; i < values.length; i++) values[i] = rgba[4 * i];
    return {width: canvas.width, height: canvas.height, values};
  };
  // The same numbers as a picture in cividis, to be drawn with drawImage
  w.tint = ({width, height, values}) => {
    const canvas = w.el("canvas");
    [canvas.width, canvas.height] = [width, height];
    const context = canvas.getContext("2d"), image = context.createImageData(width, height);
    for (let i = 0; i < values.length; i++) {
      const v = 3 * values[i];
      image.data.set([table[v], table[v + 1], table[v + 2], 255], 4 * i);
    }
    context.putImageData(image, 0, 0);
    return canvas;
  };
  w.heat = (byte) => `rgb(${table[3 * byte]},${table[3 * byte + 1]},${table[3 * byte + 2]})`;
  // A labelled player; w.play(audio, start, end) plays a stretch (to the end without `end`)
  w.player = (label, uri) => w.el("audio", {controls: "", preload: "auto", "aria-label": label, src: uri});
  w.play = (audio, start = 0, end = Infinity) => {
    const turn = audio.turn = (audio.turn || 0) + 1;
    const watch = () => {
      if (audio.turn !== turn || audio.paused) return;
      if (audio.currentTime >= end) audio.pause(); else requestAnimationFrame(watch);
    };
    const go = () => { audio.currentTime = start; audio.play().then(watch, () => {}); };
    if (audio.readyState > 0) go(); else { audio.addEventListener("loadedmetadata", go, {once: true}); audio.load(); }
  };
  // The read-out for everybody, screen readers too
  w.say = (text) => { const line = w.find(".read"); if (line && line.textContent !== text) line.textContent = text; };
  w.s = (seconds, digits = 2) => seconds.toFixed(digits) + " s";
  // Text that fits into `room` pixels, or nothing
  w.fit = (context, text, x, y, room, size = 12) => {
    for (let s = size; s >= 8.5; s -= 0.5) {
      context.font = w.font(s);
      if (context.measureText(text).width <= room - 3) {
        context.textAlign = "center"; context.textBaseline = "middle";
        context.fillText(text, x, y);
        return true;
      }
    }
    return false;
  };
  // Rows of one clip, where x(seconds) gives the pixel
  w.wave = (context, clip, x, top, height) => {
    const columns = clip.wave.length / 2, middle = top + height / 2, half = height / 2 / 100;
    const step = clip.seconds / columns, wide = Math.max(x(step) - x(0), 0.7);
    context.fillStyle = w.color("bar");
    for (let i = 0; i < columns; i++) {
      const [low, high] = [clip.wave[2 * i], clip.wave[2 * i + 1]];
      context.fillRect(x(i * step), middle - high * half, wide, Math.max((high - low) * half, 0.7));
    }
  };
  w.segments = (context, segments, x, top, height) => {
    segments.forEach(([label, start, end], i) => {
      const [left, right] = [x(start), x(end)];
      context.fillStyle = w.color(i % 2 ? "tint-b" : "tint-a");
      context.fillRect(left, top, right - left, height);
      context.strokeStyle = w.color("edge"); context.lineWidth = 0.6;
      context.strokeRect(left, top, right - left, height);
      context.fillStyle = w.color("ink");
      w.fit(context, label, (left + right) / 2, top + height / 2 + 0.5, right - left);
    });
  };
  w.axis = (context, x, seconds, top) => {
    const wide = x(seconds) - x(0), step = [0.1, 0.2, 0.5, 1, 2, 5, 10, 30].find((s) => wide * s / seconds >= 46) || 60;
    context.font = w.font(11); context.textAlign = "center"; context.textBaseline = "top";
    context.fillStyle = w.color("soft"); context.strokeStyle = w.color("edge"); context.lineWidth = 1;
    for (let t = 0; t <= seconds + 1e-6; t += step) {
      context.beginPath(); context.moveTo(x(t), top); context.lineTo(x(t), top + 4); context.stroke();
      const text = (step < 1 ? t.toFixed(1) : t.toFixed(0)) + (t + step > seconds ? " s" : "");
      const edge = context.canvas.width / context.getTransform().a - context.measureText(text).width / 2 - 1;
      context.fillText(text, Math.min(x(t), edge), top + 6);
    }
  };
  // Let pointer, keys and sound move the frame of a stage: select(frame, ...) shows it, current() tells it, point(event) gives
  // the arguments of select under the pointer. Shift goes to `starts`; a click and the button .here play from the frame.
  w.scrub = (stage, audio, {frames, hop, starts, current, select, point, follows = () => true, keys = {}}) => {
    const button = w.find(".here"), idle = button.textContent, moving = () => !audio.paused && follows();
    const here = () => { audio.dataset.goal = "here"; w.play(audio, current() * hop); };
    const toggle = () => (audio.paused ? here() : audio.pause());
    const label = () => {
      button.textContent = audio.paused ? idle : "Stop";
      w.find(".read").setAttribute("aria-live", audio.paused ? "polite" : "off");
    };
    const follow = () => {
      if (audio.paused) return;
      if (moving()) select(Math.floor(audio.currentTime / hop));
      requestAnimationFrame(follow);
    };
    let press = null;
    stage.setAttribute("aria-valuemin", 0);
    stage.setAttribute("aria-valuemax", frames - 1);
    stage.addEventListener("pointermove", (event) => { if (!moving()) select(...point(event)); });
    stage.addEventListener("pointerdown", (event) => { press = [event.clientX, event.clientY]; if (!moving()) select(...point(event)); });
    stage.addEventListener("click", (event) => {
      if (press && Math.hypot(event.clientX - press[0], event.clientY - press[1]) > 8) return;
      select(...point(event));
      here();
    });
    button.addEventListener("click", toggle);
    audio.addEventListener("pause", () => { audio.dataset.goal = ""; label(); });
    audio.addEventListener("play", () => { label(); follow(); });
    stage.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      const side = {ArrowRight: 1, ArrowUp: 1, PageUp: 1, ArrowLeft: -1, ArrowDown: -1, PageDown: -1}[event.key], frame = current();
      if (side && (event.shiftKey || event.key.startsWith("Page"))) {
        const next = side > 0 ? starts.find((s) => s > frame) : starts.filter((s) => s < frame).pop();
        select(next === undefined ? (side > 0 ? frames - 1 : 0) : next);
      } else if (side) select(frame + side);
      else if (event.key === "Home") select(0);
      else if (event.key === "End") select(frames - 1);
      else if (event.key === " " || event.key === "Enter") toggle();
      else if (keys[event.key.toLowerCase()]) keys[event.key.toLowerCase()]();
      else return;
      event.preventDefault();
    });
  };
  return w;
}

// Start all explorers of this name on the page, each once: `body` takes the place of the picture.
// `start(w, data)` comes from the script of the page, after this file.
function launch(name, {body, data, table}) {
  const colours = Uint8Array.from(atob(table), (c) => c.charCodeAt(0));
  for (const box of document.querySelectorAll(`.${name}:not([data-ready])`)) {
    box.setAttribute("data-ready", "starting");
    const still = box.querySelector(".still"), live = box.querySelector(".live");
    live.innerHTML = body;
    // JupyterLab takes arrow keys for itself, unless the element in focus asks it not to
    live.addEventListener("focusin", (event) => event.target.setAttribute("data-lm-suppress-shortcuts", "true"));
    live.hidden = false;
    still.hidden = true;
    start(tools(box, live, colours), data).then(
      () => box.setAttribute("data-ready", "yes"),
      (error) => { box.setAttribute("data-ready", "failed"); live.hidden = true; still.hidden = false; console.error(error); });
  }
}
