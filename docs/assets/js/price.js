// The sliders of "what it costs": each change is priced by hw itself, in the worker of the live cells. Until then, and
// where there is no runtime, the panel shows what was computed when the page was built.
import { ask, runtime } from "./runtime.js";

class Panel {
  constructor(section) {
    this.slug = section.dataset.price;
    this.form = section.querySelector("form");
    this.at = section.querySelector(".price-at");
    this.result = section.querySelector(".price-result");
    this.status = section.querySelector("[role=status]");
    this.own = [this.at.textContent, this.result.innerHTML];
    this.form.hidden = false;
    this.form.addEventListener("input", () => this.change());
    this.form.addEventListener("submit", (event) => event.preventDefault());
    this.form.addEventListener("reset", () => setTimeout(() => this.reset())); // after the controls are back
    this.show();
  }

  // What the controls say: {slug, sizes: {axis: n}, dials: {kind: {field: n}}, look}; dials are told where moved.
  wants() {
    const sizes = {};
    for (const control of this.form.querySelectorAll("[data-size]")) sizes[control.dataset.size] = Number(control.value);
    const dials = {};
    for (const control of this.form.querySelectorAll("[data-field]")) {
      if (control.value === control.defaultValue) continue;
      (dials[control.closest("[data-of]").dataset.of] ??= {})[control.dataset.field] = Number(control.value);
    }
    return JSON.stringify({ slug: this.slug, sizes, dials, look: this.form.elements.look.value });
  }

  // The values beside the sliders, and the sliders of the device that is looked at.
  show() {
    for (const slider of this.form.querySelectorAll("[type=range]")) {
      const words = slider.dataset.words.split("|")[slider.value];
      slider.ariaValueText = slider.parentElement.querySelector("output").textContent = words;
    }
    for (const dials of this.form.querySelectorAll("[data-of]")) dials.hidden = dials.dataset.of !== this.form.elements.look.value;
  }

  // The same in words, for paper.
  says() {
    const told = (controls) => [...controls].map((control) => {
      const name = control.parentElement.querySelector("label").textContent;
      return `${name} ${control.dataset.words?.split("|")[control.value] ?? control.selectedOptions[0].textContent}`;
    });
    const moved = [...this.form.querySelectorAll("[data-field]")].filter((x) => x.value !== x.defaultValue);
    const devices = moved.map((x) => `${x.closest("[data-of]").querySelector("legend").textContent}: ${told([x])[0]}`);
    const rest = devices.length ? `; ${devices.join(", ")}` : ", on devices as they are sold";
    return `Shown for ${told(this.form.querySelectorAll("[data-size]")).join(", ")}${rest}.`;
  }

  change() {
    this.show();
    this.wanted = this.wants();
    if (!this.asking) this.send();
  }

  // One request at a time; what changed meanwhile is asked for when it is answered.
  send() {
    const what = this.wanted;
    this.asking = what;
    this.say("waiting for Python");
    ask({ kind: "price", what, programs: this.slug }, (data) => {
      if (data.status) this.say(`${data.status} …`);
      if (!data.done) return;
      this.asking = undefined;
      if (!this.wanted) return; // back to the start
      if (data.html !== undefined && data.ok) {
        this.result.innerHTML = data.html;
        this.at.textContent = this.says();
        this.say("");
      } else this.say(data.stopped ? "stopped; a slider that moves starts again" : `failed: ${data.text}`);
      if (this.wanted !== what) this.send();
    });
  }

  reset() {
    this.wanted = undefined;
    this.show();
    [this.at.textContent, this.result.innerHTML] = this.own;
    this.say("");
  }

  say(text) {
    this.status.textContent = text;
  }
}

async function attach() {
  const sections = document.querySelectorAll("[data-price]");
  if (sections.length && (await runtime())) for (const section of sections) new Panel(section);
}

if (typeof window.document$ !== "undefined") window.document$.subscribe(attach);
else attach();
