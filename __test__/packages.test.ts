// Installing what is missing: as root in a VM of a host's root, and as user everywhere.

import { execFileSync } from "node:child_process";
import type { Agent } from "agentvm";
import { describe, expect, test } from "vitest";
import { newAptRepository } from "./apt-repository.js";
import { isRoot, newClient, newDirectory, newVm } from "./fixtures.js";
import { newRegistry } from "./npm-registry.js";

const hasDpkg = isOnHost("dpkg-deb");
const hasPip = isOnHost("pip3");

/** What a command that has to succeed prints. */
async function run(agent: Agent, command: string, user: "user" | "root" = "user"): Promise<string> {
  const { stdout, stderr, exitCode } = await agent.exec(command, { user });
  expect({ exitCode, stderr: exitCode === 0 ? "" : stderr + stdout }).toEqual({
    exitCode: 0,
    stderr: "",
  });
  return stdout.trim();
}

describe.runIf(isRoot && hasDpkg)("as root in the VM", () => {
  const daemon = {
    name: "vm-daemon",
    version: "1.2",
    fields: { Depends: "adduser" },
    files: {
      "/usr/bin/vm-daemon": "#!/bin/sh\necho runs\n",
      "/etc/vm-daemon.conf": "setting\n",
      "/var/lib/vm-daemon/data": "",
      "/etc/init.d/vm-daemon": "#!/bin/sh\ntouch /started\n",
    },
    scripts: {
      postinst: [
        "adduser --quiet --system --group --no-create-home --home /var/lib/vm-daemon vm-daemon",
        "chown -R vm-daemon:vm-daemon /var/lib/vm-daemon",
        "su -s /bin/sh vm-daemon -c 'id -un > /var/lib/vm-daemon/data'",
        "update-alternatives --install /usr/bin/vm-alternative vm-alternative /usr/bin/vm-daemon 1",
        "chmod 755 /etc/init.d/vm-daemon",
        "invoke-rc.d vm-daemon start",
      ].join("\n"),
    },
  };

  test("apt installs a package with its accounts, and it is there after sleep and in the next process", async () => {
    const repository = await newAptRepository([daemon]);
    const options = { dataDir: await newDirectory(), loopbackExemptPorts: [repository.port] };
    const client = await newClient(options);
    const agent = client.vm.getOrCreate("vm");
    await run(agent, "rm -rf /etc/apt/sources.list*", "root");
    await agent.writeFile("/tmp/source", repository.source);
    await run(agent, "install -m 644 /tmp/source /etc/apt/sources.list", "root");
    await run(agent, "apt-get update && apt-get install -y vm-daemon", "root");

    const installed = [
      "vm-daemon; vm-alternative; cat /var/lib/vm-daemon/data /etc/vm-daemon.conf",
      "stat -c %U:%G /var/lib/vm-daemon; test -e /started || echo no service started",
      "dpkg-query -s vm-daemon | grep Status",
    ].join("; ");
    const there =
      "runs\nruns\nvm-daemon\nsetting\nvm-daemon:vm-daemon\nno service started\nStatus: install ok installed";
    expect(await run(agent, installed)).toBe(there);
    await agent.sleep();
    expect(await run(agent, installed)).toBe(there);
    await client.close();
    const again = (await newClient(options)).vm.getOrCreate("vm");
    expect(await run(again, installed)).toBe(there);
    await run(again, "apt-get purge -y vm-daemon", "root");
    expect(await run(again, "command -v vm-daemon || echo gone")).toBe("gone");
  });

  test("what is not the distribution's goes to /opt and /srv, and accounts to /home, to stay there", async () => {
    const tool = {
      name: "vm-tool",
      version: "1",
      files: { "/opt/vm-tool/run": "#!/bin/sh\necho runs\n", "/srv/vm-tool/data": "data\n" },
      fields: { Depends: "adduser" },
      scripts: { postinst: "adduser --quiet --disabled-password --gecos '' somebody" },
    };
    const repository = await newAptRepository([tool]);
    const agent = await newVm({ loopbackExemptPorts: [repository.port] });
    await run(agent, "rm -rf /etc/apt/sources.list*", "root");
    await agent.writeFile("/tmp/source", repository.source);
    await run(agent, "install -m 644 /tmp/source /etc/apt/sources.list", "root");
    await run(agent, "apt-get update && apt-get install -y vm-tool", "root");
    await run(agent, "su - somebody -c 'echo mine > own'", "root");
    await agent.sleep();
    const there = "sh /opt/vm-tool/run; cat /srv/vm-tool/data; stat -c %U /home/*";
    expect(await run(agent, there)).toBe("runs\ndata\nsomebody\nuser");
    expect(await run(agent, "cat /home/somebody/own", "root")).toBe("mine");
  });

  test("a VM's packages are its own", async () => {
    const client = await newClient();
    const [one, other] = [client.vm.getOrCreate("one"), client.vm.getOrCreate("other")];
    await run(one, "dpkg --remove --force-remove-essential --force-depends hostname", "root");
    expect(await run(one, "command -v hostname || echo gone")).toBe("gone");
    expect(await run(other, "dpkg-query -s hostname | grep Status; hostname")).toBe(
      "Status: install ok installed\nagentvm",
    );
    expect(isOnHost("hostname")).toBe(true);
  });

  test("certificates and libraries are registered", async () => {
    const agent = await newVm();
    const make =
      "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout /dev/null " +
      "-subj /CN=agentvm-test -days 2 -out /usr/local/share/ca-certificates/test.crt 2>&1";
    await run(agent, `${make} && update-ca-certificates && ldconfig`, "root");
    const trusted = await run(
      agent,
      "openssl verify -CApath /etc/ssl/certs /usr/local/share/ca-certificates/test.crt",
    );
    expect(trusted).toContain(": OK");
  });

  test.runIf(hasPip)("pip installs for everyone", async () => {
    const agent = await newVm();
    await run(agent, pythonPackage("/root/package"), "root");
    await run(agent, `pip install ${PIP_OFFLINE} /root/package`, "root");
    await agent.sleep();
    expect(await run(agent, "command -v vm-tool; vm-tool")).toBe("/usr/local/bin/vm-tool\nran");
  });
});

