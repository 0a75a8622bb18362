// The server's API: streamed answers, errors in plain words, the key.

const KEY = "fastvlm-key";

/** An error whose message can be shown. `needsKey` is true if the server wants a key, or another one. */
export class ServerError extends Error {
  constructor(message, needsKey = false) {
    super(message);
    this.needsKey = needsKey;
  }
}

export function setKey(key) {
  sessionStorage.setItem(KEY, key);
}

export function hasKey() {
  return sessionStorage.getItem(KEY) !== null;
}

async function call(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server does not answer. Check that fastvlm serve still runs.");
  }
  if (response.ok) return response;
  const { error } = await response.json().catch(() => ({ error: {} }));
  if (response.status === 401) throw new ServerError("The server needs its key.", true);
  if (response.status === 429) throw new ServerError("The server is busy. Try again in a moment.");
  throw new ServerError(sentence(error.message ?? `The server answered with status ${response.status}`));
}

function sentence(text) {
  return text.charAt(0).toUpperCase() + text.slice(1);
}

/** Returns the card of the served model. */
export async function servedModel() {
  const list = await (await call("v1/models")).json();
  return list.data[0];
}

/**
 * Asks, and calls `onText` with each piece of the answer.
 * Returns { text, timings, finishReason }. An aborted answer rejects with an AbortError.
 */
export async function answer(body, onText, signal) {
  const response = await call("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true }),
    signal,
  });
  const result = { text: "", timings: null, finishReason: null };
  let done = false;
  for await (const event of events(response.body)) {
    if (event === "[DONE]") {
      done = true;
      break;
    }
    const chunk = JSON.parse(event);
    if (chunk.error) throw new ServerError(sentence(chunk.error.message));
    const choice = chunk.choices[0];
    if (choice?.delta.content) {
      result.text += choice.delta.content;
      onText(choice.delta.content);
    }
    result.finishReason = choice?.finish_reason ?? result.finishReason;
    result.timings = chunk.timings ?? result.timings;
  }
  if (!done) throw new ServerError("The answer was cut off. Check that fastvlm serve still runs.");
  return result;
}

/** Yields the data of the server-sent events of a body. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  try {
    for (;;) {
      const { value, done } = await reader.read().catch((error) => {
        if (error.name === "AbortError") throw error;
        return { done: true };
      });
      if (done) return;
      buffer += value;
      const parts = buffer.split(/\r?\n\r?\n/);
      buffer = parts.pop();
      for (const part of parts) {
        const data = part.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        if (data.length) yield data.map((line) => line.slice(5).trimStart()).join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
