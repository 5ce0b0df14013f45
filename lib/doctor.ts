import type * as Api from "../index";
import { call } from "./errors";
import type { native } from "./native";

type NativeClient = InstanceType<typeof native.NativeClient>;

/** What the addon can't know: the Node around it. */
function node(): Api.DoctorCheck {
  const detail = `${process.version}, ${process.platform} ${process.arch}`;
  const tooOld = Number(process.versions.node.split(".")[0]) < 20;
  return tooOld
    ? {
        name: "node",
        state: "missing",
        detail,
        lost: "agentvm is made for Node 20 and newer",
        remedy: "Install a current Node",
      }
    : { name: "node", state: "ok", detail, lost: null, remedy: null };
}

export async function doctor(client: NativeClient): Promise<Api.DoctorResult> {
  const { ok, checks }: Api.DoctorResult = JSON.parse(await call(client.doctor()));
  const own = node();
  return { ok: ok && own.state !== "missing", checks: [own, ...checks] };
}

/** For a person. */
export function report({ ok, checks }: Api.DoctorResult): string {
  const width = Math.max(...checks.map(({ name }) => name.length));
  const lines = checks.flatMap(({ name, state, detail, lost, remedy }) => [
    `${MARKS[state]} ${name.padEnd(width)}  ${detail}`,
    ...(lost === null ? [] : [`${" ".repeat(width + 11)}lost: ${lost}`]),
    ...(remedy === null ? [] : [`${" ".repeat(width + 11)}mend: ${remedy}`]),
  ]);
  const verdict = ok ? "VMs run on this host." : "No VM can run on this host: see what is missing.";
  return [...lines, "", verdict].join("\n");
}

const MARKS = { ok: "ok      ", degraded: "degraded", missing: "MISSING " };
