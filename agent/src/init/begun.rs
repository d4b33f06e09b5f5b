//! What a boot begins with: the machine's key, and what it remembers. Where either cannot be had, because a TPM or a firmware
//! fails, a stranger without a memory begins instead: to say so to a server, and for nothing else.

use crate::error::{AgentError, Result};
use crate::memory::{Identity, Memory, Place};
use std::path::Path;

/// A key, a memory, and whether they are this machine's.
pub struct Begun {
    pub place: Place,
    pub identity: Identity,
    pub memory: Memory,
    /// The memory cannot be parsed, and an empty one stands in its place: nothing may be started before a person says so.
    pub spoilt: Option<AgentError>,
    /// Why none of it is this machine's: nothing may be started in this boot, nor asked for.
    pub fault: Option<AgentError>,
}

impl Begun {
    /// Of the machine whose key and memory are in this place; `meanwhile` is a folder that goes with the power.
    pub fn of(place: Place, meanwhile: &Path) -> Result<Self> {
        let memory = match place.memory() {
            Ok(memory) => Ok((memory, None)),
            Err(error @ AgentError::Format { .. }) => Ok((Memory::default(), Some(error))),
            Err(error) => Err(error),
        };
        match memory.and_then(|memory| Ok((place.key()?, memory))) {
            Ok((identity, (memory, spoilt))) => Ok(Self { place, identity, memory, spoilt, fault: None }),
            Err(fault) => {
                // No part of what failed, and perhaps the only way to a server that hears of it. Read alone.
                let network = place.network();
                let place = Place::Boot(meanwhile.to_owned());
                let (identity, memory) = (place.key()?, Memory::default());
                place.remember_network(&network)?;
                Ok(Self { place, identity, memory, spoilt: None, fault: Some(fault) })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::trial::{Known, Refused};
    use kiln_protocol::{KeyStorage, RollbackMemory};
    use kiln_release::Signer;
    use std::fs;

    /// Two folders: a machine's, and one that goes with the power.
    fn begin(dir: &Path) -> Begun {
        Begun::of(Place::Directory(dir.join("state")), &dir.join("meanwhile")).unwrap()
    }

    fn public(key: &Signer) -> String {
        key.public().id()
    }

    #[test]
    fn a_key_or_memory_that_cannot_be_had_makes_a_stranger_who_remembers_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let good = begin(dir.path());
        let own = public(&good.identity.key);
        let memory = Memory { sequence: 7, floors: [("minimal".to_owned(), 2)].into(), ..Memory::default() };
        good.place.remember(&memory).unwrap();
        let network = Known { refused: Some(Refused { version: 3, reason: "lost".into() }), ..Known::default() };
        good.place.remember_network(&network).unwrap();
        let again = begin(dir.path());
        assert!(again.fault.is_none() && again.spoilt.is_none());
        assert_eq!((public(&again.identity.key), &again.memory), (own.clone(), &memory));

        for name in ["seen", "key"] {
            let [file, aside] = [name, "aside"].map(|name| dir.path().join("state").join(name));
            fs::rename(&file, &aside).unwrap();
            // It is there, and a read of it fails.
            fs::create_dir(&file).unwrap();
            let stranger = begin(dir.path());
            let fault = stranger.fault.as_ref().expect("it cannot be had");
            assert_eq!(fault.kind(), "machine-file", "{fault}");
            assert!(fault.to_string().contains(&file.display().to_string()), "{fault}");
            assert_ne!(public(&stranger.identity.key), own);
            assert_eq!(stranger.memory, Memory::default());
            assert_eq!(stranger.place.network(), network, "by which a server is found");
            let kept = (stranger.place.key_storage(), stranger.place.rollback_memory());
            assert_eq!(kept, (KeyStorage::Ephemeral, RollbackMemory::None));
            stranger.place.remember(&Memory { sequence: 9, ..Memory::default() }).unwrap();
            fs::remove_dir(&file).unwrap();
            fs::rename(&aside, &file).unwrap();
            let after = begin(dir.path());
            assert!(after.fault.is_none());
            assert_eq!((public(&after.identity.key), &after.memory), (own.clone(), &memory), "nothing was lost");
        }
    }

    #[test]
    fn a_memory_that_is_spoilt_is_the_machines_own_still() {
        let dir = tempfile::tempdir().unwrap();
        let own = public(&begin(dir.path()).identity.key);
        fs::write(dir.path().join("state/seen"), "{").unwrap();
        let begun = begin(dir.path());
        assert_eq!(begun.spoilt.as_ref().map(AgentError::kind), Some("machine-format"));
        assert!(begun.fault.is_none());
        assert_eq!((public(&begun.identity.key), begun.memory), (own, Memory::default()));
        assert!(!dir.path().join("meanwhile").exists());
    }
}
