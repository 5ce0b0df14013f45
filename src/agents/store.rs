//! The agent store as the rest of the program sees it.

use std::convert::Infallible;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{oneshot, watch};

use super::adapter;
use super::catalog::{Agent, BuiltIn};
use super::compile_cache;
use super::error::AgentError;
use super::install::{self, Movement, blocking, is_installed, store, sweep};
use super::inventory::{self, StoreEntry, Used};
use super::lease::Lease;
use super::npm::Npm;
use super::own::{ClientAgents, OwnAgent};
use super::pinned::Packages;
use super::progress::{InstallProgress, Step};
use super::removal::{self, Removal};
use super::runtime::{self, RUNTIME};
use super::version::Version;

/// Where the store is unless the caller says otherwise: `$AGENTVM_CACHE_DIR/agents`, else
/// `$XDG_CACHE_HOME/agentvm/agents`, else `~/.cache/agentvm/agents`. `env` reads a variable.
pub fn default_root(env: impl Fn(&str) -> Option<OsString>) -> Result<PathBuf, AgentError> {
    let directory = |name| {
        env(name)
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
    };
    if let Some(own) = env("AGENTVM_CACHE_DIR").filter(|own| !own.is_empty()) {
        return Ok(PathBuf::from(own).join("agents"));
    }
    // Relative paths in XDG variables are to be ignored (XDG Base Directory Specification).
    directory("XDG_CACHE_HOME")
        .or_else(|| Some(directory("HOME")?.join(".cache")))
        .map(|cache| cache.join("agentvm/agents"))
        .ok_or(AgentError::NoCacheDirectory)
}

/// A handle to the store; clones are the same store.
#[derive(Debug, Clone)]
pub struct AgentStore {
    places: Arc<Places>,
}

#[derive(Debug)]
struct Places {
    root: PathBuf,
    package: PathBuf,
    node: PathBuf,
}

/// An agent that is ready to be launched.
#[derive(Debug, Clone)]
pub enum Installed {
    BuiltIn(InStore),
    /// Whether its program is there is for the VM to say.
    Own(Arc<OwnAgent>),
}

/// A built-in agent that is ready to be launched in every VM that has the store mounted.
#[derive(Debug, Clone)]
pub struct InStore {
    pub agent: BuiltIn,
    /// Directories relative to the store.
    pub(super) runtime: String,
    pub(super) entry: String,
    /// What speaks ACP: relative to `entry`.
    pub(super) program: PathBuf,
    pub(super) compile_cache: CompileCache,
    /// To be held for as long as anything in a VM may run on it.
    pub leases: Vec<Lease>,
    /// Whether its packages have only now been installed.
    pub is_new: bool,
}

/// Place of an agent's compiled scripts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct CompileCache {
    /// Directory relative to the entry.
    pub(super) name: String,
    pub(super) is_there: bool,
}

/// A built-in agent as a client runs it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Available {
    pub name: &'static str,
    /// The npm package that is this agent, or speaks ACP for it.
    pub package: &'static str,
    pub version: String,
    /// Whether it is the version that this agentvm is tested with.
    pub is_pinned: bool,
    pub is_installed: bool,
}

impl Installed {
    /// What keeps it in the store.
    #[must_use]
    pub fn leases(&self) -> &[Lease] {
        match self {
            Self::BuiltIn(agent) => &agent.leases,
            Self::Own(_) => &[],
        }
    }
}

impl InStore {
    /// It would start faster with compiled scripts, and has none.
    #[must_use]
    pub fn lacks_compile_cache(&self) -> bool {
        !self.compile_cache.is_there
    }
}

impl AgentStore {
    /// A store at `root`, which is made when something is installed. `package` is the root of our own
    /// npm package (it holds `adapters/`), `node` the Node that runs this process: npm is looked for
    /// beside it.
    #[must_use]
    pub fn new(root: PathBuf, package: PathBuf, node: PathBuf) -> Self {
        let root = std::path::absolute(&root).unwrap_or(root);
        Self {
            places: Arc::new(Places {
                root,
                package,
                node,
            }),
        }
    }

    #[must_use]
    pub fn root(&self) -> &Path {
        &self.places.root
    }

