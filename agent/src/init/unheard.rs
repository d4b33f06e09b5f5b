//! Boots that no server could hear of: they had to close the TPM before they asked for one, and it answered, and refused. They are
//! counted beside it, and said by the next boot that has somebody to say it to.

use crate::error::AgentError;
use crate::memory::Place;
use crate::tpm::TpmFault;
use std::io;

/// One more. `place` is one beside the TPM.
pub(super) fn count(place: &Place) {
    let boots = place.unheard().saturating_add(1);
    match place.keep_unheard(boots) {
        Ok(()) => println!("kiln-agent: {boots} boots ended so, unheard: the next one that is heard says it"),
        Err(error) => println!("kiln-agent: this boot is unheard, and not counted: {error}"),
    }
}

/// What is to be said of those before this one.
pub(super) fn told(place: &Place) -> Option<AgentError> {
    let boots = place.unheard();
    let words =
        || format!("it answered, and refused the cap without which no server is asked: {boots} boots ended unheard");
    (boots > 0).then(|| TpmFault::from(io::Error::other(words())).into())
}

/// It is on its way with what is handed over.
pub(super) fn forget(place: &Place) {
    if let Err(error) = place.keep_unheard(0) {
        println!("kiln-agent: boots that ended unheard will be told again: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn boots_that_ended_unheard_are_said_by_the_next_until_it_hands_over() {
        let dir = tempfile::tempdir().unwrap();
        let place = Place::Directory(dir.path().to_owned());
        assert!(told(&place).is_none());
        forget(&place);
        assert!(std::fs::read_dir(dir.path()).unwrap().next().is_none(), "nothing is written for nothing");
        for boots in 1..=2 {
            count(&place);
            // One that is heard, and ends before its hand-over, says it as well.
            let error = told(&place).unwrap();
            assert_eq!(error.kind(), "machine-tpm");
            assert!(error.to_string().ends_with(&format!("{boots} boots ended unheard")), "{error}");
        }
        forget(&place);
        assert!(told(&place).is_none());
        place.keep_unheard(u8::MAX).unwrap();
        let written = || std::fs::metadata(dir.path().join("unheard")).unwrap().modified().unwrap();
        let before = written();
        count(&place);
        assert_eq!((place.unheard(), written()), (u8::MAX, before), "variables wear: it ends there");
        // A machine that cannot count them ends all the same.
        count(&Place::Directory("/proc/none".into()));
    }
}
