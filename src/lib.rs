//! `agentvm` runs coding agents in isolated Linux VMs inside the process that asks for them.
//!
//! # Terms
//!
//! - A **VM** is a directory with a key: files, sessions, settings. It is *running* while a guest
//!   process (its PID 1) holds namespaces for it, and *asleep* otherwise.
//! - The **guest** is that PID 1: a static program that starts processes and opens files inside.
//! - An **agent** is a program that speaks ACP (the Agent Client Protocol: JSON-RPC, one message a
//!   line) on its stdio, inside the VM.
//! - A **session** is a durable conversation with an agent. A **turn** is one prompt and everything
//!   that happens until its answer. What happens is a list of numbered **events**.
//!
//! `ARCHITECTURE.md` has the map and the invariants.

pub mod acp;
pub mod agents;
mod apart;
pub mod closing;
pub mod error;
pub mod host_path;
pub mod ids;
pub mod images;
pub mod net;
mod node;
pub mod pipe;
pub mod session;
pub mod store;
pub mod vm;