    /// Makes sure that `agent` is there, and installs what is missing if it may: the runtime, the
    /// agent's packages (both from the npm registry), our adapter. A few file look-ups if all is there,
    /// and not even these for a client's own agent.
    ///
    /// Only one installer, of all processes, makes an entry; others wait for it. Dropping the future
    /// cancels the installation and removes what it has made so far.
    pub async fn ensure(
        &self,
        agent: &Agent,
        auto_install: bool,
        progress: &(dyn Fn(InstallProgress) + Send + Sync),
    ) -> Result<Installed, AgentError> {
        let (agent, version) = match agent {
            Agent::BuiltIn(agent) => (*agent, None),
            Agent::InVersion(agent, version) => (*agent, Some(version)),
            Agent::Own(agent) => return Ok(Installed::Own(Arc::clone(agent))),
        };
        let entry = agent.entry(version)?;
        if !(auto_install || self.has(&entry)) {
            return Err(AgentError::NotInstalled {
                agent: version.map_or_else(
                    || agent.name().to_owned(),
                    |version| format!("{}@{version}", agent.name()),
                ),
                store: self.root().to_owned(),
            });
        }
        install::make_root(self.root())?;
        // Before it is looked for: what is there now, or comes now, stays.
        let mut leases = vec![
            Lease::take(self.root(), &runtime::ENTRY).await?,
            Lease::take(self.root(), &entry).await?,
        ];
        let is_new = !self.has(&entry);
        if is_new {
            // Also if it has been removed since it was looked for: that is a missing one.
            if !auto_install {
                return Err(AgentError::NotInstalled {
                    agent: agent.name().to_owned(),
                    store: self.root().to_owned(),
                });
            }
            self.install(agent, version, progress).await?;
        }
        let dist = adapter::dist(&self.places.package, agent.definition().adapter);
        let adapter = adapter::ensure(self.root(), &entry, agent.name(), dist).await?;
        leases.push(Lease::take(self.root(), &format!("{entry}/{adapter}")).await?);
        let program = Path::new(&adapter).join(adapter::MAIN);
        let cache = compile_cache::name(&runtime::ENTRY, &program);
        let compile_cache = CompileCache {
            is_there: self.root().join(&entry).join(&cache).exists(),
            name: cache,
        };
        Ok(Installed::BuiltIn(InStore {
            agent,
            runtime: runtime::ENTRY.clone(),
            entry,
            program,
            compile_cache,
            leases,
            is_new,
        }))
    }

    fn has(&self, entry: &str) -> bool {
        is_installed(self.root(), &runtime::ENTRY) && is_installed(self.root(), entry)
    }

    /// Keeps the compiled scripts of an agent, which a VM has written that ran nothing but it. Paths are
    /// relative to its `NODE_COMPILE_CACHE`.
    pub async fn keep_compile_cache(
        &self,
        agent: &InStore,
        files: Vec<(PathBuf, Vec<u8>)>,
    ) -> Result<(), AgentError> {
        let cache = &agent.compile_cache.name;
        compile_cache::keep(self.root(), &agent.entry, cache, files).await
    }

    /// The built-in agents, for a client that has `configured` agents.
    pub async fn available(&self, configured: &ClientAgents) -> Result<Vec<Available>, AgentError> {
        let (store, configured) = (self.clone(), configured.clone());
        let available = move |agent: BuiltIn| {
            let version = configured.version(agent);
            let pinned = agent.version();
            Ok(Available {
                name: agent.name(),
                package: agent.package(),
                version: version.map_or(pinned, Version::as_str).to_owned(),
                is_pinned: version.is_none(),
                is_installed: store.has(&agent.entry(version)?),
            })
        };
        let here = BuiltIn::ALL.into_iter().filter(|agent| agent.runs_here());
        blocking(move || here.map(available).collect()).await
    }

    /// What is in the store, of all versions of agentvm.
    pub async fn list(&self) -> Result<Vec<StoreEntry>, AgentError> {
        let places = Arc::clone(&self.places);
        blocking(move || inventory::list(&places.root, &places.package)).await
    }

    /// Removes an agent: all that the store has of it, or one version. The runtime stays, which others
    /// need too. What is not there is as good as removed.
    ///
    /// What a running VM uses, of whatever process, and what is just being installed, stays and is an
    /// error; the rest is removed nevertheless.
    pub async fn remove(
        &self,
        agent: BuiltIn,
        version: Option<&str>,
    ) -> Result<Removal, AgentError> {
        let mut entries = self.list().await?;
        entries.retain(|entry| {
            // With an entry go its parts.
            entry.agent == agent.name()
                && !entry.name.contains('/')
                && version.is_none_or(|version| entry.version == version)
        });
        let places = Arc::clone(&self.places);
        blocking(move || {
            let root = &places.root;
            removal::remove(root, entries, false)?.complete(root)
        })
        .await
    }

    /// Removes what this version of agentvm never uses, and what killed installers have left. What a
    /// running VM uses, and what is just being installed, stays. `pretend`: removes nothing.
    pub async fn prune(&self, pretend: bool) -> Result<Removal, AgentError> {
        let mut entries = self.list().await?;
        entries.retain(|entry| entry.used == Used::Never);
        let places = Arc::clone(&self.places);
        blocking(move || {
            if !pretend {
                sweep(&places.root, None, None);
            }
            removal::remove(&places.root, entries, pretend)
        })
        .await
    }