test.runIf(hasDpkg)("dpkg knows what the base has installed", async () => {
  const agent = await newVm();
  const known = await run(agent, "dpkg-query -s dpkg | grep Status; dpkg -S bin/dpkg");
  expect(known).toMatch(/^Status: install ok installed/);
});

test("npm installs programs for user where the shell finds them", async () => {
  const program = "console.log('ran')";
  const registry = await newRegistry({ name: "vm-tool", version: "1.0.0", program });
  const agent = await newVm({ loopbackExemptPorts: [registry.port] });
  await run(agent, `npm install --global --registry ${registry.url} vm-tool`);
  expect(await run(agent, "command -v vm-tool; vm-tool")).toBe(
    "/home/user/.local/bin/vm-tool\nran",
  );
});

test.runIf(hasPip)(
  "pip installs for user, and in virtual environments",
  {
    timeout: 60_000,
  },
  async () => {
    const agent = await newVm();
    await run(agent, pythonPackage("package"));
    await run(agent, `pip install ${PIP_OFFLINE} ./package`);
    expect(await run(agent, "command -v vm-tool; vm-tool")).toBe(
      "/home/user/.local/bin/vm-tool\nran",
    );

    await run(agent, "python3 -m venv --system-site-packages env");
    await run(agent, `env/bin/pip install ${PIP_OFFLINE} --ignore-installed ./package`);
    expect(await run(agent, "env/bin/vm-tool")).toBe("ran");
  },
);

test("programs of user's own come first on PATH, in login shells too", async () => {
  const agent = await newVm();
  await run(agent, "install -D /bin/true ~/.local/bin/own && cp /bin/false ~/.local/bin/ls");
  for (const shell of ["sh -c", "sh -lc", "bash -c", "bash -lc"]) {
    const found = await run(agent, `${shell} 'command -v own; command -v ls'`);
    expect(found, shell).toBe("/home/user/.local/bin/own\n/home/user/.local/bin/ls");
  }
});

test("a login shell keeps the PATH that it was started with", async () => {
  const agent = await newVm();
  const { stdout } = await agent.exec("bash -lc 'echo $PATH'", {
    env: { PATH: "/usr/bin:/bin:/opt/tools" },
  });
  expect(stdout).toBe("/usr/bin:/bin:/opt/tools\n");
});

test("a login shell of bash reads ~/.bashrc, unless there is a profile that says otherwise", async () => {
  const agent = await newVm();
  await agent.writeFile(".bashrc", "OWN=bashrc\n. /etc/profile\n");
  const shown = "bash -lc 'echo $OWN'; bash -c 'echo $OWN'; sh -lc 'echo $OWN'";
  expect(await run(agent, shown)).toBe("bashrc");
  await agent.writeFile(".profile", "OWN=profile\n");
  expect(await run(agent, shown)).toBe("profile\n\nprofile");
  await agent.writeFile(".bash_profile", "echo of bash: $OWN\n");
  expect(await run(agent, "bash -lc true")).toBe("of bash:");
});

test("what installers append to ~/.bashrc and to a new ~/.profile is found by every login shell", async () => {
  const agent = await newVm();
  await agent.exec(`printf '\\necho bashrc\\nPATH=$PATH:/of-bashrc' >> ~/.bashrc
    echo 'export PATH="$PATH:/of-profile"' >> ~/.profile`);
  expect(await run(agent, "sh -lc 'echo $PATH'")).toMatch(/bin:\/of-profile$/);
  const { stdout, stderr } = await agent.exec("line=own bash -lc 'echo $PATH $line; declare -F'");
  expect({ stdout, stderr }).toEqual({
    stdout: expect.stringMatching(/^bashrc\n.*:\/of-bashrc:\/of-profile own\n$/),
    stderr: "",
  });
});

test("a ~/.profile that reads ~/.bashrc itself has it read once", async () => {
  const agent = await newVm();
  await agent.writeFile(".bashrc", "echo read\n");
  const debians = 'if [ -n "$BASH_VERSION" ]; then\n  . "$HOME/.bashrc"\nfi';
  await agent.writeFile(".profile", debians);
  expect(await run(agent, "bash -lc true")).toBe("read");
});

/** The build tools are those of the base: there is no network. */
const PIP_OFFLINE = "--no-build-isolation --no-index --disable-pip-version-check";

/** A command that makes a Python package whose program is `vm-tool`. */
function pythonPackage(directory: string): string {
  const setup =
    'from setuptools import setup; setup(name="vm-tool", version="1", py_modules=["vm_tool"], ' +
    'entry_points={"console_scripts": ["vm-tool=vm_tool:main"]})';
  return [
    `mkdir -p ${directory}`,
    `cd ${directory}`,
    `echo '${setup}' > setup.py`,
    `echo 'def main(): print("ran")' > vm_tool.py`,
  ].join(" && ");
}

function isOnHost(program: string): boolean {
  try {
    execFileSync("sh", ["-c", `command -v ${program}`], { env: { PATH: "/usr/bin:/bin" } });
    return true;
  } catch {
    return false;
  }
}
