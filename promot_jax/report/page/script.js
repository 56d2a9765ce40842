"use strict";
// Text of the page is only ever read and shown or hidden; nothing is built from it.
(() => {
  const root = document.documentElement;
  const remember = (key, value) => { try { sessionStorage.setItem(key, value); } catch { /* no storage */ } };
  const recall = (key) => { try { return sessionStorage.getItem(key); } catch { return null; } };

  // ---- theme: the system's until somebody chooses
  const button = document.getElementById("theme");
  const dark = () => root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  if (["light", "dark"].includes(recall("theme"))) root.dataset.theme = recall("theme");
  button.hidden = false;
  button.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    remember("theme", root.dataset.theme);
  });

  // ---- hover values: ours show at once, for touch too; the browser's own would show a second time
  const tip = document.getElementById("tip");
  for (const title of document.querySelectorAll(".point > title")) {
    title.parentNode.setAttribute("data-tip", title.textContent);
    title.remove();
  }
  const show = (event) => {
    const point = event.target.closest?.("[data-tip]");
    tip.hidden = !point;
    if (!point) return;
    tip.textContent = point.getAttribute("data-tip");
    const box = point.getBoundingClientRect();
    const left = box.left + box.width / 2 - tip.offsetWidth / 2;
    const above = box.top - tip.offsetHeight - 4;
    tip.style.left = `${Math.max(4, Math.min(left, root.clientWidth - tip.offsetWidth - 4))}px`;
    tip.style.top = `${above > 0 ? above : box.bottom + 4}px`;
  };
  document.addEventListener("pointerover", show);
  document.addEventListener("pointerdown", show);
  document.addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });

  // ---- legends: a line stands out while its entry is pointed at, or until it is clicked again
  for (const entry of document.querySelectorAll(".legend li")) {
    const figure = entry.closest("figure");
    const light = (style) => {
      figure.classList.toggle("dimmed", style !== undefined);
      for (const one of figure.querySelectorAll("[data-style]")) one.classList.toggle("lit", one.dataset.style === style);
    };
    entry.addEventListener("pointerenter", () => light(entry.dataset.style));
    entry.addEventListener("pointerleave", () => light(figure.dataset.kept));
    entry.addEventListener("click", () => {
      if (figure.dataset.kept === entry.dataset.style) delete figure.dataset.kept;
      else figure.dataset.kept = entry.dataset.style;
      light(figure.dataset.kept);
    });
  }

  // ---- tables: the hint stands where there is something to scroll to
  const measure = new ResizeObserver((entries) => {
    for (const { target } of entries) {
      target.classList.toggle("wide", target.scrollWidth > target.clientWidth);
      target.classList.toggle("fits", target.scrollWidth <= target.clientWidth);
    }
  });
  for (const box of document.querySelectorAll(".scroll")) measure.observe(box);

  // ---- browsers: a search over items that are all in the page
  document.querySelectorAll(".browser").forEach((browser, index) => {
    const form = browser.querySelector("form");
    const more = browser.querySelector(".more");
    const items = [...browser.querySelectorAll(".item")].map((node) => [node, node.textContent.toLowerCase()]);
    const page = 20;  // items shown at once, more on demand
    let limit = page;
    const apply = () => {
      const words = form.elements.search.value.toLowerCase().split(/\s+/);
      const choices = [...form.querySelectorAll("select")].filter((one) => one.value !== "*");
      const differ = form.elements.differ?.checked;
      let found = 0;
      for (const [node, text] of items) {
        const fits = words.every((word) => text.includes(word)) && (!differ || node.dataset.differ === "1")
          && choices.every((one) => node.getAttribute(`data-${one.name}`) === one.value);
        if (fits) found += 1;
        node.hidden = !fits || found > limit;
      }
      form.querySelector(".count").value = `${Math.min(found, limit)} of ${found} shown, ${items.length} in all`;
      more.hidden = found <= limit;
    };
    const fields = [...form.elements].filter((one) => one.name);
    fields.forEach((one) => {  // a page that is served while runs go on comes again as it was
      const key = `${location.pathname} ${index} ${one.name}`, kept = recall(key);  // pages on disk share one storage
      if (kept !== null && one.type === "checkbox") one.checked = kept === "true";
      else if (kept !== null && (one.tagName !== "SELECT" || [...one.options].some((o) => o.value === kept))) one.value = kept;
      one.addEventListener("input", () => {
        remember(key, one.type === "checkbox" ? one.checked : one.value);
        limit = page;
        apply();
      });
    });
    form.addEventListener("submit", (event) => event.preventDefault());
    more.addEventListener("click", () => { limit += page; apply(); });
    form.hidden = false;
    apply();
    let kept = limit;  // paper has no button for more
    addEventListener("beforeprint", () => {
      if (limit !== Infinity) kept = limit;
      limit = Infinity;
      apply();
    });
    addEventListener("afterprint", () => { limit = kept; apply(); });
  });

  // ---- print: what a click would open is open on paper
  const opened = [];
  addEventListener("beforeprint", () => {
    for (const one of document.querySelectorAll("details:not([open])")) {
      one.open = true;
      opened.push(one);
    }
  });
  addEventListener("afterprint", () => { for (const one of opened.splice(0)) one.open = false; });
})();
