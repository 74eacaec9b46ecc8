"use strict";

(() => {
  const $ = (id) => document.getElementById(id);

  const make = (tag, className, text) => {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  };

  // Light and dark: as the system says, until the button is used

  const theme = () => {
    const button = $("theme");
    const system = window.matchMedia("(prefers-color-scheme: dark)");
    const isDark = () => (document.documentElement.dataset.theme || (system.matches ? "dark" : "light")) === "dark";
    const label = () => {
      button.textContent = isDark() ? "Light" : "Dark";
      button.setAttribute("aria-label", isDark() ? "Change to light colours" : "Change to dark colours");
    };
    // Pages without storage, as some browsers make of files, keep the choice as long as they are open
    const store = (action) => {
      try {
        return action(window.localStorage);
      } catch {
        return null;
      }
    };
    const saved = store((storage) => storage.getItem("trl-kd-theme"));
    if (saved === "light" || saved === "dark") document.documentElement.dataset.theme = saved;
    button.hidden = false;
    label();
    system.addEventListener("change", label);
    button.addEventListener("click", () => {
      document.documentElement.dataset.theme = isDark() ? "light" : "dark";
      store((storage) => storage.setItem("trl-kd-theme", document.documentElement.dataset.theme));
      label();
    });
  };

  // On paper nothing can be opened

  const printing = () => {
    let closed = [];
    window.addEventListener("beforeprint", () => {
      closed = [...document.querySelectorAll("details:not([open])")];
      closed.forEach((element) => { element.open = true; });
    });
    window.addEventListener("afterprint", () => {
      closed.forEach((element) => { element.open = false; });
    });
  };

  // Tokens coloured by their distance to the teacher's distribution

  const BOUNDS = [0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8];
  const level = (value) => BOUNDS.filter((bound) => value >= bound).length;
  const percent = (value) => value.toFixed(2);

  const drawScale = () => {
    const names = [`< ${percent(BOUNDS[0])}`, ...BOUNDS.map((bound) => `≥ ${percent(bound)}`)];
    names.forEach((name, index) => $("steps").append(make("li", `h${index}`, name)));
  };

  const tokenSpans = (response) => {
    const spans = [];
    let rest = response.text;
    response.tokens.forEach((token, index) => {
      const value = response.divergence[index];
      const span = make("span", "token", token);
      span.dataset.index = index;
      // Pieces beyond the text: the end of the sequence, and the like
      if (token && rest.startsWith(token)) rest = rest.slice(token.length);
      else span.classList.add("special");
      if (token.startsWith("\n")) span.classList.add("break");
      if (value !== null) {
        span.classList.add(`h${level(value)}`);
        span.title = `total variation ${percent(value)}`;
      }
      spans.push(span);
    });
    return spans;
  };

  const readable = (token) => token.replace(/\n/g, "↵").replace(/\t/g, "⇥");

  const colouredText = (response, name) => {
    const box = make("div", "text coloured");
    const readout = make("p", "readout");
    const spans = tokenSpans(response);
    let current = null;
    const select = (span) => {
      if (current) current.classList.remove("current");
      current = span;
      span.classList.add("current");
      const index = Number(span.dataset.index);
      const value = response.divergence[index];
      const number = value === null ? "none" : percent(value);
      readout.textContent = `“${readable(response.tokens[index])}” total variation ${number}`;
    };
    box.append(...spans);
    box.dir = "auto";
    box.tabIndex = 0;
    box.setAttribute("role", "group");
    box.setAttribute("aria-label", `Response of ${name}`);
    readout.setAttribute("aria-live", "polite");
    for (const kind of ["pointerover", "click"]) {
      box.addEventListener(kind, (event) => {
        if (event.target.classList.contains("token")) select(event.target);
      });
    }
    box.addEventListener("keydown", (event) => {
      const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!move || !spans.length) return;
      event.preventDefault();
      const place = current ? spans.indexOf(current) + move : 0;
      select(spans[Math.min(Math.max(place, 0), spans.length - 1)]);
    });
    return [box, readout];
  };

  const plainText = (text, className) => {
    const box = make("div", className, text);
    box.dir = "auto";
    return box;
  };

  const answer = (model, response) => {
    const card = make("section", `answer k-${model.style}`);
    const head = make("h3");
    head.append(make("bdi", "", model.name));
    if (model.role && model.role !== model.name) head.append(" ", make("span", "role", model.role));
    card.append(head);
    if (!response) {
      card.append(make("p", "note", "No response to this prompt."));
      return card;
    }
    if (response.tokens) card.append(...colouredText(response, model.name));
    else if (response.text) card.append(plainText(response.text, "text"));
    if (!response.text) card.append(make("p", "note", "The response is empty."));
    const list = make("dl", "metrics");
    const metrics = [...response.metrics, ["ended", response.ended ? "by itself" : "cut at the limit"]];
    metrics.forEach(([title, value]) => {
      const pair = make("div");
      pair.append(make("dt", "", title), make("dd", "", value));
      list.append(pair);
    });
    card.append(list);
    return card;
  };

  const viewer = (data) => {
    const state = { matches: [], place: 0, visible: data.models.map(() => true) };
    const texts = data.prompts.map((prompt) =>
      [prompt.prompt, ...prompt.references, ...prompt.responses.map((response) => (response ? response.text : ""))]
        .join("\n")
        .toLowerCase(),
    );
    const hasDivergence = data.prompts.some((prompt) => prompt.divergence !== null);
    const hasTokens = data.prompts.some((prompt) => prompt.responses.some((response) => response && response.tokens));

    const title = (prompt) => {
      const start = prompt.prompt.trim().replace(/\s+/g, " ");
      const divergence = prompt.divergence === null ? "" : ` · ${percent(prompt.divergence)}`;
      return `${prompt.index + 1}${divergence} · ${start.length > 60 ? `${start.slice(0, 59)}…` : start}`;
    };

    const references = (prompt) => {
      if (!prompt.references.length) return [];
      const details = make("details");
      details.open = true;
      const words = prompt.references.length > 1 ? `References (${prompt.references.length})` : "Reference";
      details.append(make("summary", "", words));
      prompt.references.forEach((text) => details.append(plainText(text, "text reference")));
      return [details];
    };

    const show = () => {
      const count = state.matches.length;
      const all = data.prompts.length;
      $("shown").hidden = count === 0;
      $("nothing").hidden = count > 0;
      $("previous").disabled = state.place <= 0;
      $("next").disabled = state.place >= count - 1;
      $("pick").disabled = count === 0;
      const which = count ? `${state.place + 1} of ${count}` : "none";
      $("matches").textContent = count === all ? `${which} prompts` : `${which} that match, of ${all} prompts`;
      if (!count) return;
      $("pick").selectedIndex = state.place;
      const prompt = data.prompts[state.matches[state.place]];
      $("prompt-title").textContent = `Prompt ${prompt.index + 1}`;
      $("prompt").textContent = prompt.prompt;
      $("references").replaceChildren(...references(prompt));
      const answers = data.models.map((model, index) => [model, prompt.responses[index], state.visible[index]]);
      $("answers").replaceChildren(
        ...answers.filter(([, , visible]) => visible).map(([model, response]) => answer(model, response)),
      );
    };

    const choose = () => {
      const words = $("filter").value.trim().toLowerCase();
      const kept = state.matches[state.place];
      const found = data.prompts.map((_, index) => index).filter((index) => texts[index].includes(words));
      if ($("order").value === "divergence" && hasDivergence) {
        const size = (index) => data.prompts[index].divergence ?? -1;
        found.sort((left, right) => size(right) - size(left) || left - right);
      }
      state.matches = found;
      state.place = Math.max(0, found.indexOf(kept));
      $("pick").replaceChildren(
        ...found.map((index) => make("option", "", title(data.prompts[index]))),
      );
      show();
    };

    const move = (step) => {
      state.place = Math.min(Math.max(state.place + step, 0), state.matches.length - 1);
      show();
    };

    const columns = () => {
      data.models.forEach((model, index) => {
        const label = make("label", "check");
        const box = make("input");
        box.type = "checkbox";
        box.checked = true;
        box.addEventListener("change", () => {
          state.visible[index] = box.checked;
          show();
        });
        label.append(box, make("bdi", "", model.name));
        $("columns").append(label);
      });
    };

    if (!hasDivergence) $("order").querySelector("[value=divergence]").remove();
    $("heat-control").hidden = !hasTokens;
    $("scale").hidden = !hasTokens;
    drawScale();
    columns();
    $("previous").addEventListener("click", () => move(-1));
    $("next").addEventListener("click", () => move(1));
    $("filter").addEventListener("input", choose);
    $("order").addEventListener("change", () => {
      state.place = 0;
      state.matches = [];
      choose();
    });
    $("pick").addEventListener("change", () => move($("pick").selectedIndex - state.place));
    $("heat").addEventListener("change", () => {
      $("viewer").classList.toggle("plain", !$("heat").checked);
      $("scale").hidden = !$("heat").checked;
    });
    $("viewer").hidden = false;
    choose();
  };

  theme();
  printing();
  const data = JSON.parse($("data").textContent);
  if (data.prompts.length) viewer(data);
})();
