// Servers that count who comes: TCP and UDP at each address. Each tells whoever comes how many came before.

import { createSocket } from "node:dgram";
import { createServer, isIPv6 } from "node:net";

export const PORT = 80;

/** @param {string[]} addresses */
export async function listen(addresses) {
  await Promise.all(addresses.flatMap((address) => [tcp(address), udp(address)]));
}

/** @param {string} address */
function tcp(address) {
  let hits = 0;
  const server = createServer((socket) => {
    socket.on("error", () => {});
    socket.end(String(hits++));
  });
  return new Promise((resolve, reject) => {
    server.on("error", reject).listen({ port: PORT, host: address }, () => resolve(address));
  });
}

/** @param {string} address */
function udp(address) {
  let hits = 0;
  const socket = createSocket(isIPv6(address) ? "udp6" : "udp4");
  socket.on("message", (_message, from) => {
    socket.send(String(hits++), from.port, from.address);
  });
  return new Promise((resolve, reject) => {
    socket.on("error", reject).bind(PORT, address, () => resolve(address));
  });
}