    /// The work is a task of its own: if the caller's future is dropped, the task still kills npm,
    /// waits for its end and clears up.
    async fn install(
        &self,
        agent: BuiltIn,
        version: Option<&Version>,
        progress: &(dyn Fn(InstallProgress) + Send + Sync),
    ) -> Result<(), AgentError> {
        // Dropped with this future.
        let (_caller, gone) = oneshot::channel::<Infallible>();
        // A slow listener sees the latest state, not every one.
        let (moved, mut moving) = watch::channel(None);
        let places = Arc::clone(&self.places);
        let packages = agent.packages(version)?;
        let task = tokio::spawn(install_missing(places, agent.name(), packages, moved, gone));
        while moving.changed().await.is_ok() {
            let latest = moving.borrow_and_update().clone();
            if let Some(latest) = latest {
                progress(latest);
            }
        }
        task.await
            .unwrap_or_else(|error| Err(AgentError::Ended(error.to_string())))
    }
}

async fn install_missing(
    places: Arc<Places>,
    agent: &'static str,
    packages: Packages,
    moved: watch::Sender<Option<InstallProgress>>,
    mut caller: oneshot::Receiver<Infallible>,
) -> Result<(), AgentError> {
    // Also when its caller is gone: until npm has ended, it runs on it.
    let _npm = Lease::take(&places.root, &runtime::ENTRY).await?;
    let report = |step, title: &str, movement| {
        moved.send_replace(Some(describe(agent, step, title, movement)));
    };
    let env = |name: &str| std::env::var_os(name);
    let mut cancelled = async || drop((&mut caller).await);
    if !is_installed(&places.root, &runtime::ENTRY) {
        let npm = Npm::of_host(&places.node, env).map_err(|tried| AgentError::NoNpm {
            title: packages.title.clone(),
            tried,
        })?;
        let lay_out = |entry: &Path| {
            runtime::lay_out(entry).map_err(|error| store("can't set up", entry, error))?;
            runtime::try_out(entry)
        };
        let packages = RUNTIME.packages();
        let title = packages.title.clone();
        let moved = |movement| report(Step::Runtime, &title, movement);
        install::install(&places.root, packages, &npm, lay_out, cancelled(), moved).await?;
    }
    // npm with its own Node: under an older one it would refuse, or choose other packages.
    let runtime = places.root.join(&*runtime::ENTRY);
    let (node, cli) = (runtime::node(&runtime), runtime::npm_cli(&runtime));
    let npm = Npm::of_runtime(node, cli, &places.node, env);
    let title = packages.title.clone();
    let moved = |movement| report(Step::Agent, &title, movement);
    install::install(&places.root, packages, &npm, |_| Ok(()), cancelled(), moved).await
}

fn describe(agent: &'static str, step: Step, title: &str, movement: Movement) -> InstallProgress {
    let seconds = |since: Duration| since.as_secs();
    match movement {
        Movement::Waiting { since } => InstallProgress {
            agent,
            step: Step::Waiting,
            message: format!(
                "waiting for another installation of {title} ({} s)",
                seconds(since)
            ),
            done: 0,
            total: 0,
            bytes: 0,
        },
        Movement::Installing {
            done,
            total,
            bytes,
            since,
        } => InstallProgress {
            agent,
            step,
            message: {
                let packages = match total {
                    // npm has still to find out.
                    0 => String::new(),
                    total => format!("{done} of {total} packages, "),
                };
                format!(
                    "installing {title}: {packages}{} MB written ({} s)",
                    bytes / 1_000_000,
                    seconds(since)
                )
            },
            done,
            total,
            bytes,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root(env: &[(&str, &str)]) -> Option<PathBuf> {
        default_root(|name| {
            let (_, value) = env.iter().find(|(own, _)| *own == name)?;
            Some(value.into())
        })
        .ok()
    }

    #[test]
    fn the_store_is_in_the_first_cache_directory_that_is_set() {
        let home = ("HOME", "/home/me");
        let xdg = ("XDG_CACHE_HOME", "/cache");
        let own = ("AGENTVM_CACHE_DIR", "/own");
        assert_eq!(root(&[home, xdg, own]), Some("/own/agents".into()));
        assert_eq!(root(&[home, xdg]), Some("/cache/agentvm/agents".into()));
        assert_eq!(root(&[home]), Some("/home/me/.cache/agentvm/agents".into()));
        let relative = ("XDG_CACHE_HOME", "cache");
        assert_eq!(
            root(&[home, relative]),
            Some("/home/me/.cache/agentvm/agents".into())
        );
        assert_eq!(root(&[]), None);
    }
}
