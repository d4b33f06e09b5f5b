//! `kiln trust floor`: the lowest release that machines may ever run again goes up. It never goes down, and is signed
//! offline, in `site.json`. Whether machines need a lower release is for the caller to ask: of the running server.

use crate::repository::{Repository, newest_state};
use crate::signing::{Changed, change_site};
use crate::site::SiteDir;
use crate::site_error::SiteError;
use jiff::Timestamp;
use kiln_release::is_image_name;
use std::path::Path;

/// Raises the floor of an image.
pub fn raise_floor(dir: &Path, image: &str, floor: u64, now: Timestamp) -> Result<Changed, SiteError> {
    if !is_image_name(image) {
        return Err(SiteError::BadImageName { got: image.to_owned() });
    }
    let site = SiteDir::open(dir)?;
    let published = Repository::of(&site, &newest_state(&site, now)?)?;
    if !published.releases.iter().any(|known| known.image == image && known.release >= floor) {
        return Err(SiteError::FloorAboveAll { image: image.to_owned(), floor });
    }
    change_site(dir, now, format!("floor of {image} to {floor}"), |document| {
        let known = document.floor(image);
        if known > floor {
            return Err(SiteError::FloorGoesDown { image: image.to_owned(), floor: known });
        }
        if known == floor {
            return Ok(false);
        }
        document.floors.insert(image.to_owned(), floor);
        Ok(true)
    })
}
