"use strict";
(() => {
  const packs = JSON.parse(document.getElementById("data").textContent);
  const tip = document.getElementById("tip");
  const section = document.getElementById("packs");
  let current = null;

  // Which place of the row each token has; worked out once for each stretch of tokens.
  function placesOf(tokens) {
    if (!tokens.places) {
      tokens.places = new Map();
      let at = Number(tokens.dataset.at);
      for (const token of tokens.children) {
        tokens.places.set(token, at);
        at += Number(token.dataset.n || 1);
      }
    }
    return tokens.places;
  }

  function line(label, value, code) {
    const row = document.createElement("div");
    row.append(label + " ");
    const shown = document.createElement(code ? "code" : "span");
    shown.textContent = value;
    row.append(shown);
    return row;
  }

  function show(token) {
    if (current) current.classList.remove("on");
    current = token;
    token.classList.add("on");
    const tokens = token.closest(".tokens");
    const sample = token.closest(".sample");
    const pack = packs[Number(token.closest(".pack").dataset.pack)];
    const at = placesOf(tokens).get(token);
    const last = at + Number(token.dataset.n || 1) - 1;
    const several = last > at;
    const start = Number(sample.dataset.start);
    const number = (value) => value.toLocaleString("en-US");
    const range = (from, to) => number(from) + (several ? " to " + number(to) : "");
    const loss = pack.loss[at];
    tip.replaceChildren(
      line("token", JSON.stringify(token.textContent), true),
      line("id", String(pack.ids[at])),
      line("in the row", range(at, last)),
      line("in the sample", range(at - start, last - start)),
      line("position", range(pack.positions[at], pack.positions[last])),
      line("role", tokens.previousElementSibling.textContent),
      line("loss", loss < 0 ? "none" : "weight " + pack.weights[loss]),
    );
    tip.hidden = false;
    const box = token.getClientRects()[0] || token.getBoundingClientRect();
    const wide = tip.offsetWidth, tall = tip.offsetHeight;
    const left = Math.min(Math.max(8, box.left), innerWidth - wide - 8);
    const below = box.bottom + 8;
    tip.style.left = left + "px";
    tip.style.top = (below + tall < innerHeight ? below : box.top - tall - 8) + "px";
  }

  function hide() {
    if (current) current.classList.remove("on");
    current = null;
    tip.hidden = true;
  }

  const tokenAt = (target) => (target instanceof Element ? target.closest(".tokens > i") : null);

  section.addEventListener("mouseover", (event) => {
    const token = tokenAt(event.target);
    if (token) show(token);
    else hide();
  });
  section.addEventListener("mouseleave", hide);
  section.addEventListener("focusin", (event) => {
    if (event.target.matches(".tokens") && event.target.matches(":focus-visible")) {
      show(event.target.firstElementChild);
    }
  });
  section.addEventListener("focusout", hide);
  addEventListener("scroll", () => { if (current && !current.matches(":hover")) hide(); }, { passive: true });

  function step(by) {
    const samples = [...document.querySelectorAll(".pack[open] .sample")];
    const here = document.activeElement.closest(".sample");
    let next = samples.indexOf(here) + by;
    if (!here) {
      // Nothing chosen yet: the first one in view.
      next = samples.findIndex((sample) => sample.getBoundingClientRect().bottom > 120);
    }
    const sample = samples[Math.min(Math.max(next, 0), samples.length - 1)];
    if (sample) {
      sample.focus({ preventScroll: true });
      sample.scrollIntoView({ block: "start" });
    }
  }

  function move(tokens, by) {
    const inside = current && current.parentElement === tokens;
    const next = inside
      ? (by > 0 ? current.nextElementSibling : current.previousElementSibling)
      : tokens.firstElementChild;
    if (next) {
      next.scrollIntoView({ block: "nearest" });
      show(next);
    }
  }

  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.matches("input")) return;
    if (event.key === "j" || event.key === "k") {
      hide();
      step(event.key === "j" ? 1 : -1);
    } else if (event.key === "Escape") {
      hide();
    } else if (event.target.matches(".tokens") && event.key.startsWith("Arrow")) {
      if (event.key === "ArrowRight" || event.key === "ArrowLeft") {
        event.preventDefault();
        move(event.target, event.key === "ArrowRight" ? 1 : -1);
      }
    }
  });

  for (const name of ["edges", "only"]) {
    const box = document.getElementById(name);
    const apply = () => document.body.classList.toggle(name, box.checked);
    box.addEventListener("change", apply);
    apply();
  }
  addEventListener("beforeprint", () => {
    for (const pack of document.querySelectorAll(".pack")) pack.open = true;
  });
})();
