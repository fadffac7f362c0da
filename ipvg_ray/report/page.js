// Filter, order, playing videos in view, enlarging pictures. Without it the page shows everything, in the set's order.
"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const one = (id) => document.getElementById(id);
  document.documentElement.classList.add("js");

  const holder = one("groups");
  const groups = all(".identity", holder);
  const samples = all(".sample", holder).map((row) => ({
    row,
    group: row.closest(".identity"),
    home: row.parentElement,
    status: row.dataset.status,
    order: Number(row.dataset.order),
    text: (row.closest(".identity").getAttribute("aria-label") + " " + row.getAttribute("aria-label") + " " + row.textContent).toLowerCase(),
  }));
  const view = { show: "all", sort: "", words: [] };
  const total = one("tally").textContent;

  const matches = (sample) =>
    (view.show === "all" || sample.status === view.show) && view.words.every((word) => sample.text.includes(word));

  // By score every sample stands alone, with a copy of its identity's pictures; else in its identity's group.
  function arrange() {
    const shown = samples.filter(matches);
    const [column, direction] = view.sort.split(" ");
    if (!column) {
      for (const sample of samples) {
        sample.row.hidden = !matches(sample);
        sample.home.append(sample.row);
      }
      for (const group of groups) group.hidden = !group.querySelector(".sample:not([hidden])");
      holder.replaceChildren(...groups);
    } else {
      const score = (sample) => {
        const text = sample.row.getAttribute("data-score-" + column);
        return text === null ? NaN : Number(text);
      };
      const sign = direction === "high" ? -1 : 1;
      shown.sort((a, b) => {
        const [x, y] = [score(a), score(b)];
        if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y) || a.order - b.order;
        return sign * (x - y) || a.order - b.order;
      });
      holder.replaceChildren(...shown.map(alone));
    }
    one("nothing").hidden = shown.length > 0 || samples.length === 0;
    one("tally").textContent = shown.length === samples.length ? total : shown.length + " of the " + samples.length + " on this page";
  }

  function alone(sample) {
    const group = sample.group.cloneNode(false);
    const list = sample.home.cloneNode(false);
    group.hidden = sample.row.hidden = false;
    group.append(sample.group.querySelector(".rail").cloneNode(true), list);
    list.append(sample.row);
    return group;
  }

  let timer = 0;
  one("search").addEventListener("input", (event) => {
    clearTimeout(timer);
    timer = setTimeout(() => {
      view.words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
      arrange();
    }, 120);
  });
  one("sort").addEventListener("change", (event) => {
    view.sort = event.target.value;
    arrange();
  });
  for (const button of all("[data-show]")) {
    const kind = button.dataset.show;
    button.hidden = kind !== "all" && !samples.some((sample) => sample.status === kind);
    button.addEventListener("click", () => {
      view.show = kind;
      for (const other of all("[data-show]")) other.setAttribute("aria-pressed", String(other === button));
      arrange();
    });
  }
  all(".controls").forEach((controls) => { controls.hidden = samples.length < 2; });

  // A failure's link must find its row, whatever the filter hides.
  document.addEventListener("click", (event) => {
    const link = event.target.closest(".failures a");
    if (!link || (view.show === "all" && !view.words.length)) return;
    view.words = [];
    one("search").value = "";
    document.querySelector('[data-show="all"]').click();
  });

  // Long prompts fold; the button appears only where something is hidden.
  function foldLongTexts() {
    for (const text of all(".clamp")) {
      if (text.scrollHeight <= text.clientHeight + 2) continue;
      const button = document.createElement("button");
      button.type = "button";
      button.className = "more";
      const label = (open) => {
        button.textContent = open ? "Less" : "More";
        button.setAttribute("aria-expanded", String(open));
      };
      label(false);
      button.addEventListener("click", () => label(text.classList.toggle("whole")));
      text.after(button);
    }
  }
  foldLongTexts();

  // Videos hold their source only near the screen: browsers refuse more than a few dozen players on a page.
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const near = new IntersectionObserver((entries) => {
    for (const { target: video, isIntersecting } of entries) {
      if (isIntersecting) {
        video.preload = "auto";
        video.src = video.source;
        video.muted = true;
        if (!still) video.play().catch(() => { /* the browser's own controls remain */ });
      } else if (video.hasAttribute("src")) {
        video.pause();
        video.removeAttribute("src");
        video.load();
      }
    }
  }, { rootMargin: "200px" });
  for (const video of all("video")) {
    video.source = video.getAttribute("src");
    video.poster ||= video.closest(".sample").querySelector(".frame img")?.src ?? "";
    video.removeAttribute("src");
    near.observe(video);
    if (still) continue;
    // Controls would cover a small picture all the time: they come with the pointer or the keyboard.
    video.controls = false;
    video.tabIndex = 0;
    for (const type of ["pointerenter", "focus"]) video.addEventListener(type, () => { video.controls = true; });
    video.addEventListener("pointerleave", () => { video.controls = document.activeElement === video; });
    video.addEventListener("blur", () => { video.controls = false; });
  }

  const zoom = one("zoom");
  document.addEventListener("click", (event) => {
    const picture = event.target.closest("img[data-zoom]");
    if (!picture) return;
    const large = zoom.querySelector("img");
    large.src = picture.src;
    large.alt = picture.alt;
    zoom.showModal();
  });
  zoom.addEventListener("click", () => zoom.close());
})();
