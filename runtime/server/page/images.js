// From a file, a drop, the clipboard or a video to a data URL that the server reads.

/** Files up to this size are sent as they are, so that the answer is exactly that of `fastvlm generate`. */
const MAX_BYTES = 8 * 1024 * 1024;

/** Types that the server reads. Others, if the browser can show them, are sent as JPEG. */
const TYPES = new Set(["image/png", "image/jpeg", "image/webp", "image/gif", "image/tiff", "image/bmp", "image/heic",
  "image/heif", "image/avif"]);

const QUALITY = 0.92;

function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error("The file cannot be read. Choose another one."));
    reader.readAsDataURL(blob);
  });
}

/** Returns the type of a file. Browsers leave that of a HEIC file empty. */
function typeOf(file) {
  const ending = file.name?.toLowerCase().match(/\.(heic|heif)$/)?.[1];
  return file.type || (ending ? `image/${ending}` : "");
}

/** Returns a data URL of `source`, a bitmap or a video, as JPEG with sides of at most `limit` px. */
function scaled(source, width, height, limit) {
  const scale = Math.min(1, limit / Math.max(width, height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(width * scale));
  canvas.height = Math.max(1, Math.round(height * scale));
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.fillStyle = "#fff"; // under transparent pixels, as the server does
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(source, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL("image/jpeg", QUALITY);
}

/** Returns a data URL of an image file. Large files are scaled to twice the encoder's `size` in px. */
export async function fromFile(file, size) {
  const type = typeOf(file);
  if (!type.startsWith("image/")) throw new Error(`${file.name || "This"} is not an image. Choose another file.`);
  if (TYPES.has(type) && file.size <= MAX_BYTES) {
    return dataUrl(new Blob([file], { type }));
  }
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    throw new Error(`The browser cannot read ${file.name || "this image"}. Convert it to JPEG or PNG.`);
  }
  try {
    return scaled(bitmap, bitmap.width, bitmap.height, 2 * size);
  } finally {
    bitmap.close();
  }
}

/** Returns a data URL of the frame that a video shows, with sides of at most `size` px. */
export function fromVideo(video, size) {
  return scaled(video, video.videoWidth, video.videoHeight, size);
}

/** Starts the camera in `video`. Its errors say what to do. */
export async function startCamera(video) {
  if (!navigator.mediaDevices?.getUserMedia) {
    throw new Error("Browsers give the camera to pages of this machine or over https only. Open the page as localhost.");
  }
  try {
    video.srcObject = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
  } catch (error) {
    const reasons = {
      NotAllowedError: "The browser did not allow the camera. Allow it in the address bar, then try again.",
      NotFoundError: "No camera was found. Connect one, then try again.",
      NotReadableError: "Another program uses the camera. Close it, then try again.",
    };
    throw new Error(reasons[error.name] ?? `The camera cannot be used: ${error.message}`);
  }
  await video.play();
}

export function stopCamera(video) {
  for (const track of video.srcObject?.getTracks() ?? []) track.stop();
  video.srcObject = null;
}
