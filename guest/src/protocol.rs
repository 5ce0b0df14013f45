//! Message types and their encoding.
