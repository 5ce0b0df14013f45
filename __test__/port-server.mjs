// Servers for ports.test.ts, to run inside a VM: one of HTTP, and one for each way to be no good one.

import { createHash } from "node:crypto";
import { createServer } from "node:http";
import { createServer as createTcpServer } from "node:net";
import { gzipSync } from "node:zlib";

const LOCALHOST = "127.0.0.1";

/** @typedef {import("node:http").ServerResponse} Response */

/** @type {Record<string, (request: import("node:http").IncomingMessage, response: Response) => unknown>} */
const routes = {
  "/hello": (_request, response) => {
    response.writeHead(201, "Made", { "x-from": "the VM" }).end("hello");
  },
  "/echo": (request, response) => {
    response.setHeader("content-type", request.headers["content-type"] ?? "none");
    request.pipe(response);
  },
  "/method": (request, response) =>
    response.setHeader("x-method", request.method ?? "").end("body"),
  "/empty": (_request, response) => response.writeHead(204).end(),
  "/fresh": (_request, response) => response.writeHead(304).end(),
  "/gzip": (_request, response) =>
    response.setHeader("content-encoding", "gzip").end(gzipSync("compressed")),
  "/redirect": (_request, response) => response.writeHead(302, { location: "/hello" }).end(),
  "/to-host": (_request, response) =>
    response.writeHead(302, { location: "http://192.0.2.7/secret" }).end(),
  // One event for each line that a client sends to /next.
  "/events": (_request, response) => {
    response.writeHead(200, { "content-type": "text/event-stream" }).flushHeaders();
    waiting = response;
  },
  "/next": (_request, response) => {
    waiting.write("data: now\n\n");
    response.end();
  },
  "/zeros": (request, response) => {
    let left = Number(request.headers["x-bytes"]);
    const chunk = Buffer.alloc(1 << 20);
    const more = () => {
      while (left > 0) {
        left -= chunk.length;
        if (!response.write(chunk)) return void response.once("drain", more);
      }
      response.end();
    };
    more();
  },
  "/count": (request, response) => {
    let bytes = 0;
    request.on("data", (chunk) => {
      bytes += chunk.length;
    });
    request.on("end", () => response.end(String(bytes)));
  },
  "/cut": (_request, response) => {
    response.writeHead(200, { "content-length": "100" });
    response.write("half of it", () => response.socket?.destroy());
  },
  "/never": () => {},
};
/** @type {Response} */
let waiting;

const http = () => {
  const server = createServer((request, response) => {
    const route = routes[(request.url ?? "").split("?")[0] ?? ""];
    if (route) route(request, response);
    else response.writeHead(404).end();
  });
  server.requestTimeout = 0;
  return server;
};

const CLOSE_FRAME = 8;

const web = http();
web.on("upgrade", (request, socket) => {
  const key = `${request.headers["sec-websocket-key"]}258EAFA5-E914-47DA-95CA-C5AB0DC85B11`;
  const accept = createHash("sha1").update(key).digest("base64");
  socket.write(
    "HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: Upgrade\r\n" +
      `sec-websocket-accept: ${accept}\r\n\r\n`,
  );
  let isDeaf = false;
  // Short frames only: unmasked, and sent back.
  socket.on("data", (/** @type {Buffer} */ frame) => {
    if (isDeaf) return;
    const [first = 0, second = 0] = frame;
    const length = second & 0x7f;
    const mask = frame.subarray(2, 6);
    const payload = frame
      .subarray(6, 6 + length)
      .map((byte, index) => byte ^ (mask[index % 4] ?? 0));
    const said = Buffer.from(payload).toString();
    if (said === "end") socket.end();
    else if (said === "destroy") socket.destroy();
    else if (said === "deaf") isDeaf = true;
    else if (said === "close") {
      isDeaf = true;
      socket.write(Buffer.from([0x80 | CLOSE_FRAME, 0]));
    } else socket.write(Buffer.concat([Buffer.from([first, length]), payload]));
    if ((first & 0x0f) === CLOSE_FRAME) socket.end();
  });
});

/** @param {(socket: import("node:net").Socket) => void} connected */
const tcp = (connected) =>
  createTcpServer((socket) => {
    socket.on("error", () => {});
    connected(socket);
  });

web.listen(3000, LOCALHOST);
http().listen(3001, "::1");
tcp((socket) => socket.end()).listen(3002, LOCALHOST);
tcp((socket) => socket.end("220 mail.example.org ESMTP\r\n")).listen(3003, LOCALHOST);
tcp((socket) => {
  socket.write("HTTP/1.1 200 OK\r\n");
  const more = () => {
    while (!socket.destroyed && socket.write(`x-header: ${"x".repeat(1000)}\r\n`));
  };
  socket.on("drain", more);
  more();
}).listen(3004, LOCALHOST);
// An echo that ends when its client has ended, and says so.
createTcpServer({ allowHalfOpen: true }, (socket) => {
  socket.on("error", () => {});
  socket.on("data", (chunk) => socket.write(chunk));
  socket.on("end", () => socket.end("bye"));
}).listen(3005, LOCALHOST);
