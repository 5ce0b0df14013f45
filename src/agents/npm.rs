//! Running `npm ci` and `npm install`: which npm, how far it is, and what its failures mean.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::process::{Child, Command};

use super::pinned::Versions;

/// Between two looks at how far npm is.
const TICK: Duration = Duration::from_secs(1);

/// Lines of npm's output that an error quotes.
const TAIL_LINES: usize = 30;

/// Longer lines are cut.
const MAX_LINE: usize = 1000;

/// How npm is started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Npm {
    program: PathBuf,
    /// `npm-cli.js`, if `program` is a Node.
    script: Option<PathBuf>,
    /// The host's npmrc for all users, if npm would not find it by itself.
    global_config: Option<PathBuf>,
}

impl Npm {
    /// The npm of the host, or where it was looked for: `AGENTVM_NPM` alone if it is set, else beside
    /// `node` (where Node's own distributions have it), else on the `PATH`.
    pub(super) fn of_host(
        node: &Path,
        env: impl Fn(&str) -> Option<OsString>,
    ) -> Result<Self, Vec<String>> {
        if let Some(own) = env("AGENTVM_NPM").filter(|own| !own.is_empty()) {
            let own = PathBuf::from(own);
            return match own.extension() {
                Some(extension) if extension == "js" && own.is_file() => Ok(Self {
                    program: node.to_owned(),
                    script: Some(own),
                    global_config: None,
                }),
                _ if is_program(&own) => Ok(Self {
                    program: own,
                    script: None,
                    global_config: None,
                }),
                _ => Err(vec![format!("{} (AGENTVM_NPM)", own.display())]),
            };
        }
        let mut tried = Vec::new();
        // A symlink, as /usr/bin/nodejs, may lead to where npm really is.
        let real = fs::canonicalize(node).unwrap_or_else(|_| node.to_owned());
        for node in [node, &real] {
            let Some(prefix) = node.parent().and_then(Path::parent) else {
                continue;
            };
            let script = prefix.join("lib/node_modules/npm/bin/npm-cli.js");
            if script.is_file() {
                return Ok(Self {
                    program: node.to_owned(),
                    script: Some(script),
                    global_config: None,
                });
            }
            let script = script.display().to_string();
            if !tried.contains(&script) {
                tried.push(script);
            }
        }
        let path = env("PATH").unwrap_or_default();
        let on_path = std::env::split_paths(&path)
            .map(|directory| directory.join("npm"))
            .find(|npm| is_program(npm));
        on_path.map_or_else(
            || {
                tried.push("npm on the PATH".to_owned());
                Err(tried)
            },
            |program| {
                Ok(Self {
                    program,
                    script: None,
                    global_config: None,
                })
            },
        )
    }

    /// npm of a runtime entry. It would look for the npmrc of all users beside its own Node: it gets
    /// the one beside `host_node`, unless the environment names another.
    pub(super) fn of_runtime(
        node: PathBuf,
        cli: PathBuf,
        host_node: &Path,
        env: impl Fn(&str) -> Option<OsString>,
    ) -> Self {
        let named = ["npm_config_globalconfig", "NPM_CONFIG_GLOBALCONFIG"]
            .iter()
            .any(|name| env(name).is_some());
        let prefix = host_node.parent().and_then(Path::parent);
        Self {
            program: node,
            script: Some(cli),
            global_config: prefix
                .filter(|_| !named)
                .map(|prefix| prefix.join("etc/npmrc")),
        }
    }

    /// As a person would type it.
    pub(super) fn command(&self) -> String {
        match &self.script {
            Some(script) => format!("{} {}", self.program.display(), script.display()),
            None => self.program.display().to_string(),
        }
    }

