//! The agent store as the rest of the program sees it.

use std::convert::Infallible;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{oneshot, watch};

use super::adapter;
use super::catalog::{Agent, BuiltIn, Definition, Program};
use super::error::AgentError;
use super::install::{self, Movement, blocking, is_installed, store};
use super::npm::Npm;
use super::own::OwnAgent;
use super::pinned::Pinned;
use super::progress::{InstallProgress, Step};
use super::runtime::{self, RUNTIME};

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
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Installed {
    BuiltIn(InStore),
    /// Whether its program is there is for the VM to say.
    Own(Arc<OwnAgent>),
}

/// A built-in agent that is ready to be launched in every VM that has the store mounted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InStore {
    pub agent: BuiltIn,
    /// Directories relative to the store.
    pub(super) runtime: String,
    pub(super) entry: String,
    /// What speaks ACP: relative to `entry`.
    pub(super) program: PathBuf,
}

/// Something in the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its directory's name: `<name>-<version>-<hash>`.
    pub name: String,
    /// Size of its files when it was installed.
    pub bytes: u64,
    /// What this version of agentvm uses; others belong to other versions.
    pub current: bool,
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
        let agent = match agent {
            Agent::BuiltIn(agent) => *agent,
            Agent::Own(agent) => return Ok(Installed::Own(Arc::clone(agent))),
        };
        let definition = agent.definition();
        let installed = |entry: &str| is_installed(self.root(), entry);
        if !(installed(&runtime::ENTRY) && installed(&definition.entry)) {
            if !auto_install {
                return Err(AgentError::NotInstalled {
                    agent: definition.name,
                    store: self.root().to_owned(),
                });
            }
            self.install(definition, progress).await?;
        }
        install::make_root(self.root())?;
        let entry = definition.entry.clone();
        let program = match definition.program {
            Program::Adapter(directory) => {
                let dist = self.places.package.join("adapters").join(directory);
                let dist = dist.join("dist");
                let adapter = adapter::ensure(self.root(), &entry, definition.name, dist).await?;
                Path::new(&adapter).join(adapter::MAIN)
            }
            Program::Script(path) | Program::Executable { path, .. } => path.into(),
        };
        Ok(Installed::BuiltIn(InStore {
            agent,
            runtime: runtime::ENTRY.clone(),
            entry,
            program,
        }))
    }

    /// What is installed, by name; of all versions.
    pub async fn list(&self) -> Result<Vec<Entry>, AgentError> {
        let root = self.root().to_owned();
        blocking(move || {
            let current = BuiltIn::ALL.map(|agent| agent.definition().entry.as_str());
            let failed = |error| store("can't read", &root, error);
            let found = match fs::read_dir(&root) {
                Ok(found) => found,
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
                Err(error) => return Err(failed(error)),
            };
            let mut entries = Vec::new();
            for found in found {
                let found = found.map_err(failed)?;
                let name = found.file_name().to_string_lossy().into_owned();
                if !name.starts_with('.')
                    && let Some(marker) = install::marker(&found.path())
                {
                    entries.push(Entry {
                        current: current.contains(&name.as_str()) || name == *runtime::ENTRY,
                        bytes: marker.bytes,
                        name,
                    });
                }
            }
            entries.sort_by(|a, b| a.name.cmp(&b.name));
            Ok(entries)
        })
        .await
    }

    /// The work is a task of its own: if the caller's future is dropped, the task still kills npm,
    /// waits for its end and clears up.
    async fn install(
        &self,
        definition: &'static Definition,
        progress: &(dyn Fn(InstallProgress) + Send + Sync),
    ) -> Result<(), AgentError> {
        // Dropped with this future.
        let (_caller, gone) = oneshot::channel::<Infallible>();
        // A slow listener sees the latest state, not every one.
        let (moved, mut moving) = watch::channel(None);
        let places = Arc::clone(&self.places);
        let task = tokio::spawn(install_missing(places, definition, moved, gone));
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
    definition: &'static Definition,
    moved: watch::Sender<Option<InstallProgress>>,
    mut caller: oneshot::Receiver<Infallible>,
) -> Result<(), AgentError> {
    let report = |step, pinned: &Pinned, movement| {
        moved.send_replace(Some(describe(definition.name, step, pinned, movement)));
    };
    let env = |name: &str| std::env::var_os(name);
    let mut cancelled = async || drop((&mut caller).await);
    if !is_installed(&places.root, &runtime::ENTRY) {
        let npm = Npm::of_host(&places.node, env).map_err(|tried| AgentError::NoNpm {
            title: definition.packages.title(),
            tried,
        })?;
        let lay_out = |entry: &Path| {
            runtime::lay_out(entry).map_err(|error| store("can't set up", entry, error))?;
            runtime::try_out(entry)
        };
        let moved = |movement| report(Step::Runtime, &RUNTIME, movement);
        install::install(&places.root, RUNTIME, &npm, lay_out, cancelled(), moved).await?;
    }
    // npm with its own Node: under an older one it would refuse, or choose other packages.
    let runtime = places.root.join(&*runtime::ENTRY);
    let (node, cli) = (runtime::node(&runtime), runtime::npm_cli(&runtime));
    let npm = Npm::of_runtime(node, cli, &places.node, env);
    let packages = definition.packages;
    let moved = |movement| report(Step::Agent, &packages, movement);
    install::install(&places.root, packages, &npm, |_| Ok(()), cancelled(), moved).await
}

fn describe(
    agent: &'static str,
    step: Step,
    pinned: &Pinned,
    movement: Movement,
) -> InstallProgress {
    let title = pinned.title();
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
            message: format!(
                "installing {title}: {done} of {total} packages, {} MB written ({} s)",
                bytes / 1_000_000,
                seconds(since)
            ),
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
