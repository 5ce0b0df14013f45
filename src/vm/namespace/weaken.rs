//! Which layers of the isolation a test does without. No release build has this.

#[cfg(not(debug_assertions))]
compile_error!("the feature `weaken` is for tests: it takes away what isolates a VM");

use std::ffi::c_int;

/// Namespaces that a VM boots without. Nothing of the host's own is set up by it then: that takes rights
/// over its namespaces.
const NAMESPACES: [(&str, c_int); 3] = [
    ("net namespace", libc::CLONE_NEWNET),
    ("ipc namespace", libc::CLONE_NEWIPC),
    ("see its own cgroup as the root", libc::CLONE_NEWCGROUP),
];

/// Of these, those that a VM is to have.
pub(super) fn namespaces(all: c_int) -> c_int {
    let without = without();
    NAMESPACES
        .iter()
        .filter(|(name, _)| without.iter().any(|layer| layer == name))
        .fold(all, |left, (_, flag)| left & !flag)
}

/// Steps of a boot, by their names, and what [`super::starter`] does before it.
pub(super) fn without() -> Vec<String> {
    let names = std::env::var("AGENTVM_WEAKEN").unwrap_or_default();
    names.split(',').map(str::to_owned).collect()
}
