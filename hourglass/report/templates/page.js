// Shows the images, changes and rows of the class and the kind that are chosen; the address keeps the choice.
const chosen = { class: document.getElementById("class"), kind: document.getElementById("kind") };
function show() {
  const of = chosen.class.value, kind = chosen.kind.value, cards = [...document.querySelectorAll(".card")];
  for (const card of cards) {
    const changes = [...card.querySelectorAll(".change")];
    for (const change of changes) {
      const classes = JSON.parse(change.dataset.classes);
      change.hidden = (of && !classes.includes(of)) || (kind && change.dataset.kind !== kind);
    }
    const left = changes.filter((change) => !change.hidden).length;
    card.hidden = !left;
    const among = left < changes.length ? ` of ${changes.length}` : "";
    card.querySelector("summary").textContent = `${left}${among} change${changes.length > 1 ? "s" : ""}`;
  }
  for (const row of document.querySelectorAll("tr[data-class]")) row.hidden = of && row.dataset.class !== of;
  const left = cards.filter((card) => !card.hidden).length;
  document.getElementById("shown").textContent = `${left} of ${cards.length} images`;
  const kept = new URLSearchParams(Object.entries(chosen).map(([key, choice]) => [key, choice.value]));
  history.replaceState(null, "", of || kind ? `#${kept}` : location.pathname);
}
if (chosen.class) {
  const asked = new URLSearchParams(location.hash.slice(1));
  for (const [key, choice] of Object.entries(chosen)) {
    if ([...choice.options].some((option) => option.value === asked.get(key))) choice.value = asked.get(key);
    choice.addEventListener("change", show);
  }
  show();
}