    /// Installs what `directory/package-lock.json` says, no more and no less, or makes that file if the
    /// versions are not locked yet. Runs no script of any package. `tick` is called every second with the number of bytes written so far. When this
    /// returns, and also when it is dropped, no process of npm is left running.
    pub(super) async fn install(
        &self,
        directory: &Path,
        versions: &Versions,
        cancelled: impl Future<Output = ()> + Send,
        tick: impl Fn(u64) + Send + Sync,
    ) -> Result<(), Failure> {
        let (output, writer) = output_pipe().map_err(Failure::Start)?;
        let mut npm = self
            .start(directory, versions, writer)
            .map_err(Failure::Start)?;
        let mut output = Output::new(output);
        let mut ticks = tokio::time::interval(TICK);
        let mut cancelled = std::pin::pin!(cancelled);
        let status = loop {
            tokio::select! {
                status = npm.child.wait() => break status.map_err(Failure::Start)?,
                () = output.read(), if output.open => {}
                _ = ticks.tick() => tick(npm.written()),
                () = &mut cancelled => {
                    npm.kill();
                    npm.child.wait().await.map_err(Failure::Start)?;
                    npm.group = None;
                    return Err(Failure::Cancelled);
                }
            }
        };
        npm.group = None;
        output.drain();
        if status.success() && output.broken_tarball.is_none() {
            Ok(())
        } else {
            let (reason, output) = output.into_reason(versions, status);
            Err(Failure::Npm { reason, output })
        }
    }

    fn start(
        &self,
        directory: &Path,
        versions: &Versions,
        output: io::PipeWriter,
    ) -> io::Result<Running> {
        let command: &[&str] = match versions {
            Versions::Locked(_) => &["ci"],
            // Hashes for every package, and of no registry's name.
            Versions::Resolved { .. } => &[
                "install",
                "--lockfile-version=3",
                "--omit-lockfile-registry-resolved",
                "--no-package-lock-only",
                "--no-legacy-peer-deps",
            ],
        };
        let mut prefix = OsString::from("--prefix=");
        prefix.push(directory);
        let global_config = self.global_config.as_ref().map(|file| {
            let mut option = OsString::from("--globalconfig=");
            option.push(file);
            option
        });
        // The environment and the working directory are inherited: the user's registry, proxies,
        // certificates and NODE_OPTIONS mean what they mean to the program that embeds us. Options
        // that would change *what* is installed are overridden, whatever ~/.npmrc says.
        let child = Command::new(&self.program)
            .args(&self.script)
            .args(command)
            .args(["--ignore-scripts", "--no-audit", "--no-fund"])
            .args(["--omit=dev", "--include=prod", "--include=optional"])
            .args(["--include=peer", "--install-strategy=hoisted"])
            .args(["--no-dry-run", "--no-global", "--package-lock"])
            // For `Output`. A line per request also ends an npm that outlives a killed installer:
            // nobody reads it any more.
            .args(["--loglevel=http", "--no-progress", "--no-color"])
            .args(["--no-json", "--no-update-notifier"])
            .arg(prefix)
            .args(global_config)
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .process_group(0)
            .kill_on_drop(true)
            .spawn()?;
        let group = child.id().map(|pid| Pid::from_raw(pid.cast_signed()));
        Ok(Running { child, group })
    }
}

fn is_program(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|data| data.is_file() && data.permissions().mode() & 0o111 != 0)
}

/// Why npm did not install.
#[derive(Debug)]
pub(super) enum Failure {
    Start(io::Error),
    Cancelled,
    Npm { reason: String, output: String },
}

/// npm, leader of a process group that is killed with it.
struct Running {
    child: Child,
    /// `None` once the leader is reaped: from then on the number may be another's.
    group: Option<Pid>,
}

impl Running {
    fn kill(&self) {
        if let Some(group) = self.group
            && let Err(errno) = killpg(group, Signal::SIGKILL)
        {
            tracing::debug!(%errno, %group, "npm was gone already");
        }
    }

    /// `wchar` of proc(5): what it has given to write(2).
    fn written(&self) -> u64 {
        self.child
            .id()
            .and_then(|pid| fs::read_to_string(format!("/proc/{pid}/io")).ok())
            .and_then(|text| {
                let line = text.lines().find_map(|line| line.strip_prefix("wchar: "))?;
                line.parse().ok()
            })
            .unwrap_or(0)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.kill();
    }
}

fn output_pipe() -> io::Result<(pipe::Receiver, io::PipeWriter)> {
    let (reader, writer) = io::pipe()?;
    Ok((
        pipe::Receiver::from_owned_fd(OwnedFd::from(reader))?,
        writer,
    ))
}

/// What npm writes: read to the end, little of it kept.
struct Output {
    pipe: pipe::Receiver,
    chunk: Vec<u8>,
    line: Vec<u8>,
    open: bool,
    /// The last lines, without those about requests.
    tail: VecDeque<String>,
    last_request: Option<String>,
    /// The code behind `npm error code`.
    code: Option<String>,
    /// npm only warns when a file of a package can't be written, and then reports success.
    broken_tarball: Option<String>,
}

