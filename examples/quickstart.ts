import { version } from "agentvm";

console.log(`agentvm ${await Promise.resolve(version)}`);
