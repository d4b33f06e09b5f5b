//! `[disk]`: how the disk is used, in disk mode.

use super::{Source, bytes_of, is_root_path};
use crate::error::RecipeError;
use kiln_release::{DataSettings, DiskSettings, WipePolicy};
use serde::Deserialize;
use toml::Spanned;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawDisk {
    esp: Option<Spanned<String>>,
    slot: Option<Spanned<String>>,
    state: Option<Spanned<String>>,
    wipe: Option<Spanned<String>>,
    data: Option<Spanned<String>>,
    data_at: Option<Spanned<String>>,
    prefetch_rate: Option<Spanned<String>>,
}

impl RawDisk {
    pub(super) fn settings(self, source: &Source<'_>) -> Result<DiskSettings, RecipeError> {
        let size = |value: Option<Spanned<String>>, default: u64, least: u64| match value {
            None => Ok(default),
            Some(text) => bytes_of(text.get_ref()).filter(|bytes| *bytes >= least).ok_or_else(|| {
                let unit = if least >= 1 << 20 { (least >> 20, "M") } else { (least >> 10, "K") };
                source.invalid(text.span(), format!("a number with K, M or G, at least \"{}{}\"", unit.0, unit.1))
            }),
        };
        let default = DiskSettings::default();
        let wipe = match self.wipe {
            None => WipePolicy::Never,
            Some(word) => match word.get_ref().as_str() {
                "never" => WipePolicy::Never,
                "foreign" => WipePolicy::Foreign,
                _ => return Err(source.invalid(word.span(), "a wipe policy is: never, foreign")),
            },
        };
        let rate = self.prefetch_rate.map(|rate| size(Some(rate), 0, DiskSettings::LEAST_RATE)).transpose()?;
        let data = match (self.data, self.data_at) {
            (None, None) => None,
            (Some(bytes), Some(at)) => {
                let path = source.check(at, is_root_path, "an absolute path without . or ..")?;
                Some(DataSettings { size: size(Some(bytes), 0, DataSettings::LEAST)?, path })
            }
            (Some(one), None) | (None, Some(one)) => {
                return Err(
                    source.invalid(one.span(), "data (its size) and data_at (where it is mounted) come together")
                );
            }
        };
        Ok(DiskSettings {
            data,
            esp: size(self.esp, default.esp, DiskSettings::LEAST_ESP)?,
            slot: size(self.slot, default.slot, DiskSettings::LEAST_SLOT)?,
            state: size(self.state, default.state, DiskSettings::LEAST_STATE)?,
            wipe,
            prefetch_rate: rate,
        })
    }
}
