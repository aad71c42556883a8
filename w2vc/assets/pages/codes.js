async function start(w, data) {
  const {groups, clips, hop, width, total, reach} = data, bands = 40;
  let g = 0, k = 0, row = 0, clip = 0, at = -1;
  const audio = w.player("Sound of the utterance below", clips.length ? clips[0].sound : "");
  w.find(".sound").append(audio);
  audio.addEventListener("error", () => { w.find(".lost").hidden = false; });
  const stops = Array.from({length: 12}, (_, i) => w.heat(Math.round(255 * Math.sqrt(i / 11))));
  w.find(".scale i").style.background = `linear-gradient(90deg, ${stops.join(",")})`;
  const patches = await Promise.all(groups.map((x) => w.pixels(x.patches)));
  const percent = (x) => (100 * x < 9.95 ? (100 * x).toFixed(1) : (100 * x).toFixed(0)) + " %";
  const sum = (list) => list.reduce((a, b) => a + b, 0);
  const here = () => groups[g];
  // the phones of a code, the commonest first: [place, share]
  const shares = (column) => {
    const counts = here().counts[column], whole = sum(counts) || 1;
    return counts.map((n, p) => [p, n / whole]).filter((x) => x[1] > 0).sort((a, b) => b[1] - a[1]);
  };
  const mainly = (column) => here().phones[shares(column)[0][0]];
  // stretches of one code in a clip: [first frame, last frame]
  const runs = (codes, wanted) => {
    const found = [];
    for (let i = 0, from = 0; i < codes.length; i++) {
      if (i + 1 === codes.length || codes[i + 1] !== codes[i]) {
        if (wanted === undefined || codes[i] === wanted) found.push([from, i]);
        from = i + 1;
      }
    }
    return found;
  };
  const span = ([first, last]) => [first * hop, last * hop + width];
  const under = (segments, [start, end]) => (segments.find((s) => s[1] <= (start + end) / 2 && (start + end) / 2 < s[2]) || ["?"])[0];
  const load = (number) => {
    if (audio.dataset.clip !== String(number)) {
      audio.dataset.clip = number;
      audio.src = clips[number].sound;
      audio.setAttribute("aria-label", `Sound of utterance ${clips[number].id}`);
    }
  };
  const hear = (number, run, margin = 0.08) => {
    clip = number; load(number);
    const [start, end] = span(run), starts = runs(clips[number].codes[g]);
    at = starts.findIndex((r) => r[0] === run[0]);
    w.play(audio, Math.max(0, start - margin), Math.min(end + margin, clips[number].seconds));
    drawStrip();
  };

  // ---- the table ----
  const side = 30, bars = 54, foot = 17;
  const cell = (wide) => [(wide - side - 1) / here().codes.length, Math.max(12, Math.min(16, 640 / here().phones.length))];
  const high = (wide) => bars + 6 + cell(wide)[1] * here().phones.length + foot;
  const grid = w.canvas(w.find(".grid"), high, (c, wide) => {
    const {codes, phones, counts, frames} = here(), [cw, ch] = cell(wide), top = bars + 6, most = Math.max(...frames);
    const x = (i) => side + i * cw;
    frames.forEach((n, i) => {
      c.fillStyle = w.color(i === k ? "mark" : "bar");
      const h = Math.max(1, n / most * (bars - 4));
      c.fillRect(x(i) + cw * 0.08, bars - h, Math.max(cw * 0.84, 0.8), h);
    });
    const even = bars - total / (codes.length + here().dead.length) / most * (bars - 4);
    c.strokeStyle = w.color("ink"); c.setLineDash([4, 3]); c.lineWidth = 1;
    c.beginPath(); c.moveTo(side, even); c.lineTo(wide, even); c.stroke(); c.setLineDash([]);
    c.font = w.font(10.5); c.textBaseline = "middle"; c.textAlign = "right"; c.fillStyle = w.color("soft");
    c.fillText("use", side - 4, bars - 8);
    codes.forEach((_, i) => {
      const whole = sum(counts[i]) || 1;
      phones.forEach((_, p) => {
        c.fillStyle = w.heat(Math.round(255 * Math.sqrt(counts[i][p] / whole)));
        c.fillRect(x(i), top + p * ch, cw + 0.5, ch + 0.5);
      });
    });
    phones.forEach((name, p) => {
      c.font = w.font(ch > 11 ? 11.5 : 10, p === row ? 700 : 400); c.textAlign = "right"; c.textBaseline = "middle";
      c.fillStyle = w.color(p === row ? "mark-ink" : "ink");
      c.fillText(name === "sil" || name.length < 4 ? name : name.slice(0, 4), side - 4, top + (p + 0.5) * ch);
    });
    c.strokeStyle = "#fff"; c.lineWidth = 3;
    const frame = (inset) => {
      c.strokeRect(x(k) - inset, top - inset, cw + 2 * inset, ch * phones.length + 2 * inset);
      c.strokeRect(side, top + row * ch - inset, wide - side, ch + 2 * inset);
    };
    c.globalAlpha = 0.85; frame(1); c.globalAlpha = 1;
    c.strokeStyle = "#d55e00"; c.lineWidth = 1.5; frame(1);
    c.fillStyle = w.color("ink"); c.font = w.font(11, 700); c.textAlign = "center"; c.textBaseline = "top";
    c.fillText("code " + codes[k], Math.min(Math.max(x(k + 0.5), side + 26), wide - 26), top + ch * phones.length + 4);
  });
  const cellAt = (event) => {
    const box = grid.canvas.getBoundingClientRect(), [cw, ch] = cell(box.width);
    const column = Math.floor((event.clientX - box.left - side) / cw), line = Math.floor((event.clientY - box.top - bars - 6) / ch);
    return [Math.max(0, Math.min(column, here().codes.length - 1)), line < 0 || line >= here().phones.length ? null : line];
  };
  const tip = (column, p) => {
    const {codes, phones, counts} = here();
    return `code ${codes[column]}` + (p === null ? `: ${percent(here().frames[column] / total)} of all frames` : `, ${phones[p]}: ${percent(counts[column][p] / (sum(counts[column]) || 1))} of the code`);
  };
  const field = w.find(".grid");
  field.addEventListener("mousemove", (event) => { field.title = tip(...cellAt(event)); });
  field.addEventListener("click", (event) => {
    const [column, p] = cellAt(event);
    choose(column, p === null ? undefined : p);
  });
  field.addEventListener("keydown", (event) => {
    const n = here().codes.length, m = here().phones.length;
    const move = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1], Home: [-n, 0], End: [n, 0]}[event.key];
    if (move && !(event.ctrlKey || event.metaKey || event.altKey)) {
      event.preventDefault();
      if (move[0]) choose(Math.max(0, Math.min(n - 1, k + move[0])));
      else { row = Math.max(0, Math.min(m - 1, row + move[1])); tell(); grid.redraw(); }
    } else if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      const first = w.find(".list button"); if (first) first.click();
    }
  });

  // ---- what is known of the code ----
  const patch = w.canvas(w.find(".patch"), 150, (c, wide) => {
    const size = 2 * reach + 1, {values} = patches[g];
    const picture = w.tint({width: size, height: bands, values: values.slice(k * bands * size, (k + 1) * bands * size)});
    const left = 44, top = 4, room = wide - left - 8, tall = 126, x = (t) => left + (t / (size * hop) + 0.5) * room;
    c.imageSmoothingEnabled = false;
    c.drawImage(picture, left, top, room, tall);
    c.strokeStyle = "#fff"; c.lineWidth = 3; c.strokeRect(x(-hop / 2), top, x(hop) - x(0), tall);
    c.strokeStyle = "#d55e00"; c.lineWidth = 1.5; c.strokeRect(x(-hop / 2), top, x(hop) - x(0), tall);
    c.fillStyle = w.color("soft"); c.font = w.font(11); c.textBaseline = "middle"; c.textAlign = "right";
    [["8 kHz", 0], ["3", 1875.9 / 2840], ["1", 999.99 / 2840], ["0", 0]].forEach(([text, m], i) =>
      c.fillText(text, left - 5, i ? top + tall - Math.max(m * tall, 5) : top + 6));
    c.textAlign = "center"; c.textBaseline = "top";
    [-0.1, 0, 0.1].forEach((t) => c.fillText(t ? (t > 0 ? "+" : "−") + "0.1 s" : "its frame", x(t), top + tall + 6));
  }, "Mean spectrogram around the frames of the code");
  const spread = () => {  // stretches on this page: one of each speaker first
    const found = clips.flatMap((one, number) => runs(one.codes[g], here().codes[k]).map((run) => [number, run]));
    const seen = {};
    return found.map((x) => { const who = clips[x[0]].who; seen[who] = (seen[who] || 0) + 1; return [seen[who], ...x]; })
      .sort((a, b) => a[0] - b[0]).map((x) => x.slice(1));
  };
  const tell = () => {
    const {codes, phones, counts, frames} = here(), best = shares(k).slice(0, 4);
    const of = sum(counts.map((line) => line[row]));
    w.say(`Group ${g}, code ${codes[k]}: ${frames[k]} frames, ${percent(frames[k] / total)} of all, in ${here().runs[k]} stretches. ` +
      `Its phones: ${best.map(([p, s]) => phones[p] + " " + percent(s)).join(", ")}. ` +
      `Of the frames of ${phones[row]}, ${percent(of ? counts[k][row] / of : 0)} choose it.`);
  };
  const choose = (column, phone) => {
    k = column;
    row = phone === undefined ? shares(k)[0][0] : phone;
    w.find(".code").value = k;
    tell(); grid.redraw(); patch.redraw();
    w.find(".near").replaceChildren(...here().near[k].map(([code, cosine]) => {
      const column = here().codes.indexOf(code);
      return w.el("button", {onclick: () => choose(column), "aria-label": `code ${code}, mostly ${mainly(column)}, cosine ${cosine}`}, `${code} · ${mainly(column)} · ${cosine.toFixed(2).replace("-", "−")}`);
    }));
    const found = spread(), shown = found.slice(0, 8);
    w.find(".count").textContent = found.length ? `Hear it: ${shown.length} of ${found.length} stretches on this page, ${here().runs[k]} in all` : "None of its stretches is on this page";
    const buttons = shown.map(([number, run]) => {
      const one = clips[number], [start, end] = span(run), phone = under(one.phones, [start, end]), word = under(one.words, [start, end]);
      return w.el("button", {"aria-pressed": "false", "aria-label": `Play ${phone} in ${word}, speaker ${one.who}, ${Math.round(1000 * (end - start))} milliseconds`,
        onclick: (event) => {
          hear(number, run);
          buttons.forEach((b) => b.setAttribute("aria-pressed", b === event.currentTarget));
        }}, `▶ ${phone}`, w.el("small", {}, `${word === "?" ? "pause" : "in “" + word + "”"}, ${one.who}, ${Math.round(1000 * (end - start))} ms`));
    });
    w.find(".list").replaceChildren(...buttons);
    if (shown.length) {
      clip = shown[0][0];
      at = runs(clips[clip].codes[g]).findIndex((r) => r[0] === shown[0][1][0]);
      load(clip);
    }
    drawStrip();
  };

  // ---- the utterance ----
  const place = (wide, one) => { const scale = (wide - 46) / one.seconds; return (t) => 44 + t * scale; };
  const strip = w.canvas(w.find(".strip"), 148, (c, wide) => {
    if (!clips.length) return;
    const one = clips[clip], x = place(wide, one), all = runs(one.codes[g]);
    if (at >= 0 && all[at]) {
      const [start, end] = span(all[at]);
      c.fillStyle = w.color("shade"); c.fillRect(x(start), 0, x(end) - x(start), 122);
    }
    w.wave(c, one, x, 2, 54);
    w.segments(c, one.phones, x, 60, 22);
    all.forEach((run, i) => {
      const code = one.codes[g][run[0]], left = x(run[0] * hop), right = x((run[1] + 1) * hop), same = code === here().codes[k];
      c.fillStyle = same ? w.color("mark-ink") : w.color(i % 2 ? "panel" : "line");
      c.fillRect(left, 88, right - left, 28);
      c.strokeStyle = w.color(i === at ? "ink" : "edge"); c.lineWidth = i === at ? 2.5 : 0.6;
      c.strokeRect(left, 88, right - left, 28);
      c.fillStyle = same ? w.color("paper") : w.color("ink");
      w.fit(c, String(code), (left + right) / 2, 102.5, right - left, 11);
    });
    c.fillStyle = w.color("soft"); c.font = w.font(11); c.textAlign = "right"; c.textBaseline = "middle";
    [["sound", 30], ["phones", 71], ["codes", 102]].forEach(([text, y]) => c.fillText(text, 40, y));
    w.axis(c, x, one.seconds, 120);
  });
  const drawStrip = () => {
    if (clips.length) w.find(".which").textContent = `Codes of group ${g} under “${clips[clip].text}”, speaker ${clips[clip].who}`;
    strip.redraw();
  };
  const step = (i, sound = true) => {
    const all = runs(clips[clip].codes[g]);
    const number = clip, run = all[Math.max(0, Math.min(all.length - 1, i))];
    const column = here().codes.indexOf(clips[clip].codes[g][run[0]]);
    if (column >= 0) choose(column);
    clip = number; at = all.indexOf(run);
    if (sound) hear(number, run); else { load(number); drawStrip(); }
  };
  const line = w.find(".strip");
  line.addEventListener("click", (event) => {
    const box = strip.canvas.getBoundingClientRect(), x = place(box.width, clips[clip]);
    const t = (event.clientX - box.left - x(0)) / (x(1) - x(0));
    const i = runs(clips[clip].codes[g]).findIndex((r) => t < (r[1] + 1) * hop);
    step(i < 0 ? Infinity : i);
  });
  line.addEventListener("keydown", (event) => {
    if (event.key === "ArrowRight" || event.key === "ArrowLeft") { event.preventDefault(); step(at + (event.key === "ArrowRight" ? 1 : -1), false); }
    else if (event.key === "Enter" || event.key === " ") { event.preventDefault(); step(at); }
  });

  // ---- groups and codes ----
  const open = (group, column) => {
    g = group;
    switches.forEach((b, i) => { b.setAttribute("aria-checked", i === g); b.tabIndex = i === g ? 0 : -1; });
    const {hard, soft, dead, codes, frames} = here();
    w.find(".facts").textContent = `perplexity hard ${hard}, soft ${soft} of ${codes.length + dead.length}; ` + (dead.length ? `never chosen: ${dead.slice(0, 8).join(", ")}${dead.length > 8 ? ", …" : ""}` : "every code is chosen");
    w.find(".code").replaceChildren(...codes.map((code, i) => w.el("option", {value: i}, `${code}: ${mainly(i)} ${percent(shares(i)[0][1])}`)));
    const worth = codes.map((_, i) => (mainly(i) === "sil" || frames[i] < total / 100 ? 0 : shares(i)[0][1]));  // begin with a clear one
    choose(column === undefined ? worth.indexOf(Math.max(...worth)) : column);
  };
  const switches = groups.map((_, i) => w.el("button", {role: "radio", onclick: () => open(i), onkeydown: (event) => {
    const move = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1}[event.key];
    if (!move) return;
    event.preventDefault();
    open((g + move + groups.length) % groups.length); switches[g].focus();
  }}, `group ${i}`));
  w.find(".groups").append(...switches);
  w.find(".code").addEventListener("change", (event) => choose(+event.target.value));
  open(0);
}
