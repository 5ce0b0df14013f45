-- A database as schema version 2 made it. Never changes: it is what users have on their disks.
PRAGMA auto_vacuum = INCREMENTAL;
PRAGMA journal_mode = WAL;
PRAGMA application_id = 0x61766d31;
CREATE TABLE sessions (
    number INTEGER PRIMARY KEY CHECK (number BETWEEN 1 AND 0x7FFFFF),
    id TEXT NOT NULL UNIQUE,
    agent_type TEXT NOT NULL,
    agent_session_id TEXT,
    title TEXT,
    cwd TEXT NOT NULL,
    status TEXT NOT NULL,
    capabilities TEXT NOT NULL,
    agent_info TEXT NOT NULL,
    settings TEXT NOT NULL,
    created_at INTEGER NOT NULL,
    updated_at INTEGER NOT NULL,
    deleting INTEGER NOT NULL DEFAULT 0,
    config TEXT NOT NULL DEFAULT '{}'
) STRICT;
CREATE TABLE events (
    id INTEGER PRIMARY KEY,
    created_at INTEGER NOT NULL,
    method TEXT NOT NULL,
    json TEXT NOT NULL
) STRICT;
CREATE INDEX events_of_rare_methods ON events (method) WHERE method <> 'session/update';
CREATE VIEW session_events AS
    SELECT sessions.id AS session, events.id & 0xFFFFFFFFFF AS seq, events.created_at,
           events.method, events.json
    FROM sessions JOIN events
      ON events.id BETWEEN sessions.number << 40 AND sessions.number << 40 | 0xFFFFFFFFFF
    WHERE NOT sessions.deleting;
INSERT INTO sessions VALUES (1, '019aaaaa-0000-7000-8000-000000000001', 'pi', 'private',
    'From an old version', '/home/user', 'closed', '{"loadSession":true}', 'null',
    '{"permissionPolicy":"ask"}', 1764000000000, 1764000000000, 0, '{}');
INSERT INTO sessions VALUES (2, '019aaaaa-0000-7000-8000-000000000002', 'claude', NULL, NULL,
    '/work', 'open', 'null', '{"name":"claude"}', '{}', 1764000000010, 1764000000020, 0, '{"modes":null}');
INSERT INTO sessions VALUES (3, '019aaaaa-0000-7000-8000-000000000003', 'pi', 'gone', NULL,
    '/home/user', 'closed', '{}', 'null', '{}', 1764000000030, 1764000000030, 1, '{}');
INSERT INTO events VALUES ((1 << 40) + 1, 1764000000001, 'session/update', '1');
INSERT INTO events VALUES ((1 << 40) + 2, 1764000000002, '_agentvm/turn_end', '2');
INSERT INTO events VALUES ((2 << 40) + 1, 1764000000015, '_agentvm/turn_start', '{ "kept":"as it is" }');
INSERT INTO events VALUES ((3 << 40) + 1, 1764000000031, 'session/update', '"deleted"');
INSERT INTO events VALUES ((3 << 40) + 2, 1764000000032, '_agentvm/turn_end', '"deleted"');
PRAGMA user_version = 2;