impl Output {
    fn new(pipe: pipe::Receiver) -> Self {
        Self {
            pipe,
            chunk: vec![0; 16 * 1024],
            line: Vec::new(),
            open: true,
            tail: VecDeque::new(),
            last_request: None,
            code: None,
            broken_tarball: None,
        }
    }

    async fn read(&mut self) {
        match self.pipe.read(&mut self.chunk).await {
            Ok(0) | Err(_) => self.open = false,
            Ok(length) => self.take(length),
        }
    }

    /// Reads what is there. A process that npm left behind may hold the pipe open: not waited for.
    fn drain(&mut self) {
        while self.open {
            match nix::unistd::read(&self.pipe, &mut self.chunk) {
                Ok(0) | Err(_) => self.open = false,
                Ok(length) => self.take(length),
            }
        }
        self.end_line();
    }

    fn take(&mut self, length: usize) {
        for index in 0..length {
            match self.chunk[index] {
                b'\n' => self.end_line(),
                byte if self.line.len() < MAX_LINE => self.line.push(byte),
                _ => {}
            }
        }
    }

    fn end_line(&mut self) {
        let line = String::from_utf8_lossy(&std::mem::take(&mut self.line))
            .trim_end()
            .to_owned();
        if line.is_empty() {
            return;
        }
        // `npm ERR!` until npm 10.7.
        let error = line
            .strip_prefix("npm error ")
            .or_else(|| line.strip_prefix("npm ERR! "));
        if let Some(code) = error.and_then(|error| error.strip_prefix("code "))
            && self.code.is_none()
        {
            self.code = Some(code.to_owned());
        }
        if line.starts_with("npm http ") {
            self.last_request = Some(line);
            return;
        }
        let broken = ["TAR_ENTRY_ERROR", "TAR_BAD_ARCHIVE", "TAR_ABORT"];
        if self.broken_tarball.is_none() && broken.iter().any(|code| line.contains(code)) {
            self.broken_tarball = Some(line.clone());
        }
        if self.tail.len() == TAIL_LINES {
            self.tail.pop_front();
        }
        self.tail.push_back(line);
    }

    /// Why it failed, and what to quote.
    fn into_reason(self, versions: &Versions, status: ExitStatus) -> (String, String) {
        let code = self.code.as_deref();
        let reason = reason(code, self.broken_tarball.as_deref(), versions, status);
        let mut lines: Vec<String> = self.tail.into();
        if lines.is_empty() {
            lines.extend(self.last_request);
        }
        (reason, lines.join("\n"))
    }
}

