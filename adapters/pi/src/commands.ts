/** Pi's slash commands: those of extensions, prompt templates and skills. */

import type { AgentSession } from "@earendil-works/pi-coding-agent";
import type { AvailableCommand } from "./shared/acp.js";

export function availableCommands(pi: AgentSession): AvailableCommand[] {
  return [
    ...pi.extensionRunner.getRegisteredCommands().map(({ invocationName, description }) => ({
      name: invocationName,
      description: description ?? "",
    })),
    ...pi.promptTemplates.map(({ name, description, argumentHint }) => ({
      name,
      description,
      ...(argumentHint ? { input: { hint: argumentHint } } : {}),
    })),
    ...pi.resourceLoader.getSkills().skills.map(({ name, description }) => ({
      name: `skill:${name}`,
      description,
    })),
  ];
}
