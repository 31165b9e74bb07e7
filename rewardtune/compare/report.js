// The page's only script: filter, search and sort; enlarge; vote blind. It writes text with textContent only.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const rows = [...document.querySelectorAll(".row")];

  // ---- filter, search, sort
  const entries = rows.map((row, order) => ({
    row,
    order,
    text: row.querySelector("h3").textContent.toLowerCase(),
    verdicts: row.dataset.verdicts.split(" "),
    margins: row.dataset.margins.split(" ").map(Number),
  }));
  const value = (id, otherwise) => (byId(id) ? byId(id).value : otherwise);
  let arranged = "prompt/0";

  function show() {
    const pair = Number(value("pair", 0));
    const wanted = value("filter", "all");
    const words = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const entry of entries) {
      const fits = (wanted === "all" || entry.verdicts[pair] === wanted) && words.every((w) => entry.text.includes(w));
      entry.row.hidden = !fits;
      count += fits;
      for (const badge of entry.row.querySelectorAll(".badge")) badge.hidden = Number(badge.dataset.pair) !== pair;
    }
    arrange(value("sort", "prompt"), pair);
    byId("shown").textContent = `${count} of ${entries.length}`;
    byId("none").hidden = count > 0;
  }

  function arrange(sort, pair) {
    if (arranged === `${sort}/${pair}`) return;
    arranged = `${sort}/${pair}`;
    const key = {
      prompt: (e) => e.order,
      best: (e) => -e.margins[pair],
      worst: (e) => e.margins[pair],
      close: (e) => Math.abs(e.margins[pair]),
    }[sort];
    const sorted = [...entries].sort((a, b) => key(a) - key(b) || a.order - b.order);
    byId("rows").append(...sorted.map((entry) => entry.row));
  }

  byId("tools").hidden = false;
  byId("tools").addEventListener("submit", (event) => event.preventDefault());
  byId("tools").addEventListener("input", show);
  show();

  // ---- enlarge
  byId("rows").addEventListener("click", (event) => {
    const button = event.target.closest(".zoom");
    if (!button) return;
    const image = button.querySelector("img");
    byId("enlarged-image").src = image.src;
    byId("enlarged-image").alt = image.alt;
    byId("enlarged-image").className = image.className;
    byId("enlarged-text").textContent = image.alt;
    byId("enlarged").showModal();
  });
  byId("enlarged").addEventListener("click", (event) => {
    if (event.target === byId("enlarged")) byId("enlarged").close();
  });

  // ---- blind vote
  // A session key shuffles the order of the pairs and which side stands left; it is drawn once and kept with the votes.
  const store = `rewardtune-votes-${data.report}`;
  const fresh = () => ({
    session: [...crypto.getRandomValues(new Uint8Array(8))].map((b) => b.toString(16).padStart(2, "0")).join(""),
    rater: "",
    votes: [],
  });
  let state = fresh();
  try {
    const kept = JSON.parse(localStorage.getItem(store));
    if (kept && Array.isArray(kept.votes) && typeof kept.session === "string") state = kept;
  } catch { /* no storage for local files in this browser: votes last as long as the page */ }
  const keep = () => {
    try { localStorage.setItem(store, JSON.stringify(state)); } catch { /* as above */ }
  };

  function hash(text) {
    let h = 2166136261;
    for (let i = 0; i < text.length; i++) h = Math.imul(h ^ text.charCodeAt(i), 16777619);
    h = Math.imul(h ^ (h >>> 16), 2246822507);
    h = Math.imul(h ^ (h >>> 13), 3266489909);
    return (h ^ (h >>> 16)) >>> 0;
  }

  // Seed by seed, prompts in a shuffled order: whoever stops early has judged a random part of all prompts.
  function queue(pair) {
    return rows
      .map((row) => ({ row, prompt: Number(row.dataset.prompt), seed: Number(row.dataset.seed) }))
      .sort((x, y) => x.seed - y.seed
        || hash(`${state.session}/${x.seed}/${x.prompt}`) - hash(`${state.session}/${y.seed}/${y.prompt}`))
      .map((item) => {
        const swapped = hash(`${state.session}/left/${item.seed}/${item.prompt}`) & 1;
        const [left, right] = swapped ? [pair[1], pair[0]] : pair;
        return { ...item, left, right };
      });
  }

  let items = [];
  let current = null;
  let shownAt = 0;
  const same = (vote, item) => vote.prompt === item.prompt && vote.seed === item.seed
    && [vote.left, vote.right].sort().join("\n") === [item.left, item.right].sort().join("\n");

  function place(image, row, side) {
    const source = row.querySelector(`figure[data-side="${data.sides.indexOf(side)}"] img`);
    image.src = source.src;
    image.width = source.width || 64;
    image.className = source.className;
  }

  function next() {
    const open = items.filter((item) => !state.votes.some((vote) => same(vote, item)));
    current = open[0] || null;
    byId("vote-progress").textContent = `${items.length - open.length} of ${items.length} judged`;
    byId("vote-run").hidden = !current;
    byId("vote-end").hidden = Boolean(current);
    byId("vote-save").disabled = state.votes.length === 0;
    byId("vote-undo").disabled = state.votes.length === 0;
    if (!current) return;
    byId("vote-prompt").textContent = current.row.querySelector("h3").textContent;
    place(byId("vote-left"), current.row, current.left);
    place(byId("vote-right"), current.row, current.right);
    shownAt = Date.now();
  }

  function vote(choice) {
    if (!current) return;
    const seconds = Math.round((Date.now() - shownAt) / 100) / 10;
    state.votes.push({ prompt: current.prompt, seed: current.seed, left: current.left, right: current.right, choice, seconds });
    keep();
    next();
  }

  function undo() {
    state.votes.pop();
    keep();
    next();
  }

  function begin() {
    state.rater = byId("vote-rater").value.trim();
    keep();
    items = queue(data.pairs[Number(value("vote-pair", 0))]);
    byId("vote-start").hidden = true;
    next();
  }

  function save() {
    const file = { kind: "rewardtune-votes", version: 1, report: data.report, rater: state.rater || "anonymous",
      session: state.session, saved: new Date().toISOString(), votes: state.votes };
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([JSON.stringify(file, null, 1)], { type: "application/json" }));
    link.download = `votes-${state.session}.json`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }

  byId("vote-rater").value = state.rater;
  byId("vote-save").disabled = state.votes.length === 0;
  byId("vote-begin").addEventListener("click", begin);
  byId("vote-undo").addEventListener("click", undo);
  byId("vote-save").addEventListener("click", save);
  for (const button of document.querySelectorAll("[data-choice]")) {
    button.addEventListener("click", () => vote(button.dataset.choice));
  }
  document.addEventListener("keydown", (event) => {
    if (location.hash !== "#vote" || byId("vote-run").hidden || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.closest("input, select")) return;
    const choice = { ArrowLeft: "left", ArrowRight: "right", t: "tie", b: "both-bad" }[event.key];
    if (choice) { event.preventDefault(); vote(choice); }
    if (event.key === "u") undo();
  });
})();
