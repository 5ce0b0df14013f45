// A server for answers.test.ts, to run inside a VM: it answers with the bytes that it is asked for.

import { createHash } from "node:crypto";
import { createServer } from "node:net";

const GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11";

/** What makes a client of WebSockets believe that this is a server of them. @param {string} key */
function upgraded(key) {
  const accept = createHash("sha1")
    .update(key + GUID)
    .digest("base64");
  return Buffer.from(
    "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n" +
      `Sec-WebSocket-Accept: ${accept}\r\nSec-WebSocket-Extensions: permessage-deflate\r\n\r\n`,
  );
}

createServer((socket) => {
  socket.on("error", () => {});
  let request = "";
  socket.on("data", (chunk) => {
    request += chunk.toString("latin1");
    if (!request.includes("\r\n\r\n")) return;
    const answer = Buffer.from(/^GET \/([\w-]*)/.exec(request)?.[1] ?? "", "base64url");
    const key = /^sec-websocket-key: (\S+)/im.exec(request)?.[1];
    request = "";
    socket.end(key === undefined ? answer : Buffer.concat([upgraded(key), answer]));
  });
}).listen(3000, "127.0.0.1");
