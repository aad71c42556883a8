async function start(w, data) {
  const {clip, hop, middle, frames, layers, heads, maps} = data, sums = data.summary;
  const stage = w.find(".stage"), grid = w.find(".maps"), audio = w.player("the whole recording", clip.sound);
  w.find(".play").append(audio);
  const packed = await Promise.all(maps.map((map) => w.pixels(map.png)));
  const tints = packed.map(w.tint), sound = w.tint(await w.pixels(clip.spectrogram));
  const percent = (share) => (share >= 0.0995 ? (100 * share).toFixed(0) : (100 * share).toFixed(1)) + " %";
  let at = data.start, frame = Math.min(data.frame, frames - 1), other = null, row = [], peaks = [];

  // ---- what the selected frame looks at
  const rowOf = (map, i) => {
    const bytes = packed[map].values, out = new Float64Array(frames), scale = maps[map].largest / 65025;
    let sum = 0;
    for (let j = 0; j < frames; j++) sum += out[j] = scale * bytes[i * frames + j] ** 2;
    return out.map((v) => v / (sum || 1));
  };
  const peaksOf = (weights) => {
    const rest = Float64Array.from(weights), found = [];
    while (found.length < 3) {
      let best = 0;
      for (let j = 1; j < frames; j++) if (rest[j] > rest[best]) best = j;
      const top = rest[best];
      if (top < 1.5 / frames) break;
      let first = best, last = best, share = 0;
      while (first > 0 && rest[first - 1] >= top / 2) first--;
      while (last < frames - 1 && rest[last + 1] >= top / 2) last++;
      for (let j = first; j <= last; j++) { share += rest[j]; rest[j] = 0; }
      found.push({first, last, best, share});
    }
    return found.sort((a, b) => b.share - a.share);
  };
  const inside = (segments, t) => segments.find(([, start, end]) => t >= start && t < end);
  const place = (j) => {
    const t = j * hop + middle, phone = inside(clip.phones, t), word = inside(clip.words, t);
    if (phone && phone[0] === "sil") return "silence";
    return [phone && phone[0], word && "“" + word[0] + "”"].filter(Boolean).join(" of ");
  };
  const stretch = (p) => `${(p.first * hop).toFixed(2)}–${w.s((p.last + 1) * hop)}`;
  const words = () => {
    const where = place(frame);
    const list = peaks.map((p) => `${stretch(p)}${place(p.best) ? " (" + place(p.best) + ")" : ""}, ${percent(p.share)}`);
    const pair = other === null ? "" : ` To frame ${other}, ${w.s(other * hop)}${place(other) ? ", in " + place(other) : ""}: ${percent(row[other])}.`;
    return `Frame ${frame}, ${w.s(frame * hop)}${where ? ", in " + where : ""}: ` +
      (list.length ? `looks most at ${list.join("; then ")}.` : "spreads its weight almost equally.") + pair;
  };

  // ---- choosing a layer and a head
  grid.classList.toggle("many", heads.length > 8 || layers.length > 6);
  grid.style.gridTemplateColumns = `auto repeat(${heads.length}, auto)`;
  grid.append(w.el("span", {"aria-hidden": "true"}, ""), ...heads.map((h) => w.el("span", {"aria-hidden": "true"}, heads.length > 8 ? h : "head " + h)));
  const buttons = maps.map((_, i) => {
    const [l, h] = [Math.floor(i / heads.length), i % heads.length];
    const small = w.el("canvas"), ratio = Math.min(window.devicePixelRatio || 1, 2);
    small.width = small.height = 46 * ratio;
    const context = small.getContext("2d");
    context.imageSmoothingQuality = "high";
    context.drawImage(tints[i], 0, 0, small.width, small.height);
    const button = w.el("button", {type: "button", role: "radio", "aria-label": `layer ${layers[l]}, head ${heads[h]}`,
      title: `layer ${layers[l]}, head ${heads[h]}`, onclick: () => choose(i)}, small);
    button.addEventListener("keydown", (event) => {
      const step = {ArrowLeft: h > 0 ? -1 : 0, ArrowRight: h < heads.length - 1 ? 1 : 0, ArrowUp: -heads.length, ArrowDown: heads.length}[event.key];
      if (step === undefined) return;
      event.preventDefault();
      if (maps[i + step]) { choose(i + step); buttons[i + step].focus(); }
    });
    if (h === 0) grid.append(w.el("span", {"aria-hidden": "true"}, heads.length > 8 ? layers[l] : "layer " + layers[l]));
    grid.append(button);
    return button;
  });
  const choose = (i) => {
    at = i;
    buttons.forEach((b, j) => { b.setAttribute("aria-checked", j === i); b.tabIndex = j === i ? 0 : -1; });
    const [l, h] = [Math.floor(i / heads.length), i % heads.length], get = (name) => sums[name] && sums[name][l][h];
    w.find(".head").replaceChildren(w.el("b", {}, `Layer ${layers[l]}, head ${heads[h]}`));
    const facts = [["looks on average", `${get("distance").toFixed(0)} ms away`], ["weight within 40 ms".replace("40", Math.round(2000 * hop)), percent(get("near"))],
      ["spread (entropy)", `${get("entropy").toFixed(2)} (0 one frame, 1 all alike)`]];
    if (sums.same) facts.push(["on the same phone", `${percent(get("same"))} (${percent(get("by_chance"))} by distance alone)`]);
    w.find(".facts").replaceChildren(...facts.flatMap(([term, value]) => [w.el("dt", {}, term), w.el("dd", {}, value)]));
    select(frame, null, true);
  };

  // ---- choosing a frame
  const select = (i, column = null, force = false) => {
    i = Math.max(0, Math.min(frames - 1, i));
    if (!force && i === frame && column === other) return;
    const changed = force || i !== frame;
    [frame, other] = [i, column];
    if (changed) { row = rowOf(at, frame); peaks = peaksOf(row); }
    const text = words();
    w.say(text);
    stage.setAttribute("aria-valuenow", frame);
    stage.setAttribute("aria-valuetext", text.split(":")[0]);
    view.redraw();
  };

  // ---- drawing: what stays is drawn once, what moves on top of it
  const size = (width) => {
    const slim = width < 560, left = slim ? 44 : 68, right = width - 10, long = right - left;
    const rows = [["wave", slim ? 36 : 48], ["sound", slim ? 62 : 84]];
    if (clip.words.length) rows.push(["words", 20]);
    if (clip.phones.length) rows.push(["phones", 20]);
    rows.push(["bars", slim ? 84 : 104], ["axis", 24], ["map", Math.round(Math.min(long, Math.max(230, long * 0.55)))]);
    const box = {left, right, long, slim};
    let top = 12;
    for (const [name, height] of rows) { box[name] = [top, height]; top += height + (name === "words" ? 0 : 5); }
    box.all = top + 20;
    return box;
  };
  const gutter = (c, text, x, y) => { c.font = w.font(box.slim ? 10 : 11); c.fillStyle = w.color("soft"); c.textAlign = "right"; c.textBaseline = "middle"; c.fillText(text, x, y); };
  let still = null, stillKey = "", box = null, x = (t) => t;
  const drawStill = (width, height, ratio) => {
    still = still || w.el("canvas");
    [still.width, still.height] = [Math.round(width * ratio), Math.round(height * ratio)];
    const c = still.getContext("2d");
    c.setTransform(still.width / width, 0, 0, still.height / height, 0, 0);
    w.wave(c, clip, x, ...box.wave);
    c.drawImage(sound, box.left, box.sound[0], box.long, box.sound[1]);
    if (box.words) w.segments(c, clip.words, x, ...box.words);
    if (box.phones) w.segments(c, clip.phones, x, ...box.phones);
    w.axis(c, x, clip.seconds, box.axis[0]);
    const [top, high] = box.map, wide = x(frames * hop) - box.left;
    c.imageSmoothingEnabled = frames > wide * ratio;
    c.drawImage(tints[at], box.left, top, wide, high);
    w.axis(c, x, clip.seconds, top + high);
    const mid = ([t, h]) => t + h / 2, edge = box.left - 7;
    for (const name of ["words", "phones"]) if (box[name]) gutter(c, name, edge, mid(box[name]));
    gutter(c, box.slim ? "wave" : "waveform", edge, mid(box.wave));
    gutter(c, `${clip.top} kHz`, edge, box.sound[0] + 7);
    gutter(c, "0", edge, box.sound[0] + box.sound[1] - 5);
    const step = [0.1, 0.2, 0.5, 1, 2, 5, 10, 30].find((s) => high * s / clip.seconds >= 34) || 60;
    for (let t = step; t < frames * hop; t += step) gutter(c, step < 1 ? t.toFixed(1) : t.toFixed(0), edge - 5, top + high * t / (frames * hop));
    gutter(c, box.slim ? "looking" : "looking (s)", edge, top + 7);
  };
  const drawBars = (c) => {
    const [top, high] = box.bars, base = top + high, peak = Math.max(...row);
    const full = [0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2, 0.3, 0.5, 0.75, 1].find((v) => v >= peak) || 1;
    const room = high - 18, wide = Math.max((x(hop) - x(0)) * 0.86, 1), y = (v) => base - room * v / full;
    c.strokeStyle = w.color("line"); c.lineWidth = 1;
    for (const v of [full, full / 2]) { c.beginPath(); c.moveTo(box.left, y(v)); c.lineTo(box.right, y(v)); c.stroke(); }
    gutter(c, percent(full).replace(".0", ""), box.left - 7, y(full));
    gutter(c, "weight", box.left - 7, y(full / 2));
    gutter(c, "0", box.left - 7, base - 4);
    c.fillStyle = w.color("bar");
    for (let j = 0; j < frames; j++) c.fillRect(x(j * hop), y(row[j]), wide, base - y(row[j]));
    c.strokeStyle = w.color("ink"); c.setLineDash([3, 3]);
    c.beginPath(); c.moveTo(box.left, y(1 / frames)); c.lineTo(box.right, y(1 / frames)); c.stroke(); c.setLineDash([]);
    c.font = w.font(11, 600); c.fillStyle = w.color("ink"); c.textBaseline = "bottom";
    const taken = [];
    for (const p of peaks) {
      const phone = inside(clip.phones, p.best * hop + middle), text = (phone ? phone[0] + " " : "") + percent(p.share);
      const half = c.measureText(text).width / 2 + 2;
      const middleX = Math.max(box.left + half, Math.min(box.right - half, x((p.first + p.last + 1) * hop / 2)));
      if (taken.some(([a, b]) => middleX + half > a && middleX - half < b)) continue;
      taken.push([middleX - half, middleX + half]);
      c.textAlign = "center"; c.fillText(text, middleX, y(row[p.best]) - 2);
    }
  };
  const drawMarks = (c) => {
    const [mapTop, mapHigh] = box.map, mark = w.color("mark"), mine = x((frame + 0.5) * hop), step = mapHigh / frames;
    if (w.find(".spot").checked) {
      const peak = Math.max(...row), [top, high] = box.sound;
      for (let j = 0; j < frames; j++) {
        c.fillStyle = `rgba(6,10,16,${(0.8 * (1 - Math.sqrt(row[j] / peak))).toFixed(3)})`;
        c.fillRect(x(j * hop), top, x((j + 1) * hop) - x(j * hop), high);
      }
      c.fillStyle = "rgba(6,10,16,.8)"; c.fillRect(x(frames * hop), top, box.right - x(frames * hop), high);
    }
    c.strokeStyle = c.fillStyle = mark; c.lineWidth = 2;
    for (const [from, to] of [[10, box.sound[0] + box.sound[1]], [box.bars[0], box.bars[0] + box.bars[1]]]) {
      c.beginPath(); c.moveTo(mine, from); c.lineTo(mine, to); c.stroke();
    }
    for (const name of ["words", "phones"]) {
      const part = box[name] && inside(clip[name], frame * hop + middle);
      if (part) c.strokeRect(x(part[1]), box[name][0], x(part[2]) - x(part[1]), box[name][1]);
    }
    c.beginPath(); c.moveTo(mine - 6, 0); c.lineTo(mine + 6, 0); c.lineTo(mine, 10); c.fill();
    const y = mapTop + frame * step;
    c.lineWidth = 1.5;
    c.strokeRect(box.left - 1, y - 1.5, x(frames * hop) - box.left + 2, step + 3);
    c.beginPath(); c.moveTo(box.left - 9, y + step / 2 - 6); c.lineTo(box.left - 9, y + step / 2 + 6); c.lineTo(box.left - 1, y + step / 2); c.fill();
    if (other !== null) {
      c.strokeStyle = w.color("mark"); c.lineWidth = 1.5; c.setLineDash([4, 3]);
      const column = x((other + 0.5) * hop);
      c.beginPath(); c.moveTo(column, box.bars[0]); c.lineTo(column, mapTop + mapHigh); c.stroke(); c.setLineDash([]);
    }
  };
  const view = w.canvas(stage, (width) => size(width).all, (c, width, height) => {
    box = size(width);
    x = (t) => box.left + box.long * t / clip.seconds;
    const ratio = window.devicePixelRatio || 1, key = [width, ratio, at, w.color("ink")].join();
    if (key !== stillKey) { drawStill(width, height, ratio); stillKey = key; }
    c.drawImage(still, 0, 0, width, height);
    drawBars(c);
    drawMarks(c);
  });
  w.find(".spot").addEventListener("change", view.redraw);

  // ---- pointer, keys, sound
  const pointed = (event) => {
    const area = view.canvas.getBoundingClientRect(), [px, py] = [event.clientX - area.left, event.clientY - area.top];
    const column = Math.max(0, Math.min(frames - 1, Math.floor((px - box.left) / box.long * clip.seconds / hop)));
    const line = Math.floor((py - box.map[0]) / box.map[1] * frames);
    return line >= 0 ? [Math.min(line, frames - 1), column] : [column, null];
  };
  const there = () => {
    const p = peaks[0] || {first: frame, last: frame}, centre = (p.first + p.last + 1) / 2 * hop, half = Math.max((p.last + 1 - p.first) * hop / 2, 0.1);
    audio.dataset.goal = "there";
    w.play(audio, Math.max(0, centre - half), Math.min(clip.seconds, centre + half));
  };
  w.find(".there").addEventListener("click", there);
  const tens = Array.from({length: Math.ceil(frames / 10)}, (_, i) => 10 * i);
  const starts = clip.phones.map(([, start]) => Math.max(0, Math.ceil((start - middle) / hop - 1e-6)));
  w.scrub(stage, audio, {frames, hop, starts: starts.length ? starts : tens, current: () => frame, select, point: pointed,
    follows: () => w.find(".follow").checked && audio.dataset.goal !== "there", keys: {l: there}});
  choose(at);
}
