//! Sessions as a caller of the crate sees them, with agents that behave badly in every way.

mod abort;
mod clients;
mod control;
mod database;
mod delivery;
mod faults;
mod files;
mod fixture;
mod flood;
mod full;
mod host;
mod hostile;
mod kill;
mod limits;
mod output;
mod own;
mod parallel;
mod permissions;
mod processes;
mod random;
mod restore;
mod sleep;
mod start;
mod stream;
mod turns;
