// The internet of the host of host.mjs: a network namespace of its own, with servers and a resolver.
// Started in it; says "here" when it can be wired, and "up" when it has been told that it is, and serves.

import { execFileSync } from "node:child_process";
import { createSocket } from "node:dgram";
import { once } from "node:events";
import { createServer } from "node:net";
import { listen } from "./listeners.mjs";

const RESOLVER = "1.2.3.53";

const PUBLIC = ["1.2.3.4", "1.2.3.5", "2606:4700::1"];
/** As if the host's network led there: only the policy is in the way. */
const FORBIDDEN = [
  "10.9.9.9",
  "100.100.100.200",
  "168.63.129.16",
  "169.254.169.254",
  "172.16.5.5",
  "192.168.1.10",
  "2002:a9fe:a9fe::1",
  "64:ff9b::506:708",
  "64:ff9b::a9fe:a9fe",
  "64:ff9b::c0a8:10a",
  "fd00:ec2::254",
  "fdaa::9",
];

const A = 1;
const CNAME = 5;
const AAAA = 28;

/** @typedef {[type: number, value: string]} Answer */

/** @type {Record<string, Answer[]>} */
const zone = {
  "site.example": [
    [A, "1.2.3.4"],
    [AAAA, "2606:4700::1"],
  ],
  "other.example": [[A, "1.2.3.5"]],
  // Of somebody whose names are trusted.
  "lan.trusted.example": [[A, "192.168.1.10"]],
  "loopback.trusted.example": [
    [A, "127.0.0.1"],
    [AAAA, "::1"],
  ],
  "metadata.trusted.example": [[A, "169.254.169.254"]],
  "metadata6.trusted.example": [[AAAA, "fd00:ec2::254"]],
  "nat64.trusted.example": [[AAAA, "64:ff9b::a9fe:a9fe"]],
  "host.trusted.example": [[A, "5.6.7.8"]],
  "mixed.trusted.example": [
    [A, "10.9.9.9"],
    [A, "1.2.3.4"],
  ],
  "alias.trusted.example": [
    [CNAME, "metadata.trusted.example"],
    [A, "169.254.169.254"],
  ],
};

/**
 * How often each `rebind-….trusted.example` was asked for, which is public in its first answer only.
 *
 * @type {Map<string, number>}
 */
const asked = new Map();

/** @param {string} name @param {number} type @returns {Answer[] | undefined} */
function answersFor(name, type) {
  if (!name.startsWith("rebind-")) return zone[name];
  const times = asked.get(name) ?? 0;
  if (type === A) asked.set(name, times + 1);
  return [[A, times === 0 ? "1.2.3.4" : "169.254.169.254"]];
}

/** @param {string} name */
function encodeName(name) {
  const labels = name.split(".").map((label) => [Buffer.from([label.length]), Buffer.from(label)]);
  return Buffer.concat([...labels.flat(), Buffer.from([0])]);
}

/** @param {Answer} answer */
function encodeData([type, value]) {
  if (type === CNAME) return encodeName(value);
  if (type === A) return Buffer.from(value.split(".").map(Number));
  const [head = "", tail = ""] = value.split("::").map((half) => half || undefined);
  const groups = (/** @type {string} */ half) => (half ? half.split(":") : []);
  const zeros = Array(8 - groups(head).length - groups(tail).length).fill("0");
  const all = [...groups(head), ...zeros, ...groups(tail)];
  return Buffer.from(all.map((group) => group.padStart(4, "0")).join(""), "hex");
}

/** RFC 1035, 4.1. @param {Buffer} message */
function answer(message) {
  /** @type {string[]} */
  const labels = [];
  let at = 12;
  for (let length = message.readUInt8(at); length > 0; length = message.readUInt8(at)) {
    labels.push(message.toString("latin1", at + 1, at + 1 + length));
    at += 1 + length;
  }
  const type = message.readUInt16BE(at + 1);
  const question = message.subarray(12, at + 5);
  const known = answersFor(labels.join(".").toLowerCase(), type);
  let owner = labels.join(".");
  const records = (known ?? [])
    .filter((answer) => answer[0] === type || answer[0] === CNAME)
    .map((answer) => {
      const data = encodeData(answer);
      const fixed = Buffer.alloc(10);
      fixed.writeUInt16BE(answer[0], 0);
      fixed.writeUInt16BE(1, 2);
      fixed.writeUInt16BE(data.length, 8);
      const record = Buffer.concat([encodeName(owner), fixed, data]);
      if (answer[0] === CNAME) owner = answer[1];
      return record;
    });
  const header = Buffer.alloc(12);
  message.copy(header, 0, 0, 2);
  header.writeUInt16BE(known === undefined ? 0x8183 : 0x8180, 2);
  header.writeUInt16BE(1, 4);
  header.writeUInt16BE(records.length, 6);
  return Buffer.concat([header, question, ...records]);
}

function resolver() {
  const socket = createSocket("udp4");
  socket.on("message", (message, from) => socket.send(answer(message), from.port, from.address));
  createServer((stream) => {
    stream.on("error", () => {});
    // One question in one piece is all that anybody sends.
    stream.on("data", (data) => {
      const message = answer(data.subarray(2));
      const length = Buffer.alloc(2);
      length.writeUInt16BE(message.length);
      stream.write(Buffer.concat([length, message]));
    });
  }).listen(53, RESOLVER);
  return new Promise((resolve, reject) => {
    socket.on("error", reject).bind(53, RESOLVER, () => resolve(RESOLVER));
  });
}

/** @param {string} command */
const ip = (command) => execFileSync("ip", command.split(" "), { stdio: "inherit" });

console.log("here");
await once(process.stdin, "data");
ip("link set lo up");
ip("link set internet up");
ip("addr add 5.6.7.1/24 dev internet");
ip("addr add 2600:5::1/64 dev internet nodad");
for (const address of [...PUBLIC, ...FORBIDDEN, RESOLVER]) ip(`addr add ${address} dev lo`);
await Promise.all([listen([...PUBLIC, ...FORBIDDEN]), resolver()]);
console.log("up");
process.stdin.on("end", () => process.exit());
