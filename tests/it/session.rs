//! Sessions as a caller of the crate sees them, with agents that behave badly in every way.

mod clients;
mod delivery;
mod fixture;
mod output;
mod own;
mod start;
mod turns;
