//! `OpenCode`: its own ACP server, `opencode acp`, behind an adapter of ours that adds what it leaves out.
//!
//! The package of the program itself is pinned, not `opencode-ai`, which brings one program for each kind
//! of processor and chooses between them when it is installed.

use std::sync::LazyLock;

use super::catalog::Definition;
use super::launch::{Launch, SessionSpec};
use super::pinned::Pinned;

#[cfg_attr(
    not(any(test, target_arch = "x86_64")),
    expect(dead_code, reason = "the other processor")
)]
pub(super) const X64: Pinned = Pinned {
    name: "opencode",
    version: "1.18.33",
    package: "opencode-linux-x64",
    manifest: include_str!("locks/opencode-x64/package.json"),
    lock: include_str!("locks/opencode-x64/package-lock.json"),
    files: &[
        "node_modules/opencode-linux-x64/bin/opencode",
        "node_modules/@vscode/ripgrep-linux-x64/bin/rg",
    ],
};

/// For processors without AVX2.
#[cfg_attr(
    not(any(test, target_arch = "x86_64")),
    expect(dead_code, reason = "the other processor")
)]
pub(super) const X64_BASELINE: Pinned = Pinned {
    package: "opencode-linux-x64-baseline",
    manifest: include_str!("locks/opencode-x64-baseline/package.json"),
    lock: include_str!("locks/opencode-x64-baseline/package-lock.json"),
    files: &[
        "node_modules/opencode-linux-x64-baseline/bin/opencode",
        "node_modules/@vscode/ripgrep-linux-x64/bin/rg",
    ],
    ..X64
};

/// Of an older version: the latest for this processor that could be had when it was pinned.
#[cfg_attr(
    not(any(test, target_arch = "aarch64")),
    expect(dead_code, reason = "the other processor")
)]
pub(super) const ARM64: Pinned = Pinned {
    name: "opencode",
    version: "1.18.18",
    package: "opencode-linux-arm64",
    manifest: include_str!("locks/opencode-arm64/package.json"),
    lock: include_str!("locks/opencode-arm64/package-lock.json"),
    files: &[
        "node_modules/opencode-linux-arm64/bin/opencode",
        "node_modules/@vscode/ripgrep-linux-arm64/bin/rg",
    ],
};

#[cfg(target_arch = "x86_64")]
fn packages() -> Pinned {
    if std::arch::is_x86_feature_detected!("avx2") {
        X64
    } else {
        X64_BASELINE
    }
}

#[cfg(target_arch = "aarch64")]
const fn packages() -> Pinned {
    ARM64
}

pub(super) static OPENCODE: LazyLock<Definition> = LazyLock::new(|| Definition {
    name: "opencode",
    packages: packages(),
    entry: LazyLock::new(|| packages().entry()),
    adapter: "opencode",
    // The adapter sets it up: what it has to look at is in the VM.
    env: &[],
    finds_transports: true,
    configure,
});

/// The adapter starts the program, which has to know both, before it is told anything by ACP.
fn configure(session: &SessionSpec<'_>, launch: &mut Launch) {
    // As in adapters/opencode/src/configuration.ts.
    launch.instructions = Some("instructions.md");
    launch.default_variable(
        session,
        "AGENTVM_ASKS",
        if session.asks { "1" } else { "0" },
    );
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]
mod tests {
    use super::*;
    use crate::agents::BuiltIn;
    use crate::agents::launch::launch;
    use crate::agents::store::{CompileCache, InStore, Installed};
    use crate::ids::SessionId;
    use crate::vm::GuestPath;

    fn plan(asks: bool) -> Launch {
        let installed = Installed::BuiltIn(InStore {
            agent: BuiltIn::OpenCode,
            runtime: "node-1".to_owned(),
            entry: "opencode-1".to_owned(),
            program: "adapter-1/main.js".into(),
            compile_cache: CompileCache {
                name: "compiled-1".to_owned(),
                is_there: false,
            },
            leases: Vec::new(),
            is_new: false,
        });
        let session = SessionSpec {
            id: SessionId::parse("0190f5fe-7c00-7000-8000-000000000001").unwrap(),
            cwd: &GuestPath::home(),
            env: &[],
            asks,
        };
        launch(&installed, &session)
    }

    fn asks(launch: &Launch) -> &str {
        let mut variables = launch.env.iter();
        let (_, value) = variables.find(|(name, _)| name == "AGENTVM_ASKS").unwrap();
        value
    }

    #[test]
    fn the_adapter_is_told_whether_it_has_to_ask_and_gets_the_instructions_as_a_file() {
        assert_eq!(asks(&plan(true)), "1");
        let launch = plan(false);
        assert_eq!(asks(&launch), "0");
        assert_eq!(launch.instructions, Some("instructions.md"));
    }

    #[test]
    fn the_program_for_another_processor_is_another_entry() {
        let [one, other] = [X64, X64_BASELINE].map(|pinned| pinned.entry());
        assert_ne!(one, other);
    }
}