/// One clause that names the cause and the remedy.
fn reason(
    code: Option<&str>,
    broken_tarball: Option<&str>,
    versions: &Versions,
    status: ExitStatus,
) -> String {
    const FULL: &str = "the disk is full: make room for the agent store and for npm's cache \
        (`npm config get cache`), or set AGENTVM_CACHE_DIR to a directory elsewhere";
    if let Some(line) = broken_tarball {
        return if line.contains("ENOSPC") || line.contains("EDQUOT") {
            FULL.to_owned()
        } else {
            "npm could not unpack a package".to_owned()
        };
    }
    let Some(code) = code else {
        use std::os::unix::process::ExitStatusExt;
        return match (status.signal(), status.code()) {
            (Some(signal), _) => {
                format!(
                    "npm was killed by signal {signal}; if by the host for want of memory, free some"
                )
            }
            (None, Some(code)) => format!("npm ended with exit code {code}"),
            (None, None) => format!("npm ended: {status}"),
        };
    };
    match code {
        "ENOSPC" | "EDQUOT" => FULL.to_owned(),
        "EINTEGRITY" => {
            "a downloaded package is not the one that agentvm pins (EINTEGRITY). Nothing \
            was installed; the registry, a proxy or npm's cache delivers another content: run `npm \
            cache verify` and check `npm config get registry`"
                .to_owned()
        }
        "E401" | "E403" | "ENEEDAUTH" => {
            format!("the npm registry refused access ({code}): check the credentials in ~/.npmrc")
        }
        "E404" | "ETARGET" | "ENOVERSIONS" => {
            let missing = match versions {
                Versions::Locked(_) => "a pinned package",
                Versions::Resolved { wanted } => &format!("{wanted}, or a package that it needs"),
            };
            format!(
                "the npm registry does not have {missing} ({code}): check `npm config get \
                 registry`, and `before` or `min-release-age` in ~/.npmrc"
            )
        }
        "EACCES" | "EPERM" | "EROFS" => format!(
            "npm may not write where it must ({code}): the agent store or npm's cache (`npm config \
             get cache`)"
        ),
        "ENOTCACHED" => "npm is set to work offline, and its cache does not have a package that \
            is needed (ENOTCACHED): take `offline` out of ~/.npmrc"
            .to_owned(),
        _ if code.contains("CERT") || code.starts_with("UNABLE_TO_") => format!(
            "the certificate of the npm registry or proxy is not trusted ({code}): set \
             NODE_EXTRA_CA_CERTS, or `cafile` in ~/.npmrc"
        ),
        "ENOTFOUND" | "EAI_AGAIN" | "ECONNREFUSED" | "ECONNRESET" | "ENETUNREACH"
        | "EHOSTUNREACH" | "ETIMEDOUT" | "ERR_SOCKET_TIMEOUT" | "EIDLETIMEOUT" | "FETCH_ERROR"
        | "EPIPE" => format!(
            "the npm registry could not be reached ({code}): check the network, the proxy, and `npm \
             config get registry`, then run `npx agentvm install` again"
        ),
        _ => format!("npm failed with {code}"),
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    fn program(path: &Path) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "#!/bin/sh\n").unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    #[test]
    fn npm_beside_the_running_node_comes_before_the_one_on_the_path() {
        let host = tempfile::tempdir().unwrap();
        let node = host.path().join("bin/node");
        let on_path = host.path().join("other/npm");
        program(&node);
        program(&on_path);
        let env = |name: &str| (name == "PATH").then(|| host.path().join("other").into_os_string());
        let found = Npm::of_host(&node, env).unwrap();
        assert_eq!(found.command(), on_path.display().to_string());
        let cli = host.path().join("lib/node_modules/npm/bin/npm-cli.js");
        program(&cli);
        let found = Npm::of_host(&node, env).unwrap();
        assert_eq!(
            found.command(),
            format!("{} {}", node.display(), cli.display())
        );
    }

    #[test]
    fn a_set_agentvm_npm_that_does_not_exist_is_not_replaced_by_another() {
        let env = |name: &str| match name {
            "AGENTVM_NPM" => Some("/nowhere/npm".into()),
            _ => std::env::var_os(name),
        };
        let tried = Npm::of_host(Path::new("/usr/bin/node"), env).unwrap_err();
        assert_eq!(tried, ["/nowhere/npm (AGENTVM_NPM)"]);
    }

    async fn parsed(text: &str) -> Output {
        let (pipe, writer) = output_pipe().unwrap();
        io::Write::write_all(&mut { writer }, text.as_bytes()).unwrap();
        let mut output = Output::new(pipe);
        while output.open {
            output.read().await;
        }
        output.drain();
        output
    }

    #[tokio::test]
    async fn a_failure_is_told_by_npms_code_and_its_own_words_without_the_requests() {
        for prefix in ["npm error", "npm ERR!"] {
            let output = parsed(&format!(
                "npm http fetch GET 200 somewhere\n{prefix} code EINTEGRITY\n{prefix} sha512-x wanted"
            ))
            .await;
            let (reason, quoted) =
                output.into_reason(&Versions::Locked(""), ExitStatus::from_raw(1 << 8));
            assert!(reason.contains("not the one that agentvm pins"), "{reason}");
            assert_eq!(
                quoted,
                format!("{prefix} code EINTEGRITY\n{prefix} sha512-x wanted")
            );
        }
    }

    #[tokio::test]
    async fn a_file_that_could_not_be_unpacked_is_a_failure_though_npm_only_warns() {
        let output =
            parsed("npm warn tar TAR_ENTRY_ERROR ENOSPC: no space left on device, write\n").await;
        assert!(output.broken_tarball.is_some());
        let (reason, _) = output.into_reason(&Versions::Locked(""), ExitStatus::from_raw(0));
        assert!(reason.starts_with("the disk is full"), "{reason}");
    }

    #[tokio::test]
    async fn of_much_output_only_the_end_is_kept() {
        let output = parsed(&"a line\n".repeat(1000)).await;
        assert_eq!(output.tail.len(), TAIL_LINES);
        let output = parsed(&"x".repeat(10 * MAX_LINE)).await;
        assert_eq!(output.tail[0].len(), MAX_LINE);
    }
}
