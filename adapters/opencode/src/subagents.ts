/** What a client is asked on behalf of a subagent, in the words in which OpenCode asks for itself. */

/** What is read of OpenCode's own request. */
export interface PermissionAsked {
  id: string;
  sessionID: string;
  permission: string;
  patterns: string[];
  metadata: Record<string, unknown>;
  tool?: { messageID: string; callID: string };
}

export const OPTIONS = [
  { optionId: "once", kind: "allow_once", name: "Allow once" },
  { optionId: "always", kind: "allow_always", name: "Always allow" },
  { optionId: "reject", kind: "reject_once", name: "Reject" },
];

const KINDS: Record<string, string> = {
  bash: "execute",
  edit: "edit",
  webfetch: "fetch",
  websearch: "search",
  read: "read",
  grep: "search",
  glob: "search",
};

export function toolCall({ id, permission, patterns, metadata, tool }: PermissionAsked): object {
  const path = ["filepath", "filePath", "path"]
    .map((name) => metadata[name])
    .find((value) => typeof value === "string");
  const title = [metadata.command, metadata.url, metadata.query, path].find(
    (value) => typeof value === "string" && value !== "",
  );
  return {
    toolCallId: tool?.callID ?? id,
    title: title ?? (patterns.length > 0 ? `${permission} ${patterns.join(", ")}` : permission),
    kind: KINDS[permission] ?? "other",
    status: "pending",
    rawInput: metadata,
    locations: path === undefined ? [] : [{ path }],
  };
}
