// Time to first token, drawn by stage.

const STAGES = ["preprocess", "encode", "project", "prefill", "sample"];

export function milliseconds(value) {
  return value >= 1000 ? `${(value / 1000).toFixed(2)} s` : `${value < 10 ? value.toFixed(1) : Math.round(value)} ms`;
}

function element(name, className, text = "") {
  const made = document.createElement(name);
  made.className = className;
  made.textContent = text;
  return made;
}

/** Returns the stages of `timings` as a bar, with the same numbers as a list. */
export function bar(timings) {
  const box = element("div", "timings");
  const line = element("p", "");
  const speed = timings.decode_tps ? `, then ${Math.round(timings.decode_tps)} tokens/s` : "";
  const reused = timings.reused_tokens ? `, ${timings.reused_tokens} of ${timings.prompt_tokens} prompt tokens known` : "";
  line.append("First token after ", element("strong", "", milliseconds(timings.ttft_ms)), speed + reused);
  const drawn = element("div", "bar");
  drawn.setAttribute("aria-hidden", "true");
  const list = element("ul", "stages");
  for (const stage of STAGES) {
    const ms = timings[`${stage}_ms`];
    const part = element("span", stage);
    part.style.flex = `${ms} 1 0`;
    part.title = `${stage} ${milliseconds(ms)}`;
    drawn.append(part);
    const entry = element("li", "");
    entry.append(element("i", stage), `${stage} ${milliseconds(ms)}`);
    list.append(entry);
  }
  box.append(line, drawn, list);
  return box;
}
