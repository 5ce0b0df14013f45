// Tries to reach each of its arguments, `tcp host` or `udp host`, and tells how each went: what the server
// said, or the code of the error. It waits as long as it takes.

import { createSocket } from "node:dgram";
import { connect, isIPv6 } from "node:net";

const PORT = 80;

/** @type {Record<string, (host: string, done: (outcome: string) => void) => void>} */
const kinds = {
  tcp: (host, done) => {
    let said = "";
    connect({ port: PORT, host, autoSelectFamily: false })
      .on("data", (data) => {
        said += data;
      })
      .on("end", () => done(said))
      .on("error", (/** @type {NodeJS.ErrnoException} */ error) =>
        done(error.code ?? error.message),
      );
  },
  udp: (host, done) => {
    const socket = createSocket(isIPv6(host) ? "udp6" : "udp4");
    const finish = (/** @type {string | undefined} */ outcome) => {
      socket.close();
      done(outcome ?? "");
    };
    const failed = (/** @type {NodeJS.ErrnoException} */ error) => finish(error.code);
    socket.once("message", (message) => finish(String(message)));
    socket.once("error", failed);
    socket.connect(PORT, host, () => {
      // The kernel reports it at once, or with the next call.
      socket.send(
        "?",
        (error) => error && socket.listenerCount("error") && socket.emit("error", error),
      );
    });
  },
};

/** @type {string[]} */
const outcomes = [];
for (const probe of process.argv.slice(2)) {
  const [kind = "", host = ""] = probe.split(" ");
  outcomes.push(await new Promise((resolve) => kinds[kind]?.(host, resolve)));
}
console.log(JSON.stringify(outcomes));
