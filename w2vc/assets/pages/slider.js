async function start(w, data) {
  const {label, pages} = data, input = w.find("input"), image = w.find("img");
  w.find("span").textContent = label;
  const turn = () => {
    const [name, src, alt, width] = pages[+input.value];
    [image.src, image.alt, image.width] = [src, alt, width];
    w.find("output").textContent = name;
    input.setAttribute("aria-valuetext", `${name}. ${alt}`);
  };
  input.max = pages.length - 1;
  input.value = data.start;
  input.addEventListener("input", turn);
  turn();
}
