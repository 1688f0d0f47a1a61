// Keys for scores and for leafing; the page works without them.
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || event.target.matches("textarea")) return;
  const score = /^[0-9]$/.test(event.key) && document.querySelector(`button[value="${event.key === "0" ? 10 : event.key}"]`);
  const link = { ArrowLeft: "previous", ArrowRight: "next" }[event.key];
  if (score) score.click();
  else if (link) document.getElementById(link)?.click();
});
// One score is one request: a second click while the page loads would score the text that comes next.
const form = document.querySelector("form");
form?.addEventListener("submit", (event) => {
  if (form.dataset.sent) event.preventDefault();
  form.dataset.sent = "yes";
});
addEventListener("pageshow", () => delete form?.dataset.sent);
