//! Options of the calls about files, as `lib/` hands them over.

use serde::de::Error as _;
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use super::argument::{MAX_SAFE, Whole};
use super::options::RawUser;
use crate::session::ReadRange;
use crate::vm::files::Time;

/// Permissions, with the set-ID and sticky bits.
#[derive(Debug, Clone, Copy)]
pub(super) struct Mode(pub(super) u32);

impl<'de> Deserialize<'de> for Mode {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        let mode = value.as_u64().and_then(|mode| u32::try_from(mode).ok());
        // As they are written: 4095 would tell nobody what is meant.
        let refused = || format!("must be a whole number between 0 and 0o7777, not {value}");
        mode.filter(|mode| *mode <= 0o7777)
            .map(Self)
            .ok_or_else(|| D::Error::custom(refused()))
    }
}

/// Of a user or group; the last number means none.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(transparent)]
pub(super) struct Id(Whole<0, { u32::MAX as u64 - 1 }>);

impl From<Id> for u32 {
    fn from(id: Id) -> Self {
        // In its range, as parsed.
        Self::try_from(id.0.0).unwrap_or(Self::MAX)
    }
}

/// Since the epoch, with fractions.
#[derive(Debug, Clone, Copy)]
pub(super) struct Milliseconds(pub(super) Time);

impl<'de> Deserialize<'de> for Milliseconds {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        /// Of JavaScript's `Date`.
        const MOST: f64 = 8.64e15;
        let value = Value::deserialize(deserializer)?;
        let given = value.as_f64().filter(|ms| ms.abs() <= MOST);
        let milliseconds = given.ok_or_else(|| {
            let problem = format!("must be milliseconds since the epoch, not {value}");
            D::Error::custom(problem)
        })?;
        let seconds = (milliseconds / 1000.0).floor();
        let nanoseconds = (milliseconds - seconds * 1000.0) * 1_000_000.0;
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "in the range of dates, and below a second"
        )]
        Ok(Self(Time {
            seconds: seconds as i64,
            nanoseconds: (nanoseconds as u32).min(999_999_999),
        }))
    }
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(super) struct RawUserOnly {
    pub(super) user: RawUser,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(super) struct RawRead {
    pub(super) user: RawUser,
    offset: Option<Whole<0, MAX_SAFE>>,
    length: Option<Whole<0, MAX_SAFE>>,
}

impl RawRead {
    pub(super) fn range(&self) -> ReadRange {
        ReadRange {
            offset: self.offset.map_or(0, |offset| offset.0),
            length: self.length.map(|length| length.0),
        }
    }
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(super) struct RawWrite {
    pub(super) user: RawUser,
    pub(super) mode: Option<Mode>,
    pub(super) append: bool,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(super) struct RawUpload {
    pub(super) user: RawUser,
    pub(super) mode: Option<Mode>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(super) struct RawMkdir {
    pub(super) user: RawUser,
    pub(super) mode: Option<Mode>,
    pub(super) recursive: bool,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(super) struct RawList {
    pub(super) user: RawUser,
    pub(super) recursive: bool,
    pub(super) skip_unreadable: bool,
    /// By `walk`.
    pub(super) at_leisure: bool,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(super) struct RawWatch {
    pub(super) user: RawUser,
    pub(super) recursive: bool,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(super) struct RawStat {
    pub(super) user: RawUser,
    pub(super) follow_symlinks: bool,
}

impl Default for RawStat {
    fn default() -> Self {
        Self {
            user: RawUser::default(),
            follow_symlinks: true,
        }
    }
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(super) struct RawDelete {
    pub(super) user: RawUser,
    pub(super) recursive: bool,
    pub(super) force: bool,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(super) struct RawMove {
    pub(super) user: RawUser,
    pub(super) overwrite: bool,
}

impl Default for RawMove {
    fn default() -> Self {
        Self {
            user: RawUser::default(),
            overwrite: true,
        }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(super) struct RawOwner {
    pub(super) user: RawUser,
    pub(super) uid: Option<Id>,
    pub(super) gid: Option<Id>,
    pub(super) follow_symlinks: bool,
}

impl Default for RawOwner {
    fn default() -> Self {
        Self {
            user: RawUser::default(),
            uid: None,
            gid: None,
            follow_symlinks: true,
        }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(super) struct RawCopy {
    pub(super) user: RawUser,
    pub(super) recursive: bool,
    pub(super) overwrite: bool,
}

impl Default for RawCopy {
    fn default() -> Self {
        Self {
            user: RawUser::default(),
            recursive: false,
            overwrite: true,
        }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(super) struct RawTimes {
    pub(super) user: RawUser,
    pub(super) atime_ms: Option<Milliseconds>,
    pub(super) mtime_ms: Option<Milliseconds>,
    pub(super) follow_symlinks: bool,
}

impl Default for RawTimes {
    fn default() -> Self {
        Self {
            user: RawUser::default(),
            atime_ms: None,
            mtime_ms: None,
            follow_symlinks: true,
        }
    }
}
