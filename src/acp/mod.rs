//! ACP over a pair of pipes: JSON-RPC lines in and out, with the exact JSON kept.
