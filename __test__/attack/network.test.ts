/**
 * Attacks on the network of the host, from inside: on its loopback, on the networks that it is in, and on
 * the metadata services of clouds. All of it exists here and counts who comes, and the host itself gets
 * through to each by the very same probes.
 */

import type { NetworkRules } from "agentvm";
import { expect, test } from "vitest";
import { isRoot } from "../fixtures.js";
import { newWorld, type Prober } from "./world.js";

const world = await newWorld();

const users = isRoot ? (["user", "root"] as const) : (["user"] as const);

const POLICIES = {
  public: { default: "public" },
  none: { default: "none" },
  allowlist: { default: "allowlist", allow: ["site.example:80", "*.trusted.example"] },
} satisfies Record<string, NetworkRules>;

type PolicyName = keyof typeof POLICIES;

interface Attack {
  probe: string;
  /** The event that tells of it, as `protocol host rule`. `undefined`: there is none. */
  told: (policy: PolicyName) => string | undefined;
}

/** Wherever a program says `host`, it is `address`. */
const at = (kind: "tcp" | "udp", host: string, rule: string, address = host): Attack => ({
  probe: `${kind} ${host}`,
  told: () => `${kind} ${address} ${rule}`,
});

/** The loopback of a VM is its own: nobody listens there, which is no rule's doing. */
const own = (host: string): Attack[] => [
  { probe: `tcp ${host}`, told: () => undefined },
  { probe: `udp ${host}`, told: () => undefined },
];

/** Has a public address, which is not everybody's. */
const ofTheHost = (host: string): Attack => ({
  probe: `tcp ${host}`,
  told: (policy) => `tcp ${host} ${policy === "public" ? "host" : policy}`,
});

const named = (label: string, rule: string, protocol = "dns"): Attack => {
  const host = `${label}.trusted.example`;
  return {
    probe: `tcp ${host}`,
    told: (policy) => (policy === "none" ? `dns ${host} none` : `${protocol} ${host} ${rule}`),
  };
};

const METADATA = "169.254.169.254";

/** By address first: an address that a name was looked up for is told by that name. */
const ATTACKS: Attack[] = [
  // The host's loopback, in each way to write it.
  ...["127.0.0.1", "127.0.0.2", "::1"].flatMap(own),
  ...["127.1", "2130706433", "0x7f000001", "0177.0.0.1", "0.0.0.0", "::", "::ffff:127.0.0.1"]
    .flatMap(own)
    .filter(({ probe }) => probe.startsWith("tcp")),
  // Where clouds give away credentials.
  at("tcp", METADATA, "link-local"),
  at("tcp", "2852039166", "link-local", METADATA),
  at("tcp", "0xa9fea9fe", "link-local", METADATA),
  at("tcp", "0251.0376.0251.0376", "link-local", METADATA),
  at("tcp", "169.254.43518", "link-local", METADATA),
  at("tcp", "::ffff:169.254.169.254", "link-local", METADATA),
  at("tcp", "64:ff9b::a9fe:a9fe", "link-local"),
  at("tcp", "2002:a9fe:a9fe::1", "reserved"),
  at("tcp", "fd00:ec2::254", "private"),
  at("tcp", "168.63.129.16", "metadata"),
  at("tcp", "100.100.100.200", "shared"),
  at("udp", METADATA, "link-local"),
  at("udp", "64:ff9b::a9fe:a9fe", "link-local"),
  at("udp", "fd00:ec2::254", "private"),
  // Networks that the host is in, or leads to.
  at("tcp", "10.9.9.9", "private"),
  at("tcp", "172.16.5.5", "private"),
  at("tcp", "192.168.1.10", "private"),
  at("tcp", "3232235786", "private", "192.168.1.10"),
  at("tcp", "0xc0.0xa8.0x1.0xa", "private", "192.168.1.10"),
  at("tcp", "::ffff:192.168.1.10", "private", "192.168.1.10"),
  at("tcp", "64:ff9b::c0a8:10a", "private"),
  at("tcp", "fdaa::9", "private"),
  at("udp", "192.168.1.10", "private"),
  at("udp", "fdaa::9", "private"),
  // The host, by its other addresses.
  at("tcp", "192.168.77.1", "private"),
  at("udp", "192.168.77.1", "private"),
  ofTheHost("5.6.7.8"),
  ofTheHost("2600:5::8"),
  ofTheHost("64:ff9b::506:708"),
  // By names whose owner wants to get there.
  named("loopback", "loopback"),
  named("lan", "private"),
  named("metadata", "link-local"),
  named("metadata6", "private"),
  named("nat64", "link-local"),
  named("alias", "link-local"),
  named("host", "host", "tcp"),
];

const SERVERS = [
  ...["127.0.0.1", "127.0.0.2", "::1", "5.6.7.8", "2600:5::8", "192.168.77.1"],
  ...["1.2.3.4", "1.2.3.5", "2606:4700::1"],
  ...["10.9.9.9", "100.100.100.200", "168.63.129.16", METADATA, "172.16.5.5", "192.168.1.10"],
  ...[
    "2002:a9fe:a9fe::1",
    "64:ff9b::a9fe:a9fe",
    "64:ff9b::506:708",
    "64:ff9b::c0a8:10a",
    "fd00:ec2::254",
    "fdaa::9",
  ],
].flatMap((address) => [`tcp ${address}`, `udp ${address}`]);

