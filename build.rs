//! Builds the guest (a static PID 1) with the same cargo and embeds it, so that an addon and its
//! guest can never differ in version.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    napi_build::setup();
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    let target = env::var("TARGET").expect("cargo sets it");
    println!("cargo::rerun-if-changed=guest");
    println!("cargo::rerun-if-changed=Cargo.toml");

    // A guest that can be weakened never lies where another build would look for its own.
    let weaken = env::var_os("CARGO_FEATURE_WEAKEN").is_some();
    let directory = guest_target_dir(&out, if weaken { "guest-weak" } else { "guest-build" });
    let features: &[&str] = if weaken {
        &["--features", "weaken"]
    } else {
        &[]
    };
    let guest = build_guest(&root, &directory, &target, features);
    println!("cargo::rustc-env=AGENTVM_GUEST={}", guest.display());
}

/// A target directory of its own: the outer cargo holds the lock of its own one.
fn guest_target_dir(out: &Path, name: &str) -> PathBuf {
    // OUT_DIR is <target>/<profile>/build/agentvm-<hash>/out: share one guest build between profiles.
    out.ancestors()
        .nth(4)
        .map_or_else(|| out.to_owned(), Path::to_owned)
        .join(name)
}

fn build_guest(root: &Path, target_dir: &Path, target: &str, features: &[&str]) -> PathBuf {
    let mut cargo = Command::new(env::var_os("CARGO").expect("cargo sets it"));
    cargo
        .current_dir(root)
        .args([
            "build",
            "--package",
            "agentvm-guest",
            "--profile",
            "guest",
            "--locked",
        ])
        .args(["--target", target])
        .args(features)
        .arg("--target-dir")
        .arg(target_dir)
        // Static, at a fixed address: nothing of any base image is needed to run PID 1.
        .env(
            "CARGO_ENCODED_RUSTFLAGS",
            "-Ctarget-feature=+crt-static\u{1f}-Crelocation-model=static",
        );
    // Variables of the outer build that would leak into the inner one (clippy's driver, coverage).
    for name in [
        "RUSTC_WRAPPER",
        "RUSTC_WORKSPACE_WRAPPER",
        "RUSTFLAGS",
        "RUSTC",
        "CARGO_BUILD_TARGET",
    ] {
        cargo.env_remove(name);
    }
    let status = cargo.status().expect("cargo can be started");
    assert!(status.success(), "building the guest failed: {status}");
    target_dir.join(target).join("guest/agentvm-guest")
}
