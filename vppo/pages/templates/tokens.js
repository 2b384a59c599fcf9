"use strict";
// Lists of tokens: one stop of the tab key each, arrow keys within, and a tooltip that follows pointer and focus.
const tip = document.getElementById("tip");
let shown = null;

function show(token, fill) {
  hide();
  shown = token;
  fill(tip, token);
  tip.hidden = false;
  token.setAttribute("aria-describedby", "tip");
  place();
}

function place() {
  if (!shown) return;
  const box = shown.getClientRects()[0], room = document.documentElement.clientWidth - tip.offsetWidth - 4;
  const above = box.top - tip.offsetHeight - 6;
  tip.style.left = Math.max(4, Math.min(box.left + (box.width - tip.offsetWidth) / 2, room)) + "px";
  tip.style.top = (above < 4 ? box.bottom + 6 : above) + "px";
}

function hide() {
  tip.hidden = true;
  shown?.removeAttribute("aria-describedby");
  shown = null;
}

const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -Infinity, End: Infinity };

// The element of a list that a key moves to, or null: with its tabindex, so that the tab key comes back to it.
function moved(event, list) {
  const from = event.target.parentElement === list ? event.target : null;
  if (!from || !(event.key in steps)) return null;
  event.preventDefault();
  const at = [...list.children].indexOf(from) + steps[event.key];
  const next = list.children[Math.max(0, Math.min(list.children.length - 1, at))];
  from.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
  return next;
}

// fill(tip, token) writes what the tooltip says about a token.
function tokenList(list, fill) {
  list.addEventListener("keydown", (event) => moved(event, list));
  for (const name of ["focusin", "pointerover"]) {
    list.addEventListener(name, (event) => {
      if (event.target.parentElement === list) show(event.target, fill);
    });
  }
  for (const name of ["focusout", "pointerleave"]) list.addEventListener(name, hide);
}
document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
// moving the focus can scroll, so the number follows its token
document.addEventListener("scroll", place, { passive: true, capture: true });
window.addEventListener("resize", place);
