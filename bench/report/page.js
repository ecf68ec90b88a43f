"use strict";
(() => {
  const root = document.documentElement;
  root.classList.add("js");

  // theme: what the system says, until the reader chooses
  const button = document.querySelector(".theme");
  const order = ["", "light", "dark"];
  const words = { "": "theme: system", light: "theme: light", dark: "theme: dark" };
  button.hidden = false;
  button.textContent = words[""];
  button.addEventListener("click", () => {
    const next = order[(order.indexOf(root.dataset.theme || "") + 1) % order.length];
    if (next) root.dataset.theme = next;
    else delete root.dataset.theme;
    button.textContent = words[next];
  });

  // tabs: without this script all items of a panel are shown
  for (const panel of document.querySelectorAll(".panel")) {
    const items = [...panel.querySelectorAll(":scope > .item")];
    if (items.length < 2) continue;
    const list = document.createElement("div");
    list.className = "tabs";
    list.setAttribute("role", "tablist");
    const tabs = items.map((item) => {
      const tab = document.createElement("button");
      tab.type = "button";
      tab.textContent = item.dataset.tab;
      tab.setAttribute("role", "tab");
      tab.setAttribute("aria-controls", item.id);
      item.setAttribute("role", "tabpanel");
      list.append(tab);
      return tab;
    });
    const choose = (chosen) => {
      items.forEach((item, index) => {
        item.hidden = index !== chosen;
        tabs[index].setAttribute("aria-selected", String(index === chosen));
        tabs[index].tabIndex = index === chosen ? 0 : -1;
      });
    };
    tabs.forEach((tab, index) => tab.addEventListener("click", () => choose(index)));
    list.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const next = (tabs.indexOf(document.activeElement) + step + tabs.length) % tabs.length;
      choose(next);
      tabs[next].focus();
    });
    panel.prepend(list);
    choose(0);
  }

  // what a mark means, beside the pointer
  const tip = document.createElement("div");
  tip.id = "tip";
  tip.hidden = true;
  document.body.append(tip);
  const show = (event) => {
    const mark = event.target.closest ? event.target.closest("[data-tip]") : null;
    tip.hidden = !mark;
    if (!mark) return;
    tip.textContent = mark.dataset.tip;
    const box = tip.getBoundingClientRect();
    const left = Math.min(event.clientX + 14, innerWidth - box.width - 8);
    const above = event.clientY - box.height - 12;
    tip.style.left = `${Math.max(8, left)}px`;
    tip.style.top = `${above > 4 ? above : event.clientY + 16}px`;
  };
  document.addEventListener("pointermove", show);
  document.addEventListener("pointerdown", show);
  document.addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });
})();
