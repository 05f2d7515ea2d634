// Steps through the run: the key numbers and the kept completions of one step, each token shaded by its logprob.
// Texts come from browser.py as plain parts and marks in turn. They become text nodes, never HTML: they are untrusted.
"use strict";

const {steps, onset} = JSON.parse(document.getElementById("run-data").textContent);
const EDGES = [0.9, 0.5, 0.1, 0.01, 0.001];  // probabilities: a token below n of them has shade n, as in the legend
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

function show(place) {
  const {step, numbers, prompts} = steps[place];
  slider.value = place;
  slider.setAttribute("aria-valuetext", `step ${step}`);
  document.getElementById("at").textContent = step;
  document.getElementById("numbers-step").textContent = `step ${step}`;
  document.querySelectorAll("#numbers .now").forEach((cell, i) => { cell.textContent = numbers[i]; });
  document.getElementById("previous").disabled = place === 0;
  document.getElementById("next").disabled = place === steps.length - 1;
  const none = element("p", "soft", "No completions of this step were kept.");
  completions.replaceChildren(...(prompts.length ? prompts.map(article) : [none]));
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
completions.addEventListener("click", pick);
document.querySelectorAll("a[href^='#step-']").forEach(link => {
  link.addEventListener("click", event => { if (follow(link.hash)) event.preventDefault(); });
});
document.getElementById("static-samples").hidden = true;
document.getElementById("browser").hidden = false;
if (!follow(location.hash)) show(onset ?? 0);
