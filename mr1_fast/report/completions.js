"use strict";
// Data enters the page through textContent alone: completions may hold markup.
(() => {
  const PAGE = 50;
  const byId = (id) => document.getElementById(id);
  const rows = [];
  for (const group of JSON.parse(byId("data").textContent))
    for (const completion of group.completions) {
      const searched = [group.problem, group.solution, completion.text, completion.why];
      rows.push({ group, ...completion, searched: searched.join("\n").toLowerCase() });
    }

  function element(name, kind, content, ...children) {
    const made = document.createElement(name);
    if (kind) made.className = kind;
    if (content) made.textContent = content;
    made.append(...children);
    return made;
  }

  // A completion that has not been judged is neither.
  const verdictOf = ({ parts: { accuracy } }) =>
    accuracy == null ? "" : accuracy > 0 ? "right" : "wrong";
  const number = (value) => (value === null ? "none" : String(+value.toFixed(3)));

  function card(row) {
    const rewards = Object.entries(row.parts).map(([name, value]) => `${name} ${number(value)}`);
    const about = [`Step ${row.group.step}`, `reward ${number(row.reward)}`, ...rewards];
    if (row.reason) about.push(`ended by ${row.reason}`);
    const head = element("p", "soft", about.join(" · ") + " ");
    const kind = verdictOf(row);
    if (kind) {
      const sign = kind === "right" ? "✓" : "✗";
      head.append(element("b", `mark ${kind}`, `${sign} ${kind}`), row.why ? ` ${row.why}` : "");
    }
    const output = element("div", "output", row.text);
    if (!row.text) output.append(element("span", "soft", "(empty)"));
    const answer = element("p", "soft", "Right answer: ", element("b", "", row.group.solution));
    const problem = element("p", "question", row.group.problem);
    return element("article", "card", "", head, problem, answer, output);
  }

  // An empty field, or one that holds no number, sets no limit.
  function limit(id, otherwise) {
    const written = byId(id).value.trim();
    const value = Number(written);
    return written === "" || Number.isNaN(value) ? otherwise : value;
  }

  function matching() {
    const words = byId("search").value.toLowerCase();
    const [from, to] = [limit("from", -Infinity), limit("to", Infinity)];
    const [low, high] = [limit("low", -Infinity), limit("high", Infinity)];
    const [verdict, ended] = [byId("verdict").value, byId("ended").value];
    const found = rows.filter(
      (row) =>
        row.group.step >= from && row.group.step <= to &&
        row.reward >= low && row.reward <= high &&
        (!verdict || verdictOf(row) === verdict) &&
        (!ended || row.reason === ended) &&
        row.searched.includes(words)
    );
    // Sorting keeps the order of equal rewards.
    const order = byId("order").value;
    if (order === "newest") found.reverse();
    if (order === "best") found.sort((a, b) => b.reward - a.reward);
    if (order === "worst") found.sort((a, b) => a.reward - b.reward);
    return found;
  }

  let found = [];
  let shown = 0;

  function more() {
    byId("list").append(...found.slice(shown, shown + PAGE).map(card));
    shown = Math.min(shown + PAGE, found.length);
    byId("more").hidden = shown === found.length;
    byId("more").textContent = `Show ${Math.min(PAGE, found.length - shown)} more`;
    const [few, many] = [shown, found.length].map((count) => count.toLocaleString("en"));
    byId("count").textContent = found.length
      ? `${many} found, ${few} of them below.`
      : "None found: clear a filter.";
  }

  function renew() {
    found = matching();
    shown = 0;
    byId("list").replaceChildren();
    more();
  }

  byId("filters").hidden = false;
  byId("filters").addEventListener("input", renew);
  byId("more").addEventListener("click", more);
  renew();
})();
