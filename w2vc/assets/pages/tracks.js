async function start(w, data) {
  const {clip, hop, middle, frames, tracks, said} = data;
  const stage = w.find(".stage"), audio = w.player("the whole recording", clip.sound);
  w.find(".play").append(audio);
  w.find(".facts").textContent = data.facts;
  w.find(".key").textContent = data.key;
  const sound = w.tint(await w.pixels(clip.spectrogram));
  for (const track of tracks) if (track.png) track.tint = w.tint(await w.pixels(track.png));
  const steps = [...new Set((tracks.find((t) => t.stretches) || {stretches: []}).stretches.map((s) => s[1]))].sort((a, b) => a - b);
  let frame = Math.min(data.frame, frames - 1), box = null, x = (t) => t;

  // ---- drawing
  const size = (width) => {
    const slim = width < 560, left = slim ? 58 : 76, right = width - 8, tops = [];
    let top = 14;
    const rows = [slim ? 36 : 48, slim ? 60 : 80, ...tracks.map((t) => (t.tint ? 14 * t.labels.length : t.values ? 44 : 21))];
    for (const high of rows) { tops.push([top, high]); top += high + 4; }
    return {slim, left, right, tops, axis: top, all: top + 22};
  };
  const gutter = (c, text, y, small) => { c.font = w.font(small ? 10 : 11.5); c.fillStyle = w.color("soft"); c.textAlign = "right"; c.textBaseline = "middle"; c.fillText(text, box.left - 5, y); };
  const lines = (c, left, top, wide, high, slope) => {
    c.beginPath();
    for (let i = -high; i < wide + high; i += 6) { c.moveTo(left + i, top + (slope > 0 ? high : 0)); c.lineTo(left + i + high, top + (slope > 0 ? 0 : high)); }
    c.stroke();
  };
  const hatch = (c, sign, left, top, wide, high) => {
    c.save(); c.beginPath(); c.rect(left, top, wide, high); c.clip();
    c.strokeStyle = c.fillStyle = w.color("mark-ink"); c.lineWidth = 1.3;
    if (sign === "false alarm") { for (let i = 3; i < wide; i += 6) for (let j = 3; j < high; j += 6) { c.beginPath(); c.arc(left + i, top + j, 1.3, 0, 7); c.fill(); } }
    else { lines(c, left, top, wide, high, 1); if (sign === "confused") lines(c, left, top, wide, high, -1); }
    c.restore();
  };
  const drawTrack = (c, track, [top, high]) => {
    gutter(c, track.name, top + high / 2);
    if (track.tint) {
      c.imageSmoothingEnabled = false;
      c.drawImage(track.tint, box.left, top, x(frames * hop) - box.left, high);
      track.labels.forEach((label, i) => gutter(c, label, top + (i + 0.5) * high / track.labels.length, true));
    } else if (track.values) {
      c.fillStyle = w.color("bar");
      track.values.forEach((v, j) => c.fillRect(x(j * hop), top + high * (1 - v / 100), Math.max(x(hop) - x(0), 1), high * v / 100));
      c.strokeStyle = w.color("ink"); c.setLineDash([3, 3]); c.lineWidth = 1;
      c.beginPath(); c.moveTo(box.left, top + high / 2); c.lineTo(x(frames * hop), top + high / 2); c.stroke(); c.setLineDash([]);
    } else {
      w.segments(c, track.stretches.map(([label, start, end, sign]) => [sign ? "" : label, start, end]), x, top, high);
      for (const [label, start, end, sign] of track.stretches) if (sign) {
        const [left, wide] = [x(start), x(end) - x(start)];
        hatch(c, sign, left, top, wide, high);
        c.font = w.font(12);
        const half = Math.min(c.measureText(label).width + 6, wide - 2) / 2;
        if (label && half > 5) { c.fillStyle = w.color("paper"); c.fillRect(left + wide / 2 - half, top + 3, 2 * half, high - 6); }
        c.fillStyle = w.color("ink");
        w.fit(c, label, left + wide / 2, top + high / 2 + 0.5, wide - 4);
      }
    }
  };
  const view = w.canvas(stage, (width) => size(width).all, (c, width) => {
    box = size(width);
    x = (t) => box.left + (box.right - box.left) * t / clip.seconds;
    w.wave(c, clip, x, ...box.tops[0]);
    c.drawImage(sound, box.left, box.tops[1][0], box.right - box.left, box.tops[1][1]);
    gutter(c, box.slim ? "wave" : "waveform", box.tops[0][0] + box.tops[0][1] / 2);
    gutter(c, `${clip.top} kHz`, box.tops[1][0] + 7);
    gutter(c, "0", box.tops[1][0] + box.tops[1][1] - 6);
    tracks.forEach((track, i) => drawTrack(c, track, box.tops[i + 2]));
    w.axis(c, x, clip.seconds, box.axis);
    const at = x((frame + 0.5) * hop);
    c.strokeStyle = c.fillStyle = w.color("mark"); c.lineWidth = 1.6;
    c.beginPath(); c.moveTo(at, 10); c.lineTo(at, box.axis); c.stroke();
    c.beginPath(); c.moveTo(at - 6, 0); c.lineTo(at + 6, 0); c.lineTo(at, 10); c.fill();
  });

  // ---- choosing and hearing
  const select = (i) => {
    frame = Math.max(0, Math.min(frames - 1, i));
    w.say(said[frame]);
    stage.setAttribute("aria-valuenow", frame);
    stage.setAttribute("aria-valuetext", said[frame]);
    view.redraw();
  };
  const point = (event) => {
    const left = view.canvas.getBoundingClientRect().left + box.left;
    return [Math.floor((event.clientX - left) / (box.right - box.left) * clip.seconds / hop)];
  };
  const starts = steps.map((s) => Math.max(0, Math.ceil((s - middle) / hop)));
  w.scrub(stage, audio, {frames, hop, starts, current: () => frame, select, point});
  select(frame);
}
