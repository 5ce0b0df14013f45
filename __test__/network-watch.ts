/**
 * What a VM tries to reach, seen in its own network namespace: every DNS question, and every address that
 * a program asks to be connected to, whether that is let through, redirected or refused.
 *
 * A VM has no device but `lo`. What its rules redirect is answered there under the address that was
 * asked for, and what they refuse is reset in its name: so it is the answers that are read here. (Not
 * seen is UDP other than DNS, which they drop without an answer.)
 */

import { type ChildProcess, spawn } from "node:child_process";
import { randomUUID } from "node:crypto";
import { readdirSync, readlinkSync } from "node:fs";
import type { Agent } from "agentvm";
import { onTestFinished } from "vitest";

export interface NetworkWatch {
  /**
   * All attempts until now, each once, sorted: `dns example.com`, `tcp 192.0.2.1:443`. The VM's own
   * addresses are among them, as `tcp 127.0.0.1:8080`.
   */
  attempts(): Promise<string[]>;
}

/** What there has to be of a VM. */
type Vm = Pick<Agent, "exec">;

/** Watches a VM until the test ends. It has to be awake, and to stay so. */
export async function watchNetwork(vm: Vm): Promise<NetworkWatch> {
  const attempts = new Set<string>();
  const capture = startCapture(await processIn(vm));
  const seen = await follow(capture, (packet) => {
    const attempt = attemptIn(packet);
    if (attempt !== undefined) attempts.add(attempt);
  });
  return {
    async attempts() {
      // Packets come in order: when this one has come, all before it have.
      const end = `end-of-watch-${randomUUID()}.invalid`;
      await vm.exec(`getent hosts ${end}.`);
      await seen(() => attempts.delete(`dns ${end}`));
      return [...attempts].sort();
    },
  };
}

/** setns(2), which changes the namespaces of Perl itself: another program would lose the capabilities. */
const SETNS = { x64: 308, arm64: 268 }[process.arch as "x64" | "arm64"];

/**
 * Enters the namespaces of the process $ARGV[0] and writes each packet with its length before it, at first
 * an empty one. It takes what is small, as the first packets of a connection are, lest bulk overflows its
 * buffer; a loss ends it all the same.
 *
 * Node opens no packet sockets; perl-base is on every Debian. The numbers are AF_PACKET, SOCK_RAW and
 * ETH_P_ALL; SOL_SOCKET and SO_ATTACH_FILTER; SOL_PACKET and PACKET_STATISTICS.
 */
const CAPTURE = `
  my @namespaces = map { open(my $file, "<", "/proc/$ARGV[0]/ns/$_") or die "$_: $!"; $file } "user", "net";
  for (@namespaces) { syscall(${SETNS}, fileno($_), 0) == 0 or die "setns: $!"; }
  my $small = pack("SCCL SCCL SCCL SCCL",
    0x80, 0, 0, 0,
    0x25, 1, 0, 1000,
    0x06, 0, 0, 1000,
    0x06, 0, 0, 0);
  socket(my $packets, 17, 3, unpack("S", pack("n", 3))) or die "socket: $!";
  setsockopt($packets, 1, 26, pack("Sx![P]P", 4, $small)) or die "SO_ATTACH_FILTER: $!";
  $| = 1;
  print pack("N", 0);
  while (sysread($packets, my $packet, 1000)) {
    my (undef, $lost) = unpack("II", getsockopt($packets, 263, 6));
    die "$lost packets are lost" if $lost;
    print pack("N/a*", $packet);
  }
`;

function startCapture(pid: number): ChildProcess {
  const capture = spawn("perl", ["-e", CAPTURE, String(pid)], {
    stdio: ["ignore", "pipe", "inherit"],
  });
  onTestFinished(() => void capture.kill());
  return capture;
}

/** Id on the host of a process in the VM's network namespace. */
async function processIn(vm: Vm): Promise<number> {
  const namespace = (await vm.exec("readlink /proc/self/ns/net")).stdout.trim();
  const pid = readdirSync("/proc").find((name) => {
    try {
      return /^\d+$/.test(name) && readlinkSync(`/proc/${name}/ns/net`) === namespace;
    } catch {
      return false; // it has ended, or is somebody else's
    }
  });
  if (pid === undefined) throw new Error(`no process of this user is in ${namespace}`);
  return Number(pid);
}

/**
 * Resolves when the capture has begun, to a function that waits until a condition holds, which only
 * packets can change.
 */
async function follow(capture: ChildProcess, take: (packet: Buffer) => void) {
  let changed: () => void = () => {};
  let ended: Error | undefined;
  let begun = false;
  let rest: Buffer = Buffer.alloc(0);
  capture.on("error", (error) => {
    ended = error;
    changed();
  });
  capture.on("close", (code, signal) => {
    ended ??= new Error(`the capture ended with ${signal ?? code}: see above`);
    changed();
  });
  capture.stdout?.on("data", (piece: Buffer) => {
    rest = Buffer.concat([rest, piece]);
    while (rest.length >= 4 && rest.length >= 4 + rest.readUInt32BE(0)) {
      const end = 4 + rest.readUInt32BE(0);
      if (end > 4) take(rest.subarray(4, end));
      rest = rest.subarray(end);
      begun = true;
    }
    changed();
  });

  const until = async (holds: () => boolean): Promise<void> => {
    while (!holds()) {
      if (ended) throw ended;
      await new Promise<void>((resolve) => {
        changed = resolve;
      });
    }
  };
  await until(() => begun);
  return until;
}

const ETHERNET_BYTES = 14;
const TCP = 6;
const UDP = 17;
const DNS_PORT = 53;
const SYN_ACK = 0x12;
const RST = 0x04;

/** What somebody wanted, if the packet is a DNS question or the answer to a wish to be connected. */
function attemptIn(frame: Buffer): string | undefined {
  const { protocol, from, payload } = readIp(frame.subarray(ETHERNET_BYTES));
  if (protocol === UDP && payload.readUInt16BE(2) === DNS_PORT) {
    return `dns ${questionIn(payload.subarray(8))}`;
  }
  if (protocol !== TCP) return undefined;
  const flags = payload.readUInt8(13);
  if ((flags & SYN_ACK) !== SYN_ACK && (flags & RST) === 0) return undefined;
  const port = payload.readUInt16BE(0);
  return port === DNS_PORT ? "dns over TCP" : `tcp ${from}:${port}`;
}

function readIp(packet: Buffer): { protocol: number; from: string; payload: Buffer } {
  if (packet.readUInt8(0) >> 4 === 4) {
    const header = (packet.readUInt8(0) & 15) * 4;
    return {
      protocol: packet.readUInt8(9),
      from: packet.subarray(12, 16).join("."),
      payload: packet.subarray(header),
    };
  }
  const groups = Array.from({ length: 8 }, (_, index) =>
    packet.readUInt16BE(8 + 2 * index).toString(16),
  );
  // Written as everybody writes it.
  const { hostname } = new URL(`http://[${groups.join(":")}]`);
  return { protocol: packet.readUInt8(6), from: hostname, payload: packet.subarray(40) };
}

/** RFC 1035, 4.1: the labels of the name after a header of 12 bytes. */
function questionIn(message: Buffer): string {
  const labels: string[] = [];
  let at = 12;
  for (let length = message.readUInt8(at); length > 0; length = message.readUInt8(at)) {
    labels.push(message.toString("latin1", at + 1, at + 1 + length));
    at += 1 + length;
  }
  return labels.join(".");
}
