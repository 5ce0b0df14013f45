//! Sessions: lifecycle, turns, events. It alone puts VM, store, ACP and agents together.
