//! One `SQLite` file per VM: its sessions and their events. The only place with SQL.
