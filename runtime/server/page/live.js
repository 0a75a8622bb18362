// Live captions: the camera's current frame is captioned again as soon as the last caption is complete.

import { answer } from "./api.js";
import { fromVideo, startCamera, stopCamera } from "./images.js";

const MAX_TOKENS = 64;
const RATE_OVER = 8; // captions
const SPOKEN_EVERY_MS = 6000;

export class Live {
  #video;
  #size;
  #show;
  #controller = null;
  #done = [];
  #spokenAt = -Infinity;

  /**
   * `show` has the callbacks `caption(text)`, `spoken(text)`, `figures({ rate, timings })` and `error(message)`.
   * `size` is the encoder's image size in px.
   */
  constructor(video, size, show) {
    this.#video = video;
    this.#size = size;
    this.#show = show;
  }

  get running() {
    return this.#controller !== null;
  }

  /** Captions frames until `stop`. `prompt` is a function, so that it can be edited meanwhile. */
  async start(prompt) {
    const controller = new AbortController();
    this.#controller = controller;
    this.#done = [];
    try {
      await startCamera(this.#video);
      while (!controller.signal.aborted) {
        await visible(controller.signal);
        if (!controller.signal.aborted) await this.#caption(prompt(), controller.signal);
      }
    } catch (error) {
      if (error.name !== "AbortError") this.#show.error(error);
    } finally {
      if (this.#controller === controller) this.stop();
    }
  }

  stop() {
    this.#controller?.abort();
    this.#controller = null;
    stopCamera(this.#video);
  }

  async #caption(prompt, signal) {
    let text = "";
    const content = [
      { type: "image_url", image_url: { url: fromVideo(this.#video, this.#size) } },
      { type: "text", text: prompt },
    ];
    const body = { messages: [{ role: "user", content }], max_tokens: MAX_TOKENS };
    const { timings } = await answer(body, (piece) => { text += piece; }, signal);
    if (signal.aborted) return;
    const now = performance.now();
    this.#done = [...this.#done.slice(-RATE_OVER), now];
    const [first] = this.#done;
    const rate = this.#done.length > 1 ? (1000 * (this.#done.length - 1)) / (now - first) : null;
    this.#show.caption(text);
    this.#show.figures({ rate, timings });
    if (now - this.#spokenAt > SPOKEN_EVERY_MS) {
      this.#spokenAt = now;
      this.#show.spoken(text);
    }
  }
}

/** Waits while the tab is hidden: nobody sees its captions. */
function visible(signal) {
  return new Promise((resolve) => {
    if (!document.hidden || signal.aborted) return resolve();
    const check = () => {
      if (document.hidden && !signal.aborted) return;
      document.removeEventListener("visibilitychange", check);
      resolve();
    };
    document.addEventListener("visibilitychange", check);
    signal.addEventListener("abort", check);
  });
}
