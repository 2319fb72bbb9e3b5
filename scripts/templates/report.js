const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];

// Light or dark: the system's choice until the button is pressed.
const theme = document.getElementById("theme");
theme.addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.style.colorScheme
    ? root.style.colorScheme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  root.style.colorScheme = dark ? "light" : "dark";
});

// Tables: a click on a heading sorts by it, a second click turns the order round.
for (const heading of $$("th[data-sort]")) {
  heading.tabIndex = 0;
  const sort = () => {
    const body = heading.closest("table").tBodies[0];
    const column = heading.cellIndex;
    const down = heading.getAttribute("aria-sort") === "ascending";
    $$("th", heading.parentNode).forEach((other) => other.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
    const numeric = heading.dataset.sort === "number";
    const order = (a, b) => (numeric ? parseFloat(key(a)) - parseFloat(key(b)) : key(a).localeCompare(key(b)));
    body.append(...[...body.rows].sort((a, b) => (down ? -order(a, b) : order(a, b))));
  };
  heading.addEventListener("click", sort);
  heading.addEventListener("keydown", (event) => event.key === "Enter" && sort());
}

// Filters: words in the search field, and at most one pressed button; all of them must match.
for (const tools of $$(".tools")) {
  const items = $$(tools.dataset.items);
  const field = tools.querySelector("input");
  const buttons = $$("button", tools);
  const count = tools.querySelector("output");
  const apply = () => {
    const pressed = buttons.find((button) => button.getAttribute("aria-pressed") === "true");
    const words = [...field.value.toLowerCase().split(/\s+/), pressed?.dataset.word ?? ""];
    let shown = 0;
    for (const item of items) {
      const text = (item.dataset.words ??= item.textContent.toLowerCase());
      item.hidden = !words.every((word) => text.includes(word));
      shown += !item.hidden;
    }
    count.textContent = shown === items.length ? "" : `${shown} of ${items.length}`;
  };
  field.addEventListener("input", apply);
  for (const button of buttons) {
    button.addEventListener("click", () => {
      const press = button.getAttribute("aria-pressed") !== "true";
      buttons.forEach((other) => other.setAttribute("aria-pressed", "false"));
      button.setAttribute("aria-pressed", String(press));
      apply();
    });
  }
}
