/** Agents that work with a key which their VM does not have: one for each TLS stack. */

import { execFileSync } from "node:child_process";
import { expect, test } from "vitest";
import { newClient, newDirectory, newModel } from "../fixtures.js";
import { newCertificate } from "../tls.js";
import { claude } from "./claude.js";
import { codex } from "./codex.js";
import { opencode } from "./opencode.js";
import { pi } from "./pi.js";

const VALUE = "the-key-that-no-vm-may-have";

test.each([pi, claude, codex, opencode])(
  "$name works with a key that its VM does not have",
  async (it) => {
    const model = await newModel(
      (request) => {
        if (it.isTitle?.(request)) return { text: '{"title":"A test"}' };
        const { messages } = request;
        const isDone = messages.some(({ role }) => role === "tool");
        return isDone ? { text: "Done." } : { toolCalls: [it.run("env | grep API_KEY")] };
      },
      { tls: await newCertificate() },
    );
    const { [Object.keys(it.env(model)).find(isKey) ?? ""]: _, ...env } = it.env(model);
    const name = Object.keys(it.env(model)).find(isKey) ?? "";
    const dataDir = await newDirectory();
    const client = await newClient({
      dataDir,
      loopbackExemptPorts: [model.port],
      secrets: { [name]: { value: VALUE, hosts: [`localhost:${model.port}`] } },
    });
    const agent = client.vm.getOrCreate("vm");
    const misdirected: unknown[] = [];
    agent.on("secretMisdirected", (told) => misdirected.push(told));
    await it.prepare?.(agent);
    const { sessionId } = await agent.createSession(it.name, { env: { ...env, ...it.noRetries } });
    const turn = await agent.sendPrompt(sessionId, "Do it");
    expect(turn.text).toBe("Done.");

    for (const { headers } of model.requests) {
      expect([headers["x-api-key"], headers.authorization]).toContainEqual(
        headers["x-api-key"] === undefined ? `Bearer ${VALUE}` : VALUE,
      );
    }
    const told = JSON.stringify(model.requests.map(({ body }) => body));
    expect(told).toContain("agentvm-secret-");
    expect(told).not.toContain(VALUE);
    expect(JSON.stringify(await agent.getEvents(sessionId))).not.toContain(VALUE);
    expect(misdirected).toEqual([]);
    await agent.sleep();
    expect(filesWith(dataDir)).toBe("");
  },
);

function isKey(name: string): boolean {
  return name.endsWith("_API_KEY");
}

/** What grep(1) finds in the VM's files and ours. */
function filesWith(directory: string): string {
  const script = 'grep -rlF -e "$0" "$1" 2> /dev/null || true';
  return execFileSync("sh", ["-c", script, VALUE, directory], { encoding: "utf8" });
}
