//! A program on a terminal of its own.

use serde::{Deserialize, Serialize};

use super::{Account, Bytes};

#[derive(Debug, Serialize, Deserialize)]
pub struct TerminalSpec {
    pub argv: Vec<Bytes>,
    /// `NAME=value`
    pub env: Vec<Bytes>,
    pub cwd: Bytes,
    pub user: Account,
    pub rows: u16,
    pub cols: u16,
}
