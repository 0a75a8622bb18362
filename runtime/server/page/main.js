// The page: an image, a conversation about it, and live captions.

import { answer, hasKey, servedModel, setKey } from "./api.js";
import { fromFile, fromVideo, startCamera, stopCamera } from "./images.js";
import { Live } from "./live.js";
import { bar, milliseconds } from "./timings.js";

const by = (id) => document.getElementById(id);
const DEFAULT_SIZE = 1024;

let model = null;
let image = null; // data URL
let unseen = false; // true if the browser cannot show the image, which the server may read all the same
let turns = []; // { role, content } of the conversation, without the image
let asking = null; // AbortController of the answer that is being read
let live = null;

// Model and key

async function connect() {
  try {
    model = await servedModel();
    by("model").textContent = model.id;
    document.title = `${model.id} - fastvlm`;
    showError(null);
  } catch (error) {
    by("model").textContent = "not connected";
    report(error);
  }
}

function report(error) {
  if (error.needsKey) {
    by("key-note").textContent = hasKey()
      ? "The key is wrong. Use the one of --api-key."
      : "It is the one of --api-key. This tab forgets it when it is closed.";
    if (!by("key-dialog").open) by("key-dialog").showModal();
  } else {
    showError(error.message);
  }
}

function showError(message) {
  by("error").textContent = message ?? "";
  by("error").hidden = !message;
}

by("key-form").addEventListener("submit", () => {
  setKey(by("key").value);
  by("key").value = "";
  connect();
});

const size = () => model?.image_size ?? DEFAULT_SIZE;

// Image

function showImage(url, name = "") {
  image = url;
  unseen = false;
  by("filename").textContent = name;
  if (url) by("preview").src = url;
  else by("preview").removeAttribute("src");
  showStage(false);
  startOver();
  by("clear").hidden = !url;
}

const isChat = () => by("live").hidden;

/** Shows the camera, or else the image or the place for one. */
function showStage(withCamera) {
  const filled = withCamera || (isChat() && Boolean(image));
  if (!withCamera) stopCamera(by("camera"));
  by("camera").hidden = !withCamera;
  by("preview").hidden = withCamera || !filled || unseen;
  by("filename").hidden = withCamera || !filled || !unseen;
  by("empty").hidden = filled;
  by("stage").classList.toggle("filled", filled);
  by("shoot").textContent = withCamera ? "Take the picture" : "Use the camera";
}

by("preview").addEventListener("error", () => {
  unseen = Boolean(image);
  showStage(false);
});

async function useFile(file) {
  if (!file) return;
  if (!isChat()) setMode(false);
  try {
    const url = await fromFile(file, size());
    showError(null);
    showImage(url, file.name);
    by("question").focus();
  } catch (error) {
    showError(error.message);
  }
}

async function useCamera() {
  const camera = by("camera");
  if (camera.srcObject) {
    showImage(fromVideo(camera, 2 * size()));
    by("question").focus();
    return;
  }
  try {
    await startCamera(camera);
  } catch (error) {
    showError(error.message);
    return;
  }
  showError(null);
  showStage(true);
}

by("choose").addEventListener("click", () => by("file").click());
by("file").addEventListener("change", () => {
  useFile(by("file").files[0]);
  by("file").value = "";
});
by("shoot").addEventListener("click", useCamera);
by("clear").addEventListener("click", () => showImage(null));

addEventListener("dragover", (event) => {
  event.preventDefault();
  by("stage").classList.add("over");
});
addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) by("stage").classList.remove("over");
});
addEventListener("drop", (event) => {
  event.preventDefault();
  by("stage").classList.remove("over");
  useFile(event.dataTransfer.files[0]);
});
addEventListener("paste", (event) => {
  const file = [...(event.clipboardData?.files ?? [])].find((found) => found.type.startsWith("image/"));
  if (!file) return;
  event.preventDefault();
  useFile(file);
});

// Conversation

function startOver() {
  asking?.abort();
  turns = [];
  by("messages").replaceChildren(by("hint"));
  by("hint").hidden = false;
}

function append(className, text = "") {
  const made = document.createElement("div");
  made.className = className;
  made.textContent = text;
  by("messages").append(made);
  made.scrollIntoView({ block: "end" });
  return made;
}

