// Requests to the server: JSON in and out, and at most one of a kind on its way.

const page = Array.from(crypto.getRandomValues(new Uint8Array(8)), (b) => b.toString(16).padStart(2, "0")).join("");

export class Refused extends Error {
  constructor(status, answer) {
    super(answer.error || `the server answered ${status}`);
    this.status = status;
    this.stale = answer.stale === true;
    this.gone = answer.gone === true;
  }
}

export async function send(path, { body, json, signal } = {}) {
  const options = { method: body || json ? "POST" : "GET", headers: { "X-Page": page }, signal };
  if (json) {
    options.headers["Content-Type"] = "application/json";
    options.body = JSON.stringify(json);
  } else if (body) {
    options.body = body;
  }
  let answer;
  try {
    answer = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer. Was `kinema demo fpt` closed?");
  }
  let value = {};
  try {
    value = await answer.json();
  } catch {
    // Not JSON: the status says enough.
  }
  if (!answer.ok) throw new Refused(answer.status, value);
  return value;
}

// The newest question of a kind. A question asked while another is on its way waits for that answer, so that
// pictures keep coming during a drag, unless the one on its way is slow: then it is given up.
export class Latest {
  constructor(path, { onAnswer, onError, onBusy, isSlow = () => false }) {
    Object.assign(this, { path, onAnswer, onError, onBusy, isSlow });
    this.running = null;
    this.next = null;
  }

  ask(question) {
    if (!this.running) return this.start(question);
    this.next = question;
    if (this.isSlow(this.running.question)) this.running.abort.abort();
  }

  drop() {
    this.next = null;
    if (this.running) this.running.abort.abort();
  }

  async start(question) {
    const abort = new AbortController();
    this.running = { question, abort };
    this.onBusy(1);
    try {
      const answer = await send(this.path, { json: question, signal: abort.signal });
      if (!abort.signal.aborted) this.onAnswer(answer, question);
    } catch (error) {
      if (error.name !== "AbortError" && !error.stale && !abort.signal.aborted) this.onError(error, question);
    } finally {
      this.onBusy(-1);
      this.running = null;
      if (this.next) {
        const next = this.next;
        this.next = null;
        this.start(next);
      }
    }
  }
}
