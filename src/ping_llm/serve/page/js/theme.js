// The choice of colours in, the page in these colours out; before anything is drawn, so it is no module.
"use strict";

const THEMES = ["auto", "light", "dark"];
const SAID = { auto: "as the system", light: "light", dark: "dark" };
let theme = THEMES.includes(localStorage.getItem("theme")) ? localStorage.getItem("theme") : "auto";

function applyTheme() {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  const button = document.getElementById("theme");
  if (!button) return;
  button.textContent = { auto: "◐", light: "○", dark: "●" }[theme];
  button.setAttribute("aria-label", `Colours: ${SAID[theme]}`);
  button.title = `Colours: ${SAID[theme]}`;
  dispatchEvent(new Event("themechange"));
}

applyTheme();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => dispatchEvent(new Event("themechange")));
addEventListener("DOMContentLoaded", () => {
  applyTheme();
  document.getElementById("theme").addEventListener("click", () => {
    theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
    localStorage.setItem("theme", theme);
    applyTheme();
  });
});
