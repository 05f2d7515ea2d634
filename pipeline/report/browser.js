// Steps through the run: the key numbers and the completions of one step, each token shaded by its logprob. Of a step
// with many the first ones, until a button asks for the others; that holds for the steps that are shown then.
// Texts come from browser.py as plain parts and marks in turn. They become text nodes, never HTML: they are untrusted.
"use strict";

const {steps, batch, onset} = JSON.parse(document.getElementById("run-data").textContent);
const EDGES = [0.9, 0.5, 0.1, 0.01, 0.001];  // probabilities: a token below n of them has shade n, as in the legend
const FIRST = {prompts: 4, completions: 2};  // those that a run keeps of each step in any case
const more = document.getElementById("more");
let everything = false;
const slider = document.getElementById("step");
const completions = document.getElementById("completions");

function element(tag, className, ...children) {
  const node = document.createElement(tag);
  node.className = className;
  node.append(...children);  // strings become text nodes
  return node;
}

function text(parts) {
  return parts.map((part, place) => place % 2 ? element("span", "mark", part) : part);
}

function signed(number, digits) {
  return number.toFixed(digits).replace("-", "−");
}

function token(piece, logprob, place) {
  const probability = logprob === null ? null : Math.exp(logprob);
  const shade = probability === null ? "unknown" : "shade" + EDGES.filter(edge => probability < edge).length;
  const node = element("span", "token " + shade, ...text([].concat(piece)));
  node.title = `token ${place + 1}: logprob ` + (
    logprob === null ? "not finite" : `${signed(logprob, 3)}, probability ${(100 * probability).toPrecision(3)}%`
  );
  return node;
}

function completion({reward, advantage, pieces, logprobs, text: read}) {
  const tokens = pieces.map((piece, place) => token(piece, logprobs[place], place));
  const body = element("div", "text tokens", ...tokens);
  body.dir = "auto";
  const node = element("div", "completion", body);
  if (!tokens.length) body.append(element("span", "empty", "(no tokens)"));
  if (read) {
    const whole = element("div", "text", ...text(read));
    whole.dir = "auto";
    node.append(element("small", "", "as the reward reads it"), whole);
  }
  node.append(element("small", "", `reward ${reward}, advantage ${advantage}`), element("small", "picked-token"));
  return node;
}

function article({prompt, completions: all}) {
  const question = element("div", "text prompt", ...text(prompt));
  question.dir = "auto";
  return element("article", "pair", question, ...all.map(completion));
}

function firstOf(prompts) {
  return prompts.slice(0, FIRST.prompts).map(
    ({prompt, completions: all}) => ({prompt, completions: all.slice(0, FIRST.completions)})
  );
}

function count(prompts) {
  return prompts.reduce((number, {completions: all}) => number + all.length, 0);
}

function show(place) {
  const {step, numbers, prompts} = steps[place];
  slider.value = place;
  slider.setAttribute("aria-valuetext", `step ${step}`);
  document.getElementById("at").textContent = step;
  document.getElementById("numbers-step").textContent = `step ${step}`;
  document.querySelectorAll("#numbers .now").forEach((cell, i) => { cell.textContent = numbers[i]; });
  document.getElementById("previous").disabled = place === 0;
  document.getElementById("next").disabled = place === steps.length - 1;
  const first = firstOf(prompts), chosen = everything ? prompts : first;
  const share = count(chosen) === batch ? "all" : count(chosen);
  document.getElementById("count").textContent = `${share} of the step’s ${batch} completions`;
  more.hidden = count(first) === count(prompts);
  more.textContent = `show ${count(everything ? first : prompts)}`;
  const none = element("p", "soft", "No completions of this step are shown.");
  completions.replaceChildren(...(prompts.length ? chosen.map(article) : [none]));
}

// A title needs a mouse: a tap on a token writes it below the completion.
function pick(event) {
  const chosen = event.target.closest(".token");
  if (!chosen) return;
  completions.querySelectorAll(".picked").forEach(node => node.classList.remove("picked"));
  completions.querySelectorAll(".picked-token").forEach(node => { node.textContent = ""; });
  chosen.classList.add("picked");
  chosen.closest(".completion").querySelector(".picked-token").textContent = chosen.title;
}

// Links such as #step-9, in the verdict or in the page's address.
function follow(hash) {
  const named = /^#step-(\d+)$/.exec(hash);
  const place = named ? steps.findIndex(({step}) => step === Number(named[1])) : -1;
  if (place < 0) return false;
  show(place);
  document.getElementById("samples").scrollIntoView();
  return true;
}

slider.addEventListener("input", () => show(Number(slider.value)));
document.getElementById("previous").addEventListener("click", () => show(Number(slider.value) - 1));
document.getElementById("next").addEventListener("click", () => show(Number(slider.value) + 1));
document.getElementById("to-onset")?.addEventListener("click", () => show(onset));
more.addEventListener("click", () => {
  everything = !everything;
  show(Number(slider.value));
});
completions.addEventListener("click", pick);
document.querySelectorAll("a[href^='#step-']").forEach(link => {
  link.addEventListener("click", event => { if (follow(link.hash)) event.preventDefault(); });
});
document.getElementById("static-samples").hidden = true;
document.getElementById("browser").hidden = false;
if (!follow(location.hash)) show(onset ?? 0);
