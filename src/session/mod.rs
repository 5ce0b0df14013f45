//! What a session is, and the VM it lives in as a durable thing.
//!
//! A [`Client`] opens a data directory. Its VMs are [`VmHandle`]s: `exec`, files, sessions. Behind all
//! handles of one key in this process stands one machine (`machine.rs`), which boots the VM when
//! something needs it. A session is *live* while an agent process runs for it (`live.rs`); closed or
//! not, its events are in the VM's store. A [`Subscription`] is a cursor over what is committed there:
//! nobody sees an event that a crash could take back.

mod awake;
mod calls;
mod client;
mod compile_cache;
mod configuration;
mod connection;
mod control;
mod doctor;
mod emission;
mod environment;
mod event;
mod files;
mod host_file;
mod image;
mod images;
mod instructions;
mod kept;
mod life;
mod limits;
mod live;
mod machine;
mod mcp;
mod network;
mod options;
mod orphans;
mod outlet;
mod permission;
mod process;
mod processes;
mod resume;
mod secrets;
mod sessions;
mod shells;
mod start;
mod state;
mod stream;
mod tail;
mod transcript;
mod transport;
mod turn;
mod updates;
mod upload;

pub use client::{Client, ClientOptions, Settings, VmHandle, VmSettings, text_prompt};
pub use connection::VmConnection;
pub use control::{Change, SessionView};
pub use emission::{Item, Notice, SessionState, ShutdownReason, Subscription};
pub use files::{Download, FileRecords, ReadRange, WriteOptions};
pub use image::RootChoice;
pub use images::{ImageRemoval, KnownImage, VmOfImage};
pub use kept::Resume;
pub use life::Started;
pub use limits::{Running, Stats};
pub(crate) use mcp::check as check_mcp_servers;
pub use mcp::{McpServer, Transport};
pub use network::NetworkRules;
pub use options::{PermissionPolicy, SessionOptions};
pub(crate) use options::{RawSessionOptions, check_environment};
pub use outlet::{End, Interest, Output, OutputSubscription, Source, Stream};
pub use permission::PermissionRequest;
pub use processes::SpawnOptions;
pub use sessions::CreatedSession;
pub use shells::{ShellId, ShellOptions};
pub use stream::EventStream;
pub use turn::TurnResult;
pub use upload::Upload;