/** How often servers were reached while `run` went on. Those that nobody reached are left out. */
async function visits(run: () => Promise<void>): Promise<Record<string, number>> {
  // The host goes to each, before and after, and is told how many have come.
  const before = (await world.probe(SERVERS)).map(Number);
  await run();
  const after = (await world.probe(SERVERS)).map(Number);
  expect([...before, ...after].every(Number.isInteger)).toBe(true);
  const counts = SERVERS.map((server, index): [string, number] => [
    server,
    Number(after[index]) - Number(before[index]) - 1,
  ]);
  return Object.fromEntries(counts.filter(([_, count]) => count > 0));
}

/** Errors of connect(2), sendto(2) and getaddrinfo(3). One that waits for an answer would be none. */
const REFUSED = /^(ECONNREFUSED|ECONNRESET|EPERM|ENOTFOUND|EAI_AGAIN)$/;
const REACHED = /^\d+$/;

async function expectTold(vm: Prober, events: string[]): Promise<void> {
  const told = async () =>
    (await vm.denied()).map(({ protocol, host, rule }) => `${protocol} ${host} ${rule}`);
  await expect.poll(told, { timeout: 30_000 }).toEqual(expect.arrayContaining(events));
}

test("the host gets through by every probe, and each server counts it", async () => {
  const reached = await visits(async () => {
    const outcomes = await world.probe(ATTACKS.map(({ probe }) => probe));
    for (const [index, outcome] of outcomes.entries()) {
      expect(outcome, ATTACKS[index]?.probe).toMatch(REACHED);
    }
  });
  const attacked = new Set(ATTACKS.map(({ probe }) => probe));
  for (const server of SERVERS.filter((server) => attacked.has(server))) {
    expect(reached[server], server).toBeGreaterThan(0);
  }
});

const CASES = users.flatMap((user) =>
  (Object.keys(POLICIES) as PolicyName[]).map((policy) => ({ user, policy })),
);

test.for(CASES)("$user reaches nothing of it where $policy holds", async ({ user, policy }) => {
  const vm = await world.boot(POLICIES[policy]);
  const isByName = ({ probe }: Attack) => probe.endsWith(".example");
  const byAddress = ATTACKS.filter((attack) => !isByName(attack));
  // All is told of addresses before names are known for them.
  for (const attacks of [byAddress, ATTACKS.filter(isByName)]) {
    const reached = await visits(async () => {
      const outcomes = await vm.probe(
        attacks.map(({ probe }) => probe),
        user,
      );
      for (const [index, outcome] of outcomes.entries()) {
        expect(outcome, attacks[index]?.probe).toMatch(REFUSED);
      }
    });
    expect(reached).toEqual({});
    await expectTold(
      vm,
      attacks.flatMap(({ told }) => told(policy) ?? []),
    );
  }
});

test.for(users)("%s reaches what is public, and what is allowed", async (user) => {
  const by = async (policy: PolicyName) => {
    const vm = await world.boot(POLICIES[policy]);
    return visits(async () => {
      await vm.probe(["tcp 1.2.3.4", "tcp 2606:4700::1", "udp 1.2.3.4"], user);
      // Its answer has a private address as well.
      await vm.probe(["tcp site.example", "tcp other.example", "tcp mixed.trusted.example"], user);
    });
  };
  expect(await by("public")).toEqual({ "tcp 1.2.3.4": 3, "tcp 1.2.3.5": 1, "tcp 2606:4700::1": 1 });
  expect(await by("none")).toEqual({});
  expect(await by("allowlist")).toEqual({ "tcp 1.2.3.4": 2 });
});

test.for(CASES)(
  "$user gets nowhere else by a name that changes, where $policy holds",
  async (it) => {
    const name = `rebind-${it.user}-${it.policy}.trusted.example`;
    const vm = await world.boot(POLICIES[it.policy]);
    const reached = await visits(async () => {
      const [first, second] = await vm.probe([`tcp ${name}`, `tcp ${name}`], it.user);
      expect(first).toMatch(it.policy === "none" ? REFUSED : REACHED);
      expect(second).toMatch(REFUSED);
    });
    expect(reached).toEqual(it.policy === "none" ? {} : { "tcp 1.2.3.4": 1 });
    await expectTold(vm, [`dns ${name} ${it.policy === "none" ? "none" : "link-local"}`]);
    // The host would have followed it.
    const own = `rebind-host-${it.user}-${it.policy}.trusted.example`;
    const followed = await visits(
      async () => void (await world.probe([`tcp ${own}`, `tcp ${own}`])),
    );
    expect(followed).toEqual({ "tcp 1.2.3.4": 1, [`tcp ${METADATA}`]: 1 });
  },
);

test.for(users)("%s gets nowhere by an old answer", async (user) => {
  const vm = await world.boot(POLICIES.allowlist);
  const reached = await visits(async () => {
    expect(await vm.probe(["tcp site.example", "tcp 1.2.3.4"], user)).toEqual([
      expect.stringMatching(REACHED),
      expect.stringMatching(REACHED),
    ]);
  });
  expect(reached).toEqual({ "tcp 1.2.3.4": 2 });
  await vm.setNetwork({ default: "allowlist", allow: ["*.trusted.example"] });
  const later = await visits(async () => {
    for (const outcome of await vm.probe(["tcp 1.2.3.4", "tcp site.example"], user)) {
      expect(outcome).toMatch(REFUSED);
    }
  });
  expect(later).toEqual({});
  await expectTold(vm, ["tcp site.example allowlist", "dns site.example allowlist"]);
});
