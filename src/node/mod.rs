//! The boundary to JavaScript: the only place with `napi` types.
//!
//! These classes are what `lib/` stands on, not the public API: options and results cross as JSON
//! text, which V8 parses faster than it builds objects through Node-API, and errors as JSON in the
//! reason (see [`error::rejection`]). `lib/` turns both into what `index.d.ts` describes.

mod agents;
mod argument;
mod client;
mod connection;
mod doctor;
mod error;
mod events;
mod file_options;
mod file_record;
mod files;
mod image_store;
mod images;
mod limits;
mod network;
mod options;
mod processes;
mod record;
mod secrets;
mod sessions;
mod shells;
mod transfers;
mod vm;