/** The messages for the server: the image belongs to the first question. */
function messages() {
  return turns.map((turn, place) => {
    if (place || !image) return turn;
    return { ...turn, content: [{ type: "image_url", image_url: { url: image } }, { type: "text", text: turn.content }] };
  });
}

async function ask(text) {
  if (asking || !text.trim()) return;
  const controller = new AbortController();
  asking = controller;
  setAsking(true);
  showError(null);
  by("hint").hidden = true;
  turns.push({ role: "user", content: text });
  append("question", text);
  const shown = append("answer waiting");
  const body = {
    messages: messages(),
    max_tokens: by("max-tokens").valueAsNumber || 256,
    temperature: by("temperature").valueAsNumber || 0,
  };
  let said = "";
  try {
    const { timings, finishReason } = await answer(body, (piece) => {
      said += piece;
      shown.textContent = said;
      shown.scrollIntoView({ block: "end" });
    }, controller.signal);
    turns.push({ role: "assistant", content: said });
    if (finishReason === "length") append("note", "The answer ends here because it is as long as the options allow.");
    if (timings) {
      by("messages").append(bar(timings));
      by("messages").lastElementChild.scrollIntoView({ block: "end" });
    }
  } catch (error) {
    ended(error, said, controller);
  } finally {
    shown.classList.remove("waiting");
    if (!shown.textContent) shown.remove();
    asking = null;
    setAsking(false);
  }
}

/** An answer that was stopped is kept as far as it came. A question without an answer can be asked again. */
function ended(error, said, controller) {
  const startedOver = turns.length === 0;
  if (startedOver) return;
  if (said) turns.push({ role: "assistant", content: said });
  else by("question").value ||= turns.pop().content;
  if (controller.signal.aborted) {
    append("note", "stopped");
  } else {
    append("note wrong", error.message);
    if (error.needsKey) report(error);
  }
}

function setAsking(busy) {
  by("send").hidden = busy;
  by("stop").hidden = !busy;
  for (const button of by("suggestions").children) button.disabled = busy;
  if (!busy && by("ask").contains(document.activeElement) === false && document.activeElement === document.body) {
    by("question").focus();
  }
}

by("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = by("question").value;
  if (asking || !text.trim()) return;
  by("question").value = "";
  ask(text);
});
by("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    by("ask").requestSubmit();
  }
});
by("stop").addEventListener("click", () => asking?.abort());
addEventListener("keydown", (event) => {
  if (event.key === "Escape") asking?.abort();
});
for (const button of by("suggestions").children) button.addEventListener("click", () => ask(button.textContent));

// Live captions

function setMode(isLive) {
  asking?.abort();
  live?.stop();
  setLive(false);
  by("empty-chat").hidden = isLive;
  by("empty-live").hidden = !isLive;
  by("chat").hidden = isLive;
  by("live").hidden = !isLive;
  by("picture").querySelector(".actions").hidden = isLive;
  by("chat-mode").setAttribute("aria-pressed", String(!isLive));
  by("live-mode").setAttribute("aria-pressed", String(isLive));
  showStage(false);
}

function setLive(running) {
  by("live-start").textContent = running ? "Stop" : "Start";
  by("live-start").classList.toggle("primary", !running);
}

const show = {
  caption(text) {
    by("caption").textContent = text;
    by("caption").classList.remove("quiet");
  },
  spoken(text) {
    by("spoken").textContent = text;
  },
  figures({ rate, timings }) {
    by("rates").hidden = false;
    by("rate").textContent = rate === null ? "-" : rate.toFixed(1);
    by("live-ttft").textContent = milliseconds(timings.ttft_ms);
    by("live-tps").textContent = timings.decode_tps ? Math.round(timings.decode_tps) : "-";
    by("live-bar").replaceChildren(bar(timings));
  },
  error: report,
};

by("live-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (live?.running) {
    live.stop();
    return;
  }
  showError(null);
  live = new Live(by("camera"), size(), show);
  setLive(true);
  showStage(true);
  await live.start(() => by("live-prompt").value.trim() || "Describe the image.");
  setLive(false);
});
by("chat-mode").addEventListener("click", () => setMode(false));
by("live-mode").addEventListener("click", () => setMode(true));

connect();
