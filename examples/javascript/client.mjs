// A client for browsers and for Node.js 18 or newer.

export class ClassificationError extends Error {}

/**
 * Classify one encoded image.
 *
 * @param {Blob | Uint8Array} image
 * @param {{url?: string, topK?: number, timeoutMs?: number, attempts?: number}} options
 * @returns {Promise<{label: string, index: number, probability: number}[]>} the most probable classes
 */
export async function classify(image, { url = "", topK = 5, timeoutMs = 10000, attempts = 5 } = {}) {
  const query = new URLSearchParams({ top_k: topK, timeout_ms: timeoutMs });
  const request = { method: "POST", headers: { "Content-Type": "application/octet-stream" }, body: image };
  for (let attempt = 1; ; attempt++) {
    const response = await fetch(`${url}/v1/classify?${query}`, request);
    const body = await response.json();
    if (response.ok) {
      return body.results[0].predictions;
    }
    if (response.status !== 429 || attempt === attempts) {
      throw new ClassificationError(`${body.title}: ${body.detail}`);
    }
    const seconds = Number(response.headers.get("Retry-After") ?? 1);
    await new Promise((resolve) => setTimeout(resolve, seconds * 1000));
  }
}
