// What it costs, by hw itself in the worker of the live cells: the sliders of a chapter, and a program of the reader's
// own. Until then, and where there is no runtime, the page shows what was computed when it was built.
import { ask, end, runtime } from "./runtime.js";

class Prices {
  constructor(section) {
    this.form = section.querySelector("form");
    this.at = section.querySelector(".price-at");
    this.result = section.querySelector(".price-result");
    this.status = section.querySelector("[role=status]");
    this.own = [this.at.textContent, this.result.innerHTML];
    this.form.hidden = false;
    this.form.addEventListener("submit", (event) => event.preventDefault());
    this.form.addEventListener("reset", () => setTimeout(() => this.reset())); // after the controls are back
  }

  // One request at a time; what is wanted meanwhile is asked for when it is answered.
  price() {
    this.wanted = JSON.stringify(this.wants());
    if (!this.asking) this.send();
  }

  send() {
    const [what, says] = [this.wanted, this.says()];
    this.asking = true;
    this.say("waiting for Python");
    ask({ kind: "price", what, programs: this.programs }, (data) => {
      if (data.status) this.say(`${data.status} …`);
      if (!data.done) return;
      this.asking = false;
      if (!this.wanted) return; // back to the start
      if (data.ok) {
        this.result.innerHTML = data.html;
        this.at.textContent = says;
        this.say("");
      } else this.say(data.stopped ? "stopped" : `failed: ${data.text}`);
      if (this.wanted !== what) this.send();
    });
  }

  reset() {
    this.wanted = undefined;
    [this.at.textContent, this.result.innerHTML] = this.own;
    this.say("");
  }

  say(text) {
    this.status.textContent = text;
  }
}

// {slug, sizes: {axis: n}, dials: {kind: {field: n}}, look}; dials are told where they moved.
class Sliders extends Prices {
  constructor(section) {
    super(section);
    this.programs = section.dataset.price;
    this.form.addEventListener("input", () => {
      this.show();
      this.price();
    });
    this.show();
  }

  get sizes() {
    return [...this.form.querySelectorAll("[data-size]")];
  }

  get moved() {
    return [...this.form.querySelectorAll("[data-field]")].filter((dial) => dial.value !== dial.defaultValue);
  }

  get look() {
    return this.form.elements.look.value;
  }

  wants() {
    const sizes = Object.fromEntries(this.sizes.map((control) => [control.dataset.size, Number(control.value)]));
    const dials = {};
    for (const dial of this.moved) (dials[dial.closest("[data-of]").dataset.of] ??= {})[dial.dataset.field] = Number(dial.value);
    return { slug: this.programs, sizes, dials, look: this.look };
  }

  // The values beside the sliders, and the sliders of the device that is looked at.
  show() {
    for (const slider of this.form.querySelectorAll("[type=range]")) {
      const words = slider.dataset.words.split("|")[slider.value];
      slider.ariaValueText = slider.parentElement.querySelector("output").textContent = words;
    }
    for (const dials of this.form.querySelectorAll("[data-of]")) dials.hidden = dials.dataset.of !== this.look;
  }

  // The same in words, for paper.
  says() {
    const told = (control) => {
      const value = control.dataset.words?.split("|")[control.value] ?? control.selectedOptions[0].textContent;
      return `${control.parentElement.querySelector("label").textContent} ${value}`;
    };
    const devices = this.moved.map((dial) => `${dial.closest("[data-of]").querySelector("legend").textContent}: ${told(dial)}`);
    return `Shown for ${this.sizes.map(told).join(", ")}${devices.length ? `; ${devices.join(", ")}` : ", on devices as they are sold"}.`;
  }

  reset() {
    super.reset();
    this.show();
  }
}

// {own: text, device, fields}
class Own extends Prices {
  constructor(section) {
    super(section);
    const { own, preset } = this.form.elements;
    preset.addEventListener("input", () => (own.value = preset.value));
    this.form.elements.stop.addEventListener("click", () => end());
    this.form.addEventListener("submit", () => this.price());
    this.form.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.form.requestSubmit();
    });
  }

  say(text) {
    super.say(text);
    this.form.elements.stop.hidden = !this.asking; // the reader's code may not end
  }

  wants() {
    const { own, device, fields } = this.form.elements;
    return { own: own.value, device: device.value, fields: fields.value };
  }

  says() {
    const { device, fields } = this.form.elements;
    return `Shown for the program above on ${device.value}${fields.value.trim() ? " with the fields above" : ""}.`;
  }
}

async function attach() {
  const sections = document.querySelectorAll("[data-price]");
  if (!sections.length || !(await runtime())) return;
  for (const section of sections) new (section.dataset.price ? Sliders : Own)(section);
}

if (typeof window.document$ !== "undefined") window.document$.subscribe(attach);
else attach();
